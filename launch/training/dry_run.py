"""`--dry-run`: what a run would do and need, before anything is started: steps, parameter groups, memory."""

import io
import math
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from configs.errors import UserError
from configs.schema import Finetune, Optim, Pretrain
from launch.training.engine import bucket_size
from launch.training.precision import precision
from models import kernels
from models.convnext import Block, Mlp

FLAT = 500_000_000  # elements that DeepSpeed flattens at a time without ZeRO, to reduce them
PROBE = 2, 4  # images of the two forward passes that are measured; a single one is spared copies that several need
PIECES = {"mlp": Mlp, "block": Block}  # what the backward pass computes again at once
GIB, WIDTH = 2**30, 120

ABOUT = """
An estimate, as if all were there at once. It leaves out the CUDA context, NCCL, tensors that come and go in a pass,
fragmentation, evaluation, and the loader, which takes the machine's memory.
  master       ZeRO's second copy of the weights that a rank updates; DeepSpeed makes it though the first is fp32 too
  buffers      DeepSpeed's: gradients that are being reduced; with ZeRO 3 also the weights gathered for a pass
  activations  a micro batch in {kind}, recompute {mode}; from {few} and {more} images, measured on this {device}"""
ON_CPU = """\
               A GPU keeps other things. With this project's kernels: .75 of it for ConvNeXt V2 in fp32, .55 in bf16;
               with recompute as much in fp32, and up to 1.5 times as much in bf16"""
AUTO = """\
               optim.precision auto is fp32 here and bf16 on a GPU; --optim.precision bf16 plans for one"""


def plan(
    config: Pretrain | Finetune, model: nn.Module, groups: list[dict], images: int, ranks: int,
    inputs: Callable[[Tensor], tuple[Tensor, ...]] = lambda image: (image,),
) -> str:  # fmt: skip
    """The plan of a run as text: batch, learning rate, steps, parameter groups, memory of a rank for each ZeRO stage.

    Args:
        model: as it will be trained; it is moved to the GPU, if there is one to measure with
        groups: its parameter groups, with `weight_decay` and `lr_scale`
        images: in the training split
        ranks: to plan for; 0 = as many as this machine would start: one for each GPU, or one
        inputs: maps images [B, C, H, W] to what the model's forward takes
    Raises:
        UserError: the batch does not divide, there are fewer images than one batch, or bf16 on a GPU that has none
    """
    optim = config.optim
    ranks = ranks or torch.cuda.device_count() or 1
    micro, _ = optim.accumulation(ranks)
    device = torch.device("cuda" if config.run.device != "cpu" and torch.cuda.is_available() else "cpu")
    kind = precision(optim, device)
    encoder = getattr(model, "encoder", model)
    parameters = sum(p.numel() for p in model.parameters())
    height, width = config.data.height_width
    steps = schedule(optim, images, ranks)
    kernels.use(config.run.kernels == "triton")
    shape = encoder.arch.channels, height, width
    probes = [inputs(torch.rand(count, *shape)) for count in PROBE]
    more = {"activations": activations(model.to(device), probes, micro, kind != "fp32")}
    if isinstance(config, Finetune) and config.augment.ema:
        more["EMA"] = 4 * parameters
    on = "CPU" if device.type == "cpu" else "GPU"
    remarks = [ABOUT.format(kind=kind, mode=encoder.recompute, few=PROBE[0], more=PROBE[1], device=on)]
    if device.type == "cpu":
        remarks += [ON_CPU, AUTO] if optim.precision == "auto" else [ON_CPU]
    return _text(
        "parameters",
        parameter_table(model, groups, optim),
        f"\n{config.run.name} on {_count(ranks, 'rank')}; nothing is started, nothing written\n",
        f"model   {encoder.arch.name}, {parameters / 1e6:.1f}M parameters, images of {height}x{width}",
        *steps,
        "\nparameter groups",
        group_table(model, groups, optim),
        "\nmemory of a rank, GiB",
        memory_table(groups, ranks, optim.zero_stage, more),
        *remarks,
    )


def schedule(optim: Optim, images: int, ranks: int) -> list[str]:
    """Lines that say how a global batch is made up, how the learning rate goes, and how many steps there are."""
    micro, accumulation = optim.accumulation(ranks)
    steps, left_out = divmod(images, optim.batch_size)
    if steps == 0:
        raise UserError(f"{images:,} images are fewer than one batch: lower optim.batch_size (now {optim.batch_size})")
    total = steps * optim.epochs
    warmup = min(total, math.ceil(optim.warmup_epochs * steps))
    return [
        f"batch   micro batch {micro} x accumulation {accumulation} x {_count(ranks, 'rank')} = {optim.batch_size}",
        f"lr      {optim.lr:g} x {optim.batch_size} / 256 = {optim.scaled(optim.lr):.3g} after warm-up, "
        f"{optim.scaled(optim.min_lr):.3g} at the end",
        f"images  {images:,}; each epoch leaves out {left_out:,}, others each time",
        f"steps   {steps:,} an epoch x {_count(optim.epochs, 'epoch')} = {total:,}; warm-up takes the first {warmup:,}",
    ]


def group_table(model: nn.Module, groups: list[dict], optim: Optim) -> Table:
    """Each parameter group: its size, weight decay, learning rate after warm-up, first and last parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    peak = optim.scaled(optim.lr)
    table = _table("tensors", "parameters", "decay", "lr scale", "lr")
    table.add_column("first and last parameter")
    for group in groups:
        params = group["params"]
        ends = dict.fromkeys((names[params[0]], names[params[-1]]))  # one name if there is one tensor
        table.add_row(
            str(len(params)), f"{sum(p.numel() for p in params):,}", f"{group['weight_decay']:g}",
            f"{group['lr_scale']:.4g}", f"{peak * group['lr_scale']:.2e}", ", ".join(ends),
        )  # fmt: skip
    return table


def parameter_table(model: nn.Module, groups: list[dict], optim: Optim) -> Table:
    """Each parameter: its shape, weight decay, learning rate scale and learning rate after warm-up; or `frozen`."""
    peak = optim.scaled(optim.lr)
    group_of = {parameter: group for group in groups for parameter in group["params"]}
    table = _table("shape", "decay", "lr scale", "lr")
    table.add_column("parameter")
    for name, parameter in model.named_parameters():
        shape = "x".join(map(str, parameter.shape))
        group = group_of.get(parameter)
        scale = group["lr_scale"] if group else 0
        numbers = (f"{group['weight_decay']:g}", f"{scale:.4g}", f"{peak * scale:.2e}") if group else ("frozen", "", "")
        table.add_row(shape, *numbers, name)
    return table


def memory_table(groups: list[dict], ranks: int, stage: int, more: dict[str, int]) -> Table:
    """Memory of a rank under each ZeRO stage, GiB. `stage` is the one configured, `more` bytes that all have alike."""
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    table = _table("ZeRO", *states(sizes, ranks, 0), *more, "sum")
    table.add_column("")
    for each in range(4):
        held = states(sizes, ranks, each) | more
        cells = [f"{count / GIB:.2f}" for count in (*held.values(), sum(held.values()))]
        table.add_row(str(each), *cells, "<- this run" if each == stage else "")
    return table


def states(sizes: Sequence[int], ranks: int, stage: int) -> dict[str, int]:
    """Bytes that DeepSpeed 0.19 holds on a rank, at most, for fp32 weights and AdamW; without activations.

    ZeRO 1 to 3 clone the rank's part of the weights for AdamW to update, and reduce gradients in a bucket. ZeRO 2 and 3
    flatten them once more to reduce them; 3 gathers all weights of a model of less than a billion parameters for a
    whole pass. tests/launch/training/test_dry_run.py counts it all in an engine.

    Args:
        sizes: number of parameters of each group
        stage: of ZeRO, 0 to 3
    """
    whole = sum(sizes)
    part = sum(2 * math.ceil(size / (2 * ranks)) for size in sizes) if stage else whole  # each group is padded
    flat, reduced = min(whole, FLAT), bucket_size(whole)
    elements = {
        "weights": (whole, part * ranks, part * ranks, part)[stage],
        "gradients": (whole, whole, part, part)[stage],
        "master": part if stage else 0,
        "AdamW": 2 * part,
        "buffers": (flat, reduced, 2 * reduced, 2 * reduced + whole)[stage],
    }
    return {name: 4 * count for name, count in elements.items()}


def activations(model: nn.Module, probes: list[list[Tensor]], micro: int, low: bool) -> int:
    """Bytes that a micro batch keeps for its backward pass, measured on the model's device with few images.

    They are linear in the images; what does not grow are the weights' copies in bf16. What the backward pass computes
    again is there one block, or MLP, at a time: the largest is added.

    Args:
        probes: the model's inputs for two numbers of images
        micro: images of the micro batch
        low: bf16 autocast
    """
    encoder = getattr(model, "encoder", model)
    mode = encoder.recompute
    pieces = [module for module in encoder.modules() if isinstance(module, PIECES.get(mode, ()))]
    device = next(model.parameters()).device
    measured = []
    for probe in probes:
        inputs = [tensor.to(device) for tensor in probe]
        kept, _ = saved(model, inputs, low)
        if pieces:  # inside one that is recomputed, nothing is seen to be saved
            encoder.recompute = "none"
            kept += saved(model, inputs, low, pieces)[1]
            encoder.recompute = mode
        measured.append(kept)
    few, many = (len(probe[0]) for probe in probes)
    return round(measured[0] + (micro - few) * (measured[1] - measured[0]) / (many - few))


def saved(model: nn.Module, inputs: list[Tensor], low: bool, pieces: Sequence[nn.Module] = ()) -> tuple[int, int]:
    """Bytes that a forward pass saves for the backward pass, parameters aside; and those of the largest of `pieces`."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}  # bytes by address: what is saved lives as long as the output
    before, spans = [], [0]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # as it is, it would keep itself alive for ever

    hooks = [p.register_forward_pre_hook(lambda *_: before.append(sum(storages.values()))) for p in pieces]
    hooks += [p.register_forward_hook(lambda *_: spans.append(sum(storages.values()) - before.pop())) for p in pieces]
    autocast = torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=low)
    with saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        output = model(*inputs)
    for hook in hooks:
        hook.remove()
    del output
    return sum(storages.values()), max(spans)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _table(*numbers: str) -> Table:
    """A table without lines, its columns aligned to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _text(*parts: str | Table) -> str:
    """Lines and tables as plain text; tables are at most 120 columns wide."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    for part in parts:
        console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
