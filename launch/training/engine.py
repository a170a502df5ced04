"""DeepSpeed: the only module that imports it. The optimizer, the engine, its checkpoints."""

import argparse
import fnmatch
import io
import logging
import os
import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch import nn

from configs.errors import UserError
from configs.schema import Optim
from launch.training.world import World

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
MOST_REDUCED = 50_000_000  # DeepSpeed's own default, 500 million, takes 1.9 GiB however small the model is


def _deepspeed():
    """DeepSpeed, imported when it is needed (seconds) and without its chatter."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    if os.environ["DS_ACCELERATOR"] == "cpu":  # else an op for inference is compiled at the first start: half a minute
        deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def precision(optim: Optim, device: torch.device) -> str:
    """fp32, bf16 or fp16. Raises `UserError` for bf16 on a GPU that has none."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if optim.precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise UserError("optim.precision is bf16, but this GPU has no bf16: use fp16 or fp32")
    if optim.precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    return optim.precision


def autocast(device: torch.device, kind: str) -> torch.autocast:
    """A context (or decorator) with products and convolutions in fp32, bf16 or fp16."""
    return torch.autocast(device.type, LOW.get(kind), enabled=kind in LOW)


class LossScale:
    """Dynamic loss scaling for fp16 (1710.03740, section 3.2): the loss is scaled up so that no gradient underflows.

    It is the `loss_scaler` of ZeRO's optimizer, which divides gradients by `cur_scale` before it clips and applies
    them; without ZeRO `backward` and `_measure` do so. A gradient that overflowed halves the scale (and the step is
    skipped), `GROWTH` applied steps in a row double it.
    """

    GROWTH = 2000
    dynamic = True

    def __init__(self):
        self.cur_scale, self.applied = 2.0**16, 0

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to differentiate."""
        return loss * self.cur_scale

    def update_scale(self, overflow: bool) -> None:
        """DeepSpeed calls this before it divides by the scale, so it changes later, in `after_step`."""

    def after_step(self, applied: bool) -> None:
        """Adapt the scale to whether a step was applied."""
        self.applied = self.applied + 1 if applied else 0
        if not applied:
            self.cur_scale = max(1.0, self.cur_scale / 2)
        elif self.applied % self.GROWTH == 0:
            self.cur_scale *= 2


def build_engine(model: nn.Module, groups: list[dict], optim: Optim, world: World):
    """Wrap a model into a DeepSpeed engine with AdamW.

    Args:
        model: on any device; its forward returns the loss of a micro batch
        groups: parameter groups with `weight_decay` and `lr_scale`
        optim: batch sizes, betas, clipping, precision, ZeRO stage
    Raises:
        UserError: the global batch is not a whole number of micro batches
    """
    micro, accumulation = optim.accumulation(world.ranks)
    parameters = sum(p.numel() for p in model.parameters())
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": optim.zero_stage, "reduce_bucket_size": bucket(parameters)},
        "zero_allow_untested_optimizer": True,
        # set, because DeepSpeed's own default is 1; without ZeRO `_measure` clips
        "gradient_clipping": optim.clip_grad if optim.zero_stage else 0.0,
        "steps_per_print": 1 << 40,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice a step
    }
    kind = precision(optim, world.device)
    # not DeepSpeed's autocast: its loss scaling for fp16 clips gradients before they are unscaled
    model.forward = autocast(world.device, kind)(model.forward)
    scale = LossScale() if kind == "fp16" else None
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, fused=True)
    if optim.zero_stage == 0:
        optimizer.register_step_pre_hook(lambda *_: _measure(optimizer, optim.clip_grad, scale))
    engine, *_ = _deepspeed().initialize(model=model.to(world.device), optimizer=optimizer, config=config)
    engine.loss_scaling = scale
    _scale_in_zero(engine)
    return engine


def _scale_in_zero(engine) -> None:
    if engine.loss_scaling and engine.zero_optimization():
        engine.optimizer.loss_scaler, engine.optimizer.dynamic_loss_scale = engine.loss_scaling, True


def backward(engine, loss: torch.Tensor) -> None:
    """The backward pass of a micro batch's loss."""
    if engine.loss_scaling and not engine.zero_optimization():
        loss = engine.loss_scaling.scale_loss(loss)
    engine.backward(loss)


def was_applied(engine) -> bool:
    """After a step: whether it was applied, which it is not if a gradient is not finite. Adapts the loss scale."""
    applied = engine.was_step_applied()
    if engine.loss_scaling:
        engine.loss_scaling.after_step(applied)
    return applied


def bucket(parameters: int) -> int:
    """Elements of the buffer in which ZeRO reduces gradients: all, for most models."""
    return min(MOST_REDUCED, parameters)


def _measure(optimizer: torch.optim.Optimizer, clip: float, scale: LossScale | None) -> None:
    """What only ZeRO's optimizer does: unscale the gradient, measure its norm, clip, skip what is not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if scale:
        torch._foreach_mul_([p.grad for p in parameters], 1 / scale.cur_scale)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    optimizer._global_grad_norm = norm  # the engine reads these two
    optimizer.overflow = not bool(torch.isfinite(norm))
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # fused AdamW leaves weights and state alone where it is 1
    if clip and not optimizer.overflow:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)


def load_engine(engine, folder: Path, tag: str, universal: bool = False) -> dict:
    """Load a checkpoint of DeepSpeed's, the run's own: its files are pickles. Returns the client state."""
    engine._config.load_universal_checkpoint = universal
    try:
        path, state = engine.load_checkpoint(str(folder), tag=tag)
    finally:
        engine._config.load_universal_checkpoint = False
    if path is None:
        raise UserError(f"{folder} could not be loaded: delete it to go on from the one before")
    _scale_in_zero(engine)  # it holds another object now
    return state


def to_universal(source: Path, target: Path) -> None:
    """Convert a checkpoint of ZeRO 1 or 2 so that any number of ranks can load it. One process calls this."""
    _deepspeed()
    from deepspeed.checkpoint.ds_to_universal import main

    options = argparse.Namespace(
        input_folder=str(source), output_folder=str(target), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        main(options)


def whole_weights(engine):
    """A context in which `engine.module` has all its weights on every rank; every rank enters it. For ZeRO 3."""
    if engine.zero_optimization_stage() < 3:
        return nullcontext()
    return _deepspeed().zero.GatheredParameters(list(engine.module.parameters()))


def parameter_groups(model: nn.Module, optim: Optim, lr_scale: Callable[[str], float] | None = None) -> list[dict]:
    """AdamW's parameter groups, one for each pair of decay and learning rate scale; frozen parameters are in none.

    Biases, norms, GRN, layer scale and mask token have no weight decay: they are the parameters with one dimension.
    `optim.decay_rules` may say otherwise. `lr_scale` gives a parameter's factor of the learning rate from its name
    (layer decay).

    Raises:
        UserError: a rule matches no parameter
    """
    rules = optim.decay_rules or {}
    names = [name for name, _ in model.named_parameters()]
    for pattern in rules:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"optim.decay_rules: {pattern} matches no parameter; --dry-run prints their names")
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim == 1 else optim.weight_decay
        for pattern, value in rules.items():
            decay = value if fnmatch.fnmatchcase(name, pattern) else decay
        scale = lr_scale(name) if lr_scale else 1.0
        group = groups.setdefault((decay, scale), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators; 0 <= seed < 2**32."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def set_lr(engine, lr: float) -> None:
    """Set the learning rate of every group, times the group's own scale (layer decay)."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
