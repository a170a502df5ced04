"""DeepSpeed: the only module that imports it. The optimizer, the engine, its checkpoints."""

import argparse
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
from launch.world import World

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
    """fp32 or bf16. Raises `UserError` for bf16 on a GPU that has none."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if optim.precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise UserError("optim.precision is bf16, but this GPU has no bf16: use fp32")
    if optim.precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    return optim.precision


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
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": optim.zero_stage, "reduce_bucket_size": bucket(model)},
        "zero_allow_untested_optimizer": True,
        # set, because DeepSpeed's own default is 1; without ZeRO `_measure` clips
        "gradient_clipping": optim.clip_grad if optim.zero_stage else 0.0,
        "steps_per_print": 1 << 40,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice a step
        # weights stay fp32, and so does the reduction of gradients
        "torch_autocast": {
            "enabled": precision(optim, world.device) == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, fused=True)
    if optim.zero_stage == 0:
        optimizer.register_step_pre_hook(lambda *_: _measure(optimizer, optim.clip_grad))
    engine, *_ = _deepspeed().initialize(model=model.to(world.device), optimizer=optimizer, config=config)
    return engine


def bucket(model: nn.Module) -> int:
    """Elements of the buffer in which ZeRO reduces gradients: all, for most models."""
    return min(MOST_REDUCED, sum(p.numel() for p in model.parameters()))


def _measure(optimizer: torch.optim.Optimizer, clip: float) -> None:
    """What only ZeRO's optimizer does: measure the gradient's norm, clip it, skip the step if it is not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
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
    return state


def to_universal(source: Path, target: Path) -> None:
    """Convert a checkpoint of ZeRO 1 or 2 so that any number of ranks can load it. One process calls this."""
    _deepspeed()
    from deepspeed.checkpoint.ds_to_universal import main

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        main(
            argparse.Namespace(
                input_folder=str(source), output_folder=str(target), inject_missing_state=True, **options
            )
        )


def whole_weights(engine):
    """A context in which `engine.module` has all its weights on every rank; every rank enters it. For ZeRO 3."""
    if engine.zero_optimization_stage() < 3:
        return nullcontext()
    return _deepspeed().zero.GatheredParameters(list(engine.module.parameters()))


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_scale: Callable[[str], float] | None = None
) -> list[dict]:
    """AdamW's parameter groups, one for each pair of decay and learning rate scale.

    Biases, norms, GRN, layer scale and mask token have no weight decay: they are the parameters with one dimension.
    `lr_scale` gives a parameter's factor of the learning rate from its name (layer decay).
    """
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        decay = 0.0 if parameter.ndim == 1 else weight_decay
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
