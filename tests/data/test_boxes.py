"""Boxes and outlines move with the pixels: a marked rectangle is where its box says, after every movement."""

import json

import numpy as np
import pytest

from data.boxes import clipped, cut, decode_mask, encode_mask, fitted, mirrored, outline_problem, resized, turned
from data.exif import upright
from data.reading import ImageError

BOX = [4.0, 6.0, 10.0, 8.0]  # in an image of 40 x 30
POLYGON = [4.0, 6.0, 14.0, 6.0, 14.0, 14.0, 4.0, 14.0]


def image():
    pixels = np.zeros((30, 40), np.uint8)
    pixels[6:14, 4:14] = 1
    return pixels


def target(kind="polygon"):
    outline = [POLYGON] if kind == "polygon" else encode_mask(image())
    return {"height": 30, "width": 40, "boxes": [{"class": "cell", "box": BOX, "segmentation": outline}]}


def bounds(pixels):
    ys, xs = np.nonzero(pixels)
    return [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]


def check(moved, pixels):
    (entry,) = moved["boxes"]
    assert (moved["height"], moved["width"]) == pixels.shape
    assert entry["box"] == pytest.approx(bounds(pixels))
    assert (decode_mask(entry["segmentation"], *pixels.shape) == pixels).all()


@pytest.mark.parametrize("kind", ["polygon", "mask"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_by_exif(kind, orientation):
    check(turned(target(kind), orientation), upright(image(), orientation))


@pytest.mark.parametrize("kind", ["polygon", "mask"])
def test_mirrored(kind):
    check(mirrored(target(kind)), image()[:, ::-1])
    check(mirrored(target(kind), "v"), image()[::-1])
    check(mirrored(target(kind), "vh"), image()[::-1, ::-1])


@pytest.mark.parametrize("kind", ["polygon", "mask"])
def test_resized(kind):
    check(resized(target(kind), 60, 80), image().repeat(2, 0).repeat(2, 1))
    assert resized(target(kind), 15, 80)["boxes"][0]["box"] == [8, 3, 20, 4]


@pytest.mark.parametrize("kind", ["polygon", "mask"])
def test_cut(kind):
    check(cut(target(kind), 8, 5, 20, 30), image()[8:28, 5:35])
    around = np.zeros((50, 60), np.uint8)
    around[5:35, 3:43] = image()
    check(cut(target(kind), -5, -3, 50, 60), around)


def test_a_cut_leaves_out_what_is_mostly_outside():
    assert cut(target(), 0, 14, 30, 26)["boxes"] == []
    assert cut(target(), 0, 12, 30, 26)["boxes"][0]["box"] == [0, 6, 2, 8]
    assert cut(target(), 0, 12, 30, 26, min_share=0.3)["boxes"] == []


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (37, 5), (300, 200)])
def test_outlines_that_pycocotools_writes_are_sound(size, share):
    pixels = (np.random.default_rng(0).random(size) < share).astype(np.uint8)
    outline = encode_mask(pixels)
    assert outline_problem(outline, *size) is None and (decode_mask(outline, *size) == pixels).all()
    assert outline_problem({**outline, "counts": outline["counts"] + "1"}, *size)


def test_polygons_of_a_tile_may_reach_beyond_it():
    outline = [[-20_000, 0, 30_000, 0, 0, 30_000]]
    assert "far beyond" in outline_problem(outline, 512, 512) and outline_problem(outline, 512, 512, 400) is None


def test_targets_are_not_changed():
    one = target("mask")
    before = json.dumps(one)
    for moved in (turned(one, 6), mirrored(one), resized(one, 60, 80), cut(one, 1, 1, 9, 9)):
        assert moved is not one
    assert json.dumps(one) == before


def test_clipped():
    assert clipped([-2, -3, 10, 10], 5, 6) == [0, 0, 6, 5]
    assert min(clipped([7, 0, 3, 3], 5, 6)[2:]) == 0


def test_fitted_to_the_image_of_a_shard():
    assert fitted(target(), 30, 40, 1) == (target(), False)
    assert fitted(target(), 15, 20, 1)[0]["boxes"][0]["box"] == [2, 3, 5, 4]
    assert fitted(target(), 30, 40, 6)[1] is False  # annotated upright
    moved, turn = fitted(target(), 40, 30, 6)  # annotated as stored
    assert turn and moved["boxes"] == turned(target(), 6)["boxes"]
    moved, turn = fitted(target(), 20, 15, 8)
    assert turn and moved["boxes"][0]["box"] == resized(turned(target(), 8), 20, 15)["boxes"][0]["box"]
    with pytest.raises(ImageError, match="40x30"):
        fitted(target(), 30, 30, 1)
    with pytest.raises(ImageError, match="40x30"):
        fitted(target(), 40, 30, 1)  # the other way round, without EXIF that says so


def test_shares_of_the_sides():
    shares = {"height": 1, "width": 1, "boxes": [{"class": "cell", "box": [0.1, 0.2, 0.25, 0.5]}]}
    for orientation in (1, 6):
        assert fitted(shares, 30, 40, orientation)[0]["boxes"][0]["box"] == pytest.approx([4, 6, 10, 15])
