"""The segmentation model and its loss."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import PATCH_PER_STEM_STRIDE, Encoder
from finetune.tasks.segmentation.heads import AUXILIARY_STAGE, Head, resize
from models.convnext import ConvNeXt, init_weights
from models.sparse.layouts import Dense

VOID = -1  # target of pixels that do not count
SMOOTH = 1.0  # pixels that dice adds to both sides of its fraction


@dataclass(frozen=True)
class HeadConfig:
    """What a weight file says about the head and evaluation."""

    head: str
    width: int
    classes: int
    auxiliary: bool
    eval: str
    flips: bool
    short_side: int | None


class Loss(nn.Module):
    """Cross entropy, dice, or their sum; `weights` [K] of the classes are for cross entropy.

    Dice (1606.04797) is over all pixels of a micro batch, its mean over the classes that occur there.
    """

    def __init__(self, kind: str, weights: Tensor | None = None):
        super().__init__()
        self.kinds = kind.split("+")
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss [] of logits [B, K, H, W] and targets [B, H, W], of which `VOID` does not count; 0 if none does."""
        logits = logits.float().movedim(1, -1).flatten(0, 2)  # cross entropy of images is not repeatable on a GPU
        target = target.flatten()
        total = logits.new_zeros(())
        if "ce" in self.kinds:
            weights = logits.new_ones(logits.shape[1]) if self.weights is None else self.weights
            loss = F.cross_entropy(logits, target, weights, ignore_index=VOID, reduction="sum")
            weight = weights[target.clamp(min=0)] * (target != VOID)
            total = total + loss / weight.sum().clamp(min=1e-6)
        if "dice" in self.kinds:
            total = total + dice(logits, target)
        return total


def dice(logits: Tensor, target: Tensor) -> Tensor:
    """1 - mean dice [] of the classes in `target` [N], for logits [N, K]."""
    truth = (target[:, None] == torch.arange(logits.shape[1], device=logits.device)).float()
    share = logits.softmax(1) * (target != VOID)[:, None]
    pixels = truth.sum(0)
    score = (2 * (share * truth).sum(0) + SMOOTH) / (share.sum(0) + pixels + SMOOTH)
    present = (pixels > 0).float()
    return ((1 - score) * present).sum() / present.sum().clamp(min=1)


class Segmenter(ConvNeXt):
    """An encoder with a `Head` on its four stages.

    Args:
        criterion: loss of training
        auxiliary: weight of the auxiliary head's loss
    """

    def __init__(
        self, arch: Encoder, config: HeadConfig, drop_path: float = 0.0, recompute: str = "none",
        criterion: Loss | None = None, auxiliary: float = 0.0,
    ):  # fmt: skip
        super().__init__(arch, 0, drop_path, recompute)
        self.head = Head(config.head, self.arch.dims, config.width, config.classes, config.auxiliary)
        self.head.apply(init_weights)
        self.criterion, self.auxiliary = criterion, auxiliary

    def forward(self, image: Tensor, target: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W] to logits [B, K, H, W] or, with targets [B, H, W], to the loss []."""
        if target is not None:
            return self.loss(list(self.forward_stages(image, Dense())), target)
        height, width = image.shape[2:]
        patch = PATCH_PER_STEM_STRIDE * self.arch.stem_stride
        image = F.pad(image, (0, -width % patch, 0, -height % patch))
        logits = self.head(list(self.forward_stages(image, Dense())))
        if self.arch.stem_stride > 1:
            logits = F.interpolate(logits.float(), scale_factor=float(self.arch.stem_stride), mode="bilinear")
        return logits[..., :height, :width]

    def loss(self, tokens: list[Tensor], target: Tensor) -> Tensor:
        """Loss [] of the tokens of the stages [B, Hi, Wi, Ci], with that of the auxiliary head."""
        maps = self.head.maps(tokens)
        outputs = [(1.0, self.head.classify(maps))]
        if self.head.auxiliary is not None:
            outputs.append((self.auxiliary, self.head.auxiliary(maps[AUXILIARY_STAGE])))
        with torch.autocast(target.device.type, enabled=False):  # interpolation in bf16 would round the logits
            sizes = target.shape[1:]
            return sum(weight * self.criterion(resize(logits.float(), *sizes), target) for weight, logits in outputs)
