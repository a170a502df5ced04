"""models/convert.py as a command."""

import pytest
import timm
import torch
import transformers

from models.convert import main
from models.formats import FORMATS
from models.formats.read import read_weights
from models.formats.write import to_form, write_weights
from tests.conftest import has, names, run
from tests.models.formats.helpers import FILES, SMALL, assert_same, autoencoder, classifier


def convert(source, destination, form, *more, code=0):
    return run("python", "models/convert.py", source, destination, "--to", form, *more, code=code)


def test_official_sparse_to_ours_to_official(tmp_path):
    weights = autoencoder(**SMALL)
    write_weights(tmp_path / "sparse.pth", weights, "official-sparse")
    done = convert(tmp_path / "sparse.pth", tmp_path / "fcmae.pt", "ours")
    assert has(done.stdout, "official-sparse convnextv2_atto encoder decoder")
    assert "python finetune/main.py --init" in done.stdout
    found, form, _ = read_weights(tmp_path / "fcmae.pt")
    assert form == "ours"
    assert_same(found.encoder | found.decoder, weights.encoder | weights.decoder)
    done = convert(tmp_path / "fcmae.pt", tmp_path / "encoder.pth", "official")
    assert has(done.stdout, "omitted decoder")
    assert_same(read_weights(tmp_path / "encoder.pth")[0].encoder, weights.encoder)


@pytest.mark.parametrize("form", [form for form in FORMATS[1:] if form != "torchvision"])  # which has V1 only
def test_convert_to_every_format(form, pretrained, tmp_path):
    """The printed lines load the file."""
    done = convert(pretrained / "fcmae.pt", tmp_path / FILES[form], form)
    assert_same(read_weights(tmp_path / FILES[form])[0].encoder, read_weights(pretrained / "fcmae.pt")[0].encoder)
    calls = [line.strip() for line in done.stdout.split("load it with\n")[1].splitlines()[::2]]
    if form in ("timm", "transformers"):
        assert has(done.stdout, "added norm")
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
    assert has(convert(tmp_path / "last.pt", tmp_path / "raw.pth", "timm").stdout, "omitted averaged")
    assert "omitted" not in convert(tmp_path / "last.pt", tmp_path / "ema.pth", "timm", "--ema").stdout
    raw, ema = (read_weights(tmp_path / name)[0] for name in ("raw.pth", "ema.pth"))
    assert_same(raw.encoder | raw.head, weights.encoder | weights.head)
    assert_same(ema.encoder | ema.head, weights.ema)
    assert "averaged" in convert(tmp_path / "raw.pth", tmp_path / "x", "ours", "--ema", code=2).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.pt", "{tmp}/y.pt", "--to", "ours"], "nowhere.pt exist"),
        (["{tmp}/x.pt", "{tmp}/x.pt", "--to", "timm"], "x.pt exists"),
        (["{tmp}/x.pt", "{tmp}/no/y.pt", "--to", "timm"], "no folder"),
        (["{tmp}/x.pt", "{tmp}/y.pt", "--to", "tim"], "--to tim timm"),
        (["{tmp}/x.pt", "{tmp}/y.pt"], "required --to"),
        (["docs", "{tmp}/y.pt", "--to", "timm"], "docs no weights"),
    ],
)
def test_bad_input(words, message, tmp_path, refused):
    write_weights(tmp_path / "x.pt", classifier(**SMALL), "ours")
    assert has(refused(main, *(word.format(tmp=tmp_path) for word in words)), message)
    assert names(tmp_path) == {"x.pt"}
