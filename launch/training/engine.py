"""The training engine around DeepSpeed, which no other module imports or reaches into."""

import argparse
import io
import logging
import os
import warnings
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Optim
from launch.training.muon import MuonAdamW, make_optimizer
from launch.training.precision import LossScale, autocast, precision
from launch.training.world import World

MAX_BUCKET = 50_000_000  # elements; DeepSpeed's default of 500 million takes 1.9 GiB for any model


class Engine:
    """A model with AdamW or Muon under DeepSpeed: forward, backward, update, checkpoints.

    Args:
        model: on any device; it is moved to the rank's
        groups: of `parameter_groups`
        pretraining: see `launch.training.precision.precision`
    Attributes:
        model: the model, without any wrapper
        precision: fp32, bf16 or fp16
        optimizer: AdamW, with ZeRO of this rank's part of the parameters; or `MuonAdamW`
        zero_stage: DeepSpeed's; 0 with Muon, which shards its own state
    Raises:
        UserError: the global batch is not a multiple of the micro batch times ranks
    """

    def __init__(self, model: nn.Module, groups: list[dict], optim: Optim, world: World, pretraining: bool = False):
        self.model, self.device = model.to(world.device), world.device
        self.zero_stage = 0 if optim.name == "muon" else optim.zero_stage
        self.precision = precision(optim, world.device, pretraining)
        self._loss_scale = LossScale() if self.precision == "fp16" else None
        micro, accumulation = optim.accumulation(world.ranks)
        bucket = bucket_size(sum(p.numel() for p in model.parameters()))
        config = {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            "zero_optimization": {"stage": self.zero_stage, "reduce_bucket_size": bucket},
            "zero_allow_untested_optimizer": True,
            # explicit, because DeepSpeed's default is 1; without ZeRO `_clip_or_skip` clips
            "gradient_clipping": optim.clip_grad if self.zero_stage else 0.0,
            "steps_per_print": 1 << 40,
            "timers": {"throughput": {"enabled": False}},  # it would synchronise with the GPU twice a step
        }
        place = (world.rank, world.ranks) if optim.zero_stage else (0, 1)
        self.optimizer = optimizer = make_optimizer(groups, optim, *place)
        if self.zero_stage == 0:
            optimizer.register_step_pre_hook(lambda *_: _clip_or_skip(optimizer, optim.clip_grad, self._loss_scale))
        wrapped = _Autocast(self.model, self.autocast())
        self._deepspeed, *_ = _import_deepspeed().initialize(model=wrapped, optimizer=optimizer, config=config)
        self._share_loss_scale()

    def autocast(self) -> torch.autocast:
        """For calls of `model` outside of training."""
        return autocast(self.device, self.precision)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The model's output under autocast, to be differentiated by `step`."""
        return self._deepspeed(*inputs)

    def step(self, loss: Tensor) -> bool:
        """Backward pass of a micro batch's loss [], and after the last one of an accumulation the update.

        Returns False if the update was skipped, on all ranks, because a gradient is not finite.
        """
        updates = self._deepspeed.is_gradient_accumulation_boundary()
        loss = loss * (1 + 0 * loss.detach())  # a NaN or Inf loss must have NaN gradients, so that all ranks skip
        if self._loss_scale and not self.zero_stage:
            loss = self._loss_scale.scale_loss(loss)
        self._deepspeed.backward(loss)
        self._deepspeed.step()
        if not updates:
            return True
        applied = self._deepspeed.was_step_applied()
        if self._loss_scale:
            self._loss_scale.after_step(applied)
        return applied

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of all groups, times the group's own scale (layer decay)."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    @property
    def grad_norm(self) -> float:
        """Norm of the last update's gradient over all parameters, before clipping. Synchronises with the device."""
        return float(self._deepspeed.get_global_grad_norm())

    @property
    def loss_scale(self) -> float | None:
        """Factor of the loss in fp16; None in other precisions."""
        return self._loss_scale.cur_scale if self._loss_scale else None

    def train(self) -> None:
        self._deepspeed.train()

    def whole_weights(self) -> AbstractContextManager:
        """Context manager in which all ranks have all weights of the model; all must enter it (ZeRO 3)."""
        if self.zero_stage < 3:
            return nullcontext()
        return _import_deepspeed().zero.GatheredParameters(list(self.model.parameters()))

    def save(self, folder: Path, tag: str, state: dict) -> None:
        """Write weights, optimizer and the caller's `state` to folder/tag; all ranks call this."""
        if isinstance(self.optimizer, MuonAdamW):
            self.optimizer.gather_state()
        content = {"state": state, "loss_scale": vars(self._loss_scale) if self._loss_scale else None}
        self._deepspeed.save_checkpoint(str(folder), tag=tag, client_state=content, save_latest=False)

    def load(self, folder: Path, tag: str, universal: bool = False) -> dict:
        """Load what `save` or, if `universal`, `to_universal` wrote, and return its `state`.

        DeepSpeed's files are pickles: load your own runs only. Raises `UserError` if it cannot be loaded.
        """
        self._deepspeed._config.load_universal_checkpoint = universal
        try:
            path, content = self._deepspeed.load_checkpoint(str(folder), tag=tag)
        finally:
            self._deepspeed._config.load_universal_checkpoint = False
        if path is None:
            raise UserError(f"{folder} could not be loaded: delete it to resume from the checkpoint before it")
        self._share_loss_scale()  # loading has replaced the optimizer's scaler
        if self._loss_scale:
            vars(self._loss_scale).update(content["loss_scale"])
        return content["state"]

    def close(self) -> None:
        self._deepspeed.destroy()

    def _share_loss_scale(self) -> None:
        if self._loss_scale and self.zero_stage:
            self._deepspeed.optimizer.loss_scaler = self._loss_scale
            self._deepspeed.optimizer.dynamic_loss_scale = True


class _Autocast(nn.Module):
    """A model whose forward runs under autocast.

    DeepSpeed's `torch_autocast` clips fp16 gradients before it unscales them, and its engine disables an autocast
    context around its call.
    """

    def __init__(self, model: nn.Module, context: torch.autocast):
        super().__init__()
        self.model, self.context = model, context

    def forward(self, *inputs: Tensor) -> Tensor:
        with self.context:
            return self.model(*inputs)


def bucket_size(parameters: int) -> int:
    """Elements of the buffer in which ZeRO reduces gradients."""
    return min(MAX_BUCKET, parameters)


def to_universal(source: Path, target: Path) -> None:
    """Convert a checkpoint of ZeRO 1 or 2 so that any number of ranks can load it. One process calls this."""
    _import_deepspeed()
    from deepspeed.checkpoint.ds_to_universal import main

    options = argparse.Namespace(
        input_folder=str(source), output_folder=str(target), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        main(options)


def _import_deepspeed():
    """Import DeepSpeed when it is needed (seconds), without its log messages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

        # `initialize` imports Muon, which decorates with torch.compile; without that, inductor is not imported (1.3 s)
        with patch.object(torch, "compile", lambda function: function):
            import deepspeed.runtime.zero.muon.muon_optimizer
    if os.environ["DS_ACCELERATOR"] == "cpu":  # or the first start compiles an inference op for half a minute
        deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def _clip_or_skip(optimizer: torch.optim.Optimizer, clip: float, scale: LossScale | None) -> None:
    """Unscale, measure and clip the gradient before a step without ZeRO, or skip the step, as ZeRO's optimizer does."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if scale:
        torch._foreach_mul_([p.grad for p in parameters], 1 / scale.cur_scale)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    optimizer._global_grad_norm = norm  # DeepSpeed's engine reads these two
    optimizer.overflow = not bool(torch.isfinite(norm))
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # fused AdamW skips the step where it is 1
    if clip and not optimizer.overflow:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
