"""Decoding, crops, flips and masks: right values, right distribution, pure functions of the sample."""

import io
import math
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import decode_image
from torchvision.transforms.v2 import RandomResizedCrop

from configs.errors import UserError
from configs.schema import Augment, Data
from data.decode import MAX_PIXELS, MODES, decode
from data.transforms import (
    AutoAugment,
    TrainTransform,
    center_crop,
    draw_masks,
    draw_visible,
    jitter,
    normalize,
    random_box,
    random_crop,
    sample_rng,
)
from tests.data.helpers import picture

RATIOS = (3 / 4, 4 / 3)


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
    for mode in ("L", "RGB", "CMYK"):  # JPEG has no alpha: opaque
        assert (decode(picture(0, mode=mode), 4)[3] == 255).all()


def test_a_png_of_16_bits_is_scaled():
    deep = np.array([[0, 65535, 13107]], np.uint16)
    out = io.BytesIO()
    Image.fromarray(deep).save(out, "png")
    assert torch.allclose(decode(out.getvalue(), 1), torch.tensor([[[0, 1, 0.2]]]))
    assert decode(out.getvalue(), 3).shape == (3, 1, 3)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def deep_png(pixels: np.ndarray) -> bytes:
    """A PNG of uint16 [H, W, 1 to 4]; PIL cannot write 16-bit colours."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    chunks = png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(lines)), png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_colours_of_16_bits_are_lossless(channels):
    pixels = np.random.default_rng(0).integers(0, 1 << 16, (7, 5, channels)).astype(np.uint16)
    found = decode(deep_png(pixels)).permute(1, 2, 0)
    assert np.array_equal((found * 65535).round().numpy().astype(np.uint16), pixels)
    torchvisions = decode_image(torch.frombuffer(bytearray(deep_png(pixels)), dtype=torch.uint8)).permute(1, 2, 0)
    assert np.array_equal(torchvisions.numpy(), pixels)
    colours, opaque = decode(deep_png(pixels), 3), channels in (1, 3)
    assert torch.equal(colours, found[..., : 1 if channels < 3 else 3].permute(2, 0, 1).expand(3, -1, -1))
    assert torch.equal(decode(deep_png(pixels), 4)[3], torch.ones(7, 5) if opaque else found[..., -1])
    assert decode(deep_png(pixels), 1).shape == (1, 7, 5)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_pngs_decode_as_in_torchvision(mode, channels):
    """PIL decodes the same colours, except for palettes with alpha, which torchvision 0.29 decodes wrongly."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (16, 20, 4), np.uint8), "RGBA")
    out = io.BytesIO()
    (colours.convert("RGB") if mode in "1P" else colours).convert(mode).save(out, "png")
    opaque = mode in "1P" and channels == 4
    expected = decode_image(
        torch.frombuffer(bytearray(out.getvalue()), dtype=torch.uint8), MODES[3 if opaque else channels]
    )
    if opaque:
        expected = torch.cat([expected, torch.full_like(expected[:1], 255)])
    difference = decode(out.getvalue(), channels).int() - expected.int()
    assert difference.abs().max() <= (1 if channels == 1 else 0)  # grey is rounded in other ways


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "deep"])
def test_damage_never_crashes_the_process(kind):
    """Truncated, or five bytes flipped: an image or a `UserError`. torchvision's libpng would crash the interpreter."""
    if kind == "deep":
        whole = deep_png(np.random.default_rng(0).integers(0, 1 << 16, (16, 20, 3)).astype(np.uint16))
    else:
        whole = picture(0, (60, 50), kind=kind)
    refused = 0
    for seed in range(60):
        rng, data = np.random.default_rng(seed), bytearray(whole)
        for place in rng.choice(len(data), 5, replace=False):
            data[place] ^= int(rng.integers(1, 256))
        try:
            assert decode(bytes(data if seed % 2 else whole[: rng.integers(len(whole))]), 3).shape[0] == 3
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused == 60 if kind in ("png", "deep") else refused > 25


def test_a_png_with_missing_lines():
    """All checksums are right, but lines or the end of the compressed stream are missing: refused, no crash."""
    lines = zlib.compress(bytes([0, *[7] * 60]) * 8)
    for data in (lines, lines[:-4], lines[:10], b""):
        parts = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 20, 16, 8, 2, 0, 0, 0)), png_chunk(b"IDAT", data)
        png = b"\x89PNG\r\n\x1a\n" + b"".join(parts) + png_chunk(b"IEND", b"")
        with pytest.raises(UserError, match="not a readable image"):  # a wrong checksum
            decode(png.replace(png_chunk(b"IDAT", data), png_chunk(b"IDAT", data)[:-1] + b"?"), 3)
        if data == lines:
            assert decode(png, 3).unique().tolist() == [0, 7]
        else:
            with pytest.raises(UserError, match="not a readable image"):
                decode(png, 3)


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


def bomb(kind: str, side: int = 60000) -> bytes:
    """A picture of a few hundred bytes whose header claims `side` x `side` pixels."""
    data = bytearray(picture(0, kind=kind))
    if kind == "jpeg":
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", side, side)
    elif kind == "png":
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "gif":
        data[6:10] = struct.pack("<HH", side, side)
    else:  # WebP has 14 bits for a side
        place = data.index(b"\x9d\x01\x2a") + 3
        data[place : place + 4] = struct.pack("<HH", *[min(side, (1 << 14) - 1)] * 2)
    return bytes(data)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif"])
def test_decompression_bombs_are_refused(kind):
    assert decode(picture(0, kind=kind), 3).shape == (3, 16, 20)
    for side in (60000, math.isqrt(MAX_PIXELS) + 1):
        with pytest.raises(UserError, match="178,956,970 pixels"):
            decode(bomb(kind, side), 3)


def test_a_gif_of_large_frames():
    """Only the first frame is decoded, so only its claimed size is checked."""
    frames = [Image.fromarray(np.full((16, 20), i, np.uint8)) for i in (7, 9)]
    out = io.BytesIO()
    frames[0].save(out, "gif", save_all=True, append_images=frames[1:], optimize=False)
    first, second = (match.start() for match in re.finditer(rb",\0\0\0\0\x14\0\x10\0", out.getvalue()))
    large = struct.pack("<HH", 60000, 60000)
    data = out.getvalue()
    assert (decode(data[: second + 5] + large + data[second + 9 :], 1) == 7).all()
    with pytest.raises(UserError, match="178,956,970 pixels"):
        decode(data[: first + 5] + large + data[first + 9 :])


@pytest.mark.parametrize("shape", ["(4000000, 4000000, 3)", "(8, 8, 4)", "(8, -8, -4)", "(9**9,)", "-" * 900 + "1"])
def test_npy_headers_are_not_trusted(shape):
    """np.load would allocate 48 TB for (4000000, 4000000, 3)."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    data = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(192)
    with pytest.raises(UserError, match="npy image"):
        decode(data)


@pytest.mark.parametrize(
    ("data", "channels", "pattern"),
    [
        (b"", 3, "not a readable image"),
        (picture(0, kind="png")[:150], 3, "not a readable image"),
        (picture(0, kind="webp")[:150], 3, "not a readable image"),
        (picture(0, kind="gif")[:150], 3, "not a readable image"),
        (b"<html></html>", 3, "not a readable image"),
        (picture(0)[:150], 3, "not a readable image"),
        (npy(np.zeros((2, 2, 5), np.uint8)), 3, "5 channels as an array, model.channels is 3"),
        (npy(np.array([{}], object)), 3, "of Python objects"),
        (npy(np.zeros(3)), 3, r"shape \[H, W\]"),
        (npy(np.zeros((2, 2, 3), np.uint8))[:-3], 3, "not a readable .npy"),
        (picture(0), 5, "cannot be read with 5 channels"),
    ],
)
def test_images_that_cannot_be_decoded(data, channels, pattern):
    with pytest.raises(UserError, match=pattern):
        decode(data, channels)


def test_random_boxes_are_distributed_as_in_torchvision():
    rng, scale, image = np.random.default_rng(0), (0.2, 1.0), torch.empty(3, 240, 320)
    ours = np.array([random_box(rng, 240, 320, scale, RATIOS) for _ in range(4000)])
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
        top, left, height, width = random_box(np.random.default_rng(seed), *shape, (0.2, 1.0), RATIOS)
        assert top >= 0 and left >= 0 and height > 0 and width > 0
        assert top + height <= shape[0] and left + width <= shape[1]


def test_crops_have_the_configured_ratios_and_areas():
    for ratios in ((1.0, 1.0), (2.0, 4.0)):
        boxes = [random_box(np.random.default_rng(seed), 400, 800, (0.05, 0.1), ratios) for seed in range(50)]
        found = np.array([(w / h, w * h / (400 * 800)) for _, _, h, w in boxes])
        assert (found[:, 0] > ratios[0] - 0.05).all() and (found[:, 0] < ratios[1] + 0.05).all()
        assert (found[:, 1] > 0.048).all() and (found[:, 1] < 0.102).all()
    image = torch.rand(3, 40, 80)
    one, other = (random_crop(image, sample_rng(0, 0, 1), Data(size=16, crop_ratio=r)) for r in ((1, 1), (2, 2)))
    assert not torch.equal(one, other)


def test_crop_and_flip():
    image = torch.arange(3 * 40 * 30, dtype=torch.float32).view(3, 40, 30)
    crops = {
        flips: random_crop(image, sample_rng(0, 0, 1), Data(size=(16, 24), hflip=flips[0], vflip=flips[1]))
        for flips in ((0, 0), (1, 0), (0, 1), (1, 1))
    }
    plain = crops[0, 0]
    assert plain.shape == (3, 16, 24)
    assert torch.equal(plain.flip(2), crops[1, 0]) and torch.equal(plain.flip(1), crops[0, 1])
    assert torch.equal(plain.flip(1, 2), crops[1, 1])


def test_interpolation():
    image = torch.from_numpy(np.random.default_rng(0).random((3, 40, 30), np.float32))
    modes = ("nearest", "bilinear", "bicubic", "random")

    def crops(i: int) -> list[torch.Tensor]:
        return [random_crop(image, sample_rng(0, 0, i), Data(size=16, hflip=0, interpolation=mode)) for mode in modes]

    nearest, bilinear, bicubic, _ = crops(0)
    assert torch.isin(nearest, image).all() and not torch.isin(bilinear, image).all()
    assert not torch.equal(bilinear, bicubic)
    drawn = [(torch.equal(found[3], found[1]), torch.equal(found[3], found[2])) for found in map(crops, range(20))]
    assert set(drawn) == {(True, False), (False, True)}
    nearest, bilinear, bicubic = (center_crop(image, (16, 16), 0.875, mode) for mode in modes[:3])
    assert torch.isin(nearest, image).all() and not torch.equal(bilinear, bicubic)


@pytest.mark.parametrize("size", [(16, 24), (64, 48)])  # smaller and larger than the crop
def test_resized_crops_agree_with_pil(size):
    """Bicubic, antialiased, on uint8: within one grey level of PIL, and equal in the mean."""
    data = picture(3, (90, 70), kind="png")
    ours = random_crop(decode(data, 3), sample_rng(0, 0, 5), Data(size=size, hflip=0))
    top, left, height, width = random_box(sample_rng(0, 0, 5), 70, 90, (0.2, 1.0), RATIOS)
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
    assert ((seen.float().mean(0) - 6 / 15).abs() < 0.05).all()  # all patches are equally likely


@pytest.mark.parametrize(("n", "masks"), [(6, 1), (6, 2), (6, 3), (4, 4), (6, 7), (14, 3), (1, 15)])
def test_masks_of_an_image_show_different_patches(n, masks):
    """Disjoint while patches last, together the whole image; no patch is shown twice more often than another."""
    drawn = draw_masks(np.random.default_rng(3), (3, 5), n, masks)
    assert drawn.shape == (masks, 3, 5) and (drawn.flatten(1).sum(1) == n).all()
    shown = drawn.sum(0)
    assert shown.min() == n * masks // 15 and shown.max() == -(-n * masks // 15)
    first = np.random.default_rng(3).permutation(15)[:n]  # as of a single mask
    assert sorted(first) == drawn[0].flatten().nonzero().flatten().tolist()


def test_center_crop():
    image = torch.zeros(1, 64, 128, dtype=torch.uint8)
    image[:, 16:48, 48:80] = 200
    centre = center_crop(image, (16, 16), 0.5)
    assert (centre.float() - 200).abs().max() <= 30  # bicubic weights reach across the edge
    assert center_crop(image, (16, 24), 0.875).shape == (1, 16, 24)
    whole = center_crop(image, (16, 16), 1)
    assert abs(int(whole[0, 8, 8]) - 200) <= 10 and whole[0, 0, 0] == 0


def test_normalize():
    image = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 2, 1, 2)
    found = normalize(image, torch.tensor([0.5, 0.0]), torch.tensor([0.5, 2.0]))
    assert torch.equal(found.flatten(), torch.tensor([-1, 1, 0, 0.5]))


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", "v0r", "3a", "augmix-m3-w3"])
def test_policies_are_functions_of_the_generator(policy):
    augment = AutoAugment(policy, (0.5, 0.5, 0.5), Data(size=96))
    image = decode(picture(0), 3)
    first = [augment(image, sample_rng(0, 0, i)) for i in range(5)]
    assert all(torch.equal(augment(image, sample_rng(0, 0, i)), first[i]) for i in range(5))
    assert not all(torch.equal(x, first[0]) for x in first)
    for i in range(600 if policy.startswith("rand") else 60):  # every operation at every strength
        assert augment(image, sample_rng(1, 0, i)).shape == image.shape


def test_three_augment_is_grey_solarised_or_blurred():
    image = decode(picture(0), 3)
    found = [AutoAugment("3a", (0.5, 0.5, 0.5), Data())(image, sample_rng(0, 0, i)) for i in range(30)]
    grey = [x for x in found if torch.equal(x[0], x[1]) and torch.equal(x[1], x[2])]
    assert 3 < len(grey) < 20 and len({x.float().mean().item() for x in found}) >= 3


def test_shifts_scale_with_the_image():
    """At most 45 % of the side: 100 pixels would leave nothing of 32."""
    for size, max_shift in ((224, 100), (32, 14)):
        op = AutoAugment("rand-m9-mstd0.5-inc1", (0.5, 0.5, 0.5), Data(size=size)).transform.ops[-1]
        assert op.hparams["translate_const"] == max_shift


def test_colour_jitter():
    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    image[0] = 200
    found = torch.stack([jitter(image, sample_rng(0, 0, i), 0.4) for i in range(200)]).float()
    brightness = found.mean((1, 2, 3)) / image.float().mean()
    assert 0.5 < brightness.min() < 0.75 and 1.25 < brightness.max() < 1.5
    assert ((found[:, 0] - found[:, 1]).mean((1, 2)).std()) > 10  # contrast and saturation
    assert torch.equal(jitter(image, sample_rng(0, 0, 0), 0.0), image)


@pytest.mark.parametrize(
    ("augment", "channels", "pattern"),
    [
        (Augment(auto_augment="nonsense"), 3, "'nonsense' .*rand-m9"),
        (Augment(auto_augment="rand-nonsense"), 3, "'rand-nonsense' "),
        (Augment(auto_augment="original"), 1, "augment.auto_augment .*null"),
        (Augment(color_jitter=0.3), 4, "augment.color_jitter .*0"),
    ],
)
def test_augmentations_that_are_refused(augment, channels, pattern):
    with pytest.raises(UserError, match=pattern):
        TrainTransform(Data(), augment, (0.5,) * channels)


def test_train_transform_follows_the_configuration():
    image = decode(picture(3, (64, 64), kind="png"), 3)
    data = Data(size=32)
    options = [Augment(), Augment(auto_augment="3a"), Augment(color_jitter=0.4), Augment("3a", 0.4)]
    means = (0.5, 0.5, 0.5)
    found = [TrainTransform(data, augment, means)(image, 0, sample_rng(0, 0, 1))["image"] for augment in options]
    assert torch.equal(found[0], random_crop(image, sample_rng(0, 0, 1), data))
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
