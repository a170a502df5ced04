"""Scores against scikit-learn, for any division into batches and ranks; assembling, windows."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, recall_score

from finetune.tasks.segmentation.inference import class_shares, segment, starts
from finetune.tasks.segmentation.scores import EXAMPLES, Predictions, collect, join, restore
from tests.finetune.tasks.segmentation.helpers import config

CLASSES, VOID, IMAGES = 5, 255, 11


def outputs(seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Masks of different sizes and their predictions; class 4 is predicted, but in no mask."""
    rng = np.random.default_rng(seed)
    sizes = [(int(rng.integers(3, 9)), int(rng.integers(3, 9))) for _ in range(IMAGES)]
    truth = [rng.choice([0, 1, 2, 3, VOID], size) for size in sizes]
    return truth, [np.where(rng.random(size) < 0.5, t % 5, rng.integers(0, 5, size)) for t, size in zip(truth, sizes)]  # noqa: B905


def collected(samples: list[int], padding: int = 0) -> Predictions:
    truth, guess = outputs()
    found = [(torch.from_numpy(guess[i]), True) for i in samples] + [(None, True)] * padding
    batch = {
        "object_mask": torch.cat([torch.from_numpy(truth[i]).flatten() for i in samples]),
        "objects": torch.tensor([truth[i].size for i in samples] + [0] * padding),
        "sample": torch.tensor([*samples, *[-1] * padding]),
        "size": torch.tensor([truth[i].shape for i in samples] + [(1, 1)] * padding),
        "image": torch.zeros(len(samples) + padding, 3, 8, 8, dtype=torch.uint8),
    }
    return collect(found, batch, CLASSES, VOID)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_scores_are_those_of_sklearn(ranks):
    parts = [join([collected([i], padding=1) for i in range(rank, IMAGES, ranks)]) for rank in range(ranks)]
    found = restore(vars(join(parts)))
    truth, guess = (np.concatenate([x.ravel() for x in masks]) for masks in outputs())
    truth, guess = truth[(counts := truth != VOID)], guess[counts]
    labels = list(range(CLASSES))
    assert (found.confusion == confusion_matrix(truth, guess, labels=labels)).all()
    assert found.iou() == pytest.approx(jaccard_score(truth, guess, labels=labels, average=None), abs=1e-6)
    scores = found.scores()
    assert scores["miou"] == pytest.approx(jaccard_score(truth, guess, labels=labels, average="macro"), abs=1e-6)
    assert scores["pixel_accuracy"] == pytest.approx(accuracy_score(truth, guess), abs=1e-6)
    recall = recall_score(truth, guess, labels=labels[:4], average="macro")
    assert scores["mean_accuracy"] == pytest.approx(recall, abs=1e-6) and scores["images"] == IMAGES
    whole = collected(list(range(IMAGES)))
    assert scores == whole.scores() and found.sample.tolist() == list(range(IMAGES))
    assert [e.sample for e in found.examples] == [e.sample for e in whole.examples]
    order = np.argsort(found.image_scores(), kind="stable")
    assert [e.sample for e in found.examples] == [*order[:EXAMPLES], *order[-EXAMPLES:]]


def test_a_class_that_occurs_nowhere_does_not_count():
    none = np.zeros((0, 3), np.int64)
    matrix = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    found = Predictions(np.array([]), np.array([]), none, none, none, matrix, [])
    assert np.isnan(found.iou()[2]) and found.scores()["miou"] == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert Predictions(*[np.array([])] * 2, none, none, none, 0 * matrix, []).scores()["miou"] == 0


class Coordinates(torch.nn.Module):
    """Logits that depend on a pixel's colour alone: windows must agree with the whole."""

    def forward(self, image):
        return torch.cat([image[:, :1], 3 * image[:, 1:2], -image[:, 2:3]], 1)


@pytest.mark.parametrize("size", [(7, 9), (16, 40), (33, 16)])
def test_windows_cover_the_image(size):
    image = torch.rand(1, 3, *size)
    whole, slide = (class_shares(Coordinates(), image, mode, (16, 16)) for mode in ("whole", "slide"))
    assert (whole - slide).abs().max() < 1e-6
    for side in (5, 16, 17, 100):
        found = starts(side, min(side, 16))
        assert found[0] == 0 and found[-1] == side - min(side, 16)
        assert all(b - a <= 11 for a, b in pairwise(found))


def test_images_are_segmented_at_full_size_without_their_padding():
    batch = {"size": torch.tensor([[4, 6], [8, 8], [1, 1]]), "full": torch.tensor([[8, 12], [8, 8], [1, 1]])}
    batch["sample"] = torch.tensor([0, 1, -1])
    image = torch.rand(3, 3, 8, 8)
    image[0, :, 4:], image[0, :, :, 6:] = torch.nan, torch.nan
    for flips in (False, True):
        found = segment(Coordinates(), image, batch, config(flips=flips), (8, 8))
        assert found[0][0].shape == (8, 12) and found[2][0] is None and [finite for _, finite in found] == [True] * 3
        assert (found[1][0] == Coordinates()(image[1:2])[0].argmax(0)).all()
    image[1, 0, 0, 0] = torch.nan
    assert not segment(Coordinates(), image, batch, config(), (8, 8))[1][1]
