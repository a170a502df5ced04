"""Reconstruction pictures and a measure of feature collapse."""

from functools import partial
from pathlib import Path
from statistics import mean

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from configs.files import atomic_file
from data.transforms import to_rgb
from models.convnext import ConvNeXt
from models.fcmae import FCMAE, patch_statistics
from models.sparse.layouts import Dense, patchify, unpatchify

COLUMNS = ("input", "visible patches", "prediction", "prediction pasted")
CELL, GAP, CAPTION = 128, 4, 18  # pixels: minimum side of an image, gap between images, height of a line of text
GREY = 0.5  # of missing pixels


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


def reconstruction_grid(model: FCMAE, image: Tensor, visible: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Captioned picture [3, height, width], uint8: the four `COLUMNS` for each image, two images per row."""
    zoom, cells = max(1, -(-CELL // max(image.shape[2:]))), []
    for x in (image, *reconstruct(model, image, visible)):
        pixels = to_rgb((x.float() * std[:, None, None] + mean[:, None, None]).nan_to_num(GREY)).cpu()
        cells.append(pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3))
    height, width = cells[0].shape[2:]
    across = min(2, len(image))
    down, group = -(-len(image) // across), len(COLUMNS) * (width + GAP) + 4 * GAP
    sheet = Image.new("RGB", (across * group - 3 * GAP, down * (height + GAP) + GAP + 2 * CAPTION), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(len(image)):
        for j, (name, column) in enumerate(zip(COLUMNS, cells, strict=True)):
            left = GAP + i % across * group + j * (width + GAP)
            sheet.paste(F.to_pil_image(column[i]), (left, CAPTION + GAP + i // across * (height + GAP)))
            draw.text((left, GAP), name, fill="black")
    if model.settings.norm_pix:
        note = "predicted patches have the mean and variance of the true ones"
        draw.text((GAP, sheet.height - CAPTION + GAP / 2), note, fill="black")
    return F.pil_to_tensor(sheet)


def write_png(path: Path, picture: Tensor) -> None:
    """Write a picture [3, H, W], uint8."""
    with atomic_file(path) as file:
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "png")


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
