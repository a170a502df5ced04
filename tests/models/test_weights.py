"""Weight files: round trip and damaged files."""

import os
from dataclasses import replace

import pytest
import torch

from configs.errors import UserError
from configs.preprocessing import Preprocessing
from configs.schema import Encoder
from models.convnext import ConvNeXt
from models.opening import open_weights
from models.sizes import resolve
from models.weights import Weights, cpu_state, load_strict, save
from tests.conftest import has, names

ARCH = resolve(Encoder("convnextv2_atto", stem_stride=1, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)))


IMAGE = Preprocessing((8, 8), 3, (0.5,) * 3, (0.4,) * 3)


def write(path, **changes):
    content = {"arch": ARCH, "preprocessing": IMAGE, "encoder": cpu_state(ConvNeXt(ARCH))} | changes
    save(path, Weights(**content))
    return path


def test_round_trip(tmp_path):
    weights = open_weights(write(tmp_path / "x.pt", classes=["a", "b"])).weights
    assert weights.arch == ARCH
    assert weights.classes == ["a", "b"]
    model = ConvNeXt(ARCH)
    load_strict(model, weights.encoder, "x.pt")
    assert all(torch.equal(tensor, weights.encoder[name]) for name, tensor in model.state_dict().items())
    assert names(tmp_path) == {"x.pt"}


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.pt"):
        open_weights(tmp_path / "nothing.pt")


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated(tmp_path, keep):
    path = write(tmp_path / "x.pt")
    size = path.stat().st_size
    os.truncate(path, keep if keep >= 1 or keep == 0 else int(size * keep))
    with pytest.raises(UserError, match=r"x\.pt"):
        open_weights(path)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_is_refused_and_does_not_run(tmp_path):
    trap = tmp_path / "ran"
    torch.save({"format": "convnext-fcmae/1", "encoder": Payload(str(trap))}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="code"):
        open_weights(tmp_path / "x.pt")
    assert not trap.exists()


@pytest.mark.parametrize("content", [{"model": {}}, {"format": "convnext-fcmae/9"}, {}])
def test_other_format(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt"):
        open_weights(tmp_path / "x.pt")


def test_another_model_is_refused_and_changes_nothing(tmp_path):
    model = ConvNeXt(resolve(Encoder("convnextv2_atto", stem_stride=1, depths=(1, 1, 2, 1), dims=(8, 8, 8, 16))))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"x\.pt.* missing stages\.2\.blocks\.1"):
        load_strict(model, open_weights(write(tmp_path / "x.pt")).weights.encoder, "x.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_head_may_be_ignored(tmp_path):
    model = ConvNeXt(ARCH, classes=3)
    tensors = open_weights(write(tmp_path / "x.pt")).weights.encoder
    with pytest.raises(UserError, match="head"):
        load_strict(model, tensors, "x.pt")
    load_strict(model, tensors, "x.pt", ignore="head.")


def test_html_instead_of_a_weight_file(tmp_path):
    (tmp_path / "x.pt").write_text("<html>404</html>")
    with pytest.raises(UserError, match="web page"):
        open_weights(tmp_path / "x.pt")


def stored(path, **changes):
    """Write a file with other preprocessing, as in older or damaged files."""
    content = torch.load(write(path))
    content["image"] = {"size": [8, 8], "mean": [0.5] * 3, "std": [0.4] * 3} | changes
    torch.save(content, path)
    return path


def test_preprocessing_of_older_files_has_defaults(tmp_path):
    assert open_weights(stored(tmp_path / "x.pt")).weights.preprocessing == IMAGE
    unknown = open_weights(stored(tmp_path / "x.pt", mean=None, std=None)).weights.preprocessing
    assert unknown.mean is None and unknown.std is None


def test_preprocessing_round_trips(tmp_path):
    changed = replace(IMAGE, size=(8, 16), crop=0.9, interpolation="bilinear", bit_depth=16)
    assert open_weights(write(tmp_path / "x.pt", preprocessing=changed)).weights.preprocessing == changed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", [0.5]),
        ("mean", None),
        ("mean", "abc"),
        ("std", [0.4, 0.4, 0.0]),
        ("std", [0.4, 0.4, float("nan")]),
        ("size", [8]),
        ("size", [8, 0]),
        ("size", 8),
        ("eval_crop", 1.5),
        ("interpolation", "lanczos"),
        ("bit_depth", 0),
    ],
)
def test_damaged_preprocessing(key, value, tmp_path):
    with pytest.raises(UserError, match=r"x\.pt is a damaged weight file"):
        open_weights(stored(tmp_path / "x.pt", **{key: value}))


def test_preprocessing_without_statistics(tmp_path):
    content = torch.load(write(tmp_path / "x.pt"))
    torch.save(content | {"image": {"size": [8, 8]}}, tmp_path / "x.pt")
    with pytest.raises(UserError) as error:
        open_weights(tmp_path / "x.pt")
    assert has(error.value, "x.pt mean")


def test_an_exported_program_is_not_weights(tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "x.pt2")
    torch.jit.save(torch.jit.script(torch.nn.Identity()), tmp_path / "x.pt")
    for name in ("x.pt2", "x.pt"):
        with pytest.raises(UserError, match="exported program"):
            open_weights(tmp_path / name)
