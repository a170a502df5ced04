"""`--dry-run`: steps, parameter groups and estimated memory of a run, without starting it."""

import math
from dataclasses import replace

import torch
from torch import nn

from configs.errors import counted
from configs.schema import Finetune, Optim, Pretrain
from launch.training.fit import Check, any_batch, fit_batch, frozen_bytes, largest, measured_counts, room_on
from launch.training.memory import GIB, Inputs, group_bytes
from launch.training.precision import precision
from models import kernels

LEGEND = """
An estimate: the sum of all parts at once. Not included: CUDA context, NCCL, temporary tensors, fragmentation,
evaluation, and the loader, which uses main memory.
  master       ZeRO's copy of the weights that a rank updates; DeepSpeed makes it even though the weights are fp32
  buffers      DeepSpeed's: gradients being reduced; with ZeRO 3 also the weights gathered for a pass
  activations  of a micro batch in {kind}, recompute {mode}; measured with {counts} images on this {device}
  frozen       weights that are not trained, such as those of a teacher
  free         now, for one rank; a run that needs more is refused, and --optim.micro_batch auto leaves a margin"""
ON_CPU = """\
               The kernels, which are off here, store .75 times as much for ConvNeXt V2 in fp32, .55 in bf16; with
               recompute as much in fp32, up to 1.5 times as much in bf16"""
NAMES = {"adamw": "AdamW", "muon": "Muon"}
AUTO = """\
               optim.precision auto is {kind} here and bf16 on a GPU; use --optim.precision bf16 to plan for a GPU"""


def plan(
    config: Pretrain | Finetune, model: nn.Module, groups: list[dict], images: int, ranks: int,
    inputs: Inputs = lambda image: (image,), check: Check = any_batch, every: bool = False, beside: int = 0,
) -> str:  # fmt: skip
    """Text of a dry run: batch, learning rate, steps, parameter groups, memory per rank for each ZeRO stage.

    Args:
        model: moved to the GPU, if there is one
        images: size of the training split
        ranks: 0 = one for each GPU of this machine, or one
        inputs: maps images [B, C, H, W] to the arguments of the model's forward
        check: raises `UserError` for a micro batch that the task cannot use
        every: also a line for each parameter, below the summary
        beside: bytes of frozen models that `inputs` uses
    Raises:
        UserError: the batch does not divide, or bf16 on a GPU without it
    """
    ranks = ranks or torch.cuda.device_count() or 1
    optim = fit_batch(config.optim, images, ranks, config.data.repeats, check)
    counts = " and ".join(map(str, measured_counts(optim, ranks, config.data.repeats)))
    device = torch.device("cuda" if config.run.device != "cpu" and torch.cuda.is_available() else "cpu")
    kind = precision(optim, device, isinstance(config, Pretrain))
    encoder = getattr(model, "encoder", model)
    parameters = sum(p.numel() for p in model.parameters())
    height, width = config.data.height_width
    kernels.use(config.run.kernels == "fused")
    room = room_on(device, replace(config, optim=optim), model, groups, ranks, inputs, beside)
    best = largest(room.limit, room.roomy, optim.batch_size // ranks, check)
    if optim.micro_batch == "auto":
        optim = replace(optim, micro_batch=best)
    micro, _ = optim.accumulation(ranks)
    extra = {"activations": room.need.activations.bytes(micro)}
    if frozen := frozen_bytes(model, groups) + beside:
        extra["frozen"] = frozen
    if isinstance(config, Finetune) and config.augment.ema:
        extra["EMA"] = 4 * parameters
    notes = [LEGEND.format(kind=kind, mode=encoder.recompute, counts=counts, device=device.type.upper())]
    if device.type == "cpu":
        notes += [] if config.run.kernels == "fused" and kernels.compiled() else [ON_CPU]
        notes += [AUTO.format(kind=kind)] if optim.precision == "auto" and kind != "bf16" else []
    lines = [f"{config.run.name} on {counted(ranks, 'rank')}; nothing is started or written\n"]
    lines += [f"model   {encoder.arch.name}, {parameters / 1e6:.1f}M parameters, images of {height}x{width}"]
    lines += schedule(optim, images, ranks, config.data.repeats)
    lines += ["\nparameter groups", *group_table(model, groups, optim)]
    lines += ["\nmemory per rank, GiB", *memory_table(groups, ranks, optim.zero_stage, extra)]
    enough = f"enough for micro batches of {best}" if best else "too little for any micro batch"
    lines += [f"\nfree  {room.free / GIB:.2f} on this {device.type.upper()}: {enough}"]
    if every:
        notes += ["\nparameters", *parameter_table(model, groups, optim)]
    else:
        notes += [f"\n--parameters lists all {sum(1 for _ in model.parameters())} parameters, with decay and rate"]
    return "\n".join(lines + notes)


def schedule(optim: Optim, images: int, ranks: int, repeats: int = 1) -> list[str]:
    """Lines on the global batch, the learning rate and the number of steps."""
    micro, accumulation = optim.accumulation(ranks)
    steps, dropped = divmod(images, optim.batch_size)
    total = steps * optim.epochs
    warmup = min(total, math.ceil(optim.warmup_epochs * steps))
    shown = f"each epoch drops {dropped:,}, chosen anew"
    if repeats > 1:
        shown = f"each epoch has {repeats} crops of {steps * optim.batch_size // repeats:,}, chosen anew"
    return [
        f"batch   micro batch {micro} x accumulation {accumulation} x {counted(ranks, 'rank')} = {optim.batch_size}",
        f"lr      {optim.lr:g} x {optim.batch_size} / 256 = {optim.scaled(optim.lr):.3g} after warm-up, "
        f"{optim.scaled(optim.min_lr):.3g} at the end",
        f"images  {images:,}; {shown}",
        f"steps   {steps:,} per epoch x {counted(optim.epochs, 'epoch')} = {total:,}; the first {warmup:,} are warm-up",
    ]


def group_table(model: nn.Module, groups: list[dict], optim: Optim) -> list[str]:
    """Parameter groups: size, optimizer, weight decay, learning rate after warm-up, first and last parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    rows = [("tensors", "parameters", "optimizer", "decay", "lr scale", "lr", "first and last parameter")]
    for group in groups:
        params = group["params"]
        ends = dict.fromkeys((names[params[0]], names[params[-1]]))  # one name if there is one tensor
        count = sum(p.numel() for p in params)
        rows.append((f"{len(params)}", f"{count:,}", *_rates(group, optim), ", ".join(ends)))
    return _aligned(rows)


def parameter_table(model: nn.Module, groups: list[dict], optim: Optim) -> list[str]:
    """Parameters: shape; optimizer, weight decay, learning rate scale and rate after warm-up, or `frozen`; name."""
    group_of = {parameter: group for group in groups for parameter in group["params"]}
    rows = [("shape", "optimizer", "decay", "lr scale", "lr", "parameter")]
    for name, parameter in model.named_parameters():
        rates = _rates(group_of[parameter], optim) if parameter in group_of else ("frozen", "", "", "")
        rows.append(("x".join(map(str, parameter.shape)), *rates, name))
    return _aligned(rows)


def _rates(group: dict, optim: Optim) -> tuple[str, str, str, str]:
    """Optimizer, weight decay, learning rate scale and learning rate after warm-up of a parameter group."""
    scale, name = group["lr_scale"], NAMES[group["optimizer"]]
    return name, f"{group['weight_decay']:g}", f"{scale:.4g}", f"{optim.scaled(optim.lr) * scale:.2e}"


def memory_table(groups: list[dict], ranks: int, stage: int, extra: dict[str, int]) -> list[str]:
    """Memory per rank for each ZeRO stage, GiB. `stage` is the configured one, `extra` bytes are needed in all."""
    muon = any(group["optimizer"] == "muon" for group in groups)
    rows = [("ZeRO", *group_bytes(groups, ranks, 0), *extra, "sum", "")]
    for row in range(2 if muon else 4):
        parts = (group_bytes(groups, ranks, row) | extra).values()
        cells = [f"{count / GIB:.2f}" for count in (*parts, sum(parts))]
        rows.append((f"{row}", *cells, "<- this run" if row == stage else ""))
    return _aligned(rows)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table; all columns but the last are aligned to the right."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    return ["  ".join([*map(str.rjust, row, widths), row[-1]]).rstrip() for row in rows]
