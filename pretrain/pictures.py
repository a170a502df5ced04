"""Reconstruction pictures and a measure of feature collapse."""

from collections.abc import Sequence
from functools import partial
from statistics import mean

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from configs.style import hatching
from data.sheets import Cell, Group, Sheet
from data.transforms import to_rgb
from models.convnext import ConvNeXt
from models.fcmae import FCMAE, patch_statistics
from models.sparse.layouts import Dense, patchify, unpatchify

COLUMNS = (("input",), ("visible",), ("predicted",), ("combined",))
CELL = 128  # pixels: minimum side of an image
NOTE = "hatched: hidden from the encoder, or not predicted"
NORM_NOTE = "predicted patches have the true mean and variance"


def reconstruct(model: FCMAE, image: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Visible patches of normalised images [B, C, H, W], predicted hidden patches, and both; missing pixels are NaN.

    With norm_pix, predictions are rescaled by mean and variance of the true patch, so brightness and contrast of a
    hidden patch are not predicted.
    """
    output, grid = model.predict(image, visible), tuple(visible.shape[1:])
    patches = patchify(image, grid).flatten(1, 2)  # [B, gy * gx, P, P, C]
    rows = torch.arange(len(image), device=image.device)[:, None]
    pixels = output.prediction.float()
    if model.settings.norm_pix:
        mean, std = patch_statistics(model.true_pixels(image, output.hidden))
        pixels = pixels * std + mean
    masked, predicted = patches.clone(), torch.full_like(patches, float("nan"))
    masked[rows, output.hidden] = float("nan")
    predicted[rows, output.hidden] = pixels.view(*output.hidden.shape, *patches.shape[2:]).to(patches.dtype)
    pasted = torch.where(masked.isnan(), predicted, masked)
    return tuple(unpatchify(x.unflatten(1, grid)) for x in (masked, predicted, pasted))


def reconstruction_grid(model: FCMAE, image: Tensor, visible: Tensor, mean: Tensor, std: Tensor) -> Sheet:
    """The four `COLUMNS` for each of normalised images [B, C, H, W]; missing pixels are hatched."""
    parts = [pixels_of(x, mean, std) for x in (image, *reconstruct(model, image, visible))]
    return image_rows(parts, COLUMNS, f"{NOTE}; {NORM_NOTE}" if model.settings.norm_pix else NOTE)


def image_rows(parts: Sequence[Tensor], columns: Sequence[tuple[str]], note: str) -> Sheet:
    """A row for each image, of its pictures in `parts`: [B, C, H, W] from 0 to 1; missing pixels, NaN, are hatched."""
    rows = zip(*map(hatched_pictures, parts), strict=True)
    groups = [Group("", [Cell(*cell) for cell in zip(row, columns, strict=True)], together=True) for row in rows]
    return Sheet(groups, note, across=2)


def hatched_pictures(x: Tensor) -> list[Image.Image]:
    """Images [B, C, H, W] from 0 to 1 as pictures whose longer side is `CELL` or more; missing pixels are hatched."""
    zoom = max(1, -(-CELL // max(x.shape[2:])))
    x = x.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    hatched = torch.from_numpy(hatching(*x.shape[2:])).permute(2, 0, 1)
    drawn = torch.where(x.isnan().any(1, keepdim=True), hatched, to_rgb(x.nan_to_num()))
    return [F.to_pil_image(picture) for picture in drawn]


def pixels_of(image: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels from 0 to 1 of normalised images [B, C, H, W], on the CPU."""
    return (image.float() * std[:, None, None] + mean[:, None, None]).cpu()


def hide(pixels: Tensor, visible: Tensor) -> Tensor:
    """Images [B, C, H, W] on the CPU, with NaN where masks [B, gy, gx] hide them."""
    patches = patchify(pixels, tuple(visible.shape[1:]))
    return unpatchify(patches.masked_fill(~visible.cpu()[..., None, None, None], float("nan")))


def feature_distance(encoder: ConvNeXt, image: Tensor) -> dict[str, float]:
    """Mean cosine distance between channels per stage (feature collapse, 2301.00808, section 3.2).

    0 = all channels are equal, 0.5 = they are uncorrelated. As in the paper, measured in the expanded layer of each
    block's MLP, after GRN. Between blocks the measure would stay at 0.5: channels have both signs, so cosines cancel.
    """
    distances = {f"stage_{i}": [] for i in range(1, 1 + len(encoder.stages))}

    def measure(stage: str, _, inputs: tuple[Tensor]) -> None:
        maps = torch.nn.functional.normalize(inputs[0].flatten(1, 2).float(), dim=1)  # [B, T, C]: length 1 over T
        cosine = maps.sum(2).square().sum(1) / maps.shape[2] ** 2  # mean over pairs = squared norm of the mean map
        distances[stage].append(float((1 - cosine).mean() / 2))

    hooks = []
    for name, stage in zip(distances, encoder.stages, strict=True):
        hooks += [block.mlp.fc2.register_forward_pre_hook(partial(measure, name)) for block in stage.blocks]
    encoder.forward_features(image, Dense())
    for hook in hooks:
        hook.remove()
    return {stage: mean(values) for stage, values in distances.items()}
