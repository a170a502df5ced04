"""Batches do not depend on the number of loader processes; damage reaches the user as one line."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import UserError
from configs.schema import Data, Optim
from data.loader import eval_loader, open_split, train_loader
from data.shards import index_file
from data.transforms import EvalTransform, PretrainTransform
from tests.data.helpers import as_folder, collection, picture
from tests.data.test_prepare import prepared

transform = PretrainTransform((16, 16), (0.2, 1.0), 0.5, (2, 2), 2)


def batches(folder, workers, first_step=0):
    data = Data(str(folder), workers=workers)
    loader = train_loader(open_split(data), transform, 1, 7, data, Optim(batch_size=240, epochs=2), 0, 1)
    loader.batches.first_step = first_step
    return list(loader)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_do_not_depend_on_workers(digits):
    alone = batches(digits, 0)
    assert len(alone) == 12
    assert alone[0]["image"].shape == (240, 1, 16, 16) and alone[0]["image"].dtype == torch.uint8
    assert alone[0]["visible"].shape == (240, 2, 2)
    for workers, first in ((1, 0), (3, 0), (2, 7)):
        for a, b in zip(alone[first:], batches(digits, workers, first), strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_epochs_differ_in_crops_and_masks(digits):
    found = batches(digits, 0)
    first, second = (torch.cat([batch["sample"] for batch in part]) for part in (found[:6], found[6:]))
    assert len(set(first.tolist())) == len(first)
    common = set(first.tolist()) & set(second.tolist())
    a = {int(s): x for batch in found[:6] for s, x in zip(batch["sample"], batch["image"], strict=True)}
    b = {int(s): x for batch in found[6:] for s, x in zip(batch["sample"], batch["image"], strict=True)}
    assert sum(torch.equal(a[s], b[s]) for s in common) < len(common) / 20


def test_evaluation_fills_with_label_minus_one(digits):
    data = Data(str(digits), workers=0)
    split = open_split(data, "val")
    found = [batch for rank in range(3) for batch in eval_loader(split, EvalTransform((8, 8), 1), 1, data, 50, rank, 3)]
    labels = torch.cat([batch["label"] for batch in found])
    assert (labels >= 0).sum() == 355 and len(labels) == 357
    assert np.array_equal(np.bincount(labels[labels >= 0]), np.bincount(split.labels()))


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_one_line(workers, tmp_path):
    prepared(as_folder(collection({"a": 6}), tmp_path / "in"), tmp_path / "out")
    rows = np.load(index_file(tmp_path / "out/train-000000.tar"))
    shard = tmp_path / "out/train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[int(rows["offset"][3]) + 50] ^= 255
    shard.write_bytes(data)
    config = Data(str(tmp_path / "out"), workers=workers)
    loader = train_loader(open_split(config), transform, 3, 0, config, Optim(batch_size=6, epochs=1), 0, 1)
    with pytest.raises(UserError) as error:
        list(loader)
    assert str(error.value).startswith(f"{shard} is damaged at byte") and "\n" not in str(error.value)


def test_images_of_8_and_16_bits_in_one_batch(tmp_path):
    deep = io.BytesIO()
    Image.fromarray(np.full((16, 20), 6000, np.uint16)).save(deep, "png")
    images = {"0.png": picture(0, mode="L", kind="png"), "1.png": deep.getvalue()}
    prepared(as_folder(images, tmp_path / "in"), tmp_path / "out")
    config = Data(str(tmp_path / "out"), workers=1)
    batch = next(iter(train_loader(open_split(config), transform, 1, 0, config, Optim(batch_size=2, epochs=1))))
    assert batch["image"].dtype == torch.float32 and batch["image"].max() <= 1.1
    assert any(torch.allclose(image, torch.tensor(6000 / 65535), atol=1e-4) for image in batch["image"])


def test_too_few_images_for_a_batch(digits):
    data = Data(str(digits))
    with pytest.raises(UserError, match=r"1442 samples .* fewer than one batch: lower optim\.batch_size .now 4096"):
        train_loader(open_split(data), transform, 1, 0, data, Optim(), 0, 1)
