"""The head of a regression model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from configs.errors import UserError
from data.vectors import target_names
from models.convnext import Head, init_weights


class NumberHead(Head):
    """LayerNorm and linear layer on the image's mean token, scaled by `std` and shifted by `mean` [N] of the numbers.

    In fp32 also under autocast: bf16 would round the numbers to three digits.
    """

    def __init__(self, dim: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__(dim, len(mean))
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.float().mean((1, 2)))
        normalised = (x[:, None] * self.fc.weight).sum(-1) + self.fc.bias  # autocast would run a linear layer in bf16
        return normalised * self.std + self.mean


def number_names(images) -> tuple[list[str], tuple[float, ...] | None]:
    """Names of a data set's numbers, and the values of its classes if these are the numbers.

    Raises `UserError` if it has neither.
    """
    classes = images.classes
    if not (getattr(images, "targets", None) or {}).get("kind") and classes:
        try:
            return ["number"], tuple(map(float, classes))
        except ValueError:
            problem = f"{images.folder}: task numbers needs numbers, but class {classes[0]} is not a number"
            raise UserError(f"{problem}: use --task.name classification, or a table with --label-column") from None
    return target_names(images, "numbers"), None
