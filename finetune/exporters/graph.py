"""The exported graph: images [B, C, H, W], float32 from 0 to 1, to logits or feature maps, in fp32 or fp16.

The graph normalises the images. B is dynamic; H and W are too for backbones, for tasks other than classification, and
for classifiers on request.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from configs.schema import PATCH_PER_STEM_STRIDE, Encoder
from data.transforms import normalize
from models.convnext import Block, ConvNeXt
from models.sparse.layouts import Dense
from models.weights import Weights


class Deployed(nn.Module):
    """The exported model: images to the task's output, such as logits [B, classes], or, without a head, to the feature
    maps [B, Ci, Hi, Wi] of the four stages; outputs are float32.

    `model` is in evaluation mode; `mean` and `std` are [C].
    """

    def __init__(self, model: ConvNeXt, mean: Tensor, std: Tensor):
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = normalize(image, self.mean, self.std).to(self.model.stem[0].weight.dtype)
        if self.model.head is not None:
            return self.model(x)
        return tuple(x.permute(0, 3, 1, 2).float() for x in self.model.forward_stages(x, Dense()))


def to_fp16(deployed: Deployed) -> Deployed:
    """Copy with fp16 weights and activations in convolutions and linear layers.

    Head, LayerNorm and GRN's norm stay fp32: in fp16, GRN's sum of squares overflows from activations of 256 on.
    """
    low = copy.deepcopy(deployed)
    for module in [*low.model.stem.modules(), *low.model.stages.modules()]:
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
            module.register_forward_hook(lambda _, inputs, output: output.half())
        elif isinstance(module, nn.Conv2d | nn.Linear):
            module.half()
        elif isinstance(module, Block) and module.gamma is not None:
            module.gamma.data = module.gamma.data.half()
    if low.model.head is not None:
        low.model.head.register_forward_pre_hook(lambda _, inputs: tuple(map(_to_float, inputs)))
    return low


def _to_float(tokens: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """Tokens of one stage, or of several."""
    return tokens.float() if isinstance(tokens, Tensor) else [x.float() for x in tokens]


def min_free_side(arch: Encoder) -> int:
    """Minimum dynamic height and width in pixels: torch.export fixes a side of a single patch."""
    return 2 * PATCH_PER_STEM_STRIDE * arch.stem_stride


@dataclass(frozen=True)
class Shape:
    """What an exported graph takes: one image at a time or a batch of any size; whether height and width are free."""

    one_by_one: bool = False
    free: tuple[bool, bool] = (False, False)


def free_sides(weights: Weights, dynamic: bool) -> tuple[bool, bool]:
    """Whether (height, width) of the exported model are free: of a classifier only if it is to be `dynamic`."""
    free = dynamic or not weights.outputs
    return tuple(free and side >= min_free_side(weights.arch) for side in weights.preprocessing.size)


def trace(deployed: Deployed, example: Tensor, free: dict[int, str], min_side: int) -> torch.export.ExportedProgram:
    """Export the graph of a model, for any device, from images [2, C, H, W]; `free` names the dynamic axes.

    Dynamic sides of a model with a head are multiples of a patch, half of `min_side`.
    """
    dim, patch = torch.export.Dim, min_side // 2
    if deployed.model.head is None:
        shape = {axis: dim(name, min=min_side if axis else None) for axis, name in free.items()}
    else:
        shape = {axis: patch * dim(f"{name}_patches", min=2) if axis else dim(name) for axis, name in free.items()}
    program = torch.export.export(deployed, (example,), dynamic_shapes=(shape,))
    for node in list(program.graph.nodes):
        node.meta.pop("stack_trace", None)  # paths of this machine
        if node.target is torch.ops.aten._assert_tensor_metadata.default:  # would pin the graph to this device
            program.graph.erase_node(node)
    program.graph_module.recompile()
    return program
