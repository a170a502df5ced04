"""A model in fp16 for finetune/export.py: which numbers stay fp32, and which layer fp16 cannot hold."""

import copy

import torch
from torch import Tensor, nn

from configs.errors import UserError
from finetune.exporters import Deployed, compare, guard, run
from models.convnext import Block

# Every result is rounded by up to 2^-11, a base model's about 400 times from image to logits: errors of random sign add
# up to sqrt(400) * 2^-11 = 1 % of the largest output.
HALF_TOLERANCE = 1e-2
LARGEST = torch.finfo(torch.float16).max  # 65504


def half(deployed: Deployed) -> Deployed:
    """A copy whose convolutions and linear layers have fp16 weights and tokens.

    The head, LayerNorm and GRN's norm stay fp32: GRN's sum of squares exceeds fp16 from activations of 256 on.
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
    return low


def half_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in fp16."""
    return {name: tensor.half() for name, tensor in tensors.items()}


def check_half(source: Deployed, low: Deployed, expected: list[list[Tensor]], batches: list[Tensor]) -> None:
    """Raise `UserError` where fp16 does not suit a model: as torch computes it, since runtimes may take fp32 on a CPU.

    The message names the first layer that fp16 cannot hold, if that is why.
    """
    try:
        compare(expected, guard(run(low), "torch"), batches, HALF_TOLERANCE, "--fp16 does not suit this model: it")
    except UserError as error:
        name, value = too_large(source, batches)
        if not name:
            raise
        raise UserError(
            f"--fp16 does not suit this model: {name} reaches {value:.3g}, fp16 ends at {LARGEST:.0f}: leave it out"
        ) from error


def too_large(source: Deployed, batches: list[Tensor]) -> tuple[str, float]:
    """(what first exceeds fp16, its largest number); what it is is "" where nothing does."""
    found: list[tuple[str, float]] = []

    def look(name: str):
        def hook(_, inputs: tuple, output: Tensor) -> None:
            for what, x in ((f"what enters {name}", inputs[0]), (name, output)):
                if (value := float(x.abs().max())) > LARGEST:
                    found.append((what, value))

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in source.model.named_modules() if name]
    for images in batches:
        run(source)(images)
    for handle in handles:
        handle.remove()
    return found[0] if found else ("", 0.0)
