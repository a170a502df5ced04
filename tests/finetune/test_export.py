"""Exported files in their own runtimes, against timm's models with the same weights."""

import io
import json
import re
import sys
from copy import deepcopy
from dataclasses import replace
from functools import partialmethod
from importlib.util import find_spec
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from torch.onnx import ONNXProgram

from configs.errors import UserError
from configs.schema import Data
from data.decode import decode
from data.shards import open_split
from data.transforms import EvalTransform
from finetune import export as command
from finetune.exporters import SUFFIXES, files
from finetune.exporters.comparison import predict_with
from finetune.exporters.files import METADATA, export
from finetune.exporters.graph import Deployed, to_fp16
from finetune.exporters.quantize import check_drop
from models.convnext import ConvNeXt
from models.formats.write import how_to_load, how_to_load_backbone, write_weights
from models.sparse import layouts
from models.weights import Weights, save
from tests.conftest import has, names
from tests.conftest import run as run_command
from tests.data.helpers import as_folder
from tests.finetune.test_evaluate import classifier as digits_classifier
from tests.models.formats.helpers import SMALL, autoencoder, change, classifier
from tests.models.helpers import assert_close

GRAPHS = ["onnx", "torch-export", "torchscript"]
INSTALLED = [pytest.param(True, marks=pytest.mark.skipif(not find_spec("openvino"), reason="pip install openvino"))]
FORMATS = [*GRAPHS, "safetensors"]
MODELS = {
    "v2": ("convnextv2_atto", {"channels": 3, "stem_stride": 4}, [64, 96]),
    "v1": ("convnext_atto", {"channels": 1, "stem_stride": 1}, [32, 24]),
}


def lively(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A random state whose logits differ between images."""
    return {
        name: torch.randn(t.shape) * (2 / t[0].numel() ** 0.5 if t.ndim > 1 else 0.1 if name.endswith("bias") else 1)
        for name, t in model.state_dict().items()
    }


def trained(kind: str = "v2", classes: int = 5) -> Weights:
    name, shape, size = MODELS[kind]
    weights = classifier(name, classes, lively, **shape, **SMALL)
    change(weights, size=tuple(size), crop=0.9, interpolation="bilinear")
    return weights


def call(*words: object) -> None:
    command.main([str(word) for word in words])


def exported(weights: Weights, folder: Path, digits: Path, to: str, *options: str) -> Path:
    """Export weights with the command; returns the file."""
    save(folder / "best.pt", weights)
    out = folder / f"out{SUFFIXES[to]}"
    call(folder / "best.pt", out, "--to", to, "--images", digits, *options)
    return out


def outputs(line: str, images: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of the expression that the command prints; timm's models expect normalised images."""
    found = eval(line, {"images": images, "torch": torch, "timm": timm, "onnxruntime": onnxruntime})
    if isinstance(found, torch.nn.Module):
        with torch.no_grad():
            found = found.eval()(images)
    found = [found] if isinstance(found, torch.Tensor) else found
    return [torch.as_tensor(output) for output in found]


def reference(weights: Weights, folder: Path, images: torch.Tensor, features: bool) -> list[torch.Tensor]:
    """Outputs of timm's model with the same weights."""
    write_weights(folder / "reference.pth", replace(weights, ema=None), "timm")
    line = (how_to_load_backbone if features else how_to_load)(folder / "reference.pth", weights, "timm")
    return outputs(line, normalized(weights, images))


def normalized(weights: Weights, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(getattr(weights.preprocessing, key))[:, None, None] for key in ("mean", "std"))
    return (images - mean) / std


def some_digits(weights: Weights, digits: Path, count: int = 5) -> torch.Tensor:
    """Digits as input of the model, from 0 to 1."""
    split, transform = (
        open_split(Data(str(digits)), "val"),
        EvalTransform.of(weights.preprocessing),
    )
    decoded = [decode(split.read(70 * i)[0], weights.arch.channels) for i in range(count)]
    return torch.stack([transform(image)["image"] for image in decoded]) / 255


def about(path: Path, to: str) -> dict:
    """The metadata of a file."""
    if to == "onnx":
        return json.loads({entry.key: entry.value for entry in onnx.load(path).metadata_props}[METADATA])
    metadata = {METADATA: ""}
    if to == "torch-export":
        torch.export.load(path, extra_files=metadata)
    else:
        torch.jit.load(path, _extra_files=metadata)
    return json.loads(metadata[METADATA])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("to", FORMATS)
def test_a_classifier_gives_the_logits_of_timm(to, kind, digits, tmp_path, capsys):
    weights = trained(kind)
    out = exported(weights, tmp_path, digits, to)
    printed = capsys.readouterr()
    line = printed.out.splitlines()[-1]
    images = some_digits(weights, digits)
    expected = reference(weights, tmp_path, images, features=False)[0]
    assert expected.std(0).max() > 0.02 * expected.abs().max()  # they tell images apart
    for batch in (images, images[:1], images.repeat(2, 1, 1, 1)):
        given = normalized(weights, batch) if to == "safetensors" else batch
        found = outputs(line, given)[0]
        assert_close(found[: len(images)], expected[: len(batch)])
    assert printed.err == "" and names(tmp_path) == {"best.pt", "reference.pth", out.name}
    if to != "safetensors":
        metadata = about(out, to)
        assert metadata["classes"] == weights.classes and metadata["model"] == weights.arch.name
        stored = weights.preprocessing.to_dict()
        assert {key: metadata[key] for key in stored} == stored
        size = ", ".join(map(str, [weights.arch.channels, *weights.preprocessing.size]))
        assert metadata["input"]["image"].startswith(f"float32 [batch, {size}]")
        assert metadata["output"] == {"logits": "float32 [batch, 5]"} and metadata["precision"] == "float32"
        return
    with safe_open(out, "pt") as file:
        metadata = json.loads(file.metadata()["config"])
    settings = metadata["pretrained_cfg"]
    assert metadata["label_names"] == weights.classes and settings["crop_pct"] == 0.9
    assert settings["interpolation"] == "bilinear" and settings["mean"] == list(weights.preprocessing.mean)


@pytest.mark.parametrize(
    ("to", "kind"),
    [("onnx", "v2"), ("torch-export", "v1"), ("torchscript", "v2"), ("safetensors", "v1"), ("safetensors", "v2")],
)
def test_a_backbone_gives_the_maps_of_timm(to, kind, digits, tmp_path, capsys):
    """For other heights and widths, including sides that are not a multiple of the patch."""
    weights = trained(kind)
    out = exported(weights, tmp_path, digits, to, "--features")
    line, stride = capsys.readouterr().out.splitlines()[-1], weights.arch.stem_stride
    for batch, height, width in ((2, 16, 24), (1, 27, 17)):
        images = torch.rand(batch, weights.arch.channels, height * stride, width * stride + stride // 2)
        expected = reference(weights, tmp_path, images, features=True)
        found = outputs(line, normalized(weights, images) if to == "safetensors" else images)
        assert [output.shape[1] for output in found] == list(weights.arch.dims)
        assert found[0].shape[2:] == (height, width)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs)
    if to != "safetensors":
        metadata = about(out, to)
        assert f"height >= {16 * stride}, width >= {16 * stride}]" in metadata["input"]["image"]
        assert metadata["output"]["stage4"] == f"float32 [batch, 32, height / {8 * stride}, width / {8 * stride}]"


def test_a_backbone_of_pretraining(digits, tmp_path, capsys):
    """fcmae.pt has a decoder and no classifier; one patch wide, its width is fixed."""
    weights = autoencoder(channels=1, **SMALL)
    change(weights, size=(64, 32))
    out = exported(weights, tmp_path, digits, "torch-export", "--features")
    printed = capsys.readouterr().out
    assert has(printed, "fixed 64 pixels")
    assert "height >= 64, 32]" in about(out, "torch-export")["input"]["image"]
    images = torch.rand(2, 1, 128, 32)
    weights = replace(weights, decoder={})
    for ours, theirs in zip(
        outputs(printed.splitlines()[-1], images), reference(weights, tmp_path, images, True), strict=True
    ):
        assert_close(ours, theirs)


def test_averaged_weights_and_another_size(digits, tmp_path, capsys):
    weights, other = trained("v1"), trained("v1")
    weights.ema = other.encoder | other.head
    out = exported(weights, tmp_path, digits, "torchscript", "--ema", "--size", "[48,40]")
    images = torch.rand(2, 1, 48, 40)
    found = outputs(capsys.readouterr().out.splitlines()[-1], images)
    assert_close(found[0], reference(other, tmp_path, images, features=False)[0])
    assert about(out, "torchscript")["size"] == [48, 40]


def test_files_are_for_any_device(digits, tmp_path):
    """No operation is pinned to the CPU."""
    program = torch.export.load(exported(trained(), tmp_path, digits, "torch-export"))
    assert not [node for node in program.graph.nodes if "device" in node.kwargs]
    assert program.module().to("meta")(torch.rand(2, 3, 64, 96, device="meta")).shape == (2, 5)
    scripted = torch.jit.load(exported(trained(), tmp_path, digits, "torchscript"))
    assert "Device" not in str(scripted.inlined_graph)


def test_images_of_a_folder_and_one_alone(digits, tmp_path, capsys):
    split = open_split(Data(str(digits)), "val")
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / f"in/{i}.png").write_bytes(split.read(i)[0])
    exported(trained(), tmp_path, tmp_path / "in", "torchscript")
    call(tmp_path / "best.pt", tmp_path / "one.pt", "--to", "torchscript", "--images", tmp_path / "in/0.png")
    (tmp_path / "in/1.png").write_bytes(b"no picture")
    call(tmp_path / "best.pt", tmp_path / "two.pt", "--to", "torchscript", "--images", tmp_path / "in")
    assert has(capsys.readouterr().out, "left out: in, sample 1")
    with pytest.raises(UserError, match=r"1\.png: not an image"):
        call(tmp_path / "best.pt", tmp_path / "three.pt", "--to", "torchscript", "--images", tmp_path / "in/1.png")


def test_a_large_model_has_a_second_file(digits, tmp_path, monkeypatch, capsys):
    """As ONNX of more than 2 GB; both files can be moved."""
    monkeypatch.setattr(ONNXProgram, "save", partialmethod(ONNXProgram.save, external_data=True))
    weights = trained("v1")
    out = exported(weights, tmp_path, digits, "onnx")
    assert has(capsys.readouterr().out, f"{out}.data {out}")
    (tmp_path / "moved").mkdir()
    for file in (out, tmp_path / "out.onnx.data"):
        file.rename(tmp_path / "moved" / file.name)
    images = some_digits(weights, digits)
    session = onnxruntime.InferenceSession(str(tmp_path / "moved/out.onnx"))
    assert_close(
        torch.from_numpy(session.run(None, {"image": images.numpy()})[0]),
        reference(weights, tmp_path, images, features=False)[0],
    )
    (tmp_path / "out.onnx.data").touch()
    with pytest.raises(UserError, match=r"out\.onnx\.data exists"):
        call(tmp_path / "best.pt", out, "--to", "onnx", "--images", digits)


# ---- fp16


def with_large_tokens(value: float, tensor: str = "stages.0.blocks.0.mlp.fc1.bias") -> Weights:
    weights = trained()
    weights.encoder[tensor] = weights.encoder[tensor] + value
    return weights


@pytest.mark.parametrize("to", FORMATS)
def test_fp16_where_the_sum_of_squares_would_overflow(to, digits, tmp_path, capsys):
    """300 squared exceeds the range of fp16, 300 does not."""
    weights = with_large_tokens(300)
    out = exported(weights, tmp_path, digits, to, "--fp16")
    images = some_digits(weights, digits)
    given = normalized(weights, images) if to == "safetensors" else images
    found = outputs(capsys.readouterr().out.splitlines()[-1], given)[0]
    expected = reference(weights, tmp_path, images, features=False)[0]
    assert_close(found, expected, tolerance=1e-2)
    assert found.dtype == torch.float32 and torch.equal(found.argmax(1), expected.argmax(1))
    assert not torch.equal(found, expected)
    if to == "onnx":
        types = {tensor.name: tensor.data_type for tensor in onnx.load(out).graph.initializer}
        assert types["model.stages.0.blocks.0.conv_dw.weight"] == onnx.TensorProto.FLOAT16
        assert types["model.stages.0.blocks.0.norm.weight"] == onnx.TensorProto.FLOAT


def test_naive_fp16_overflows_there(digits, monkeypatch):
    """Control of the test above."""
    weights = with_large_tokens(300)
    model = ConvNeXt(weights.arch, weights.outputs).eval()
    model.load_state_dict(weights.encoder | weights.head)
    low = predict_with(
        to_fp16(Deployed(model, *map(torch.tensor, (weights.preprocessing.mean, weights.preprocessing.std))))
    )
    images = some_digits(weights, digits)
    assert low(images)[0].isfinite().all()
    monkeypatch.setattr(layouts, "channel_norm", lambda x, dims: x.square().sum(dims, keepdim=True).sqrt())
    assert not low(images)[0].isfinite().all()


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [
        ("stages.0.blocks.0.mlp.fc1.bias", "stages.0.blocks.0.mlp.fc1"),
        ("stages.1.blocks.0.conv_dw.bias", "stages.1.blocks.0.norm"),
    ],
)
def test_fp16_is_refused_where_tokens_overflow(tensor, layer, digits, tmp_path):
    """Even if onnxruntime computes in fp32 on this machine."""
    with pytest.raises(UserError) as error:
        exported(with_large_tokens(1e5, tensor), tmp_path, digits, "onnx", "--fp16")
    assert has(error.value, f"--fp16 {layer} 1e+05 65504")
    assert names(tmp_path) == {"best.pt"}


def test_fp16_is_refused_where_it_is_too_coarse(digits, tmp_path):
    """No overflow, but with an offset of 20000 in all channels fp16 cannot distinguish 1 from 2."""
    with pytest.raises(UserError, match=r"--fp16.* differs "):
        exported(with_large_tokens(20000, "stages.3.blocks.0.mlp.fc2.bias"), tmp_path, digits, "onnx", "--fp16")


# ---- opset, free sides, OpenVINO, int8


def test_an_opset_that_cannot_be_written(digits, tmp_path):
    """The exporter would keep its own version."""
    with pytest.raises(UserError, match=r"--opset 9: .* opset \d+"):
        exported(trained("v1"), tmp_path, digits, "onnx", "--opset", "9")
    assert names(tmp_path) == {"best.pt"}


@pytest.mark.parametrize(
    ("to", "more"), [("onnx", ["--opset", "18"]), pytest.param("torchscript", [], marks=pytest.mark.slow)]
)
def test_a_classifier_with_free_sides_and_an_opset(to, more, digits, tmp_path, capsys):
    weights = trained("v1")
    out = exported(weights, tmp_path, digits, to, "--dynamic", *more)
    printed = capsys.readouterr().out
    assert has(printed, "1x1x32x24") and has(about(out, to)["input"]["image"], "height >= 16, a multiple of 8 width")
    for height, width in ((16, 16), (48, 24)):
        images = torch.rand(2, 1, height, width)
        assert_close(outputs(printed.splitlines()[-1], images)[0], reference(weights, tmp_path, images, False)[0])
    if more:
        assert [entry.version for entry in onnx.load(out).opset_import if entry.domain == ""] == [18]


@pytest.mark.parametrize("_", INSTALLED)
@pytest.mark.parametrize(
    "options", [[], *(pytest.param([more], marks=pytest.mark.slow) for more in ("--dynamic", "--features", "--fp16"))]
)
def test_openvino(options, _, digits, tmp_path, capsys):
    import openvino

    weights = trained("v1")
    out = exported(weights, tmp_path, digits, "openvino", *options)
    assert names(tmp_path) == {"best.pt", "out.xml", "out.bin"}
    stored = json.loads(openvino.Core().read_model(out).get_rt_info(METADATA).astype(str))
    assert stored["mean"] == list(weights.preprocessing.mean)
    images = some_digits(weights, digits)
    line = capsys.readouterr().out.splitlines()[-1]
    found = list(eval(line, {"images": images, "openvino": openvino}).values())
    expected = reference(weights, tmp_path, images, "--features" in options)
    for ours, theirs in zip(found, expected, strict=True):
        far = 1e-2 if options == ["--fp16"] else 1e-4
        assert (torch.from_numpy(ours) - theirs).abs().max() < far * theirs.abs().max()


def test_openvino_that_is_not_installed(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match="pip install openvino"):
        exported(trained("v1"), tmp_path, digits, "openvino")
    assert names(tmp_path) == {"best.pt"}


@pytest.fixture(scope="module")
def quantised(digits, tmp_path_factory) -> tuple[Path, Path, str]:
    """A classifier of digits, its int8 file, and what the command prints."""
    folder = tmp_path_factory.mktemp("int8")
    torch.manual_seed(0)
    best = digits_classifier(digits, folder / "best.pt")
    words = ["python", "finetune/export.py", best, folder / "x.onnx", "--to", "onnx", "--images", digits]
    done = run_command(*words, "--quantize", "int8")
    assert "Warning" not in done.stderr and names(folder) == {"best.pt", "x.onnx"}
    return best, folder / "x.onnx", done.stdout


def test_int8_has_the_accuracy_that_is_reported(quantised, digits):
    _, out, printed = quantised
    before, after = (
        float(x) for x in re.search(r"top1 ([\d.]+) % in fp32, ([\d.]+) % in int8, on 355", printed).groups()
    )
    model = onnx.load(out)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}
    kinds = [x.data_type for x in model.graph.initializer]
    assert kinds.count(onnx.TensorProto.INT8) > 4 and about(out, "onnx")["eval_crop"] == 1
    session, split = onnxruntime.InferenceSession(str(out)), open_split(Data(str(digits)), "val")
    transform = EvalTransform((8, 8), 1)
    read = [split.read(i) for i in range(len(split))]
    images = torch.stack([transform(decode(data, 1))["image"] for data, _ in read]) / 255
    right = session.run(None, {"image": images.numpy()})[0].argmax(1) == [label for _, label in read]
    assert after == pytest.approx(100 * right.mean(), abs=1) and before > 80 and before - after < 1


def test_int8_that_loses_too_much_is_not_written(quantised, digits, tmp_path):
    """Calibrated on black images, activations are cut off."""
    black = io.BytesIO()
    Image.new("L", (8, 8)).save(black, "png")
    as_folder({f"train/a/{i}.png": black.getvalue() for i in range(2)}, tmp_path / "black")
    words = [quantised[0], tmp_path / "x.onnx", "--to", "onnx", "--images", digits, "--quantize", "int8"]
    with pytest.raises(UserError) as error:
        call(*words, "--calibrate", tmp_path / "black")
    assert has(error.value, "--quantize int8 top1 fp32 int8 355 images --max-drop") and names(tmp_path) == {"black"}


@pytest.mark.parametrize("after", [0.88, float("nan")])
def test_the_largest_drop(after):
    assert has(check_drop(0.9, 0.895, 100, 1.0, "top1"), "top1 90.00 89.50 100 images")
    with pytest.raises(UserError, match="loses too much"):
        check_drop(0.9, after, 100, 1.0, "top1")


# ---- the comparison can fail


def tampered(path: Path, to: str, deployed: Deployed, weights: Weights, outputs: dict, *more: object) -> None:
    """Write another model: one bias differs by a thousandth of the largest logit."""
    deployed, weights = deepcopy(deployed), deepcopy(weights)
    deployed.model.head.fc.bias.data[0] += 3e-3
    weights.head["head.fc.bias"][0] += 3e-3
    export(path, to, deployed, weights, outputs, *more)


def cut(path: Path, to: str, deployed: Deployed, weights: Weights, outputs: dict, *more: object) -> None:
    """Writes half a file."""
    export(path, to, deployed, weights, outputs, *more)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_that_is_another_model_is_not_written(to, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "export", tampered)
    with pytest.raises(UserError, match=r"out\.\w+ is not written.* differs "):
        exported(trained("v1"), tmp_path, digits, to)
    assert names(tmp_path) == {"best.pt"}


@pytest.mark.parametrize("to", ["onnx", "torchscript", "safetensors"])
def test_a_file_that_its_runtime_refuses_is_not_written(to, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "export", cut)
    with pytest.raises(UserError, match=f"runtime.* {to} "):
        exported(trained("v1"), tmp_path, digits, to)
    assert names(tmp_path) == {"best.pt"}


def test_another_class_is_noticed(digits, tmp_path, monkeypatch):
    """The difference alone is within the tolerance."""
    weights = trained("v1")
    weights.head["head.fc.weight"][1], weights.head["head.fc.bias"][:2] = weights.head["head.fc.weight"][0], 10
    weights.head["head.fc.bias"][1] += 2e-4  # class 1 always, by a hair

    def other(path: Path, to: str, deployed: Deployed, weights: Weights, outputs: dict, *more: object) -> None:
        deployed.model.head.fc.bias.data[0] += 3e-4
        export(path, to, deployed, weights, outputs, *more)

    monkeypatch.setattr(files, "export", other)
    with pytest.raises(UserError, match=r"not written.* 1 of 1 images .*class"):
        exported(weights, tmp_path, digits, "torchscript")


# ---- input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}/best.pt", "{tmp}/x.onnx", "--to", "onxx"], "--to onxx"),
        (["{tmp}/best.pt", "{tmp}/x.onnx"], "required --to"),
        (["{tmp}/best.pt", "{tmp}/x.pt2", "--to", "onnx"], "x.pt2 onnx .onnx"),
        (["{tmp}/best.pt", "{tmp}/best.pt", "--to", "torchscript"], "best.pt exists"),
        (["{tmp}/best.pt", "{tmp}/no/x.pt2", "--to", "torch-export"], "no folder"),
        (["{tmp}/no.pt", "{tmp}/x.pt2", "--to", "torch-export"], "no.pt exist"),
        (["{tmp}/fcmae.pt", "{tmp}/x.pt2", "--to", "torch-export"], "fcmae.pt classifier"),
        (["{tmp}/best.pt", "{tmp}/x.pt2", "--to", "torch-export", "--ema"], "averaged --ema"),
        (["{tmp}/best.pt", "{tmp}/x.pt2", "--to", "torch-export", "--size", "50"], "50"),
        (["{tmp}/best.pt", "{tmp}/x.pt2", "--to", "torch-export", "--features", "--size", "50"], "50"),
        (["{tmp}/best.pt", "{tmp}/x.safetensors", "--to", "safetensors"], "model.stem_stride 2 timm"),
        (["{tmp}/fcmae.pt", "{tmp}/x.pt2", "--to", "torch-export", "--features"], "fcmae.pt 5 channels"),
        (["{tmp}/best.pt", "{tmp}/x.pt2", "--to", "torch-export", "--split", "tst"], "tst train val"),
        (["{tmp}/best.pt", "{tmp}/x.pt2", "--to", "torch-export", "--opset", "18"], "--opset 18 onnx"),
        (["{tmp}/best.pt", "{tmp}/x.pt2", "--to", "torch-export", "--quantize", "int8"], "--quantize int8 onnx"),
        (["{tmp}/best.pt", "{tmp}/x.onnx", "--to", "onnx", "--quantize", "int8", "--fp16"], "--quantize --fp16"),
        (["{tmp}/best.pt", "{tmp}/x.safetensors", "--to", "safetensors", "--dynamic"], "--dynamic graphs"),
    ],
)
def test_bad_input(words, message, digits, tmp_path):
    weights = classifier(channels=1, stem_stride=2, **SMALL)
    save(tmp_path / "best.pt", weights)
    weights = autoencoder(channels=5, **SMALL)
    change(weights, mean=None, std=None)
    save(tmp_path / "fcmae.pt", weights)
    before = names(tmp_path)
    with pytest.raises(UserError) as error:
        call(*(word.format(tmp=tmp_path) for word in words), "--images", digits)
    assert has(error.value, message)
    assert names(tmp_path) == before


def test_the_command_prints_three_lines(digits, tmp_path):
    """Warnings of exporters are suppressed."""
    save(tmp_path / "best.pt", trained("v1"))
    words = ["python", "finetune/export.py", tmp_path / "best.pt", tmp_path / "x.onnx", "--to", "onnx"]
    done = run_command(*words, "--images", digits)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 3
