"""Image and mask stay together in every transform; the same numbers give the same crops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.schema import Augment, Data
from data.loader import collate
from data.masks import encode_mask
from finetune.tasks.segmentation import Settings
from finetune.tasks.segmentation.transforms import EvalTransform, ReadMask, TrainTransform

VOID = 255


def transform(size=(24, 32), augment: Augment = Augment(), data: dict | None = None, **more) -> TrainTransform:  # noqa: B008
    made = Data(size=size, hflip=0.5, vflip=0.5, interpolation="bilinear", **(data or {}))
    return TrainTransform(made, augment, Settings(**more), VOID, (0.5, 0.5, 0.5))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(20, 70), st.integers(20, 70), st.sampled_from([None, 30]))
def test_a_marked_block_stays_marked(seed, height, width, short_side):
    """A bright block is of class 1, the rest of class 0: after any crop, scale and flip, bright pixels are too."""
    rng = np.random.default_rng(seed)
    mask = torch.zeros(height, width, dtype=torch.uint8)
    y, x = rng.integers(height - 12), rng.integers(width - 12)
    mask[y : y + 12, x : x + 12] = 1
    image = (mask * 255).expand(3, -1, -1)
    out = transform(scale=(0.5, 2.0), short_side=short_side)(image, mask, rng)
    found, target = out["image"][0].float() / 255, out["mask"]
    assert found.shape == target.shape == (24, 32)
    inside = target != VOID
    assert (found[inside] > 0.5).eq(target[inside] == 1).float().mean() > 0.9  # edges are blurred
    assert ((found - (target == 1).float()).abs()[inside] < 0.02).float().mean() > 0.5
    assert (out["image"][:, ~inside] == 127).all()  # the mean


def test_every_pixel_without_scaling():
    """At scale 1, pixels are copied: each keeps its own class."""
    mask = torch.arange(30 * 40).view(30, 40) % 250
    image = mask.to(torch.uint8).expand(3, -1, -1)
    for seed in range(20):
        out = transform(scale=(1.0, 1.0))(image, mask.to(torch.uint8), np.random.default_rng(seed))
        assert (out["image"][0] == out["mask"]).all()


def test_colours_change_in_the_image_alone():
    mask = torch.randint(0, 3, (24, 32), dtype=torch.uint8)
    image = torch.randint(0, 256, (3, 24, 32), dtype=torch.uint8)
    plain, coloured = (
        transform(augment=Augment(color_jitter=c), scale=(1.0, 1.0))(image, mask, np.random.default_rng(0))
        for c in (0.0, 0.5)
    )
    assert (plain["mask"] == coloured["mask"]).all() and not (plain["image"] == coloured["image"]).all()
    again = transform(augment=Augment(color_jitter=0.5), scale=(1.0, 1.0))(image, mask, np.random.default_rng(0))
    assert (again["image"] == coloured["image"]).all()


def test_five_bands_of_16_bits():
    mask = torch.randint(0, 3, (20, 20), dtype=torch.int32)
    made = TrainTransform(Data(size=32), Augment(), Settings(), 65535, (0.5,) * 5)
    out = made(torch.rand(5, 20, 20), mask, np.random.default_rng(0))
    assert out["image"].shape == (5, 32, 32) and out["mask"].dtype == torch.int32


def test_evaluation_keeps_the_mask_and_pads_batches():
    one, two = (torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((10, 20), (16, 12)))
    mask = torch.randint(0, 3, (10, 20), dtype=torch.uint8)
    batch = collate([EvalTransform(None)(one, mask), EvalTransform(None)(two, None)])
    assert batch["image"].shape == (2, 3, 16, 20) and batch["objects"].tolist() == [200, 0]
    assert (batch["image"][0, :, :10, :20] == one).all() and (batch["object_mask"].view(10, 20) == mask).all()
    assert batch["size"].tolist() == batch["full"].tolist() == [[10, 20], [16, 12]]
    shrunk = EvalTransform(5)(one, mask)
    assert shrunk["image"].shape == (3, 5, 10) and shrunk["full"].tolist() == [10, 20]


def test_bad_masks():
    read = ReadMask(3, VOID)
    assert read(encode_mask(np.array([[0, 2, VOID]], np.uint8))).tolist() == [[0, 2, VOID]]
    for data, message in ((b"", "no mask"), (b"x", "PNG"), (encode_mask(np.array([[3]], np.uint8)), "value 3")):
        with pytest.raises(UserError, match=message):
            read(data)
    with pytest.raises(UserError, match="4x3 pixels has a mask of 4x4"):
        transform()(torch.zeros(3, 3, 4), torch.zeros(4, 4), np.random.default_rng(0))
    for augment, channels in ((Augment(auto_augment="3a"), 3), (Augment(color_jitter=0.1), 5)):
        with pytest.raises(UserError, match=r"augment\."):
            TrainTransform(Data(), augment, Settings(), VOID, (0.5,) * channels)
