"""What a plan learns about a collection: channels, depth, sizes, mean and std, splits and labels."""

import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from configs.errors import UserError
from data import prepare
from data.folder import count_labels
from launch.plans.facts import evaluated_split, find_facts, why_no_finetuning

RANDOM = np.random.default_rng(0)


def write(folder, name, pixels, kind="png"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "npy":
        np.save(path, pixels)
    else:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, kind)
        path.write_bytes(out.getvalue())


def noise(*shape, dtype=np.uint8, high=256):
    return RANDOM.integers(0, high, shape).astype(dtype)


@pytest.mark.parametrize(
    ("pictures", "channels", "deep"),
    [
        ([noise(20, 24)] * 2, 1, False),
        ([noise(20, 24, 3)] * 2, 3, False),
        ([noise(20, 24), noise(20, 24, 3)], 3, False),
        ([noise(20, 24, 4)] * 2, 3, False),  # alpha is dropped
        ([noise(20, 24, 2)] * 2, 1, False),
        ([noise(20, 24, dtype=np.uint16, high=4096)] * 2, 1, True),
    ],
)
def test_channels_and_depth_of_pictures(pictures, channels, deep, tmp_path):
    for i, pixels in enumerate(pictures):
        write(tmp_path, f"{i}.png", pixels)
    facts, _ = find_facts(str(tmp_path))
    assert (facts.channels, facts.deep, facts.side) == (channels, deep, (20, 20, 20))
    assert len(facts.mean) == len(facts.std) == channels


def test_mean_and_std_are_of_the_pixels(tmp_path):
    arrays = [noise(8, 9, 5, dtype=np.uint16, high=4096) for _ in range(6)]
    for i, pixels in enumerate(arrays):
        write(tmp_path, f"{i}.npy", pixels, "npy")
    (tmp_path / "damaged.npy").write_bytes(b"\x93NUMPY")
    facts, _ = find_facts(str(tmp_path))
    pixels = np.stack(arrays).reshape(-1, 5) / 65535
    assert facts.looked == 6 and facts.channels == 5
    assert np.allclose(facts.mean, pixels.mean(0), rtol=1e-3) and np.allclose(facts.std, pixels.std(0), rtol=1e-3)


def test_a_large_jpeg_is_decoded_small_but_keeps_its_size(tmp_path):
    write(tmp_path, "a.jpg", np.full((600, 800, 3), (200, 100, 50), np.uint8), "jpeg")
    facts, _ = find_facts(str(tmp_path))
    assert facts.side == (600, 600, 600)
    assert np.allclose(facts.mean, np.array((200, 100, 50)) / 255, atol=0.01)
    assert min(facts.std) > 0  # a constant image


def test_no_image_can_be_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    with pytest.raises(UserError, match="no image can be read, the first"):
        find_facts(str(tmp_path))


def test_shards_and_folder_give_the_same_and_no_survey_is_needed(tmp_path):
    for split, count in (("train", 8), ("test", 4)):
        for i in range(count):
            write(tmp_path / "in", f"{split}/{'ab'[i % 2]}/{i}.png", noise(30, 40, 3))
    prepare.main([str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"])
    index = json.loads((tmp_path / "out/index.json").read_text())
    (tmp_path / "out/index.json").write_text(json.dumps(index | {"survey": None}))
    one, other = (find_facts(str(tmp_path / name))[0] for name in ("in", "out"))
    assert count_labels(str(tmp_path / "in")) == {"train": Counter(a=4, b=4), "test": Counter(a=2, b=2)}
    assert count_labels(str(tmp_path / "out")) == {"train": Counter({0: 4, 1: 4}), "test": Counter({0: 2, 1: 2})}
    assert (one.side, one.channels, one.looked) == (other.side, other.channels, other.looked) == ((30, 30, 30), 3, 8)
    assert np.allclose(one.mean, other.mean, rtol=1e-3)
    assert find_facts(str(tmp_path / "out"))[0] == other  # deterministic


def test_the_larger_of_train_and_unlabeled_is_for_pretraining(tmp_path):
    for name, count in (("train/a", 2), ("train/b", 2), ("unlabeled", 6)):
        for i in range(count):
            write(tmp_path, f"{name}/{i}.png", noise(9, 9))
    facts, images = find_facts(str(tmp_path))
    assert facts.split == images.name == "unlabeled" and facts.images == 6


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        ({"train": {None: 9}}, "needs labels"),
        ({"unlabeled": {None: 9}}, "needs labels"),
        ({"train": {0: 9}, "val": {0: 1}}, "several classes"),
        ({"train": {0: 9, 1: 9}}, "--val-fraction"),
        ({"train": {0: 9, 1: 9}, "unlabeled": {None: 3}}, "--val-fraction"),
        ({"train": {0: 9, 1: 9}, "test": {None: 3}}, "split test has none for 3 of 3"),
        ({"train": {0: 9, 1: 8, None: 1}, "val": {0: 3}}, "split train has none for 1 of 18"),
        ({"train": {0: 9, 1: 9}, "val": {0: 3}}, None),
        ({"train": {0: 9, 1: 9}, "test": {0: 3}}, None),
    ],
)
def test_why_there_is_no_fine_tuning(splits, says):
    counts = {name: Counter(labels) for name, labels in splits.items()}
    problem = why_no_finetuning(counts, evaluated_split(counts))
    assert (problem is None) == (says is None) and (says or "") in (problem or "")
