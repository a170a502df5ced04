"""Pictures of crops that are compared."""

import torch.nn.functional as F
from torch import Tensor

from data.sheets import Cell, Group, Sheet
from models.lejepa import LeJEPA
from pretrain.pictures import hatched_pictures, hide, pixels_of

NOTE = (
    "below a crop: cosine of its embedding with that of the image's first crop; in brackets, with the next image's; "
    "hatched: hidden from the encoder"
)


def view_sheet(model: LeJEPA, image: Tensor, visible: Tensor, crops: int, mean: Tensor, std: Tensor) -> Sheet:
    """A row for each image, of what the encoder sees of its crops, with their similarities.

    The normalised crops in `image` are [B * crops, C, H, W], their masks [B * crops, gy, gx].
    """
    whole = len(image) // crops * crops
    image, visible = image[:whole], visible[:whole]
    x = F.normalize(model.embed(image, visible), dim=1).unflatten(0, (-1, crops))
    same, other = ((x * first[:, None]).sum(2).tolist() for first in (x[:, 0], x[:, 0].roll(-1, 0)))
    pictures = hatched_pictures(hide(pixels_of(image, mean, std), visible))
    groups = []
    for i, (alike, unlike) in enumerate(zip(same, other, strict=True)):
        texts = [f"{a:.2f} ({b:.2f})" for a, b in zip(alike, unlike, strict=True)]
        row = pictures[i * crops : (i + 1) * crops]
        groups.append(
            Group("", [Cell(picture, (text,)) for picture, text in zip(row, texts, strict=True)], together=True)
        )
    return Sheet(groups, NOTE, across=2)
