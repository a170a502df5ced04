"""Folds of a split: each sample is evaluated once, classes are divided evenly, order and reading of a part."""

import numpy as np
import pytest

from configs.errors import UserError
from configs.schema import Data, Optim
from data.folder import names_of, open_images
from data.folds import Part, fold_parts
from data.loader import train_loader
from data.sampler import EpochOrder
from data.shards import open_split
from data.transforms import EvalTransform
from tests.data.helpers import as_folder, collection


def test_each_sample_is_evaluated_once_and_classes_are_divided_evenly(digits):
    split = open_split(Data(str(digits)))
    found = [fold_parts(split, fold, 5) for fold in range(5)]
    evaluated = np.concatenate([part.samples for _, part in found])
    assert sorted(evaluated) == list(range(len(split)))
    for train, part in found:
        assert not set(train.samples) & set(part.samples) and len(train) + len(part) == len(split)
        counts = np.bincount(part.labels()) - np.bincount(split.labels()) / 5
        assert np.abs(counts).max() <= 1
    again = fold_parts(open_split(Data(str(digits))), 0, 5)[1]
    assert again.samples.tolist() == found[0][1].samples.tolist() and again.digest == found[0][1].digest
    assert len({part.digest for pair in found for part in pair} | {split.digest}) == 11


def test_a_part_reads_its_own_samples(digits):
    split = open_split(Data(str(digits)))
    train, _ = fold_parts(split, 1, 3)
    assert train.counts.sum() == len(train) and len(train.counts) == len(split.counts)
    for i in (0, 7, len(train) - 1):
        assert train.read(i) == split.read(train.samples[i]) and train.read(i)[1] == train.labels()[i]
    optim, data = Optim(batch_size=len(train), epochs=1), Data(workers=0)
    batch = next(iter(train_loader(train, EvalTransform((8, 8), 1), 1, 0, data, optim)))
    assert sorted(batch["sample"].tolist()) == list(range(len(train)))
    assert sorted(batch["label"].tolist()) == sorted(train.labels().tolist())


def test_a_part_knows_its_names(digits):
    """Those of the split, in the order asked for, of shards and folders alike."""
    split = open_split(Data(str(digits)))
    train, _ = fold_parts(split, 1, 3)
    assert names_of(train, [9, 0]) == names_of(split, [train.samples[9], train.samples[0]])


def test_shards_without_a_sample_are_passed_over():
    order = EpochOrder(np.array([0, 3, 0, 2, 0]), 0)
    assert sorted(order.ids(0, 0, 5)) == [0, 1, 2, 3, 4]


def test_a_folder_has_folds_too(tmp_path):
    folder = open_images(str(as_folder(collection({"a": 4, "b": 2}), tmp_path / "in")), "train")
    parts = [fold_parts(folder, fold, 2)[1] for fold in (0, 1)]
    assert [sorted(part.labels()) for part in parts] == [[0, 0, 1], [0, 0, 1]]
    assert isinstance(parts[0], Part) and parts[0].name == "fold 0 of train"
    with pytest.raises(UserError, match=r"6 images, too few for data.folds 7"):
        fold_parts(folder, 0, 7)
