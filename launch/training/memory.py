"""Memory of a run: DeepSpeed's state, computed, and activations, measured with a few images; what a device has free."""

import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from configs.machine import available_memory
from launch.training.engine import bucket_size
from launch.training.muon import owners, state_size
from launch.training.precision import autocast
from models.convnext import Block, Mlp

FLATTENED = 500_000_000  # elements that DeepSpeed flattens at a time without ZeRO, to reduce them
MEASURED_BATCHES = 2, 4  # images; a batch of one would avoid copies that larger ones need
RECOMPUTED = {"mlp": Mlp, "block": Block}  # modules that activation checkpointing recomputes, by mode
GIB = 2**30
Inputs = Callable[[Tensor], tuple[Tensor, ...]]  # images [B, C, H, W] -> the arguments of the model's forward


@dataclass(frozen=True)
class Activations:
    """Bytes that a micro batch stores for its backward pass: linear in its images.

    The constant part is copies of weights, in bf16 or reordered.
    """

    constant: float
    per_image: float

    def bytes(self, micro: int) -> int:
        """Bytes of a micro batch of so many images."""
        return round(self.constant + micro * self.per_image)


def state_bytes(sizes: Sequence[int], ranks: int, stage: int) -> dict[str, int]:
    """Maximum bytes per rank of DeepSpeed 0.19's state for fp32 weights and AdamW, without activations.

    ZeRO 1 to 3 clone the rank's part of the weights for AdamW to update, and reduce gradients in a bucket. ZeRO 2 and 3
    flatten gradients again to reduce them; 3 gathers all weights of a model below a billion parameters for a pass.
    tests/launch/training/test_dry_run.py compares these numbers with an engine.

    `sizes` are the numbers of parameters of the groups.
    """
    total = sum(sizes)
    part = sum(2 * math.ceil(size / (2 * ranks)) for size in sizes) if stage else total  # groups are padded
    flattened, bucket = min(total, FLATTENED), bucket_size(total)
    elements = {
        "weights": (total, part * ranks, part * ranks, part)[stage],
        "gradients": (total, total, part, part)[stage],
        "master": part if stage else 0,
        "AdamW": 2 * part,
        "buffers": (flattened, bucket, 2 * bucket, 2 * bucket + total)[stage],
    }
    return {name: 4 * count for name, count in elements.items()}


def group_bytes(groups: Sequence[dict], ranks: int, stage: int) -> dict[str, int]:
    """`state_bytes` of parameter groups; with Muon, which has no ZeRO 2 and 3, that of `MuonAdamW`."""
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    if all(group["optimizer"] == "adamw" for group in groups):
        return state_bytes(sizes, ranks, stage)
    owner, loads = owners(groups, ranks if stage else 1), [0] * ranks
    for group in groups:
        for parameter in group["params"]:
            loads[owner[parameter]] += state_size(group, parameter)
    elements = {
        "weights": sum(sizes),
        "gradients": sum(sizes),
        "optimizer": max(loads),
        "buffers": min(sum(sizes), FLATTENED),
    }
    return {name: 4 * count for name, count in elements.items()}


def measure_activations(model: nn.Module, batches: Sequence[Sequence[Tensor]], low: bool) -> Activations:
    """What a training step stores for its backward pass, from forward passes of two small batches.

    With activation checkpointing, the largest recomputed block or MLP is added. torch's generators are left as they
    were.

    Args:
        batches: the model's inputs for two numbers of images; for one number, the memory is taken as proportional
        low: bf16 autocast
    """
    encoder = getattr(model, "encoder", model)
    mode = encoder.recompute
    recomputed = [module for module in encoder.modules() if isinstance(module, RECOMPUTED.get(mode, ()))]
    device = next(model.parameters()).device
    measured = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # of drop path
        for batch in batches:
            inputs = [tensor.to(device) for tensor in batch]
            stored, _ = saved_bytes(model, inputs, low)
            if recomputed:  # the hooks do not see inside a recomputed module
                encoder.recompute = "none"
                stored += saved_bytes(model, inputs, low, recomputed)[1]
                encoder.recompute = mode
            measured.append((len(inputs[0]), stored))
    (few, less), (many, more) = measured[0], measured[-1]
    per_image = (more - less) / (many - few) if many > few else less / few
    return Activations(less - few * per_image, per_image)


def saved_bytes(
    model: nn.Module, inputs: list[Tensor], low: bool, modules: Sequence[nn.Module] = ()
) -> tuple[int, int]:
    """Bytes that a forward pass saves for the backward pass, without parameters: all, and the largest of `modules`."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}  # bytes by address; addresses are unique while the output lives
    before, spans = [], [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself could be a reference cycle

    hooks = [m.register_forward_pre_hook(lambda *_: before.append(sum(storages.values()))) for m in modules]
    hooks += [m.register_forward_hook(lambda *_: spans.append(sum(storages.values()) - before.pop())) for m in modules]
    with saved_tensors_hooks(pack, lambda tensor: tensor), autocast(inputs[0].device, "bf16" if low else "fp32"):
        output = model(*inputs)
    for hook in hooks:
        hook.remove()
    del output
    return sum(storages.values()), max(spans)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device: free on the GPU, or see `available_memory`."""
    if device.type == "cpu":
        return available_memory()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # of torch's own cache
    return torch.cuda.mem_get_info(device)[0] + unused


def owner(device: torch.device) -> str:
    """Name of what has a device's memory, which several ranks may share: a GPU or a machine."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else socket.gethostname()
