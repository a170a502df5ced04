"""Pictures of several tasks: copies of images with lines of text below them, and figures."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from configs.files import atomic_file
from configs.style import FIGURE, INK, PAPER, RC, font, new_figure
from data.transforms import to_rgb

MIN_SIDE = 256  # pixels: smaller pictures are enlarged before annotation
MIN_LETTERS, LETTERS = 14, 1 / 24  # height of letters: minimum in pixels, and relative to the width
DPI, MAX_PIXELS = 192, 3000  # of a figure: twice the 96 of a screen; longest side


def annotate(image: Tensor, lines: list[str]) -> Image.Image:
    """A decoded image [C, H, W], enlarged if small, with lines of text below it, shortened in the middle if long."""
    picture = F.to_pil_image(to_rgb(image))
    zoom = max(1, math.ceil(MIN_SIDE / max(picture.size)))
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    width = max(picture.width, MIN_SIDE)
    height = max(MIN_LETTERS, round(width * LETTERS))
    letters, space = font(height), height // 2
    sheet = Image.new("RGB", (width, picture.height + space + len(lines) * (height + space)), PAPER)
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        top = picture.height + space + i * (height + space)
        draw.text((space, top), _shorten(" ".join(line.split()), letters, width - 2 * space), INK, letters)
    return sheet


def _shorten(line: str, letters: ImageFont.FreeTypeFont, width: int) -> str:
    """Remove letters from the middle of a line until it is at most `width` pixels wide."""
    cut = line
    while letters.getlength(cut) > width and len(cut) > 2:
        keep = len(cut) // 2 - 1
        cut = f"{cut[:keep]}…{cut[len(cut) - keep :]}"
    return cut


@contextmanager
def figure_file(path: Path, width: float, height: float) -> Iterator[Figure]:
    """An empty figure of the project's style, sizes in inches, which is written as a PNG at the end."""
    with matplotlib.rc_context(RC):
        figure = new_figure(width, height)
        yield figure
        with atomic_file(path) as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as a box
            dpi, about = min(DPI, MAX_PIXELS / max(width, height)), {"Description": FIGURE}
            figure.savefig(file, format="png", dpi=dpi, facecolor=PAPER, metadata=about)
