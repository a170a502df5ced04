"""Pictures of a teacher's features and the student's predictions of them, as colours."""

import torch
from torch import Tensor

from data.sheets import Sheet
from pretrain.pictures import hide, image_rows, pixels_of

COLUMNS = (("input",), ("visible",), ("target features",), ("predicted features",))
NOTE = "colours: the three main components of the targets of these images; hatched: hidden, or not predicted"
SPAN = 2.5  # standard deviations of a component from black to full


def feature_sheet(
    image: Tensor, visible: Tensor, target: Tensor, predicted: Tensor, mean: Tensor, std: Tensor
) -> Sheet:
    """The four `COLUMNS`, a colour for each patch.

    Args:
        image: normalised images [B, C, H, W]
        visible: their masks [B, gy, gx]
        target, predicted: features [B, gy, gx, D]; NaN = not predicted
        mean, std: of the images' channels
    """
    side = image.shape[2] // visible.shape[1]
    colours = [x.permute(0, 3, 1, 2) for x in as_colours(target.cpu(), predicted.cpu())]
    pixels = pixels_of(image, mean, std)
    enlarged = [x.repeat_interleave(side, 2).repeat_interleave(side, 3) for x in colours]
    return image_rows([pixels, hide(pixels, visible), *enlarged], COLUMNS, NOTE)


def as_colours(target: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Both features [..., D], in any number, as colours [..., 3] from 0 to 1: principal components of the targets."""
    rows = target.flatten(0, -2).double()
    centre = rows.mean(0)
    _, lengths, directions = torch.linalg.svd(rows - centre, full_matrices=False)
    basis, scale = directions[:3].mT, lengths[:3] / len(rows) ** 0.5
    basis = torch.nn.functional.pad(basis / scale.clamp(min=1e-6), (0, 3 - basis.shape[1]))  # of fewer than three
    return tuple(((x.double() - centre) @ basis / (2 * SPAN) + 0.5).float().clamp(0, 1) for x in (target, predicted))
