"""Files that are wrong, wrapped, or hostile; the official checkpoints' own containers."""

import argparse
import contextlib
import itertools
import json
import os
import pickle
import re

import numpy as np
import pytest
import timm
import torch

from configs.errors import UserError
from configs.preprocessing import Preprocessing
from configs.schema import IMAGENET_MEAN, IMAGENET_STD, Encoder
from models.formats import FORMATS
from models.formats.metadata import class_names
from models.formats.read import read_weights
from models.formats.write import to_form, write_weights
from models.weights import save
from tests.conftest import has
from tests.models.formats.helpers import FILES, SMALL, assert_same, autoencoder, classifier, weights_for

FOREIGN = [form for form in FORMATS if form != "ours"]


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Command(argparse.Namespace):
    """A subclass of the permitted class."""


def test_an_official_sparse_checkpoint(tmp_path):
    """As the official code saves it: tensors, optimizer, epoch, scaler and the command line."""
    weights = autoencoder(decoder_depth=2, decoder_dim=24, mask_ratio=0.75, norm_pix=False, **SMALL)
    tensors, _ = to_form(weights, "official-sparse")
    args = argparse.Namespace(
        model="convnextv2_atto", input_size=192, mask_ratio=0.75, norm_pix_loss=False, decoder_depth=2, device="cuda"
    )
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    content = {"model": tensors, "optimizer": optimizer, "epoch": 799, "scaler": {"scale": 1.0}, "args": args}
    torch.save(content, tmp_path / "checkpoint-799.pth")
    found, form, remarks = read_weights(tmp_path / "checkpoint-799.pth")
    assert form == "official-sparse" and "ImageNet" in remarks[0]
    assert_same(found.encoder | found.decoder, weights.encoder | weights.decoder)
    assert found.preprocessing.size == (192, 192) and found.preprocessing.mean == (0.485, 0.456, 0.406)
    expected = {"mask_ratio": 0.75, "norm_pix": False, "grn_scope": "batch", "decoder_depth": 2, "decoder_dim": 24}
    assert {key: found.decoder_config[key] for key in expected} == expected
    assert found.arch.depths == SMALL["depths"] and found.arch.dims == SMALL["dims"]


def test_an_official_fine_tuned_checkpoint(tmp_path):
    weights = classifier(**SMALL)
    tensors, _ = to_form(weights, "official")
    average = {name: tensor * 2 for name, tensor in tensors.items()}
    torch.save({"model": tensors, "model_ema": average, "args": argparse.Namespace(lr=1.0)}, tmp_path / "x.pth")
    found, form, _ = read_weights(tmp_path / "x.pth")
    assert form == "official"
    assert_same(found.encoder | found.head, weights.encoder | weights.head)
    assert_same(found.ema, {name: tensor * 2 for name, tensor in (weights.encoder | weights.head).items()})


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.module.", "net.encoder.", "visual.trunk."])
@pytest.mark.parametrize("container", [None, "model", "state_dict", "params_ema"])
@pytest.mark.parametrize("form", FOREIGN)
def test_containers_and_wrappers(form, container, wrapper, tmp_path):
    weights = weights_for(form)
    tensors = {wrapper + name: tensor for name, tensor in to_form(weights, form)[0].items()}
    torch.save({container: tensors} if container else tensors, tmp_path / "x.pth")
    found, detected, _ = read_weights(tmp_path / "x.pth")
    assert detected == form
    assert_same(found.encoder | found.decoder | found.head, weights.encoder | weights.decoder | weights.head)


def test_released_files_after_pretraining(tmp_path):
    """Dense names and kernels without prefix, but GRN in the sparse code's shape."""
    weights = classifier(classes=0, **SMALL)
    tensors, _ = to_form(weights, "official")
    tensors = {name: tensor[0, 0] if "grn" in name else tensor for name, tensor in tensors.items()}
    torch.save({"model": tensors}, tmp_path / "x.pt")
    found, form, _ = read_weights(tmp_path / "x.pt")
    assert form == "official" and found.head == {}
    assert_same(found.encoder, weights.encoder)


def test_averaged_weights_of_another_model(tmp_path):
    tensors, _ = to_form(classifier(**SMALL), "official")
    average, _ = to_form(classifier(classes=7, **SMALL), "official")
    torch.save({"model": tensors, "model_ema": average}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="averaged"):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("form", "beside"),
    [
        ("timm", {"label_names": {"0": "a", "1": "b", "10": "e", "2": "c", "9": "d"}}),
        ("transformers", {"id2label": {"0": "a", "10": "e", "1": "b", "9": "d", "2": "c"}}),
    ],
)
def test_class_names_of_a_dict_are_sorted(form, beside):
    assert class_names(beside, form, 5, []) == ["a", "b", "c", "d", "e"]


GARBAGE = [None, 0, -1, 2**80, "x", b"x", [], {}, [None] * 3, "abc", {"a": 1}, [float("nan")] * 3, True, torch.zeros(3)]


@pytest.mark.parametrize("form", FOREIGN)
@pytest.mark.parametrize("key", ["image", "classes", "label_names", "pretrained_cfg", "meta", "pretraining", "args"])
def test_invalid_metadata_is_ignored(form, key, tmp_path):
    """Weights are read, with defaults for the metadata."""
    weights = weights_for(form)
    tensors, _ = to_form(weights, form)
    for value in GARBAGE:
        for nested in (value, {"mean": value, "std": value, "size": value, "input_size": value, "eval_crop": value},
                       {"image": value, "dataset_meta": value, "CLASSES": value, "mask_ratio": value}):  # fmt: skip
            torch.save({"model": tensors, key: nested}, tmp_path / "x.pth")
            found, _, _ = read_weights(tmp_path / "x.pth")
            assert found.preprocessing == Preprocessing((224, 224), 3, IMAGENET_MEAN, IMAGENET_STD)
            assert found.classes is None and found.decoder_config.get("mask_ratio") in (None, 0.6)


@pytest.mark.parametrize(
    "key", ["id2label", "image_size", "preprocessor", "size", "crop_size", "image_mean", "crop_pct"]
)
def test_invalid_metadata_of_a_folder_is_ignored(key, tmp_path):
    write_weights(tmp_path / "x", classifier(**SMALL), "transformers")
    config, processor = tmp_path / "x/config.json", tmp_path / "x/preprocessor_config.json"
    inside = json.loads(config.read_text()), json.loads(processor.read_text())
    for value in (value for value in GARBAGE if not isinstance(value, bytes | torch.Tensor)):
        for file, content in zip((config, processor), inside, strict=True):
            file.write_text(json.dumps(content | {key: value}))
        read_weights(tmp_path / "x")


@pytest.mark.parametrize(
    "damage",
    [
        lambda w: w.encoder.pop("stages.1.blocks.0.conv_dw.weight"),
        lambda w: w.encoder.update({"stem.0.weight": torch.zeros(2)}),
        lambda w: w.decoder.pop("pred.weight"),
        lambda w: w.decoder.update({"extra": torch.zeros(2)}),
        lambda w: w.encoder.update({"stem.0.bias": torch.zeros(8, dtype=torch.int32)}),
        lambda w: w.encoder.update({"stem.0.bias": "x"}),
        lambda w: setattr(w, "encoder", None),
        lambda w: setattr(w, "ema", {"stem.0.weight": torch.zeros(2)}),
        lambda w: setattr(w, "arch", Encoder("x")),
        lambda w: setattr(w, "arch", Encoder("convnextv2_atto", dims=(8, 16, 24, 40))),
    ],
)
def test_a_damaged_file_of_our_own(damage, tmp_path):
    weights = autoencoder(**SMALL)
    damage(weights)
    save(tmp_path / "x.pt", weights)
    with pytest.raises(UserError, match=r"x\.pt.*(damaged|another model|floating-point)"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_only_floating_point_numbers(dtype, tmp_path):
    tensors, _ = to_form(classifier(**SMALL), "timm")
    tensors["stem.1.bias"] = tensors["stem.1.bias"].to(dtype)
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"stem\.1\.bias .*floating-point"):
        read_weights(tmp_path / "x.pth")


def test_absurd_numbers_in_names_and_widths(tmp_path):
    tensors, _ = to_form(classifier(**SMALL), "timm")
    torch.save(tensors | {"stages.0.blocks.20000.gamma": torch.zeros(8)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"unexpected stages\.0\.blocks\.20000\.gamma"):
        read_weights(tmp_path / "x.pth")
    torch.save(tensors | {"stages.1.downsample.1.bias": torch.zeros(1).expand(2**40)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="ConvNeXt"):
        read_weights(tmp_path / "x.pth")


def test_bytes_flipped_anywhere_end_in_one_line(tmp_path):
    """A damaged file is read, if only values changed, or refused with a `UserError`."""
    weights = classifier(**SMALL)
    write_weights(tmp_path / "x.pth", weights, "official")
    whole, rng = (tmp_path / "x.pth").read_bytes(), np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 300):
        (tmp_path / "y.pth").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(UserError):
            read_weights(tmp_path / "y.pth")


def test_mmpretrains_older_key_for_class_names(tmp_path):
    tensors, _ = to_form(classifier(**SMALL), "mmpretrain")
    torch.save({"state_dict": tensors, "meta": {"CLASSES": ("a", "b", "c", "d", "e")}}, tmp_path / "x.pth")
    assert read_weights(tmp_path / "x.pth")[0].classes == ["a", "b", "c", "d", "e"]


def test_wrong_number_of_class_names_is_ignored(tmp_path):
    tensors, _ = to_form(classifier(**SMALL), "timm")
    torch.save({"state_dict": tensors, "label_names": ["a", "b"]}, tmp_path / "x.pth")
    found, _, remarks = read_weights(tmp_path / "x.pth")
    assert found.classes is None and any(has(remark, "2 5") for remark in remarks)


def test_unknown_statistics_of_four_channels(tmp_path):
    torch.save(to_form(classifier(channels=4, **SMALL), "official")[0], tmp_path / "x.pth")
    found, _, remarks = read_weights(tmp_path / "x.pth")
    assert found.preprocessing.mean is None and has(remarks[0], "4 channels")


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
@pytest.mark.parametrize("form", FORMATS)
def test_truncated(form, keep, tmp_path):
    path = tmp_path / FILES[form]
    write_weights(path, weights_for(form), form)
    file = path / "model.safetensors" if path.is_dir() else path
    size = file.stat().st_size
    os.truncate(file, keep if keep in (0, 10) else int(size * keep))
    with pytest.raises(UserError, match="truncated"):
        read_weights(path)


@pytest.mark.parametrize("form", FOREIGN)
def test_wrong_tensors_are_listed_by_the_files_names(form, tmp_path):
    tensors, _ = to_form(weights_for(form), form)
    names = sorted(name for name in tensors if re.search(r"norm|block\.2", name) and re.search("stages|features", name))
    gone, bent = names[0], names[-1]
    extra = next((p for p in ("convnextv2.", "backbone.", "features.") if gone.startswith(p)), "") + "extra.weight"
    tensors[extra] = torch.zeros(3)
    tensors[bent] = torch.zeros(7, 7)
    del tensors[gone]
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(UserError) as error:
        read_weights(tmp_path / "x.pth")
    assert f"missing {gone}" in str(error.value) and f"unexpected {extra}" in str(error.value)
    assert has(error.value, f"{bent} [7, 7]") and "\n" not in str(error.value)


@pytest.mark.parametrize("form", FOREIGN)
def test_a_transposed_tensor_is_misshapen(form, tmp_path):
    """Tensors of another shape are not reshaped to fit."""
    tensors, _ = to_form(weights_for(form), form)
    name = next(name for name in tensors if re.search(r"fc1\.weight|wconv1|pointwise_conv1|block\.3\.weight", name))
    tensors[name] = tensors[name].transpose(0, 1).contiguous()
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth"):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize(("first", "second"), itertools.permutations(FOREIGN, 2))
def test_mixed_up_formats(first, second, tmp_path):
    one, two = (to_form(weights_for(form), form)[0] for form in (first, second))
    half = {name: tensor for name, tensor in one.items() if ".2." not in name}
    torch.save(half | {name: tensor for name, tensor in two.items() if ".2." in name}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r" (missing|unexpected) "):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("content", [{"fc.weight": torch.zeros(2)}, {"epoch": 3}, {}, {"model": {}}, [torch.zeros(2)]])
def test_other_models(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth"):
        read_weights(tmp_path / "x.pth")


def test_another_architecture_of_timm(tmp_path):
    """An overlapping stem, as timm's *_ols models have it."""
    tensors, _ = to_form(classifier(**SMALL), "timm")
    tensors["stem.0.weight"] = torch.zeros(8, 3, 9, 9)
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"stem\.0\.weight .*\[8, 3, 9, 9\]"):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("place", ["tensors", "args", "beside", "bare"])
def test_code_is_refused_and_does_not_run(place, tmp_path):
    trap = tmp_path / "ran"
    tensors, _ = to_form(classifier(**SMALL), "official")
    content = {
        "tensors": {"model": tensors | {"stages.0.0.gamma": Payload(trap)}},
        "args": {"model": tensors, "args": argparse.Namespace(lr=Payload(trap))},
        "beside": {"model": tensors, "optimizer": [Payload(trap)]},
        "bare": Payload(trap),
    }[place]
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"code .*mkdir"):
        read_weights(tmp_path / "x.pth")
    assert not trap.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.safetensors", "x.pt"])
def test_a_bare_pickle_is_not_opened(name, tmp_path):
    trap = tmp_path / "ran"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "convnextv2"}))
    (tmp_path / name).write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(UserError, match=r"truncated|code"):
        read_weights(tmp_path if name.endswith("bin") else tmp_path / name)
    assert not trap.exists()


@pytest.mark.parametrize("value", [Command(lr=1), np.float64(1.0), np.zeros(2)], ids=["derived", "scalar", "array"])
def test_no_other_class_is_allowed(value, tmp_path):
    tensors, _ = to_form(classifier(**SMALL), "official")
    torch.save({"model": tensors, "args": value}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"code .*\b(tests|numpy)\.\S+"):
        read_weights(tmp_path / "x.pth")


def test_the_allowed_class_stays_allowed_only_here(tmp_path):
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth.* format"):  # opened, and not known
        read_weights(tmp_path / "x.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pth", weights_only=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no weights"),
        ({"config.json": "{"}, "JSON"),
        ({"config.json": "[]"}, "JSON"),
        ({"config.json": "{}"}, r"model\.safetensors .*pytorch_model\.bin"),
        (
            {"config.json": "{}", "model.safetensors.index.json": '{"weight_map": {"a": "part-1.safetensors"}}'},
            "part-1",
        ),
    ],
)
def test_folders_that_are_not_models(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path)


def renamed(tensors: dict, change) -> dict:
    return {change(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("content", "remark"),
    [
        (lambda t: {"state_dict": renamed(t, "model.".__add__) | {"loss.weight": torch.ones(3)}}, "1 tensors .*loss"),
        (lambda t: renamed(t, "visual.trunk.".__add__) | {"text.x": torch.ones(1), "logit_scale": torch.ones(1)}, "2 "),
        (lambda t: {"state_dict_ema": t, "epoch": 3}, "averaged weights only"),
        (lambda t: {"checkpoint": 1, "model": {"state_dict": renamed(t, "net.module.".__add__)}}, None),
        (lambda t: renamed(t, lambda name: f"_orig_mod.{name.replace('.blocks.', '.blocks._orig_mod.')}"), None),
    ],
    ids=["lightning", "clip", "ema alone", "nested", "compiled parts"],
)
def test_wrapped_files(content, remark, tmp_path):
    weights = classifier(**SMALL)
    torch.save(content(to_form(weights, "timm")[0]), tmp_path / "x.pth")
    found, form, remarks = read_weights(tmp_path / "x.pth")
    assert form == "timm" and ([r for r in remarks if re.search(remark, r)] if remark else len(remarks) == 1)
    assert_same(found.encoder | found.head, weights.encoder | weights.head)


def test_backbones_with_norms_after_the_stages(tmp_path):
    """mmseg's and mmdet's, with their heads; transformers'."""
    weights = classifier(classes=0, **SMALL)
    tensors, _ = to_form(weights, "mmpretrain")
    norms = {f"backbone.norm{i}.{p}": torch.rand(w) for i, w in enumerate(SMALL["dims"]) for p in ("weight", "bias")}
    torch.save({"state_dict": tensors | norms | {"decode_head.x": torch.ones(2)}}, tmp_path / "x.pth")
    found, form, remarks = read_weights(tmp_path / "x.pth")
    assert form == "mmpretrain" and found.head == {} and has(remarks, "8 tensors decode_head")
    assert_same(found.encoder, weights.encoder)


def test_sparks_pretraining_file(tmp_path):
    weights = classifier("convnext_tiny", classes=0, **SMALL)
    tensors = renamed(to_form(weights, "official")[0], "sparse_encoder.sp_cnn.".__add__)
    others = {"dense_decoder.dec.0.weight": torch.ones(2), "mask_tokens.0": torch.ones(2), "norm_black": torch.ones(2)}
    torch.save({"epoch": 1, "module": tensors | others, "optimizer": {}}, tmp_path / "x.pth")
    found, form, remarks = read_weights(tmp_path / "x.pth")
    assert form == "official" and has(remarks, "3 tensors dense_decoder")
    assert_same(found.encoder, weights.encoder)


@pytest.mark.parametrize("form", FOREIGN)
def test_the_format_of_older_torch(form, tmp_path):
    weights = weights_for(form)
    tensors = to_form(weights, form)[0]
    torch.save(tensors, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    found, detected, _ = read_weights(tmp_path / "x.pth")
    assert detected == form
    assert_same(found.encoder | found.decoder | found.head, weights.encoder | weights.decoder | weights.head)


def test_code_in_the_format_of_older_torch(tmp_path):
    trap = tmp_path / "ran"
    torch.save({"a": Payload(trap)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="code"):
        read_weights(tmp_path / "x.pth")
    assert not trap.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", FORMATS)
def test_numbers_that_are_not_finite(form, value, tmp_path):
    weights = weights_for(form)
    weights.encoder["stages.1.blocks.0.norm.bias"][3] = value
    write_weights(tmp_path / FILES[form], weights, form)
    with pytest.raises(UserError, match=r"not finite in \S*bias:"):
        read_weights(tmp_path / FILES[form])


def test_averaged_weights_that_are_not_finite(tmp_path):
    weights = classifier(**SMALL)
    weights.ema = {name: tensor * float("nan") for name, tensor in (weights.encoder | weights.head).items()}
    for form in ("ours", "official"):
        write_weights(tmp_path / FILES[form], weights, form)
        with pytest.raises(UserError, match=r"not finite .* more"):
            read_weights(tmp_path / FILES[form])


def test_several_encoders(tmp_path):
    tensors, _ = to_form(classifier(**SMALL), "timm")
    torch.save(renamed(tensors, "student.".__add__) | renamed(tensors, "teacher.".__add__), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"several encoders \(student\., teacher\.\)"):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("name", "seems"),
    [("resnet18", "ResNet"), ("vit_tiny_patch16_224", "vision transformer"), ("efficientnet_b0", "EfficientNet")],
)
def test_other_models_by_name(name, seems, tmp_path):
    torch.save(timm.create_model(name).state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match=f"seems to be an? {seems}"):
        read_weights(tmp_path / "x.pth")
