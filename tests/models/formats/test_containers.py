"""Files by their bytes, tensors in nested dicts, folders and parts; other kinds of files by their own names."""

import gzip
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from configs.errors import UserError
from models.formats.hub import digest
from models.formats.read import read_weights
from models.formats.write import to_form
from models.weights import Weights
from tests.conftest import has
from tests.models.formats.helpers import SMALL, assert_same, classifier


@pytest.fixture(scope="module")
def weights() -> Weights:
    return classifier(**SMALL)


@pytest.fixture(scope="module")
def tensors(weights) -> dict:
    return to_form(weights, "timm")[0]


def prefixed(prefix: str, tensors: dict) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("content", "remark"),
    [
        (lambda t: {"encoder": t, "decoder": {"x": torch.ones(2)}, "epoch": 3}, "1 tensors outside of encoder"),
        (lambda t: {"model": {"backbone": t, "neck": {"0": {"x": torch.ones(2)}}}}, "1 tensors outside of backbone"),
        (lambda t: {"state": {"models": {"net": prefixed("module.", t)}}}, None),
        (lambda t: {"teacher": prefixed("backbone.", t)}, None),
        (lambda t: (t, {"lr": 1}), None),
        (lambda t: {"models": [t], "betas": (0.9, 0.95)}, None),
        (lambda t: {"a": {"net": t}, "b": {"net": t}}, None),
        (lambda t: [t], None),
        (lambda t: {"model": {"model": {"model": t}}}, None),
        (lambda t: prefixed("module.", t) | {"n_averaged": torch.tensor(7)}, "1 tensors .*n_averaged"),
        (lambda t: {k: torch.nn.Parameter(v) for k, v in t.items()}, None),
        (lambda t: {k: v.movedim(0, -1).contiguous().movedim(-1, 0) for k, v in t.items()}, None),
    ],
    ids=[
        "parts",
        "parts in a key",
        "deep",
        "teacher",
        "tuple",
        "in a list",
        "the same twice",
        "list",
        "thrice",
        "swa",
        "parameters",
        "strides",
    ],
)
def test_tensors_inside_of_other_values(content, remark, weights, tensors, tmp_path):
    torch.save(content(tensors), tmp_path / "x.pth")
    found, form, remarks = read_weights(tmp_path / "x.pth")
    assert form == "timm" and len(remarks) == 1 + bool(remark)
    assert_same(found.encoder | found.head, {k: v.detach() for k, v in (weights.encoder | weights.head).items()})


def test_mixed_precision_is_kept(weights, tensors, tmp_path):
    types = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    mixed = {name: tensor.to(types[i % 4]) for i, (name, tensor) in enumerate(tensors.items())}
    torch.save(mixed, tmp_path / "x.pth")
    found = read_weights(tmp_path / "x.pth")[0]
    assert_same(to_form(found, "timm")[0], mixed)


def test_dicts_that_multiply(tmp_path):
    """Each contains the one before 50 times: 50 ** 12 in all."""
    content: dict = {"x": torch.ones(1)}
    for _ in range(12):
        content = {str(i): content for i in range(50)}
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match="no known format"):
        read_weights(tmp_path / "x.pth")


def test_a_dict_that_contains_itself(tmp_path):
    content: dict = {"epoch": 1}
    content["model"] = content["x"] = content
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match="no known format"):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"config": "x"}, {"config": "[1]"}, {"config": "{}"}])
@pytest.mark.parametrize("name", ["x.safetensors", "x.SAFETENSORS", "x.bin", "x.ckpt", "x"])
def test_safetensors_under_any_name(name, metadata, weights, tensors, tmp_path):
    save_file(prefixed("model.", tensors), tmp_path / name, metadata)
    assert_same(read_weights(tmp_path / name)[0].encoder, weights.encoder)


def test_torch_save_under_the_name_of_safetensors(weights, tensors, tmp_path):
    torch.save(tensors, tmp_path / "x.safetensors")
    assert_same(read_weights(tmp_path / "x.safetensors")[0].encoder, weights.encoder)


CONFIG = {"architecture": "convnextv2_atto", "num_classes": 5, "label_names": list("abcde")}


def write_parts(folder, tensors, suffix: str, config: bool) -> str:
    """Write a folder of two parts; the name of its index."""
    stem, half = ("model", "pytorch_model")[suffix == "bin"], len(tensors) // 2
    names, places = [*tensors], {}
    for i, part in enumerate((names[:half], names[half:])):
        file = f"{stem}-{i + 1:05d}-of-00002.{suffix}"
        places |= dict.fromkeys(part, file)
        content = {name: tensors[name] for name in part}
        (torch.save if suffix == "bin" else save_file)(content, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    if config:
        (folder / "config.json").write_text(json.dumps(CONFIG))
    return f"{stem}.{suffix}.index.json"


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_parts_by_their_folder_or_index(suffix, config, weights, tensors, tmp_path):
    index = write_parts(tmp_path, tensors, suffix, config)
    for path in (tmp_path, tmp_path / index):
        found = read_weights(path)[0]
        assert_same(found.encoder, weights.encoder)
        assert found.classes == (CONFIG["label_names"] if config else None)
        assert digest(path).count("-") == 1 + config


@pytest.mark.parametrize("place", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "x.py", 3, None])
def test_parts_elsewhere_are_refused(place, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"stem.0.weight": place}}))
    with pytest.raises(UserError, match="lists no files"):
        read_weights(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "best.ckpt"])
@pytest.mark.parametrize("config", [True, False])
def test_a_folder_with_one_file(config, name, weights, tensors, tmp_path):
    content = prefixed("visual.trunk.", tensors)
    (save_file if name.endswith("safetensors") else torch.save)(content, tmp_path / name)
    if config:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert_same(read_weights(tmp_path)[0].encoder, weights.encoder)


def test_a_folder_with_several_files_of_their_own_names(tensors, tmp_path):
    for name in ("best.pt", "last.pt"):
        torch.save(tensors, tmp_path / name)
    with pytest.raises(UserError, match=r"give one of them \(best\.pt, last\.pt\)"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "Keras"),
        (b"GGUF" + bytes(99), "GGUF"),
        (gzip.compress(b"x" * 99, mtime=0), "gzip"),
        (b"\x93NUMPY" + bytes(99), "NumPy"),
    ],
)
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_other_files_are_named(name, data, remedy, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=remedy) as error:
        read_weights(tmp_path / name)
    assert "copy it again" not in str(error.value)


def test_archives_are_named(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(2))
    with pytest.raises(UserError, match="NumPy archive"):
        read_weights(tmp_path / "x.npz")


OWN_CLASSIFIERS = [
    ("timm", "head.fc.", "head.norm.weight"), ("official", "head.", "norm.weight"),
    ("transformers", "classifier.", "convnextv2.layernorm.weight"), ("mmpretrain", "head.fc.", "backbone.norm3.weight"),
    ("torchvision", "classifier.2.", "classifier.0.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "start", "norm"), OWN_CLASSIFIERS)
def test_another_classifier_is_left_out(form, start, norm, tmp_path):
    """A user's own layers in place of the linear one."""
    whole = classifier("convnext_tiny" if form == "torchvision" else "convnextv2_atto", **SMALL)
    theirs = {name: x for name, x in to_form(whole, form)[0].items() if not name.startswith(start) or name == norm}
    own = {f"{start}{layer}.weight": torch.ones(4, 4) for layer in (0, 3)}
    torch.save(theirs | own, tmp_path / "x.pth")
    found, detected, remarks = read_weights(tmp_path / "x.pth")
    assert detected == form and norm in theirs and has(remarks[0], "classifier 2 tensors")
    assert_same(found.encoder, whole.encoder)
    assert found.outputs == 0


@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.body."])
def test_the_features_of_torchvision_alone(prefix, tmp_path):
    """As inside of its detectors."""
    whole = classifier("convnext_tiny", classes=0, **SMALL)
    theirs = {prefix + name.removeprefix("features."): x for name, x in to_form(whole, "torchvision")[0].items()}
    torch.save(theirs | ({"rpn.x": torch.ones(1)} if prefix else {}), tmp_path / "x.pth")
    found, form, _ = read_weights(tmp_path / "x.pth")
    assert form == "torchvision"
    assert_same(found.encoder, whole.encoder)


def test_norms_of_the_official_codes_backbones(tmp_path):
    """Those of its detection and segmentation."""
    whole = classifier(classes=0, **SMALL)
    theirs = prefixed("backbone.", to_form(whole, "official")[0])
    norms = {f"backbone.norm{i}.{p}": torch.ones(w) for i, w in enumerate(SMALL["dims"]) for p in ("weight", "bias")}
    torch.save({"state_dict": theirs | norms | {"decode_head.x": torch.ones(1)}}, tmp_path / "x.pth")
    found, form, remarks = read_weights(tmp_path / "x.pth")
    assert form == "official" and has(remarks[0], "norms 8 tensors") and has(remarks[1], "1 tensors decode_head")
    assert_same(found.encoder, whole.encoder)
