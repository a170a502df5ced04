"""Mixed precision: which one a run uses, autocast, and loss scaling for fp16."""

import torch
from torch import Tensor

from configs.errors import UserError
from configs.machine import cpu_info
from configs.schema import Optim

LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def precision(optim: Optim, device: torch.device, pretraining: bool = False) -> str:
    """`optim.precision` on a device: fp32, bf16 or fp16. Raises `UserError` for bf16 on a GPU without it.

    `auto` is bf16 on a GPU that has it and, in pretraining, on a CPU that has it: measured to learn as good features.
    """
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if optim.precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise UserError("optim.precision is bf16, but this GPU has no bf16: use fp16 or fp32")
    if optim.precision == "auto":
        return "bf16" if has_bf16 or (pretraining and device.type == "cpu" and cpu_has_bf16()) else "fp32"
    return optim.precision


def cpu_has_bf16() -> bool:
    """Whether the CPU has instructions for products in bf16; False where Linux does not say."""
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(cpu_info("flags").split())


def autocast(device: torch.device, kind: str) -> torch.autocast:
    """Context manager that runs matrix products and convolutions in fp32, bf16 or fp16."""
    return torch.autocast(device.type, LOW_PRECISION.get(kind), enabled=kind in LOW_PRECISION)


def exact_products() -> None:
    """Choose who computes matrix products in fp32 on a CPU: MKL, or oneDNN where that is faster and as exact.

    On CPUs of other makers than Intel, MKL takes a slow path: on two EPYCs, oneDNN was 1.1 and 2.2 times as fast. Torch
    asks oneDNN under the precision "medium", which allows bf16; where oneDNN makes use of that, MKL stays.
    """
    torch.set_float32_matmul_precision("highest")
    if cpu_maker() == "GenuineIntel":
        return
    exact_error = _product_error()
    torch.set_float32_matmul_precision("medium")
    if not _product_error() <= 2 * exact_error:
        torch.set_float32_matmul_precision("highest")


def cpu_maker() -> str:
    """The CPU's vendor, like GenuineIntel or AuthenticAMD; empty where Linux does not say."""
    return cpu_info("vendor_id")


def _product_error() -> float:
    """Relative error of a product and of its gradients."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(size, generator=generator) for size in ((512, 384), (384, 640), (512, 640)))
    found, exact = (
        [a @ b, g @ b.t(), a.t() @ g] for a, b, g in ((x, weight, grad), (x.double(), weight.double(), grad.double()))
    )
    return max(float((y - z).norm() / z.norm()) for y, z in zip(found, exact, strict=True))


class LossScale:
    """Dynamic loss scaling for fp16 (1710.03740, section 3.2): scales the loss so that gradients do not underflow.

    ZeRO's optimizer takes it as its `loss_scaler`: it divides gradients by `cur_scale` before clipping. An overflow
    halves the scale and skips the step; `GROWTH` applied steps in a row double it.
    """

    GROWTH = 2000
    dynamic = True

    def __init__(self):
        self.cur_scale, self.applied = 2.0**16, 0

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss * self.cur_scale

    def update_scale(self, overflow: bool) -> None:
        """No-op: DeepSpeed calls this before it divides by the scale, so the scale changes later, in `after_step`."""

    def after_step(self, applied: bool) -> None:
        """Adapt the scale after a step that was applied, or skipped because of an overflow."""
        self.applied = self.applied + 1 if applied else 0
        if not applied:
            self.cur_scale = max(1.0, self.cur_scale / 2)
        elif self.applied % self.GROWTH == 0:
            self.cur_scale *= 2
