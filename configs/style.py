"""The look of all pictures: letters, colours that colour-blind readers can tell apart, hatching.

Series also differ by their dashes, so no colour is needed to tell them apart.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from PIL.ImageFont import FreeTypeFont

INK, PAPER, GRID = "#1f2328", "#ffffff", "#d0d7de"
SERIES = ("#0072b2", "#c04d00", "#007a5a", "#a3487f", "#806000", "#57606a")  # Okabe and Ito's, darker: 4.5:1 on white
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
DARK = {  # the same on a dark page
    INK: "#e6edf3", GRID: "#3d444d",
    **dict(zip(SERIES, ("#56b4e9", "#ff9b5c", "#2fd0a0", "#e79fc7", "#e6c34a", "#9aa4af"), strict=True)),
}  # fmt: skip
AREAS = ("#56b4e9", "#e69f00", "#009e73", "#d55e00", "#0072b2", "#cc79a7", "#f0e442")  # Okabe and Ito's, of classes
FILL, SHADES = "#9ecae9", "Blues"  # bars behind text; shares from 0 to 1
RC = {
    "font.size": 9.5, "axes.titlesize": 10.5, "axes.labelsize": 9.5, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "legend.fontsize": 9, "legend.frameon": False, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.titlecolor": INK, "axes.spines.top": False,
    "axes.spines.right": False, "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "legend.handlelength": 2.8,
}  # fmt: skip
WIDTH = 4.4  # inches of a figure: on a phone its letters are still 9 pixels high
LETTERS, GAP = 13, 8  # pixels: height of letters in sheets of images, and space between images
FIGURE = "figure"  # Description in a figure's PNG: report.html inverts it on a dark page, images it does not
STRIPE = 8  # pixels between the lines of the hatching


def font(letters: int = LETTERS) -> "FreeTypeFont":
    """A font for PIL with more than Latin letters, unlike PIL's own."""
    from pathlib import Path

    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), letters)


def new_figure(width: float = WIDTH, height: float = 3.0) -> "Figure":
    """An empty figure of this style, sizes in inches. Draw on it within `matplotlib.rc_context(RC)`."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def hatching(height: int, width: int) -> "np.ndarray":
    """Slanted blue lines on white, uint8 [height, width, 3], for pixels that are not there: no image looks like it."""
    import numpy as np

    rows, columns = np.ogrid[:height, :width]
    line = ((rows + columns) % STRIPE < STRIPE // 4)[..., None]
    return np.where(line, np.uint8([86, 140, 200]), np.uint8([255, 255, 255]))
