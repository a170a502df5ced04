"""The order of an epoch is a permutation, a pure function, and independent of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sampler import EpochOrder, EvalBatches, TrainBatches, class_weights, labelled_share

COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(lambda counts: sum(counts) > 0)


@settings(deadline=None, max_examples=60)
@given(COUNTS, st.integers(1, 7), st.integers(0, 5))
def test_an_epoch_has_every_sample_once(counts, window, epoch):
    order = EpochOrder(np.array(counts), seed=3, window=window)
    assert sorted(order.ids(epoch, 0, len(order))) == list(range(sum(counts)))


@settings(deadline=None, max_examples=60)
@given(COUNTS, st.integers(1, 7), st.data())
def test_any_part_equals_that_part_of_the_whole(counts, window, data):
    order, fresh = (EpochOrder(np.array(counts), seed=3, window=window) for _ in range(2))
    start = data.draw(st.integers(0, len(order)))
    stop = data.draw(st.integers(start, len(order)))
    assert np.array_equal(fresh.ids(1, start, stop), order.ids(1, 0, len(order))[start:stop])


def test_epochs_and_seeds_differ():
    orders = {
        (seed, epoch): tuple(EpochOrder(np.full(8, 50), seed).ids(epoch, 0, 400)) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4


def test_a_window_mixes_its_shards():
    ids = EpochOrder(np.full(8, 100), 0, window=8).ids(0, 0, 100)
    assert len(set(ids // 100)) == 8


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (2, 8), (4, 2), (1, 2)])
def test_global_batches_do_not_depend_on_ranks(ranks, micro):
    def batches(ranks, micro):
        order = EpochOrder(np.array([7, 20, 13]), 5)
        parts = [list(TrainBatches(order, 16, micro, rank, ranks, epochs=3).iterate()) for rank in range(ranks)]
        per_step = 16 // (micro * ranks)
        steps = len(parts[0]) // per_step
        return [
            [index for part in parts for batch in part[s * per_step : (s + 1) * per_step] for index in batch]
            for s in range(steps)
        ]

    assert batches(ranks, micro) == batches(1, 16)
    assert len(batches(ranks, micro)) == 3 * (40 // 16)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_repeated_augmentation(ranks):
    order = EpochOrder(np.array([30, 30]), 5)
    make = [TrainBatches(order, 12, 12 // ranks, rank, ranks, epochs=2, repeats=3) for rank in range(ranks)]
    parts = [list(batches.iterate()) for batches in make]
    steps = [[index for batch in step for index in batch] for step in zip(*parts, strict=True)]
    assert len(steps) == 2 * (60 // 12)
    for number, step in enumerate(steps):
        epoch, place = divmod(number, 5)
        images = order.ids(epoch, 4 * place, 4 * place + 4).tolist()
        assert step == [(epoch, sample, view) for sample in images for view in range(3)]


@settings(deadline=None, max_examples=60)
@given(COUNTS, st.integers(1, 7), st.integers(0, 3))
def test_weighted_epochs(counts, window, epoch):
    total = sum(counts)
    weights = np.random.default_rng(total).random(total) + 0.01
    order = EpochOrder(np.array(counts), 3, weights, window)
    copies = np.bincount(order.ids(epoch, 0, total), minlength=total)
    assert copies.sum() == total and (np.abs(copies - weights * total / weights.sum()) < 1).all()
    part = EpochOrder(np.array(counts), 3, weights, window).ids(epoch, total // 3, total // 2)
    assert np.array_equal(part, order.ids(epoch, 0, total)[total // 3 : total // 2])


def test_balanced_classes():
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    shares = {}
    for power in (0, 0.5, 1):
        order = EpochOrder(np.array([500, 500]), 0, class_weights(labels, power))
        drawn = np.concatenate([labels[order.ids(epoch, 0, 1000)] for epoch in range(6)])
        shares[power] = np.bincount(drawn) / len(drawn)
    assert np.allclose(shares[0], [0.9, 0.09, 0.01])
    roots = np.sqrt([900, 90, 10])
    assert np.allclose(shares[0.5], roots / roots.sum(), atol=0.002) and np.allclose(shares[1], 1 / 3, atol=0.002)
    ids = [np.bincount(order.ids(epoch, 0, 1000)[:900], minlength=1000)[:900] for epoch in range(2)]
    assert not np.array_equal(*ids)  # other images of the frequent class each time


def test_a_share_of_the_labels():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [900, 90, 10]))
    few, more, other = (labelled_share(labels, share, seed) for share, seed in ((0.05, 0), (0.3, 0), (0.05, 1)))
    assert np.bincount(labels[few]).tolist() == [45, 4, 1]  # half of one of ten images rounds to none, so at least one
    assert np.bincount(labels[more]).tolist() == [270, 27, 3] and more[few].all()
    assert np.bincount(labels[other]).tolist() == [45, 4, 1] and not np.array_equal(few, other)
    assert labelled_share(labels, 1, 0).all()


@settings(deadline=None, max_examples=60)
@given(COUNTS, st.integers(1, 7), st.integers(0, 3), st.integers(0, 99))
def test_an_epoch_of_a_share(counts, window, epoch, seed):
    """Samples without weight are not drawn, the others once each, in an order that is cut anywhere."""
    used = np.random.default_rng(seed).random(sum(counts)) < 0.3
    used[seed % len(used)] = True
    order = EpochOrder(np.array(counts), 3, used.astype(float), window)
    assert len(order) == used.sum()
    ids = order.ids(epoch, 0, len(order))
    assert np.array_equal(np.sort(ids), np.flatnonzero(used))
    assert np.array_equal(order.ids(epoch, len(order) // 2, len(order)), ids[len(order) // 2 :])
    assert list(order.windows(epoch, 0, len(order)))[-1] < -(-len(counts) // window)


def test_a_resumed_run_sees_the_rest():
    def make(first):
        return list(TrainBatches(EpochOrder(np.array([30, 30]), 5), 8, 4, 0, 1, epochs=4).iterate(first))

    whole = make(0)
    for step in (0, 1, 6, 7, 8, 20, 28):
        assert make(step) == whole[2 * step :]


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 6))
def test_evaluation_sees_every_sample_once(samples, batch, ranks):
    parts = [list(EvalBatches(range(samples), batch, rank, ranks)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1  # no rank waits for another
    assert all(len(part) == len(EvalBatches(range(samples), batch, 0, ranks)) for part in parts)
    seen = [sample for part in parts for b in part for _, sample, _ in b if sample >= 0]
    assert sorted(seen) == list(range(samples))


def test_evaluation_of_chosen_samples():
    parts = [[sample for b in EvalBatches([2, 3, 5, 7, 11], 2, rank, 2) for _, sample, _ in b] for rank in range(2)]
    assert parts == [[2, 5, 11], [3, 7, -1]]
