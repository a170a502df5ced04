"""Reconstruction pictures, and the measure of feature collapse."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from configs.files import whole_file
from models.convnext import ConvNeXt
from models.fcmae import FCMAE, patch_statistics
from models.sparse.layouts import Dense, patchify, unpatchify

CELL, GAP, CAPTION = 128, 4, 18  # pixels: least side of one image, gap between two, height of the caption line
GREY = 0.5  # of hidden patches


def reconstruct(model: FCMAE, image: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """(masked, reconstruction) of normalised images [B, C, H, W]; masked has NaN at hidden patches.

    Visible patches are pasted from the input: the model was never trained on them. Where it predicts normalised
    pixels (norm_pix), the true patch's mean and variance bring them back, so brightness and contrast of a hidden
    patch are given, not predicted.
    """
    output = model.predict(image, visible)
    grid = tuple(visible.shape[1:])
    patches = patchify(image, grid).flatten(1, 2)  # [B, gy * gx, P, P, C]
    rows = torch.arange(len(image), device=image.device)[:, None]
    predicted = output.prediction.float()
    if model.config.norm_pix:
        mean, std = patch_statistics(model.true_pixels(image, output.hidden))
        predicted = predicted * std + mean
    filled, masked = patches.clone(), patches.clone()
    filled[rows, output.hidden] = predicted.view(*output.hidden.shape, *patches.shape[2:]).to(patches.dtype)
    masked[rows, output.hidden] = float("nan")
    return unpatchify(masked.unflatten(1, grid)), unpatchify(filled.unflatten(1, grid))


def reconstruction_grid(model: FCMAE, image: Tensor, visible: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """A captioned picture [3, height, width], uint8: a row an image, with its visible patches and reconstruction."""
    masked, filled = reconstruct(model, image, visible)
    columns = [_to_rgb(x, mean, std) for x in (image, masked, filled)]
    zoom = max(1, -(-CELL // max(image.shape[2:])))
    columns = [x.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3) for x in columns]
    height, width = columns[0].shape[2:]
    rows, across = len(image), 2 if len(image) > 2 else 1  # two triples side by side
    down = -(-rows // across)
    sheet_width = across * 3 * (width + GAP) + (across - 1) * 4 * GAP + GAP
    sheet = torch.full((3, down * (height + GAP) + GAP + CAPTION, sheet_width), 255, dtype=torch.uint8)
    for i in range(rows):
        top = CAPTION + GAP + i // across * (height + GAP)
        for j, column in enumerate(columns):
            left = GAP + (i % across) * (3 * (width + GAP) + 4 * GAP) + j * (width + GAP)
            sheet[:, top : top + height, left : left + width] = column[i]
    text = "input | visible patches | reconstruction"
    if model.config.norm_pix:
        text += " (hidden patches: predicted, scaled with the true mean and variance)"
    return _caption(sheet, text)


def _to_rgb(image: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised images of any number of channels as uint8 RGB, on the CPU: the first three channels, or grey."""
    pixels = (image.float() * std[:, None, None] + mean[:, None, None]).nan_to_num(GREY).clamp(0, 1)
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return (pixels * 255).round().to(torch.uint8).cpu()


def _caption(sheet: Tensor, text: str) -> Tensor:
    picture = F.to_pil_image(sheet)
    ImageDraw.Draw(picture).text((GAP, GAP), text, fill="black")
    return F.pil_to_tensor(picture)


def write_png(path: Path, picture: Tensor) -> None:
    """Write a picture [3, H, W], uint8."""
    with whole_file(path) as file:
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "png")


def feature_distance(encoder: ConvNeXt, image: Tensor) -> float:
    """Mean pairwise cosine distance of the last stage's channels (2301.00808, section 3.2): near 0 = collapsed."""
    tokens = encoder.forward_features(image, Dense()).flatten(0, 2).float()  # [T, C]
    channels = torch.nn.functional.normalize(tokens.T, dim=1)
    return float((1 - channels @ channels.T).mean() / 2)
