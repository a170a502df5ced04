"""The file formats of finetune/export.py: write them, and read them back in their own runtimes.

safetensors contains weights with timm's names but no graph; its runtime is timm's model.
"""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open

from configs.errors import UserError
from configs.schema import Encoder
from data.transforms import normalize
from finetune.exporters.comparison import Predict, predict_with, quiet_libraries
from finetune.exporters.graph import Deployed, Shape, min_free_side, trace
from models.formats.write import how_to_load, how_to_load_backbone, timm_backbone, timm_options, write_weights
from models.weights import Weights

METADATA = "convnext-fcmae.json"  # key in ONNX's metadata_props; extra file of torch archives
IMAGE = "image"  # name of the input
SIDES = ("height", "width")
OPENVINO_CONFIG = {"INFERENCE_PRECISION_HINT": "f32"}  # else it computes in bf16 on CPUs that have it


def export(
    path: Path, to: str, deployed: Deployed, weights: Weights, outputs: dict[str, str], shape: Shape,
    opset: int | None = None,
) -> None:  # fmt: skip
    """Write a model in a format of `SUFFIXES`; ONNX stores weights of more than 2 GB in a second file, OpenVINO all.

    The metadata comes from `weights` and `outputs` (description by name), for safetensors the tensors too. `opset` is
    the version of ONNX's operators, None = the exporter's own. Raises `UserError` if timm cannot build this model, or
    the exporter cannot write the opset.
    """
    if to == "safetensors":
        write_weights(path, weights, "timm")
        return
    example = torch.zeros(1 if shape.one_by_one else 2, weights.arch.channels, *weights.preprocessing.size)
    kind = str(deployed.model.stem[0].weight.dtype).removeprefix("torch.")
    text = json.dumps(metadata(weights, outputs, kind, shape))
    free = {} if shape.one_by_one else {0: "batch"}
    free |= {axis + 2: SIDES[axis] for axis in (0, 1) if shape.free[axis]}
    with torch.no_grad(), quiet_libraries():
        if to == "torchscript":
            traced = torch.jit.trace(deployed, (example,), check_trace=False)  # `compare` checks it
            torch.jit.save(traced, path, _extra_files={METADATA: text})
            return
        program = trace(deployed, example, free, min_free_side(weights.arch))
        if to == "torch-export":
            torch.export.save(program, path, extra_files={METADATA: text})
            return
        names = {"input_names": [IMAGE], "output_names": list(outputs), "opset_version": opset}
        model = torch.onnx.export(program, (example,), dynamo=True, verbose=False, dynamic_shapes=(free,), **names)
        if opset not in (None, written := model.model.opset_imports[""]):
            raise UserError(f"--opset {opset}: the exporter can write this model with opset {written}: choose another")
        model.model.metadata_props[METADATA] = text
        if to == "openvino":
            write_openvino(path, model, text, kind == "float16")
        else:
            model.save(path)


def write_openvino(path: Path, model: torch.onnx.ONNXProgram, text: str, low: bool) -> None:
    """Write OpenVINO's files PATH.xml and PATH.bin; `text` is the metadata. Raises `UserError` without openvino."""
    openvino = import_openvino()
    source = path.with_name(f".{path.stem}.onnx")
    model.save(source)
    try:
        found = openvino.convert_model(source)
        found.set_rt_info(text, METADATA)
        openvino.save_model(found, path, compress_to_fp16=low)
    finally:
        for file in (source, source.with_name(f"{source.name}.data")):
            file.unlink(missing_ok=True)


def import_openvino() -> Any:
    """The package. Raises `UserError` if it is not installed."""
    try:
        import openvino
    except ImportError:
        raise UserError("--to openvino needs OpenVINO: pip install openvino") from None
    return openvino


def metadata(weights: Weights, outputs: dict[str, str], precision: str, shape: Shape) -> dict:
    """Metadata of an exported file: model, precision, input, outputs, class names, preprocessing."""
    arch = weights.arch
    sides = zip(SIDES, weights.preprocessing.size, shape.free, strict=True)
    least = min_free_side(arch)
    rule = f" >= {least}" + (f", a multiple of {least // 2}" if weights.head else "")
    height, width = (f"{name}{rule}" if free else str(side) for name, side, free in sides)
    image = f"float32 [batch, {arch.channels}, {height}, {width}], 0 to 1, resized and cropped, not normalised"
    about = {"model": arch.name, "precision": precision, "input": {IMAGE: image}, "output": outputs}
    if weights.head and weights.task:
        about |= {"task": weights.task, **weights.task_config}  # thresholds, names of numbers
    return about | {"classes": weights.classes} | weights.preprocessing.to_dict()


def stage_outputs(arch: Encoder) -> dict[str, str]:
    """Names and descriptions of an encoder's feature maps."""
    outputs = {}
    for i, channels in enumerate(arch.dims):
        stride = arch.stem_stride * 2**i
        outputs[f"stage{i + 1}"] = f"float32 [batch, {channels}, height / {stride}, width / {stride}]"
    return outputs


def load_exported(path: Path, to: str, weights: Weights) -> Predict:
    """Read an exported file in its own runtime, on the CPU; `weights` has the architecture, for safetensors.

    This and the returned function raise the runtime's exceptions.
    """
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda images: [torch.from_numpy(output) for output in session.run(None, {IMAGE: images.numpy()})]
    if to == "openvino":
        model = import_openvino().compile_model(path, "CPU", OPENVINO_CONFIG)
        return lambda images: [torch.from_numpy(output.copy()) for output in model(images.numpy()).values()]
    if to == "torch-export":
        return predict_with(torch.export.load(path).module())
    if to == "torchscript":
        return predict_with(torch.jit.load(path))
    options = {"num_classes": weights.outputs, "checkpoint_path": str(path)} | timm_options(weights.arch)
    options = options if weights.outputs else timm_backbone(path, weights)
    predict = predict_with(timm.create_model(weights.arch.name, **options).eval())
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])["pretrained_cfg"]
    mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    return lambda images: predict(normalize(images, mean, std))


def how_to_use(path: Path, to: str, weights: Weights) -> str:
    """Python expression for the outputs of `images`; for safetensors one that creates timm's model."""
    if to == "safetensors":
        return (how_to_load if weights.outputs else how_to_load_backbone)(path, weights, "timm")
    text = json.dumps(str(path))  # a string of Python, whatever the name
    if to == "onnx":
        return f'onnxruntime.InferenceSession({text}).run(None, {{"{IMAGE}": images.numpy()}})'
    if to == "openvino":
        return f'openvino.compile_model({text}, "CPU", {OPENVINO_CONFIG})(images.numpy())'
    if to == "torch-export":
        return f"torch.export.load({text}).module()(images)"
    return f"torch.jit.load({text})(images)"
