"""Decoding, crops, flips and masks: right values, right distribution, pure functions of the sample."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import RandomResizedCrop

from configs.errors import UserError
from data.transforms import (
    RandAugment,
    center_crop,
    decode,
    draw_visible,
    normalize,
    random_box,
    random_crop_flip,
    sample_rng,
)
from tests.data.helpers import picture


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("jpeg", "L"),
        ("jpeg", "RGB"),
        ("png", "L"),
        ("png", "RGB"),
        ("webp", "RGB"),
        ("gif", "L"),
        ("webp", "RGBA"),
        ("png", "RGBA"),
    ],
)
def test_decode_agrees_with_pil(kind, mode):
    data = picture(0, mode=mode, kind=kind)
    for channels, convert in ((1, "L"), (3, "RGB")):
        expected = np.asarray(Image.open(io.BytesIO(data)).convert(convert)).reshape(16, 20, channels)
        found = decode(data, channels).permute(1, 2, 0).numpy()
        assert found.dtype == np.uint8
        assert np.abs(found.astype(int) - expected).max() <= (8 if kind in ("jpeg", "webp") else 1)


def test_decode_a_png_named_jpg_and_cmyk():
    assert decode(picture(0, kind="png"), 3).shape == (3, 16, 20)
    assert decode(picture(0, mode="CMYK"), 3).shape == (3, 16, 20)


def test_a_png_of_16_bits_is_scaled():
    deep = np.array([[0, 65535, 13107]], np.uint16)
    out = io.BytesIO()
    Image.fromarray(deep).save(out, "png")
    assert torch.allclose(decode(out.getvalue(), 1), torch.tensor([[[0, 1, 0.2]]]))
    assert decode(out.getvalue(), 3).shape == (3, 1, 3)


def test_decode_arrays_of_any_depth():
    for dtype, scale in ((np.uint8, 1), (np.uint16, 1 / 65535), (np.float32, 1), (np.float64, 1)):
        array = (np.random.default_rng(0).random((4, 6, 7)) * 200).astype(dtype)
        out = io.BytesIO()
        np.save(out, array)
        image = decode(out.getvalue(), 7)
        assert image.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
        assert np.allclose(image.permute(1, 2, 0).numpy(), array * scale)


def npy(array) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "channels", "says"),
    [
        (b"", 3, "not a readable image"),
        (b"<html></html>", 3, "not a readable image"),
        (picture(0)[:150], 3, "not a readable image"),
        (npy(np.zeros((2, 2, 5), np.uint8)), 3, "5 channels, model.channels is 3"),
        (npy(np.array([{}], object)), 3, "not a readable .npy"),
        (npy(np.zeros(3)), 3, r"shape \[H, W\]"),
        (npy(np.zeros((2, 2, 3), np.uint8))[:-3], 3, "not a readable .npy"),
        (picture(0), 5, "cannot be read with 5 channels"),
    ],
)
def test_what_cannot_be_decoded(data, channels, says):
    with pytest.raises(UserError, match=says):
        decode(data, channels)


def test_boxes_are_distributed_like_torchvisions():
    rng, scale, image = np.random.default_rng(0), (0.2, 1.0), torch.empty(3, 240, 320)
    ours = np.array([random_box(rng, 240, 320, scale) for _ in range(4000)])
    theirs = np.array(
        [RandomResizedCrop.make_params(RandomResizedCrop(8, scale), [image]) for _ in range(4000)], object
    )
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs])
    for ours_column, theirs_column in zip(ours.T, theirs.T, strict=True):
        quantiles = np.quantile(ours_column, [0.1, 0.5, 0.9]), np.quantile(theirs_column, [0.1, 0.5, 0.9])
        assert np.allclose(*quantiles, atol=12)
    assert (ours[:, 0] + ours[:, 2] <= 240).all() and (ours[:, 1] + ours[:, 3] <= 320).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (8, 8)])
def test_boxes_fit_odd_images(shape):
    for seed in range(50):
        top, left, height, width = random_box(np.random.default_rng(seed), *shape, (0.2, 1.0))
        assert top >= 0 and left >= 0 and height > 0 and width > 0
        assert top + height <= shape[0] and left + width <= shape[1]


def test_crop_and_flip():
    image = torch.arange(3 * 40 * 30, dtype=torch.float32).view(3, 40, 30)
    plain = random_crop_flip(image, sample_rng(0, 0, 1), (16, 24), (0.2, 1.0), hflip=0)
    mirrored = random_crop_flip(image, sample_rng(0, 0, 1), (16, 24), (0.2, 1.0), hflip=1)
    assert plain.shape == (3, 16, 24)
    assert torch.equal(plain.flip(2), mirrored)


@pytest.mark.parametrize("size", [(16, 24), (64, 48)])  # smaller and larger than the crop
def test_resized_crops_are_pils(size):
    """Bicubic, antialiased, on uint8: within one grey level of PIL's, and equal in the mean."""
    data = picture(3, (90, 70), kind="png")
    ours = random_crop_flip(decode(data, 3), sample_rng(0, 0, 5), size, (0.2, 1.0), hflip=0)
    top, left, height, width = random_box(sample_rng(0, 0, 5), 70, 90, (0.2, 1.0))
    crop = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
    theirs = torch.from_numpy(np.asarray(crop.resize(size[::-1], Image.Resampling.BICUBIC)).copy()).permute(2, 0, 1)
    difference = (ours.float() - theirs.float()).abs()
    assert ours.float().std() > 10 and difference.max() <= 1 and difference.mean() < 0.05


def test_random_numbers_are_a_function_of_seed_epoch_and_sample():
    draws = {key: sample_rng(*key).random() for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2, 10**9)]}
    assert len(set(draws.values())) == 5
    assert all(sample_rng(*key).random() == value for key, value in draws.items())


def test_masks():
    seen = torch.stack([draw_visible(np.random.default_rng(i), (3, 5), 6) for i in range(2000)])
    assert (seen.flatten(1).sum(1) == 6).all()
    assert ((seen.float().mean(0) - 6 / 15).abs() < 0.05).all()  # no patch is preferred


def test_center_crop():
    image = torch.zeros(1, 64, 128, dtype=torch.uint8)
    image[:, 16:48, 48:80] = 200
    centre = center_crop(image, (16, 16), 0.5)
    assert (centre.float() - 200).abs().max() <= 30  # bicubic weights reach over the edge
    assert center_crop(image, (16, 24), 0.875).shape == (1, 16, 24)
    whole = center_crop(image, (16, 16), 1)
    assert abs(int(whole[0, 8, 8]) - 200) <= 10 and whole[0, 0, 0] == 0


def test_normalize():
    image = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 2, 1, 2)
    found = normalize(image, torch.tensor([0.5, 0.0]), torch.tensor([0.5, 2.0]))
    assert torch.equal(found.flatten(), torch.tensor([-1, 1, 0, 0.5]))


def test_randaugment_is_a_function_of_the_generator():
    augment = RandAugment("rand-m9-mstd0.5-inc1", (0.5, 0.5, 0.5))
    image = decode(picture(0), 3)
    first = [augment(image, sample_rng(0, 0, i)) for i in range(5)]
    assert all(torch.equal(augment(image, sample_rng(0, 0, i)), first[i]) for i in range(5))
    assert not all(torch.equal(x, first[0]) for x in first)
    for i in range(600):  # every operation at every strength
        assert augment(image, sample_rng(1, 0, i)).shape == image.shape
    with pytest.raises(UserError, match="rand_augment"):
        RandAugment("nonsense", (0.5, 0.5, 0.5))
