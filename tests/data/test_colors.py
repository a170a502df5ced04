"""Changes of colours, against torchvision's, which make one at a time."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from data.colors import GREY, RECOLORED, color_map, recolor
from data.transforms import sample_rng


class Draws:
    """A generator that draws given numbers."""

    def __init__(self, *values):
        self.values = list(values)

    def random(self):
        return self.values.pop(0)

    def uniform(self, low, high, size=None):
        return self.values.pop(0)


def photo(dtype=torch.uint8) -> torch.Tensor:
    """A picture without extreme values, so that no change is clipped."""
    x = torch.from_numpy(np.random.default_rng(0).uniform(80, 140, (3, 9, 7))).float()
    return x.round().to(torch.uint8) if dtype == torch.uint8 else x / 255


def changed(image, brightness=1.0, contrast=1.0, saturation=1.0, turn=0.0, grey=False):
    draws = Draws(0.0, (brightness, contrast, saturation), turn, 0.0 if grey else 1.0)
    return recolor(image, draws, 0.4, 0.1, 0.2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_each_change_is_torchvisions(dtype):
    image, levels = photo(dtype), 255 if dtype == torch.uint8 else 1
    cases = [
        (changed(image, brightness=1.3), F.adjust_brightness(image, 1.3)),
        (changed(image, contrast=0.7), F.adjust_contrast(image, 0.7)),
        (changed(image, saturation=1.4), F.adjust_saturation(image, 1.4)),
        (changed(image, grey=True), F.rgb_to_grayscale(image, 3)),
        (changed(image), image),
    ]
    for found, expected in cases:
        assert found.dtype == image.dtype and found.shape == image.shape
        torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=1.2 * levels / 255)


def test_another_hue_keeps_luminance_and_greys():
    grey = photo()[:1].expand(3, -1, -1)
    assert torch.equal(changed(grey, turn=0.1), grey)
    image = photo(torch.float32)
    luminance = torch.from_numpy(GREY).float()
    found = changed(image, turn=0.1)
    assert (found - image).abs().mean() > 0.01
    torch.testing.assert_close(torch.tensordot(luminance, found, 1), torch.tensordot(luminance, image, 1))
    torch.testing.assert_close(changed(found, turn=-0.1), image, rtol=0, atol=1e-5)
    whole = changed(image, turn=1.0)
    torch.testing.assert_close(whole, image, rtol=0, atol=1e-5)


def test_draws():
    """Shares of images that are left alone and that are grey; ranges of the factors."""
    image = photo()
    found = [recolor(image, sample_rng(0, 0, i), 0.4, 0.1, 0.2) for i in range(600)]
    same = sum(torch.equal(x, image) for x in found) / 600
    assert same == pytest.approx((1 - RECOLORED) * 0.8, abs=0.05)
    assert sum(bool((x == x[:1]).all()) for x in found) / 600 == pytest.approx(0.2, abs=0.05)
    factors = np.array([color_map(0.4, 0.1, sample_rng(0, 0, i))[1:] for i in range(300)])
    assert 0.6 <= factors.min() < 0.63 and 1.37 < factors.max() <= 1.4
    assert torch.equal(recolor(image, sample_rng(0, 0, 5), 0.4, 0.1, 0.2), found[5])
    assert all(torch.equal(recolor(image, sample_rng(0, 0, i), 0.0, 0.0, 0.0), image) for i in range(9))
