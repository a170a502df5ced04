"""Pictures of crops that are compared."""

import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from data.sheets import Cell, Group, Sheet
from data.transforms import to_rgb
from models.lejepa import LeJEPA
from pretrain.pictures import CELL

NOTE = "below a crop: cosine of its embedding with that of the image's first crop; in brackets, with the next image's"


def view_sheet(model: LeJEPA, image: Tensor, mean: Tensor, std: Tensor) -> Sheet:
    """A row for each image, of its normalised crops in `image` [B * V, C, H, W], with their similarities."""
    whole = image[: len(image) // model.views * model.views]
    x = F.normalize(model.embed(whole), dim=1).unflatten(0, (-1, model.views))
    same, other = ((x * first[:, None]).sum(2).tolist() for first in (x[:, 0], x[:, 0].roll(-1, 0)))
    pixels = to_rgb((whole.float() * std[:, None, None] + mean[:, None, None]).cpu())
    zoom = max(1, -(-CELL // max(image.shape[2:])))
    pictures = [V.to_pil_image(p.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)) for p in pixels]
    groups = []
    for i, (alike, unlike) in enumerate(zip(same, other, strict=True)):
        texts = [f"{a:.2f} ({b:.2f})" for a, b in zip(alike, unlike, strict=True)]
        row = pictures[i * model.views : (i + 1) * model.views]
        groups.append(
            Group("", [Cell(picture, (text,)) for picture, text in zip(row, texts, strict=True)], together=True)
        )
    return Sheet(groups, NOTE, across=2)
