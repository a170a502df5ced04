"""Test-time augmentation: a model's outputs for several views of each image, averaged by the task."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from torch import Tensor, nn

from configs.errors import UserError

AXIS = {"hflip": 3, "vflip": 2}  # of images [B, C, H, W]
MARGIN = 8 / 7  # side of the enlarged image of `crops`, relative to a crop's: 256 for crops of 224


class Averaged(nn.Module):
    """A model whose output is `average` of its outputs for all views.

    Flips double the views; an output [B, K, H, W], as in segmentation, is flipped back. Crops are the corners and the
    centre, of height and width `size`, of larger images.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], size: tuple[int, int], average: Callable[[list[Tensor]], Tensor]
    ):
        super().__init__()
        self.model, self.average, self.size, self.crops = model, average, size, "crops" in names
        self.flips = [[axis for axis in axes if axis] for axes in product(*((0, AXIS[n]) for n in AXIS if n in names))]

    def forward(self, image: Tensor) -> Tensor:
        outputs = []
        for part in self._parts(image):
            for axes in self.flips:
                output = self.model(part.flip(axes))
                outputs.append(output.flip(axes) if output.ndim == 4 else output)
        return self.average(outputs)

    def _parts(self, image: Tensor) -> list[Tensor]:
        if not self.crops:
            return [image]
        (h, w), (height, width) = self.size, image.shape[2:]
        bottom, right = height - h, width - w
        corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
        return [image[:, :, top : top + h, left : left + w].contiguous() for top, left in corners]


def with_views(task: Any, names: Sequence[str]) -> nn.Module:
    """The model of a `finetune.inference.Inference` with the views `names` of each image; its transform is enlarged.

    Raises `UserError` if the task cannot average outputs.
    """
    if not names:
        return task.trained.model
    average = getattr(task, "average", None)
    enlarged = getattr(task.transform, "enlarged", None)
    if average is None or ("crops" in names and enlarged is None):
        raise UserError(f"--tta {' '.join(names)}: task {task.trained.weights.task} has no such views: leave it out")
    if "crops" in names:
        task.transform = enlarged(MARGIN)
    return Averaged(task.trained.model, names, tuple(task.trained.preprocessing.size), average).eval()
