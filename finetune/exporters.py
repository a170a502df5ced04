"""The formats of finetune/export.py: what is exported, how each is written, read by its own runtime, and compared.

An exported graph takes images [B, C, H, W], float32 from 0 to 1, and normalises them itself. B is free; for a backbone
H and W are too. safetensors holds no graph but weights, under timm's names: timm's model is the runtime.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

from configs.errors import UserError, reason
from configs.schema import PATCH_PER_STEM_STRIDE, Encoder
from data.transforms import normalize
from models.convnext import ConvNeXt
from models.formats.write import how_to_load, how_to_load_backbone, timm_backbone, timm_options, write_weights
from models.sparse.layouts import Dense
from models.weights import Weights

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".pt", "safetensors": ".safetensors"}
METADATA = "convnext-fcmae.json"  # its key in ONNX's metadata_props, its name among a torch archive's extra files
IMAGE, LOGITS, STAGES = "image", "logits", ("stage1", "stage2", "stage3", "stage4")  # names of input and outputs
SIDES = ("height", "width")

Run = Callable[[Tensor], list[Tensor]]  # images from 0 to 1 to [logits], or to the four stages' maps


class Deployed(nn.Module):
    """The model as it is exported: images [B, C, H, W], float32 from 0 to 1, to logits [B, classes] or, of a model
    without a head, the four stages' maps [B, Ci, Hi, Wi]; all float32.

    Args:
        model: in evaluation mode
        mean: [C] of the channels
        std: [C]
    """

    def __init__(self, model: ConvNeXt, mean: Tensor, std: Tensor):
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        conv, norm = self.model.stem
        x = normalize(image, self.mean, self.std).to(conv.weight.dtype)
        if self.model.head is not None:
            return self.model.head(self.model.forward_features(x, Dense()).float())
        maps, x = [], norm(Dense().embed(x, conv))
        for stage in self.model.stages:
            x = stage(x, Dense(), "none")
            maps.append(x.permute(0, 3, 1, 2).float())
        return tuple(maps)


def run(module: Callable) -> Run:
    """A module of torch as what is compared."""

    @torch.no_grad()
    def outputs(images: Tensor) -> list[Tensor]:
        found = module(images)
        return [found] if isinstance(found, Tensor) else list(found)

    return outputs


def least_side(arch: Encoder) -> int:
    """Pixels that height and width must have to be free: torch.export takes a side of a single patch for a constant."""
    return 2 * PATCH_PER_STEM_STRIDE * arch.stem_stride


def free_sides(weights: Weights) -> tuple[bool, bool]:
    """Whether the exported model takes images of another height, and of another width, than `weights` names."""
    height, width = (not weights.outputs and side >= least_side(weights.arch) for side in weights.image["size"])
    return height, width


def export(path: Path, to: str, deployed: Deployed, weights: Weights) -> None:
    """Write a model in one of the formats of `SUFFIXES`; ONNX of more than 2 GB keeps its weights in a file beside it.

    Args:
        weights: what the metadata tells; for safetensors, which has timm's metadata, the tensors too
    Raises:
        UserError: timm cannot build this model
    """
    if to == "safetensors":
        write_weights(path, weights, "timm")
        return
    example = torch.zeros(2, weights.arch.channels, *weights.image["size"])
    text = json.dumps(metadata(weights, str(deployed.model.stem[0].weight.dtype).removeprefix("torch.")))
    free = {0: "batch"} | {axis + 2: SIDES[axis] for axis in (0, 1) if free_sides(weights)[axis]}
    with torch.no_grad(), silence():
        if to == "torchscript":
            traced = torch.jit.trace(deployed, (example,), check_trace=False)  # real images are compared, later
            torch.jit.save(traced, path, _extra_files={METADATA: text})
            return
        program = trace(deployed, example, free, least_side(weights.arch))
        if to == "torch-export":
            torch.export.save(program, path, extra_files={METADATA: text})
            return
        names = {"input_names": [IMAGE], "output_names": [LOGITS] if weights.outputs else STAGES}
        model = torch.onnx.export(program, (example,), dynamo=True, verbose=False, dynamic_shapes=(free,), **names)
        model.model.metadata_props[METADATA] = text
        model.save(path)


def metadata(weights: Weights, precision: str) -> dict:
    """What stands in a file: the model, what it takes and gives, class names, preprocessing."""
    arch, image = weights.arch, weights.image
    sides = zip(SIDES, image["size"], free_sides(weights), strict=True)
    height, width = (f"{name} >= {least_side(arch)}" if free else str(side) for name, side, free in sides)
    taken = f"float32 [batch, {arch.channels}, {height}, {width}], 0 to 1, resized and cropped, not normalised"
    given = {LOGITS: f"float32 [batch, {weights.outputs}]"}
    if not weights.outputs:
        strides = [arch.stem_stride * 2**i for i in range(4)]
        given = {
            name: f"float32 [batch, {channels}, height / {stride}, width / {stride}]"
            for name, channels, stride in zip(STAGES, arch.dims, strides, strict=True)
        }
    about = {"model": arch.name, "precision": precision, "input": {IMAGE: taken}, "output": given}
    return about | {"classes": weights.classes} | image


def trace(deployed: Deployed, example: Tensor, free: dict[int, str], least: int) -> torch.export.ExportedProgram:
    """The graph of a model, for any device.

    Args:
        example: [2, C, H, W]
        free: names of the input's axes whose length is free
        least: that of height and width, where they are free
    """
    shape = {axis: torch.export.Dim(name, min=least if axis else None) for axis, name in free.items()}
    program = torch.export.export(deployed, (example,), dynamic_shapes=(shape,))
    for node in list(program.graph.nodes):
        node.meta.pop("stack_trace", None)  # paths of this machine
        if node.target is torch.ops.aten._assert_tensor_metadata.default:  # that a tensor is on the device of now
            program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


def load(path: Path, to: str, weights: Weights) -> Run:
    """Read an exported file as its user will, in its own runtime on the CPU.

    Args:
        weights: for safetensors: of which model, and whether with a head
    Raises:
        UserError: the runtime cannot read the file or, later, run it
    """
    return guard(guard(_load, to)(path, to, weights), to)


def _load(path: Path, to: str, weights: Weights) -> Run:
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda images: [torch.from_numpy(output) for output in session.run(None, {IMAGE: images.numpy()})]
    if to == "torch-export":
        return run(torch.export.load(path).module())
    if to == "torchscript":
        return run(torch.jit.load(path))
    options = {"num_classes": weights.outputs, "checkpoint_path": str(path)} | timm_options(weights.arch)
    options = options if weights.outputs else timm_backbone(path, weights)
    model = run(timm.create_model(weights.arch.name, **options).eval())
    with safe_open(path, framework="pt") as file:
        held = json.loads(file.metadata()["config"])["pretrained_cfg"]
    mean, std = torch.tensor(held["mean"]), torch.tensor(held["std"])
    return lambda images: model(normalize(images, mean, std))


def call(path: Path, to: str, weights: Weights) -> str:
    """The Python expression that gives outputs for `images`; for safetensors the one that gives timm's model."""
    if to == "safetensors":
        return (how_to_load if weights.outputs else how_to_load_backbone)(path, weights, "timm")
    return {
        "onnx": f'onnxruntime.InferenceSession("{path}").run(None, {{"{IMAGE}": images.numpy()}})',
        "torch-export": f'torch.export.load("{path}").module()(images)',
        "torchscript": f'torch.jit.load("{path}")(images)',
    }[to]


def compare(expected: list[list[Tensor]], found: Run, batches: list[Tensor], tolerance: float, what: str) -> float:
    """The largest difference of a model's outputs from those expected, as a share of the output's largest value.

    Args:
        expected: outputs for each batch
        batches: images [B, C, H, W] from 0 to 1
        what: how the error begins
    Raises:
        UserError: the difference exceeds the tolerance or is not finite, or the likeliest class of an image is another
    """
    largest = 0.0
    for images, wanted in zip(batches, expected, strict=True):
        for output, want in zip(found(images), wanted, strict=True):
            if output.shape != want.shape:
                raise UserError(f"{what} gives {list(output.shape)} for {list(want.shape)}")
            share = float((output - want).abs().max() / want.abs().max())
            if not share <= tolerance:
                raise UserError(
                    f"{what} differs from the source by {share:.1e} of the largest output in a batch of {len(images)}, "
                    f"more than {tolerance:.0e}"
                )
            others = int((output.argmax(1) != want.argmax(1)).sum()) if output.ndim == 2 else 0
            if others:
                raise UserError(f"{what} gives {others} of {len(images)} images another class than the source")
            largest = max(largest, share)
    return largest


def guard(function: Callable, runtime: str) -> Callable:
    """The function, with whatever a runtime raises as a `UserError`, and without its chatter."""

    def guarded(*inputs):
        try:
            with silence():
                return function(*inputs)
        except Exception as error:  # each runtime has errors of its own
            raise UserError(
                f"the runtime of {runtime} cannot take this model here ({reason(error)}): choose another format or "
                "precision"
            ) from error

    return guarded


@contextmanager
def silence() -> Iterator[None]:
    """A context without the libraries' chatter: deprecations of torch.jit, timm's log of tensors it has no use for."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
