"""The settings of both stages. Sections about model and images are in configs/sections.py and importable from here.

A recipe (`configs/pretrain/*.yaml`, `configs/finetune/*.yaml`) is a YAML file of these keys; the command line
overrides single keys by their dotted names (`--optim.lr 1e-3`).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from configs.errors import UserError
from configs.keys import BelowOne, Choice, Share, fixed, free, require, section
from configs.sections import *  # noqa: F403  # importable from here
from configs.sections import Augment, Data, FCMAEChoice, FinetuneModel, PretrainModel

INIT = "weights to start from: fcmae.pt, another format (official, timm, transformers, ...) or hf://USER/REPO[/FILE][@REVISION]"
RESUME = "auto = from the newest checkpoint, if any; must = fail without one; never = fail if there is one"


@dataclass(frozen=True)
class Optim:
    """AdamW or Muon with linear warm-up and cosine decay; the learning rate changes every step."""

    name: Literal["adamw", "muon"] = fixed(
        "adamw",
        "muon = Muon for the matrices of hidden layers, AdamW for the rest; lr and weight_decay carry over",
    )
    lr: PositiveFloat = fixed(1.5e-4, "base learning rate; the actual one is lr x batch_size / 256")
    batch_size: PositiveInt = fixed(4096, "images per optimizer step, over all ranks; fewer if there are fewer images")
    micro_batch: PositiveInt | Literal["auto"] | None = free(
        None,
        "images per rank and forward pass; gradients are accumulated; null = batch_size / ranks; auto = the largest "
        "that fits into memory",
    )
    epochs: PositiveInt = free(
        800, "passes over the data; raise it to extend a run, whose learning rate then follows the longer schedule"
    )
    warmup_epochs: NonNegativeFloat = fixed(40, "epochs of linear warm-up")
    warmup_lr: NonNegativeFloat = fixed(0.0, "base learning rate at the start of the warm-up")
    min_lr: NonNegativeFloat = fixed(0.0, "base learning rate at the end")
    weight_decay: NonNegativeFloat = fixed(0.05, "weight decay; not for biases, norms, GRN, layer scale and mask token")
    decay_rules: dict[str, NonNegativeFloat] | None = fixed(
        None, 'other decays by parameter name, like {"stem.*": 0, "*.grn.*": 0.01}; last match counts; see --parameters'
    )
    betas: tuple[BelowOne, BelowOne] = fixed((0.9, 0.95), "betas of AdamW; Muon's momentum is 0.95")
    clip_grad: NonNegativeFloat = fixed(0.0, "maximum norm of the gradient; 0 = off")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = fixed(
        "auto",
        "bf16 and fp16 = autocast with fp32 weights; fp16 with loss scaling, for GPUs without bf16; auto = bf16 on a "
        "GPU that has it and, in pretraining, on a CPU that has it (AMX, AVX-512 BF16), else fp32",
    )
    zero_stage: Literal[0, 1, 2, 3] = fixed(
        1,
        "DeepSpeed ZeRO: 0 = no sharding, 1 = optimizer state, 2 = also gradients, 3 = also weights; 3 resumes on the "
        "same number of ranks only; 0 or 1 with muon",
    )
    max_skipped: NonNegativeInt = free(10, "maximum number of consecutive steps with a non-finite loss or gradient")

    def __post_init__(self):
        if self.name == "muon":
            require(self.zero_stage < 2, "optim.zero_stage", self.zero_stage, "0 or 1 with optim.name muon")

    def scaled(self, lr: float) -> float:
        """The actual learning rate for a base rate: linear in the batch, which is 256 for the base."""
        return self.batch_size / 256 * lr

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step (counted from 0), before layer decay: linear warm-up, then half a cosine."""
        warmup, total = self.warmup_epochs * steps_per_epoch, self.epochs * steps_per_epoch
        if step < warmup:
            return self.scaled(self.warmup_lr + (self.lr - self.warmup_lr) * step / warmup)
        progress = (step - warmup) / max(1, total - warmup)
        return self.scaled(self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))

    def accumulation(self, ranks: int) -> tuple[int, int]:
        """Micro batch of a rank and number of accumulated micro batches. Raises `UserError` if they do not divide.

        `micro_batch` auto is as null; `launch.training.fit.fit_memory` replaces it.
        """
        micro = self.batch_size // ranks if self.micro_batch in (None, "auto") else self.micro_batch
        if micro == 0 or self.batch_size % (micro * ranks):
            raise UserError(
                f"optim.batch_size {self.batch_size} is not a whole number of micro batches: optim.micro_batch "
                f"{micro} x {ranks} ranks = {micro * ranks}; choose a multiple of it"
            )
        return micro, self.batch_size // (micro * ranks)


@dataclass(frozen=True)
class Run:
    """Where a run writes, how often, and on what it runs."""

    name: str = free("digits", "name of the run; it writes to FOLDER/NAME")
    folder: str = free("runs", "parent folder of runs")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = fixed(0, "seed of everything random")
    log_every: PositiveInt = free(10, "steps between log lines")
    picture_every: PositiveInt = free(10, "epochs between reconstruction pictures (pretraining)")
    eval_every: PositiveInt = free(1, "epochs between evaluations; the last epoch is always evaluated (fine-tuning)")
    patience: NonNegativeInt = free(0, "stop after this many epochs without a better score; 0 = never (fine-tuning)")
    max_steps: PositiveInt | None = free(None, "stop after this many steps as if training were complete: a trial")
    save_every: PositiveInt = free(1, "epochs between checkpoints")
    save_minutes: NonNegativeFloat = free(30.0, "also save within an epoch if the last checkpoint is this old; 0 = off")
    keep: PositiveInt = free(2, "checkpoints to keep, besides the best (fine-tuning)")
    hang_minutes: PositiveFloat = free(
        10.0, "minutes without progress after which the run ends and names the rank it waits for"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = free(
        ("tensorboard",),
        "where to send the values of log.jsonl as well: a list of tensorboard, wandb, mlflow; [] = none",
    )
    device: Literal["auto", "cpu", "cuda"] = free("auto", "auto = a GPU if there is one")
    kernels: Literal["fused", "plain"] = free(
        "fused", "fused = this project's kernels; plain = PyTorch operations: slower, same result"
    )

    def __post_init__(self):
        one_part = self.name not in ("", ".", "..") and not set(self.name) & {"/", "\\", "\0"}
        require(one_part, "run.name", repr(self.name), "the name of one folder; --run.folder says where it is")


@dataclass(frozen=True)
class Probe:
    """Evaluation of the encoder's features during pretraining: kNN and linear with labels, other measures without."""

    every: NonNegativeInt = free(0, "epochs between evaluations, and one after the last epoch; 0 = none; needs labels")
    unlabelled_every: NonNegativeInt = free(
        0,
        "epochs between evaluations without labels: RankMe, alpha-ReQ and loss, of eval_split if there is one, else "
        "of training images; 0 = none",
    )
    unlabelled_images: PositiveInt = free(
        2048, "maximum number of images for unlabelled_every, evenly spaced; RankMe is at most this number"
    )
    path: str | None = free(None, "labelled shards; null = data.path")
    train_split: str = free("train", "split of the neighbours")
    eval_split: str = free("val", "split that is classified")
    images: PositiveInt = free(50_000, "maximum number of images per split, evenly spaced")
    linear_epochs: NonNegativeInt = free(0, "epochs of a linear classifier on the features; 0 = kNN only")
    crop: Share = free(0.875, "centre crop, as a share of the side; 1 = squash without a crop")

    def __post_init__(self):
        other = self.eval_split != self.train_split
        require(other, "probe.eval_split", self.eval_split, "another than probe.train_split")


def check_repeats(data: Data, optim: Optim) -> None:
    """Raise `UserError` unless the global batch has the same number of crops of each of its images."""
    divides = optim.batch_size % data.repeats == 0
    require(divides, "data.repeats", data.repeats, f"a divisor of optim.batch_size {optim.batch_size}")


@dataclass(frozen=True)
class Pretrain:
    """Self-supervised pretraining."""

    init: str = free("none", f"{INIT}, with the decoder if there is one; none = from scratch")
    resume: Literal["auto", "must", "never"] = free("auto", RESUME, alone="must")
    objective: Choice = section(partial(FCMAEChoice, "fcmae"), "what is learnt: name, and its own keys")
    data: Data = section(Data, "images")
    model: PretrainModel = section(PretrainModel, "encoder")
    optim: Optim = section(Optim, "optimisation: AdamW or Muon, linear warm-up, cosine decay")
    probe: Probe = section(Probe, "evaluation during pretraining: kNN, linear, measures without labels")
    run: Run = section(Run, "output, intervals, device")

    def __post_init__(self):
        check_repeats(self.data, self.optim)


@dataclass(frozen=True)
class Finetune:
    """Supervised fine-tuning. The keys of `task` are those of the task's module (`finetune/tasks`)."""

    init: str = free("none", f"{INIT}; none = from scratch")
    resume: Literal["auto", "must", "never"] = free("auto", RESUME, alone="must")
    eval_split: str = fixed("val", "split that is evaluated after each epoch")
    layer_decay: Share = fixed(1.0, "factor of the learning rate from each layer to the one below; 1 = off")
    layer_decay_kind: Literal["single", "group"] = fixed(
        "single", "layers of layer_decay: single = each block; group = twelve groups of blocks"
    )
    task: Choice = section(partial(Choice, "classification"), "what is predicted: name, and its own keys")
    data: Data = section(Data, "images")
    model: FinetuneModel = section(FinetuneModel, "encoder; keys left null are read from --init")
    optim: Optim = section(Optim, "optimisation: AdamW or Muon, linear warm-up, cosine decay")
    augment: Augment = section(Augment, "augmentation and weight averaging")
    run: Run = section(Run, "output, intervals, device")

    def __post_init__(self):
        check_repeats(self.data, self.optim)
        if self.augment.ema and self.optim.zero_stage == 3:
            raise UserError(
                f"augment.ema is {self.augment.ema} with optim.zero_stage 3, where no rank has all weights to average: "
                "use optim.zero_stage 0, 1 or 2, or augment.ema 0"
            )
