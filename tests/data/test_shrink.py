"""JPEGs much larger than the crops are decoded at 1/2, 1/4 or 1/8 of their size."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from configs.errors import UserError
from configs.schema import Data, Optim
from data.decode import decode
from data.loader import train_loader
from data.shards import open_split
from data.transforms import PretrainTransform, crop_shrink, is_small, random_box, sample_rng
from tests.conftest import ROOT, run


def photo(height: int, width: int, mode: str = "RGB", kind: str = "jpeg") -> bytes:
    """A smooth picture, as photographs are."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, channels), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels.squeeze(), mode).resize((width, height), Image.BICUBIC).save(out, kind, quality=95)
    return out.getvalue()


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 3), ("RGB", 1), ("RGB", 4), ("CMYK", 3)])
def test_equal_to_the_full_picture_within_two_grey_levels(mode, channels, factor):
    data = photo(600, 800, mode)
    full, small = decode(data, channels), decode(data, channels, lambda height, width: factor)
    if mode != "CMYK":  # decoded in full: only grey and RGB are safe
        assert small.shape == (channels, 600 // factor, 800 // factor)
    a, b = (F.resize(image, [60, 80], F.InterpolationMode.BICUBIC, antialias=True).float() for image in (full, small))
    assert (a - b).abs().mean() < 2


@pytest.mark.parametrize("kind", ["png", "webp", "gif"])
def test_other_formats_are_decoded_in_full(kind):
    assert decode(photo(64, 96, kind=kind), 3, lambda *_: 8).shape == (3, 64, 96)


def test_damage_is_still_an_error():
    data = photo(600, 800)
    with pytest.raises(UserError, match="not a readable image"):
        decode(data[: len(data) // 2], 3, lambda *_: 4)


@pytest.mark.parametrize(
    ("size", "scale", "side", "factors"),
    [
        (224, (0.2, 1.0), (3000, 4000), {4, 8}),
        (224, (0.2, 1.0), (375, 500), {1}),
        (224, (1.0, 1.0), (2000, 2000), {4}),
        (32, (0.2, 1.0), (3000, 4000), {8}),
        ((64, 512), (0.2, 1.0), (3000, 4000), {1, 2, 4}),
        (224, (0.2, 1.0), (1, 1), {1}),
    ],
)
def test_no_crop_has_fewer_pixels_than_asked_for(size, scale, side, factors):
    data, seen = Data(size=size, crop_scale=scale), set()
    for sample in range(200):
        factor = crop_shrink(data, sample_rng(0, 0, sample), *side)
        *_, height, width = random_box(
            sample_rng(0, 0, sample), *(-(-pixels // factor) for pixels in side), data.crop_scale, data.crop_ratio
        )
        assert factor == 1 or (height >= data.height_width[0] and width >= data.height_width[1])
        seen.add(factor)
    assert seen == factors
    assert not is_small(data, *side) or seen == {1}


@pytest.mark.parametrize(("side", "small"), [((32, 32), True), ((95, 500), True), ((96, 96), False), ((500, 95), True)])
def test_small_images_need_no_crop_to_tell(side, small):
    """At 3 times the size, the whole image would still have 1.5 times the pixels at half its size."""
    data = Data(size=32, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    assert is_small(data, *side) == small
    assert (crop_shrink(data, sample_rng(0, 0, 0), 96, 96) > 1) and not is_small(data, 96, 96)


def test_the_loader_does_it_unless_switched_off(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(2):
        (tmp_path / f"photos/{i}.jpg").write_bytes(photo(600, 800))
    run("python", ROOT / "data/prepare.py", "--no-plan", tmp_path / "photos", tmp_path / "shards")
    shapes = []

    class Seen(PretrainTransform):
        def __call__(self, image: torch.Tensor, *rest):
            shapes.append(tuple(image.shape))
            return super().__call__(image, *rest)

    for shrink in (True, False):
        data = Data(path=str(tmp_path / "shards"), size=32, workers=0, shrink_jpeg=shrink, crop_scale=(0.2, 0.3))
        next(iter(train_loader(open_split(data), Seen(data, (2, 2), 2), 3, 0, data, Optim(batch_size=2, epochs=1))))
    assert shapes == [(3, 150, 200)] * 2 + [(3, 600, 800)] * 2
