"""Random changes of an RGB image's colours as one affine map of its pixels: faster than one change after another."""

import math

import numpy as np
import torch
from torch import Tensor

RECOLORED = 0.8  # probability of other colours than the image's (2002.05709, appendix A)
GREY = np.array([0.299, 0.587, 0.114])  # luminance of red, green and blue (ITU-R BT.601)
# red, green and blue to luminance and two axes of colour (YIQ), in which another hue is a rotation
YIQ = np.array([GREY, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
RGB = np.linalg.inv(YIQ)


def color_map(strength: float, hue: float, rng: np.random.Generator) -> tuple[np.ndarray, float, float]:
    """A random matrix [3, 3] of RGB, and factors (brightness, contrast) around the image's mean luminance.

    Brightness, contrast and saturation change by 1 - to 1 + `strength`, the hue by up to `hue` of a turn.
    """
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    angle = 2 * math.pi * rng.uniform(-hue, hue)
    cos, sin = math.cos(angle), math.sin(angle)
    turned = np.array([[1, 0, 0], [0, saturation * cos, -saturation * sin], [0, saturation * sin, saturation * cos]])
    return RGB @ turned @ YIQ, brightness, contrast


def recolor(image: Tensor, rng: np.random.Generator, strength: float, hue: float, grey: float) -> Tensor:
    """An image [3, H, W], uint8 or float32 from 0 to 1, with other colours; grey with probability `grey`."""
    matrix, brightness, contrast = np.eye(3), 1.0, 1.0
    if rng.random() < RECOLORED:
        matrix, brightness, contrast = color_map(strength, hue, rng)
    if rng.random() < grey:
        matrix = np.ones((3, 1)) * GREY @ matrix
    largest = 255 if image.dtype == torch.uint8 else 1
    pixels = image.float().flatten(1)
    luminance = float(GREY @ pixels.mean(1).numpy()) * brightness
    mapped = torch.from_numpy(matrix * brightness * contrast).float() @ pixels + (1 - contrast) * luminance
    mapped = mapped.clamp_(0, largest).view_as(image)
    return mapped.round_().to(torch.uint8) if image.dtype == torch.uint8 else mapped
