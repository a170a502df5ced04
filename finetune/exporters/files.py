"""The file formats of finetune/export.py: write them, and read them back in their own runtimes.

safetensors contains weights with timm's names but no graph; its runtime is timm's model.
"""

import json
from pathlib import Path

import timm
import torch
from safetensors import safe_open

from configs.schema import Encoder
from data.transforms import normalize
from finetune.exporters.comparison import Predict, predict_with, quiet_libraries
from finetune.exporters.graph import Deployed, free_sides, min_free_side, trace
from models.formats.write import how_to_load, how_to_load_backbone, timm_backbone, timm_options, write_weights
from models.weights import Weights

METADATA = "convnext-fcmae.json"  # key in ONNX's metadata_props; extra file of torch archives
IMAGE = "image"  # name of the input
SIDES = ("height", "width")


def export(
    path: Path, to: str, deployed: Deployed, weights: Weights, outputs: dict[str, str], one_by_one: bool = False
) -> None:
    """Write a model in a format of `SUFFIXES`; ONNX stores weights of more than 2 GB in a second file.

    With `one_by_one` the graph takes one image at a time. The metadata comes from `weights` and `outputs` (description
    by name), for safetensors the tensors too. Raises `UserError` if timm cannot build this model.
    """
    if to == "safetensors":
        write_weights(path, weights, "timm")
        return
    example = torch.zeros(1 if one_by_one else 2, weights.arch.channels, *weights.preprocessing.size)
    text = json.dumps(metadata(weights, outputs, str(deployed.model.stem[0].weight.dtype).removeprefix("torch.")))
    free = {} if one_by_one else {0: "batch"}
    free |= {axis + 2: SIDES[axis] for axis in (0, 1) if not one_by_one and free_sides(weights)[axis]}
    with torch.no_grad(), quiet_libraries():
        if to == "torchscript":
            traced = torch.jit.trace(deployed, (example,), check_trace=False)  # `compare` checks it
            torch.jit.save(traced, path, _extra_files={METADATA: text})
            return
        program = trace(deployed, example, free, min_free_side(weights.arch))
        if to == "torch-export":
            torch.export.save(program, path, extra_files={METADATA: text})
            return
        names = {"input_names": [IMAGE], "output_names": list(outputs)}
        model = torch.onnx.export(program, (example,), dynamo=True, verbose=False, dynamic_shapes=(free,), **names)
        model.model.metadata_props[METADATA] = text
        model.save(path)


def metadata(weights: Weights, outputs: dict[str, str], precision: str) -> dict:
    """Metadata of an exported file: model, precision, input, outputs, class names, preprocessing."""
    arch = weights.arch
    sides = zip(SIDES, weights.preprocessing.size, free_sides(weights), strict=True)
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
    if to == "torch-export":
        return f"torch.export.load({text}).module()(images)"
    return f"torch.jit.load({text})(images)"
