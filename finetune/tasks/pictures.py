"""Pictures of several tasks: copies of images with lines of text below them, and figures."""

import math
import warnings
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from configs.files import atomic_file
from data.transforms import to_rgb

MIN_SIDE = 256  # pixels: smaller pictures are enlarged before annotation
MIN_LETTERS, LETTERS = 14, 1 / 24  # height of letters: minimum in pixels, and relative to the width
FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"  # PIL's default has Latin letters only


def annotate(image: Tensor, lines: list[str]) -> Image.Image:
    """A decoded image [C, H, W], enlarged if small, with lines of text below it, shortened in the middle if long."""
    picture = F.to_pil_image(to_rgb(image))
    zoom = max(1, math.ceil(MIN_SIDE / max(picture.size)))
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    width = max(picture.width, MIN_SIDE)
    height = max(MIN_LETTERS, round(width * LETTERS))
    font, space = ImageFont.truetype(FONT, height), height // 2
    sheet = Image.new("RGB", (width, picture.height + space + len(lines) * (height + space)), "white")
    sheet.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        top = picture.height + space + i * (height + space)
        draw.text((space, top), _shorten(" ".join(line.split()), font, width - 2 * space), "black", font)
    return sheet


def _shorten(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Remove letters from the middle of a line until it is at most `width` pixels wide."""
    cut = line
    while font.getlength(cut) > width and len(cut) > 2:
        keep = len(cut) // 2 - 1
        cut = f"{cut[:keep]}…{cut[len(cut) - keep :]}"
    return cut


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as a PNG."""
    with atomic_file(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as a box
        figure.savefig(file, format="png", dpi=120)
