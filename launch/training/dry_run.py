"""`--dry-run`: steps, parameter groups and estimated memory of a run, without starting it."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from configs.errors import UserError
from configs.schema import Finetune, Optim, Pretrain
from launch.training.engine import bucket_size
from launch.training.precision import autocast, precision
from models import kernels
from models.convnext import Block, Mlp

FLATTENED = 500_000_000  # elements that DeepSpeed flattens at a time without ZeRO, to reduce them
MEASURED_BATCHES = 2, 4  # images; a batch of one would avoid copies that larger ones need
RECOMPUTED = {"mlp": Mlp, "block": Block}  # modules that activation checkpointing recomputes, by mode
GIB = 2**30

LEGEND = """
An estimate: the sum of all parts at once. Not included: CUDA context, NCCL, temporary tensors, fragmentation,
evaluation, and the loader, which uses main memory.
  master       ZeRO's copy of the weights that a rank updates; DeepSpeed makes it even though the weights are fp32
  buffers      DeepSpeed's: gradients being reduced; with ZeRO 3 also the weights gathered for a pass
  activations  of a micro batch in {kind}, recompute {mode}; measured with {few} and {many} images on this {device}"""
ON_CPU = """\
               The kernels, which are off here, store .75 times as much for ConvNeXt V2 in fp32, .55 in bf16; with
               recompute as much in fp32, up to 1.5 times as much in bf16"""
AUTO = """\
               optim.precision auto is {kind} here and bf16 on a GPU; use --optim.precision bf16 to plan for a GPU"""


def plan(
    config: Pretrain | Finetune, model: nn.Module, groups: list[dict], images: int, ranks: int,
    inputs: Callable[[Tensor], tuple[Tensor, ...]] = lambda image: (image,),
) -> str:  # fmt: skip
    """Text of a dry run: batch, learning rate, steps, parameter groups, memory per rank for each ZeRO stage.

    Args:
        model: moved to the GPU, if there is one
        images: size of the training split
        ranks: 0 = one for each GPU of this machine, or one
        inputs: maps images [B, C, H, W] to the arguments of the model's forward
    Raises:
        UserError: the batch does not divide, there are fewer images than one batch, or bf16 on a GPU without it
    """
    optim = config.optim
    ranks = ranks or torch.cuda.device_count() or 1
    micro, _ = optim.accumulation(ranks)
    device = torch.device("cuda" if config.run.device != "cpu" and torch.cuda.is_available() else "cpu")
    kind = precision(optim, device, isinstance(config, Pretrain))
    encoder = getattr(model, "encoder", model)
    parameters = sum(p.numel() for p in model.parameters())
    height, width = config.data.height_width
    steps = schedule(optim, images, ranks)
    kernels.use(config.run.kernels == "fused")
    few, many = MEASURED_BATCHES
    batches = [inputs(torch.rand(count, encoder.arch.channels, height, width)) for count in (few, many)]
    extra = {"activations": activation_bytes(model.to(device), batches, micro, kind != "fp32")}
    if isinstance(config, Finetune) and config.augment.ema:
        extra["EMA"] = 4 * parameters
    notes = [LEGEND.format(kind=kind, mode=encoder.recompute, few=few, many=many, device=device.type.upper())]
    if device.type == "cpu":
        notes += [] if config.run.kernels == "fused" and kernels.compiled() else [ON_CPU]
        notes += [AUTO.format(kind=kind)] if optim.precision == "auto" and kind != "bf16" else []
    lines = ["parameters", *parameter_table(model, groups, optim)]
    lines += [f"\n{config.run.name} on {_count(ranks, 'rank')}; nothing is started or written\n"]
    lines += [f"model   {encoder.arch.name}, {parameters / 1e6:.1f}M parameters, images of {height}x{width}", *steps]
    lines += ["\nparameter groups", *group_table(model, groups, optim)]
    lines += ["\nmemory per rank, GiB", *memory_table(groups, ranks, optim.zero_stage, extra)]
    return "\n".join(lines + notes)


def schedule(optim: Optim, images: int, ranks: int) -> list[str]:
    """Lines on the global batch, the learning rate and the number of steps."""
    micro, accumulation = optim.accumulation(ranks)
    steps, dropped = divmod(images, optim.batch_size)
    if steps == 0:
        raise UserError(f"{images:,} images are fewer than one batch: lower optim.batch_size (now {optim.batch_size})")
    total = steps * optim.epochs
    warmup = min(total, math.ceil(optim.warmup_epochs * steps))
    return [
        f"batch   micro batch {micro} x accumulation {accumulation} x {_count(ranks, 'rank')} = {optim.batch_size}",
        f"lr      {optim.lr:g} x {optim.batch_size} / 256 = {optim.scaled(optim.lr):.3g} after warm-up, "
        f"{optim.scaled(optim.min_lr):.3g} at the end",
        f"images  {images:,}; each epoch drops {dropped:,}, chosen anew",
        f"steps   {steps:,} per epoch x {_count(optim.epochs, 'epoch')} = {total:,}; the first {warmup:,} are warm-up",
    ]


def group_table(model: nn.Module, groups: list[dict], optim: Optim) -> list[str]:
    """Parameter groups: size, weight decay, learning rate after warm-up, first and last parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    rows = [("tensors", "parameters", "decay", "lr scale", "lr", "first and last parameter")]
    for group in groups:
        params = group["params"]
        ends = dict.fromkeys((names[params[0]], names[params[-1]]))  # one name if there is one tensor
        count = sum(p.numel() for p in params)
        rows.append((f"{len(params)}", f"{count:,}", *_rates(group, optim), ", ".join(ends)))
    return _aligned(rows)


def parameter_table(model: nn.Module, groups: list[dict], optim: Optim) -> list[str]:
    """Parameters: shape, weight decay, learning rate scale and learning rate after warm-up, or `frozen`; name."""
    group_of = {parameter: group for group in groups for parameter in group["params"]}
    rows = [("shape", "decay", "lr scale", "lr", "parameter")]
    for name, parameter in model.named_parameters():
        rates = _rates(group_of[parameter], optim) if parameter in group_of else ("frozen", "", "")
        rows.append(("x".join(map(str, parameter.shape)), *rates, name))
    return _aligned(rows)


def _rates(group: dict, optim: Optim) -> tuple[str, str, str]:
    """Weight decay, learning rate scale and learning rate after warm-up of a parameter group."""
    scale = group["lr_scale"]
    return f"{group['weight_decay']:g}", f"{scale:.4g}", f"{optim.scaled(optim.lr) * scale:.2e}"


def memory_table(groups: list[dict], ranks: int, stage: int, extra: dict[str, int]) -> list[str]:
    """Memory per rank for each ZeRO stage, GiB. `stage` is the configured one, `extra` bytes are needed in all."""
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    rows = [("ZeRO", *state_bytes(sizes, ranks, 0), *extra, "sum", "")]
    for row in range(4):
        parts = (state_bytes(sizes, ranks, row) | extra).values()
        cells = [f"{count / GIB:.2f}" for count in (*parts, sum(parts))]
        rows.append((f"{row}", *cells, "<- this run" if row == stage else ""))
    return _aligned(rows)


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


def activation_bytes(model: nn.Module, batches: list[Sequence[Tensor]], micro: int, low: bool) -> int:
    """Bytes that a micro batch stores for its backward pass, extrapolated from two smaller batches.

    They are linear in the images; the constant part is copies of weights, in bf16 or reordered. With activation
    checkpointing, the largest recomputed block or MLP is added. `batches` are the model's inputs for two numbers of
    images, `micro` is the number wanted, `low` is bf16 autocast.
    """
    encoder = getattr(model, "encoder", model)
    mode = encoder.recompute
    recomputed = [module for module in encoder.modules() if isinstance(module, RECOMPUTED.get(mode, ()))]
    device = next(model.parameters()).device
    measured = []
    for batch in batches:
        inputs = [tensor.to(device) for tensor in batch]
        stored, _ = saved_bytes(model, inputs, low)
        if recomputed:  # the hooks do not see inside a recomputed module
            encoder.recompute = "none"
            stored += saved_bytes(model, inputs, low, recomputed)[1]
            encoder.recompute = mode
        measured.append(stored)
    few, many = (len(batch[0]) for batch in batches)
    return round(measured[0] + (micro - few) * (measured[1] - measured[0]) / (many - few))


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


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table; all columns but the last are aligned to the right."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    return ["  ".join([*map(str.rjust, row, widths), row[-1]]).rstrip() for row in rows]
