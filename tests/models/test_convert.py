"""The converter as a command."""

import pytest
import timm
import torch
import transformers

from models.convert import main
from models.formats import FORMATS
from models.formats.read import read_weights
from models.formats.write import to_form, write_weights
from tests.conftest import names, run
from tests.models.formats.helpers import FILES, SMALL, assert_same, autoencoder, classifier


def convert(source, destination, form, *more, code=0):
    return run("python", "models/convert.py", source, destination, "--to", form, *more, code=code)


def test_official_sparse_to_ours_and_on(tmp_path):
    weights = autoencoder(**SMALL)
    write_weights(tmp_path / "sparse.pth", weights, "official-sparse")
    done = convert(tmp_path / "sparse.pth", tmp_path / "fcmae.pt", "ours")
    assert "is official-sparse: convnextv2_atto (" in done.stdout and "encoder, decoder" in done.stdout
    assert "python finetune/main.py --init" in done.stdout
    found, form, _ = read_weights(tmp_path / "fcmae.pt")
    assert form == "ours"
    assert_same(found.encoder | found.decoder, weights.encoder | weights.decoder)
    done = convert(tmp_path / "fcmae.pt", tmp_path / "encoder.pth", "official")
    assert "left out: the decoder" in done.stdout
    assert_same(read_weights(tmp_path / "encoder.pth")[0].encoder, weights.encoder)


@pytest.mark.parametrize("form", FORMATS[1:])
def test_a_trained_model_leaves_in_every_format(form, pretrained, tmp_path):
    """The lines that say how to load the file are true."""
    done = convert(pretrained / "fcmae.pt", tmp_path / FILES[form], form)
    assert_same(read_weights(tmp_path / FILES[form])[0].encoder, read_weights(pretrained / "fcmae.pt")[0].encoder)
    calls = [line.strip() for line in done.stdout.split("load it with\n")[1].splitlines()[::2]]
    if form in ("timm", "transformers"):
        assert "final norm" in done.stdout
        assert len(calls) == 2  # the model, the backbone
        for call in calls:
            eval(call, {"timm": timm, "transformers": transformers})
    elif form == "official":
        model = torch.nn.Module()
        model.load_state_dict = lambda tensors: assert_same(
            tensors, to_form(read_weights(pretrained / "fcmae.pt")[0], form)[0]
        )
        exec(*calls, {"torch": torch, "model": model})


def test_averaged_weights(tmp_path):
    weights = classifier(**SMALL)
    weights.ema = {name: tensor + 1 for name, tensor in (weights.encoder | weights.head).items()}
    write_weights(tmp_path / "last.pt", weights, "ours")
    assert "averaged weights" in convert(tmp_path / "last.pt", tmp_path / "raw.pth", "timm").stdout
    assert "left out" not in convert(tmp_path / "last.pt", tmp_path / "ema.pth", "timm", "--ema").stdout
    raw, ema = (read_weights(tmp_path / name)[0] for name in ("raw.pth", "ema.pth"))
    assert_same(raw.encoder | raw.head, weights.encoder | weights.head)
    assert_same(ema.encoder | ema.head, weights.ema)
    assert "no averaged weights" in convert(tmp_path / "raw.pth", tmp_path / "x", "ours", "--ema", code=2).stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere.pt", "{tmp}/y.pt", "--to", "ours"], "nowhere.pt does not exist"),
        (["{tmp}/x.pt", "{tmp}/x.pt", "--to", "timm"], "exists: choose another name"),
        (["{tmp}/x.pt", "{tmp}/no/y.pt", "--to", "timm"], "is not a folder"),
        (["{tmp}/x.pt", "{tmp}/y.pt", "--to", "tim"], "invalid choice: 'tim'"),
        (["{tmp}/x.pt", "{tmp}/y.pt"], "the following arguments are required: --to"),
        (["{tmp}", "{tmp}/y.pt", "--to", "timm"], "without config.json"),
    ],
)
def test_bad_input(words, says, tmp_path, refused):
    write_weights(tmp_path / "x.pt", classifier(**SMALL), "ours")
    assert says in refused(main, *(word.format(tmp=tmp_path) for word in words))
    assert names(tmp_path) == {"x.pt"}
