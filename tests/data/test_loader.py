"""Batches do not depend on the number of loader processes; damage is reported in one line."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from configs.errors import LostLoader, UserError
from configs.schema import Data, Optim, Pretrain
from data import loader as module
from data.decode import decode
from data.index import index_folder
from data.loader import Loader, eval_loader, train_loader
from data.pool import Pool
from data.shard_index import index_file
from data.shards import open_split
from data.transforms import EvalTransform, PretrainTransform
from data.writing import write_tar
from finetune.batches import padded_batches
from launch.training.world import process_errors
from tests.data.helpers import as_folder, collection, picture
from tests.data.test_prepare import prepared

transform = PretrainTransform(Data(size=16), (4, 4), 6)
STEPS = 6  # of an epoch


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A training split of 50 images, 10 in each shard, and a validation split of 11."""
    folder = tmp_path_factory.mktemp("loader")
    images = collection({"train/a": 25, "train/b": 25, "val/a": 5, "val/b": 6})
    prepared(as_folder(images, folder / "in"), folder / "out", "--shard-size", "10")
    return folder / "out"


def loader(folder, workers=0) -> Loader:
    data = Data(str(folder), workers=workers)
    return train_loader(open_split(data), transform, 1, 7, data, Optim(batch_size=8, epochs=2))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_do_not_depend_on_workers(shards):
    alone = list(loader(shards))
    assert len(alone) == 2 * STEPS
    assert alone[0]["image"].shape == (8, 1, 16, 16) and alone[0]["image"].dtype == torch.uint8
    assert alone[0]["visible"].shape == (8, 4, 4)
    for workers, first in ((1, 0), (2, 7), (4, 8)):
        for a, b in zip(alone[first:], loader(shards, workers).iterate(first), strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("killed", "error"), [(True, LostLoader), (False, ConnectionResetError)])
def test_a_loader_process_that_is_killed_while_it_sends_a_batch(shards, monkeypatch, killed, error):
    """Torch looks once whether a process has died, here before it did. Its signal handler may see that first."""

    def lose(batches) -> None:
        if killed:
            batches._workers[0].kill()
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_get_data", lose)
    with pytest.raises(error), process_errors():
        next(loader(shards, 1).iterate())


def test_an_iteration_draws_one_number_from_the_global_generator(shards):
    """Later draws of the training process (dropout, mixup) must not depend on where a run was resumed."""
    torch.manual_seed(3)
    torch.empty((), dtype=torch.int64).random_()
    expected = torch.rand(1)
    for first_step in (0, 7):
        torch.manual_seed(3)
        next(loader(shards).iterate(first_step))
        assert torch.equal(torch.rand(1), expected)


def test_epochs_differ_in_crops_and_masks(shards):
    batches = list(loader(shards))
    epochs = [
        {
            sample: (image, visible)
            for batch in part
            for sample, image, visible in zip(batch["sample"].tolist(), batch["image"], batch["visible"], strict=True)
        }
        for part in (batches[:STEPS], batches[STEPS:])
    ]
    assert [len(epoch) for epoch in epochs] == [48, 48]  # no sample twice
    common = epochs[0].keys() & epochs[1].keys()
    for part in range(2):  # crop, mask
        same = sum(torch.equal(epochs[0][sample][part], epochs[1][sample][part]) for sample in common)
        assert len(common) >= 46 and same <= 1


def test_evaluation_pads_with_label_minus_one(shards):
    data = Data(str(shards), workers=0)
    split = open_split(data, "val")
    found = [batch for rank in range(3) for batch in eval_loader(split, EvalTransform((8, 8), 1), 1, data, 2, rank, 3)]
    labels = torch.cat([batch["label"] for batch in found])
    assert (labels >= 0).sum() == 11 and len(labels) == 12
    assert np.array_equal(np.bincount(labels[labels >= 0]), np.bincount(split.labels()))


def damage(shard, *samples):
    """Flip a bit in the middle of some images of a shard, so that their checksums do not fit."""
    rows, data = np.load(index_file(shard)), bytearray(shard.read_bytes())
    for sample in samples:
        data[int(rows["offset"][sample]) + int(rows["size"][sample]) // 2] ^= 1
    shard.write_bytes(data)


def small(tmp_path, images=12):
    prepared(as_folder(collection({"a": images}), tmp_path / "in"), tmp_path / "out")
    return tmp_path / "out/train-000000.tar"


def by_sample(folder, workers, rank=0, ranks=1, epochs=3):
    """(epoch, sample) -> image, mask, and whether it was replaced; of one rank."""
    data = Data(str(folder), workers=workers)
    optim = Optim(batch_size=6, epochs=epochs)
    found = {}
    for number, batch in enumerate(train_loader(open_split(data), transform, 3, 0, data, optim, rank, ranks)):
        for i, sample in enumerate(batch["sample"].tolist()):
            found[number // 2, sample] = batch["image"][i], batch["visible"][i], bool(batch["damaged"][i])
    return found


def test_a_damaged_image_is_replaced_by_the_same_one_everywhere(tmp_path):
    shard = small(tmp_path)
    whole = by_sample(shard.parent, 0)
    damage(shard, 3, 8)
    alone = by_sample(shard.parent, 0)
    assert {key for key, (*_, damaged) in alone.items() if damaged} == {(e, s) for e in range(3) for s in (3, 8)}
    for key, (image, visible, damaged) in alone.items():
        assert torch.equal(visible, whole[key][1])  # the mask is the sample's own
        assert torch.equal(image, whole[key][0]) != damaged
    others = [by_sample(shard.parent, 2), *(by_sample(shard.parent, 0, rank, 2) for rank in (0, 1))]
    for other in (others[0], {**others[1], **others[2]}):
        assert other.keys() == alone.keys()
        assert all(torch.equal(a, b) for key in other for a, b in zip(other[key][:2], alone[key][:2], strict=True))


def test_damage_is_described_with_its_place(tmp_path):
    shard = small(tmp_path)
    damage(shard, 3)
    samples = train_loader(open_split(Data(str(shard.parent))), transform, 3, 0, Data(), Optim(batch_size=6)).samples
    assert re.search(
        r"split train, sample 3: .*train-000000\.tar is damaged at byte \d+ \(checksum\)", samples.describe_damage(3)
    )


def test_padding_is_not_a_damaged_sample(tmp_path):
    shard = small(tmp_path)
    damage(shard, 0)  # which pads the last batch
    data = Data(str(shard.parent), workers=0)
    (batch,) = eval_loader(open_split(data), EvalTransform((8, 8), 1), 3, data, 5, rank=4, ranks=5)
    assert batch["sample"].tolist() == [4, 9, -1] and not batch["damaged"].any()


def test_a_damaged_image_does_not_count_in_an_evaluation(tmp_path):
    shard = small(tmp_path)
    damage(shard, 3)
    data = Data(str(shard.parent), workers=0)
    batches = list(eval_loader(open_split(data), EvalTransform((8, 8), 1), 3, data, 5))
    labels, samples = (torch.cat([batch[key] for batch in batches]) for key in ("label", "sample"))
    assert samples.tolist() == list(range(12)) and (labels < 0).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_if_all_replacements_are_damaged_too(workers, tmp_path):
    shard = small(tmp_path)
    damage(shard, *range(12))
    config = Data(str(shard.parent), workers=workers)
    batches = train_loader(open_split(config), transform, 3, 0, config, Optim(batch_size=6, epochs=1))
    with pytest.raises(UserError, match=r"train-000000\.tar is damaged at byte .*replacements") as error:
        list(batches)
    assert "\n" not in str(error.value)


def test_images_of_8_and_16_bits_in_one_batch(tmp_path):
    deep = io.BytesIO()
    Image.fromarray(np.full((16, 20), 6000, np.uint16)).save(deep, "png")
    images = {"0.png": picture(0, mode="L", kind="png"), "1.png": deep.getvalue()}
    prepared(as_folder(images, tmp_path / "in"), tmp_path / "out")
    config = Data(str(tmp_path / "out"), workers=1)
    batch = next(iter(train_loader(open_split(config), transform, 1, 0, config, Optim(batch_size=2, epochs=1))))
    assert batch["image"].dtype == torch.float32 and batch["image"].max() <= 1.1
    assert any(torch.allclose(image, torch.tensor(6000 / 65535), atol=1e-4) for image in batch["image"])


def test_too_few_images_for_a_batch(shards):
    data = Data(str(shards))
    with pytest.raises(UserError, match=r"50 .*optim\.batch_size .*4096"):
        train_loader(open_split(data), transform, 1, 0, data, Optim(), 0, 1)


def test_repeated_images_have_other_crops_and_masks(shards):
    data, optim = Data(str(shards), size=16, repeats=2, workers=0), Optim(batch_size=40, epochs=1)
    batch = next(iter(train_loader(open_split(data), PretrainTransform(data, (2, 2), 2), 1, 0, data, optim)))
    assert torch.equal(batch["sample"][::2], batch["sample"][1::2]) and len(batch["sample"][::2].unique()) == 20
    for part in ("image", "visible"):
        first, second = batch[part][::2].flatten(1), batch[part][1::2].flatten(1)
        differ = (first != second).any(1).float().mean()
        assert differ > 0.7  # of two patches in four, one pair of masks in six is alike
    with pytest.raises(UserError, match=r"data\.repeats is 3.*optim\.batch_size 40"):
        Pretrain(data=Data(repeats=3), optim=optim)


@pytest.mark.parametrize("micro", [40, 5])
def test_an_image_is_decoded_once_for_its_views(micro, shards, monkeypatch):
    """Crops and masks do not depend on the micro batches, which may divide the views of an image."""
    data = Data(str(shards), size=16, repeats=4, workers=0)
    calls = []
    monkeypatch.setattr(module, "decode", lambda *words: calls.append(1) or decode(*words))

    def first(micro: int) -> torch.Tensor:
        optim = Optim(batch_size=40, epochs=1, micro_batch=micro)
        batches = iter(train_loader(open_split(data), PretrainTransform(data, (2, 2), 2), 1, 0, data, optim))
        return torch.cat([next(batches)["image"] for _ in range(40 // micro)])

    found = first(micro)
    assert len(calls) == 10  # one process has all views of each
    assert torch.equal(found, first(40))


def test_views_share_an_image_that_all_their_crops_fit(shards):
    """The decoded size is that of the view with the smallest crop, whichever views this rank has."""
    data = Data(str(shards), size=16, crop_scale=(0.01, 1), repeats=4)
    split = open_split(data)
    samples = module.Samples(split, 1, 0, transform, crops=data, views=4)
    factors = [module.crop_shrink(data, module.sample_rng(0, 0, 3, view), 256, 256) for view in range(4)]
    assert len(set(factors)) > 1 and samples._shrink(0, 3, 256, 256) == min(factors)


def test_targets_and_rows_of_objects(tmp_path):
    """A target that cannot be read makes a sample damaged; padding and replacements have none in evaluation."""
    about = [{"boxes": [{"box": [i, 0, 1, 1]}] * i} for i in range(4)] + [{"boxes": "damaged"}]
    samples = [
        {"__key__": str(i), "png": picture(i, kind="png"), "json": json.dumps(x).encode()} for i, x in enumerate(about)
    ]
    write_tar(tmp_path / "train-0.tar", iter(samples))
    index_folder(tmp_path, Pool(1))

    def read_target(data):
        boxes = json.loads(data)["boxes"]
        if boxes == "damaged":
            raise UserError("boxes are damaged")
        return torch.tensor([box["box"] for box in boxes]).reshape(-1, 4)

    def with_boxes(image, target, rng):
        return {"image": image, "object_box": torch.full((1, 4), -1) if target is None else target}

    data = Data(str(tmp_path), workers=0)
    found = eval_loader(open_split(data), with_boxes, 3, data, 3, 0, 1, read_target=read_target)
    one, two = found
    assert one["objects"].tolist() == [0, 1, 2] and one["object_box"][:, 0].tolist() == [1, 2, 2]
    assert two["objects"].tolist() == [3, 1] and two["object_box"][-1].tolist() == [-1] * 4
    assert two["damaged"].tolist() == [False, True]
    assert "boxes are damaged" in found.samples.describe_damage(4)
    padded = list(padded_batches(found, 3, {}, False))[1]
    assert padded["objects"].tolist() == [3, 1, 0] and padded["sample"].tolist() == [3, 4, -1]
