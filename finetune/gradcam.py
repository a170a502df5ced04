"""Grad-CAM (1610.02391): where in a picture the evidence for an output is."""

from collections.abc import Callable

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.transforms import to_rgb
from models.convnext import ConvNeXt
from models.sparse.layouts import Dense

STRONGEST = 0.6  # opacity of the colour where the evidence is highest
COLOURS = "inferno"  # dark to light, also for colour-blind readers


def grad_cam(model: ConvNeXt, image: Tensor, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """(maps [B, h, w] from 0 to 1 over the last stage's tokens, output numbers [B]) of normalised images [B, C, H, W].

    `choose` gets the outputs [B, K] and returns which one of each image to explain. Equations 1 and 2: channels are
    weighted by the mean gradient of that output, negative sums are cut off. A map is all 0 where nothing speaks for it.
    """
    with torch.no_grad():
        tokens = model.forward_features(image, Dense()).float()
    with torch.enable_grad():
        tokens.requires_grad_()
        output = model.head(tokens)
        number = choose(output.detach())
        (gradient,) = torch.autograd.grad(output.gather(1, number[:, None]).sum(), tokens)
    maps = (tokens.detach() * gradient.mean((1, 2), keepdim=True)).sum(3).relu()
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny), number


def draw(image: Tensor, evidence: Tensor, region: tuple[float, float, float, float]) -> Tensor:
    """A decoded picture [C, H, W] as uint8 [3, H, W] with a map [h, w] over the part that the model saw.

    `region` is (left, top, right, bottom) of that part in pixels. Small maps are interpolated bilinearly.
    """
    picture = Image.fromarray(to_rgb(image).permute(1, 2, 0).numpy())
    left, top, right, bottom = (round(x) for x in region)
    values = Image.fromarray((255 * evidence.cpu()).round().byte().numpy())
    values = values.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BILINEAR)
    colours = (255 * np.array(matplotlib.colormaps[COLOURS].colors)).round().astype(np.uint8)
    opacity = values.point(lambda x: round(x * STRONGEST))
    picture.paste(Image.fromarray(colours[np.asarray(values)]), (left, top), opacity)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
