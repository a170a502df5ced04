"""The style of pictures: contrast, colours for colour-blind readers, hatching."""

import itertools

import numpy as np
import pytest

from configs.style import AREAS, DARK, INK, PAPER, SERIES, hatching

DARK_PAGE = "#121212"
# Machado, Oliveira and Fernandes (2009), severity 1: linear RGB as it is seen
BLINDNESS = {
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
}


def linear(colour: str) -> np.ndarray:
    values = np.frombuffer(bytes.fromhex(colour[1:]), np.uint8) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """Of the WCAG."""
    low, high = sorted(float(linear(colour) @ (0.2126, 0.7152, 0.0722)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", [INK, *SERIES])
def test_lines_and_text_stand_out_on_light_and_on_dark_pages(colour):
    assert contrast(colour, PAPER) >= 4.5 and contrast(DARK[colour], DARK_PAGE) >= 4.5


@pytest.mark.parametrize("kind", BLINDNESS)
@pytest.mark.parametrize("dark", [False, True])
def test_the_first_four_colours_differ_for_colour_blind_readers(kind, dark):
    seen = [np.clip(BLINDNESS[kind] @ linear(DARK[c] if dark else c), 0, 1) ** (1 / 2.2) for c in SERIES[:4]]
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(seen, 2)) > 0.08


@pytest.mark.parametrize("kind", BLINDNESS)
def test_areas_differ_for_colour_blind_readers(kind):
    seen = [np.clip(BLINDNESS[kind] @ linear(c), 0, 1) ** (1 / 2.2) for c in AREAS]
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(seen, 2)) > 0.08


def test_hatching_is_no_grey():
    pixels = hatching(32, 40).astype(int)
    assert pixels.shape == (32, 40, 3) and len(np.unique(pixels.reshape(-1, 3), axis=0)) == 2
    assert 0.1 < (np.ptp(pixels, axis=2) > 80).mean() < 0.5  # blue lines
