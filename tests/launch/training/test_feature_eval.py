"""Features, kNN and linear classifier compared with timm and scikit-learn, on one and several ranks."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from configs.errors import UserError
from configs.feature_eval import KS
from configs.schema import Data, Encoder
from data.shards import open_split
from data.transforms import EvalTransform
from launch.training import feature_eval as probe
from launch.training.feature_eval import Features, check_labels, features, knn, linear, probe_loader
from launch.training.world import World
from models.convnext import ConvNeXt
from models.formats.read import read_weights
from tests.processes import on_ranks

CPU = torch.device("cpu")
TINY = Encoder("convnextv2_atto", 1, 1, (1, 1, 1, 1), (8, 16, 16, 16))


def progress(steps, number, what):
    return steps


@pytest.fixture
def alone():
    """A process group of one rank."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield World(0, 1, CPU)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def pixels() -> tuple[Features, Features]:
    """1,300 training and 497 evaluation digits with pixels as features."""
    x, label = load_digits(return_X_y=True)
    whole = torch.tensor(x, dtype=torch.float32), torch.tensor(label), torch.arange(len(x))
    return Features(*(part[:1300] for part in whole)), Features(*(part[1300:] for part in whole))


def test_knn_is_that_of_sklearn(alone, pixels, monkeypatch):
    monkeypatch.setattr(probe, "QUERIES", 100)  # several chunks of both
    monkeypatch.setattr(probe, "BANK", 150)
    bank, queries = pixels
    found = knn(bank, queries, 10, (1, 5, 20, 200), 0.07, alone, progress)
    for k, score in found.items():
        sklearn = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        share = sklearn.fit(bank.x.numpy(), bank.label.numpy()).predict_proba(queries.x.numpy())
        right = share.argmax(1) == queries.label.numpy()
        rank = (share > share[np.arange(len(share)), queries.label.numpy()][:, None]).sum(1)
        voted = share[np.arange(len(share)), queries.label.numpy()] > 0
        assert score["top1"] == pytest.approx(right.mean(), abs=1e-9)
        assert score["top5"] == pytest.approx(((rank < 5) & voted).mean(), abs=1e-9)
    assert found.keys() == {1, 5, 20, 200} and 0.9 < found[20]["top1"] < found[20]["top5"]


def test_a_low_temperature_is_the_nearest_neighbour(alone, pixels):
    found = knn(*pixels, 10, (1, 50), 1e-5, alone, progress)  # exp(1 / 1e-5) would overflow
    assert found[50]["top1"] == found[1]["top1"] > 0.9


def test_more_neighbours_than_images_are_left_out(alone, pixels):
    bank = Features(*(part[:30] for part in (pixels[0].x, pixels[0].label, pixels[0].sample)))
    assert knn(bank, pixels[1], 10, KS, 0.07, alone, progress).keys() == {10, 20}
    assert knn(bank, pixels[1], 10, [31], 0.07, alone, progress) == {}


def test_classes_without_a_vote_are_not_right(alone):
    bank = Features(torch.eye(3), torch.tensor([0, 1, 2]), torch.arange(3))
    queries = Features(torch.eye(3), torch.tensor([0, 2, 2]), torch.arange(3))
    assert knn(bank, queries, 3, [1], 0.07, alone, progress) == {
        1: {"top1": pytest.approx(2 / 3), "top5": pytest.approx(2 / 3)}
    }


def test_features_are_those_of_timm(alone, digits, tmp_path):
    theirs = timm.create_model("convnextv2_atto", in_chans=1).eval()
    torch.save(theirs.state_dict(), tmp_path / "atto.pth")
    encoder = ConvNeXt(Encoder("convnextv2_atto", 1))
    encoder.load_state_dict(read_weights(tmp_path / "atto.pth")[0].encoder)
    transform = EvalTransform((32, 32), 0.875)
    split = open_split(Data(path=str(digits)), "val")
    loader = probe_loader(split, 20, transform, 1, Data(workers=0), 8, alone)
    found = features(encoder.train(), loader, alone, torch.tensor([0.5]), torch.tensor([0.25]), "fp32", progress)
    image = torch.stack([loader.samples[0, sample, 0]["image"] for sample in found.sample.tolist()])
    with torch.no_grad():
        expected = theirs.forward_features((image / 255 - 0.5) / 0.25).mean((2, 3))
    assert torch.allclose(found.x, expected, atol=1e-4) and found.x.std() > 0.1
    assert found.label.tolist() == split.labels()[found.sample.numpy()].tolist()
    assert encoder.training  # as it was


def test_images_are_spread_over_the_split(alone, digits):
    split = open_split(Data(path=str(digits)), "train")
    loaders = [
        probe_loader(split, 100, EvalTransform((24, 24), 1), 1, Data(workers=0), 8, World(rank, 3, CPU))
        for rank in range(3)
    ]
    assert len({len(loader.batches) for loader in loaders}) == 1
    ids = sorted(i for loader in loaders for i in loader.batches.ids if i >= 0)
    assert len(set(ids)) == 100 and ids[0] == 0 and set(np.diff(ids)) == {14, 15}
    every = probe_loader(split, None, EvalTransform((24, 24), 1), 1, Data(workers=0), 8, World(0, 1, CPU))
    assert every.batches.ids == list(range(1442))


def test_damaged_images_and_fillings_are_left_out(alone, digits):
    split = open_split(Data(path=str(digits)), "val")
    loader = probe_loader(split, 10, EvalTransform((24, 24), 1), 1, Data(workers=0), 8, alone)
    load, bad = loader.samples.load, loader.batches.ids[3]
    loader.samples.load = lambda sample, *_: (None, "damaged") if sample == bad else load(sample)
    loader.batches.ids += [-1, -1]
    found = features(ConvNeXt(TINY), loader, alone, torch.zeros(1), torch.ones(1), "fp32", progress)
    assert found.sample.tolist() == [i for i in loader.batches.ids if i not in (bad, -1)]
    assert len(found.x) == len(found.label) == 9 and found.label.min() >= 0


def evaluated(rank: int, ranks: int, path: Path) -> tuple[dict, list, list]:
    """(kNN, linear classifiers, this rank's samples of both splits) for fixed random weights."""
    torch.manual_seed(0)
    world, encoder, transform = World(rank, ranks, CPU), ConvNeXt(TINY), EvalTransform((24, 24), 1)
    splits = [open_split(Data(path=str(path)), name) for name in ("train", "val")]
    loaders = [probe_loader(split, 400, transform, 1, Data(workers=0), 50, world) for split in splits]
    parts = [features(encoder, loader, world, *torch.ones(2, 1), "fp32", progress) for loader in loaders]
    grid = linear(*parts, 10, (0.01, 0.1), 5, 0, progress)
    return knn(*parts, 10, KS, 0.07, world, progress), grid, [part.sample.tolist() for part in parts]


def test_any_number_of_ranks(digits, tmp_path):
    """kNN accuracies are equal, those of the linear classifier up to rounding."""
    one, two, three = (on_ranks(ranks, evaluated, tmp_path, ranks, digits) for ranks in (1, 2, 3))
    for several in (two, three):
        assert all(neighbours == one[0][0] for neighbours, _, _ in several)
        assert all(grid == several[0][1] for _, grid, _ in several)
        for split in (0, 1):
            assert sorted(i for _, _, seen in several for i in seen[split]) == one[0][2][split]
        for row, expected in zip(several[0][1], one[0][1], strict=True):
            for key in ("held_out", "top1", "top5"):
                assert getattr(row, key) == pytest.approx(getattr(expected, key), abs=0.026)  # one of 40 held out
    assert len(one[0][2][1]) == 355 and 0.2 < one[0][0][20]["top1"] < 1


def test_linear_is_as_good_as_sklearn(alone, pixels):
    grid = linear(*pixels, 10, (0.1, 0.001, 0.01), 50, 0, progress)
    train, evaluation = pixels
    scaler = StandardScaler().fit(train.x.numpy())
    sklearn = LogisticRegression(max_iter=500).fit(scaler.transform(train.x.numpy()), train.label.numpy())
    expected = sklearn.score(scaler.transform(evaluation.x.numpy()), evaluation.label.numpy())
    assert [row.lr for row in grid] == [0.001, 0.01, 0.1]
    best = max(grid, key=lambda row: row.held_out)
    assert best.top1 == pytest.approx(expected, abs=0.02) and best.top5 > 0.98


def test_high_learning_rates_are_stable(alone, pixels):
    """Correlated features: at rate 1 the loss would oscillate, and accuracy would depend on the seed."""
    torch.manual_seed(0)
    mix = torch.randn(64, 128) / 8
    train, evaluation = (Features(torch.relu(p.x @ mix) + p.x.mean(1, True), p.label, p.sample) for p in pixels)
    found = [linear(train, evaluation, 10, (0.01, 1.0, 10.0), 10, seed, progress) for seed in (0, 1)]
    for low, high, higher in found:
        assert low.used == 0.01 and high.used == higher.used < 0.5 and high.top1 == higher.top1
        assert high.top1 > low.top1 - 0.02
    assert found[0][1].top1 == pytest.approx(found[1][1].top1, abs=0.012)


def test_the_largest_stable_rate_is_of_the_largest_eigenvalue(alone):
    x = torch.randn(500, 20) @ torch.randn(20, 20)
    expected = 3.8 / (0.5 * float(torch.linalg.eigvalsh(x.T @ x / 500)[-1]))
    assert probe.max_stable_lr(x, 500) == pytest.approx(expected, rel=0.02)


def test_one_optimizer_is_as_good_as_one_for_each_rate(alone):
    """Weights equal those of one torch SGD per learning rate."""
    torch.manual_seed(1)
    x, label = torch.randn(300, 5), torch.randint(3, (300,))
    orders = [torch.randperm(300).numpy() for _ in range(3)]
    weight, bias = probe._fit(x, label, orders, 6, 3, [0.01, 0.5])
    for i, lr in enumerate((0.01, 0.5)):
        layer = torch.nn.Linear(5, 3)
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        for rows in (part for order in orders for part in torch.from_numpy(order).split(256)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x[rows]), label[rows]).backward()
            optimizer.step()
            schedule.step()
        assert torch.allclose(weight[i], layer.weight.T, atol=1e-5) and torch.allclose(
            bias[i, 0], layer.bias, atol=1e-5
        )


def test_the_held_out_tenth_is_not_trained_on(alone):
    """With random labels, only the training images can be memorised."""
    x, label = torch.randn(200, 400), torch.randint(4, (200,))
    part = Features(x, label, torch.arange(200))
    (row,) = linear(part, part, 4, (0.1,), 40, 0, progress)
    assert row.top1 > 0.9 and row.held_out < 0.7


def test_features_without_any_difference(alone):
    same = Features(torch.ones(40, 6), torch.arange(40) % 2, torch.arange(40))
    (row,) = linear(same, same, 2, (0.1,), 3, 0, progress)
    assert 0 <= row.top1 <= 1 and row.top5 == 1  # of two classes
    assert knn(same, same, 2, [10], 0.07, alone, progress)[10]["top5"] <= 1


def test_images_without_labels(digits):
    split = open_split(Data(path=str(digits)), "train")
    check_labels(split)
    split.labels = lambda: np.array([3, -1])
    with pytest.raises(UserError, match=r"digits.*train.*labels"):
        check_labels(split)
    split.classes = None
    with pytest.raises(UserError, match="labels"):
        check_labels(split)
