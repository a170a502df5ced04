"""What a plan costs on this machine: a few real training steps, and the memory that they need."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.errors import UserError, counted
from configs.schema import Encoder, Finetune, Pretrain
from configs.values import build
from data.folder import Folder
from data.loader import MAX_WORKERS, Samples, Transform, collate
from data.shards import Split
from data.transforms import TrainTransform, normalize
from launch.plans.choices import Choices, Entries
from launch.plans.facts import Facts
from launch.training.fit import Check, Room, any_batch, largest, room_on
from launch.training.memory import GIB
from launch.training.muon import make_optimizer
from launch.training.parameter_groups import parameter_groups
from launch.training.precision import autocast, precision
from launch.training.world import prepare_cpu
from models import kernels
from models.convnext import ConvNeXt
from models.sizes import resolve

SECONDS = 7.0  # for the steps of a stage, after the first one
MAX_STEPS = 10
CPU_BATCH = 128  # images of a measured step on a CPU; a small model at 32 had half the images/s
LOADED = 32  # images that are read and cropped
EVAL_COST = 1 / 3  # of an image's training: the forward pass alone


@dataclass(frozen=True)
class Cost:
    """Measured on one rank: seconds per image of a training step and of the loader, and what fits into memory."""

    step: float
    load: float
    steps: int  # measured
    batch: int  # of each
    parameters: int
    room: Room
    micro: int  # largest micro batch that fits

    def image_seconds(self, device: str, ranks: int) -> float:
        """Seconds per image of a run. On a CPU the loader and the model share the cores, on a GPU they overlap."""
        cores = len(os.sched_getaffinity(0))
        if device == "cpu":
            return self.step + self.load / cores
        return max(self.step / ranks, self.load / min(MAX_WORKERS * ranks, cores))


@dataclass(frozen=True)
class Stage:
    """What a stage of a plan takes on this machine."""

    title: str
    cost: Cost
    seconds: float
    size: str  # what it consists of
    unit: str = "image"  # of `cost`: image, or crop of one


def start_device(wanted: str) -> tuple[torch.device, int]:
    """The device to plan for, set up as for training, and the number of ranks. Raises `UserError` for no GPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; use auto or cpu")
    kernels.use(True)
    if wanted != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", 0), torch.cuda.device_count()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    prepare_cpu(fused=True)
    return torch.device("cpu"), 1


def measure(
    facts: Facts, choices: Choices, images: Split | Folder, device: torch.device, ranks: int,
    objectives: dict[str, ModuleType],
) -> Iterator[Stage]:  # fmt: skip
    """Run a few steps of each stage of a plan. Sets the micro batch of a stage whose batch does not fit into memory.

    `objectives` are the modules of pretrain/objectives by name.
    """
    values, config = choices.common.values() | choices.pretrain.values(), Pretrain()
    name = values.get("objective.name", config.objective.name)
    config = build(replace(config, objective=objectives[name].Settings(name)), values)
    optim, cost = config.optim, pretraining_cost(objectives[name].Objective(config), images, device, ranks)
    _fit(choices.pretrain, cost, optim.batch_size // ranks)
    steps = optim.epochs * (facts.images // optim.batch_size)
    seconds = steps * optim.batch_size * cost.image_seconds(device.type, ranks)
    repeats = config.data.repeats
    crops = f"{repeats} crops of " if repeats > 1 else ""
    size = f"{optim.epochs:,} epochs, {steps:,} steps of {crops}{counted(optim.batch_size // repeats, 'image')}"
    yield Stage("pretraining", cost, seconds, size, config.data.unit)
    if choices.finetune is None:
        return
    values = choices.common.values() | choices.finetune.values()
    tuned = build(Finetune(), values)
    tuned = replace(tuned, data=replace(tuned.data, mean=config.data.mean, std=config.data.std))
    mixes, optim = values.get("task.mixup", 0) or values.get("task.cutmix", 0), tuned.optim
    cost = finetuning_cost(
        tuned, config.model, len(facts.splits["train"]), images, device, ranks, _even if mixes else any_batch
    )
    _fit(choices.finetune, cost, optim.batch_size // ranks)
    train, held_out = (facts.splits[name].total() for name in ("train", tuned.eval_split))
    seconds = optim.epochs * (train + EVAL_COST * held_out) * cost.image_seconds(device.type, ranks)
    size = f"{optim.epochs:,} epochs of {counted(train, 'image')}, evaluated on {held_out:,} of {tuned.eval_split}"
    yield Stage("fine-tuning", cost, seconds, size)


def _even(micro: int) -> None:
    """The check of a task with mixup."""
    if micro % 2:
        raise UserError(f"a micro batch of {micro} images is not even")


def _fit(entries: Entries, cost: Cost, share: int) -> None:
    """Set the micro batch if a rank's share of the batch does not fit into its memory."""
    free = f"{cost.room.free / GIB:.2g} GiB are free"
    if cost.micro < share:
        entries.set("optim.micro_batch", cost.micro, f"a rank's {share} images do not fit at once: {free}")


def pretraining_cost(objective: Any, images: Split | Folder, device: torch.device, ranks: int) -> Cost:
    """The cost of pretraining with an objective (`pretrain.pretraining.Objective`), from some of its images."""
    model = objective.build()

    def inputs(image: Tensor) -> tuple[Tensor, ...]:
        return objective.inputs(image, objective.example(len(image)))

    more = objective.transform(), device, ranks, objective.check_batch
    return _cost(objective.config, model, model, inputs, images, *more)


def finetuning_cost(
    config: Finetune, arch: Encoder, classes: int, images: Split | Folder, device: torch.device, ranks: int, even: Check
) -> Cost:
    """The cost of fine-tuning a classifier; `even` is the check of its micro batch."""
    model = ConvNeXt(resolve(arch), classes, config.model.drop_path, config.model.recompute)
    transform = TrainTransform(config.data, config.augment, config.data.mean)

    def loss(image: Tensor) -> Tensor:
        return F.cross_entropy(model(image).float(), torch.zeros(len(image), dtype=torch.long, device=image.device))

    return _cost(config, model, loss, lambda image: (image,), images, transform, device, ranks, even)


def _cost(
    config: Pretrain | Finetune, model: nn.Module, loss: Callable[..., Tensor], inputs: Callable,
    images: Split | Folder, transform: Transform, device: torch.device, ranks: int, check: Check = any_batch,
) -> Cost:  # fmt: skip
    groups = parameter_groups(model, config.optim)
    room = room_on(device, config, model, groups, ranks, inputs)
    share = config.optim.batch_size // ranks
    micro = largest(room.limit, room.roomy, share, check)
    if micro is None:
        free = f"{room.free / GIB:.2g} GiB of memory are free"
        raise UserError(f"{model.__class__.__name__} does not fit: {free}; free some, or train on another machine")
    batch = min(micro, CPU_BATCH if device.type == "cpu" else share)
    data, repeats = config.data, config.data.repeats
    samples = Samples(images, len(data.mean), 0, transform, views=repeats, max_pixels=data.max_pixels, crops=data)
    started = time.perf_counter()
    loaded = [samples[0, i // repeats, i % repeats] for i in range(min(LOADED, repeats * len(images)))]
    load = (time.perf_counter() - started) / len(loaded)
    image = collate([loaded[i % len(loaded)] for i in range(batch)])["image"].to(device)
    mean, std = (torch.tensor(values, device=device) for values in (config.data.mean, config.data.std))
    arguments = inputs(normalize(image, mean, std))
    kind = precision(config.optim, device, isinstance(config, Pretrain))
    optimizer = make_optimizer(groups, config.optim)

    def step() -> float:
        began = time.perf_counter()
        with autocast(device, kind):
            value = loss(*arguments)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    first = step()  # also allocates memory: counted only if it is very slow
    taken = [first] if first > SECONDS else []
    while not taken or (first + sum(taken) < SECONDS and len(taken) < MAX_STEPS):
        taken.append(step())
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(sum(taken) / len(taken) / batch, load, len(taken), batch, parameters, room, micro)
