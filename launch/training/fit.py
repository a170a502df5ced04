"""Fit a run to its images and to the memory of its devices, before the first step: batch size and micro batch."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from configs.errors import UserError, counted
from configs.log import say
from configs.schema import Finetune, Optim, Pretrain
from launch.training.memory import (
    GIB,
    MEASURED_BATCHES,
    Activations,
    Inputs,
    free_bytes,
    group_bytes,
    measure_activations,
    owner,
)
from launch.training.precision import precision
from launch.training.world import World, barrier, gather

MARGIN = 1.75  # memory of real steps over the estimate, see `fit_memory`
LESS = "use data.repeats 1"
SILENCE = 1.0  # seconds until a line says what takes so long
Check = Callable[[int], None]  # raises `UserError` for a micro batch that the task cannot use


@dataclass(frozen=True)
class Need:
    """Bytes that a rank needs: its state, and the activations of a micro batch."""

    state: int
    activations: Activations

    def bytes(self, micro: int) -> int:
        """Bytes with micro batches of so many images."""
        return self.state + self.activations.bytes(micro)

    def images(self, free: float) -> int:
        """The largest micro batch in so many bytes; 0 = none."""
        rest = free - self.state - self.activations.constant
        return max(0, int(rest / max(1.0, self.activations.per_image)))


@dataclass(frozen=True)
class Room:
    """What a rank can use. `limit` is the largest micro batch by the estimate, `roomy` the largest with the margin."""

    free: int  # bytes
    sharers: int  # ranks that share the device's memory
    need: Need

    @property
    def limit(self) -> int:
        return self.need.images(self.free)

    @property
    def roomy(self) -> int:
        return self.need.images(self.free / MARGIN)


def any_batch(_: int) -> None:
    """The check of a stage that can use any micro batch."""


def fit_batch(
    optim: Optim, images: int, ranks: int, repeats: int = 1, check: Check = any_batch, recorded: dict | None = None
) -> Optim:
    """`optim` with the largest batch that the images allow, if they are fewer than a batch; a line says so.

    The learning rate follows, because it is linear in the batch. The batch stays a multiple of ranks, `data.repeats`
    and, if there are enough images, of `micro_batch`. A resumed run keeps its batch.

    Args:
        images: samples of an epoch
        check: raises `UserError` for a micro batch that the task cannot use
        recorded: section `optim` of the run's newest checkpoint
    Raises:
        UserError: there are too few images for a batch of any size
    """
    if images >= optim.batch_size:
        return optim
    micro = optim.micro_batch
    shares = [share for share in range(images // ranks, 0, -1) if share * ranks % repeats == 0]
    usable = [share for share in shares if accepts(check, share)]
    if shares and not usable and repeats == 1:
        check(shares[0])
    if not usable:
        crops = f" with data.repeats {repeats}" if repeats > 1 else ""
        fewer = ranks > 1 and any(share % repeats == 0 and accepts(check, share) for share in range(images, 0, -1))
        ways = [*(["start fewer ranks"] if fewer else ["add images"]), *([LESS] if crops and accepts(check, 1) else [])]
        few = "is too few" if images == 1 else "are too few"
        raise UserError(f"{counted(images, 'image')} {few} for {counted(ranks, 'rank')}{crops}: {', or '.join(ways)}")
    if isinstance(micro, int):
        usable = [share for share in shares if share % micro == 0] or usable
    batch = usable[0] * ranks
    if 0 < (recorded or {}).get("batch_size", 0) <= images:
        batch = recorded["batch_size"]
    if isinstance(micro, int) and micro * ranks > batch:
        micro = None
    fitted = replace(optim, batch_size=batch, micro_batch=micro)
    rates = " -> ".join(f"{each.scaled(each.lr):.2g}" for each in (optim, fitted))
    changed = "" if micro == optim.micro_batch else f", optim.micro_batch {optim.micro_batch} -> {batch // ranks}"
    are = "image is" if images == 1 else f"{images:,} images are"
    say(f"{are} fewer than optim.batch_size {optim.batch_size}: using {batch}{changed}, lr {rates}")
    return fitted


def fit_memory(
    config: Pretrain | Finetune, model: nn.Module, groups: list[dict], world: World, inputs: Inputs,
    check: Check = any_batch, recorded: dict | None = None, beside: int = 0,
) -> Optim:  # fmt: skip
    """`config.optim` with a number for micro_batch auto, after comparing the memory that it needs with what is free.

    All ranks call this with the model loaded, and get the same result. The estimate is DeepSpeed's state and the
    stored activations, without temporary tensors and fragmentation. Twelve runs of three steps with atto, tiny and base
    on a CPU (fp32 and bf16, with and without kernels, recompute, accumulation, ZeRO 0 to 2) peaked at 1.25 to 1.66
    times the estimate; nothing was measured on a GPU. So a run whose estimate exceeds the free memory cannot fit and
    is refused. `auto` leaves room for `MARGIN` times the estimate, and a run between the two starts with a warning.
    Swap space does not count as memory.

    `auto` takes the micro batch of the run's newest checkpoint if that still fits: another one rounds differently.

    Args:
        groups: parameter groups of the model
        inputs: maps images [B, C, H, W] to the arguments of the model's forward
        check: raises `UserError` for a micro batch that the task cannot use
        recorded: section `optim` of the run's newest checkpoint
        beside: bytes of frozen models that `inputs` uses, loaded on the CPU
    Raises:
        UserError: the micro batch does not fit, or none does
    """
    optim, share = config.optim, config.optim.batch_size // world.ranks
    wanted, _ = optim.accumulation(world.ranks)
    rooms = _rooms(config, model, groups, world, inputs, beside)
    limit, roomy = min(room.limit for room in rooms), min(room.roomy for room in rooms)
    best = largest(limit, roomy, share, check)
    rank = next(rank for rank, room in enumerate(rooms) if room.limit == limit)
    auto = optim.micro_batch == "auto"
    if auto and best:
        wanted = _chosen(best, limit, share, recorded or {})
        say(f"optim.micro_batch auto: {wanted}, of {counted(share, 'image')} per rank")
    tight = f"a micro batch of {counted(wanted, 'image')} needs {_compared(rooms[rank], wanted, rank, world)}"
    if wanted > limit:
        raise UserError(f"{tight}: {f'add --optim.micro_batch {best}' if best else _remedies(config)}")
    if wanted > roomy:
        advice = f": --optim.micro_batch {best} leaves more room" if best < wanted else ""
        say(f"memory may run out, because temporary tensors come on top: {tight}{advice}")
    return replace(optim, micro_batch=wanted) if auto else optim


def measure_need(
    config: Pretrain | Finetune, model: nn.Module, groups: list[dict], ranks: int, inputs: Inputs,
    free: float = math.inf, beside: int = 0,
) -> Need:  # fmt: skip
    """What a rank needs. Activations are not measured if the state alone exceeds `free` bytes."""
    optim, device = config.optim, next(model.parameters()).device
    parameters = sum(p.numel() for p in model.parameters())
    state = sum(group_bytes(groups, ranks, optim.zero_stage).values()) + frozen_bytes(model, groups) + beside
    if isinstance(config, Finetune) and config.augment.ema:
        state += 4 * parameters
    if state > free:
        return Need(state, Activations(0, 0))
    channels = getattr(model, "encoder", model).arch.channels
    generator = torch.Generator().manual_seed(0)
    batches = [
        inputs(torch.rand(count, channels, *config.data.height_width, generator=generator).to(device))
        for count in measured_counts(optim, ranks, config.data.repeats)
    ]
    low = precision(optim, device, isinstance(config, Pretrain)) != "fp32"
    return Need(state, measure_activations(model, batches, low))


def room_on(
    device: torch.device, config: Pretrain | Finetune, model: nn.Module, groups: list[dict], ranks: int, inputs: Inputs,
    beside: int = 0,
) -> Room:  # fmt: skip
    """What a rank could use on this device, outside of a run; the model is moved there."""
    free = free_bytes(device)  # before the model is measured
    need = measure_need(config, model.to(device), groups, ranks, inputs, beside=beside)
    weights = 4 * sum(p.numel() for p in model.parameters()) + beside
    return Room(free + weights * (device.type == "cpu"), 1, need)  # on a CPU the weights are loaded already


def frozen_bytes(model: nn.Module, groups: list[dict]) -> int:
    """Bytes of the parameters that are in no group."""
    trained = sum(p.numel() for group in groups for p in group["params"])
    return 4 * (sum(p.numel() for p in model.parameters()) - trained)


def measured_counts(optim: Optim, ranks: int, repeats: int) -> list[int]:
    """Numbers of crops that activations are measured with, `repeats` of each image.

    Not more than a micro batch has, which could not fit.
    """
    micro, _ = optim.accumulation(ranks)
    return sorted({min(micro, count * repeats) for count in MEASURED_BATCHES})


def largest(limit: int, roomy: int, share: int, check: Check = any_batch) -> int | None:
    """The largest micro batch that divides a rank's share of the batch and is at most `roomy`; if there is none, the
    smallest that is at most `limit`; None if there is none."""
    usable = [micro for micro in range(1, share + 1) if share % micro == 0 and accepts(check, micro)]
    tight = min((micro for micro in usable if micro <= limit), default=None)
    return max((micro for micro in usable if micro <= roomy), default=tight)


def accepts(check: Check, micro: int) -> bool:
    """Whether the task can use a micro batch."""
    try:
        check(micro)
    except UserError:
        return False
    return True


@contextmanager
def announced(activity: str) -> Iterator[None]:
    """Context manager: prints what is going on if it takes longer than `SILENCE`."""
    timer = threading.Timer(SILENCE, say, [f"{activity} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _rooms(
    config: Pretrain | Finetune, model: nn.Module, groups: list[dict], world: World, inputs: Inputs, beside: int
) -> list[Room]:
    """What each rank can use, on all ranks."""
    held = sum(p.numel() * p.element_size() for p in model.to(world.device).parameters())
    held += beside * (world.device.type == "cpu")
    barrier()  # every rank has its weights now
    owners = gather((owner(world.device), free_bytes(world.device)))  # and none measures yet
    own, free = owners[world.rank]
    sharers = sum(name == own for name, _ in owners)
    free = free // sharers + held
    with announced("estimating the memory of a step"):
        need = measure_need(config, model, groups, world.ranks, inputs, free, beside)
    return gather(Room(free, sharers, need))


def _chosen(best: int, limit: int, share: int, recorded: dict) -> int:
    """The micro batch of `auto`: that of the newest checkpoint if it fits, else `best`; a line says if it changes."""
    if not recorded:
        return best
    before = recorded.get("micro_batch") or share
    if share % before == 0 and before <= limit:
        return before
    say(f"the run had micro batches of {before}, which do not fit these ranks: results differ by rounding from now on")
    return best


def _compared(room: Room, micro: int, rank: int, world: World) -> str:
    """`61.0 GiB, this machine has 20.1 GiB free`, of a rank."""
    device = "GPU" if world.device.type == "cuda" else "machine"
    where = f"the {device} of rank {rank}" if world.ranks > 1 else f"this {device}"
    each = f" for each of {room.sharers} ranks" if room.sharers > 1 else ""
    return f"{_gib(room.need.bytes(micro))} GiB, {where} has {_gib(room.free)} GiB free{each}"


def _remedies(config: Pretrain | Finetune) -> str:
    """What helps if no micro batch fits."""
    recompute = "--model.recompute block, " if config.model.recompute != "block" else ""
    return (
        f"no smaller one fits: use {recompute}more ranks with --optim.zero_stage 3, smaller images (--data.size) "
        "or a smaller model (--model.name)"
    )


def _gib(count: float) -> str:
    return f"{count / GIB:.1f}" if count >= GIB else f"{count / GIB:.2g}"
