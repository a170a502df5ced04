"""The verdict on curves with known ends."""

import numpy as np
import pytest

from launch.training.plateau import last_improvement, verdict

EPOCHS = range(10, 210, 10)


def curve(loss, rank=lambda epoch: 20.0, noise: float = 0.0) -> dict[int, dict[str, float]]:
    """Evaluations every ten epochs, and one of the initial weights, which is much better in both."""
    random = np.random.default_rng(0)
    found = {0: {"loss": 0.01, "rankme": 1e3}}
    for epoch in EPOCHS:
        factors = 1 + noise * random.uniform(-1, 1, 2)
        found[epoch] = {"loss": loss(epoch) * factors[0], "rankme": rank(epoch) * factors[1]}
    return found


def falls_until(end: int):
    return lambda epoch: 1 - 0.002 * min(epoch, end)


@pytest.mark.parametrize("noise", [0.0, 0.001])
@pytest.mark.parametrize(
    ("loss", "rank", "found"),
    [
        (falls_until(1000), lambda epoch: 20.0, "still improving"),
        (falls_until(100), lambda epoch: 20.0, "plateau since epoch 100"),
        (falls_until(100), lambda epoch: 20.0 + min(epoch, 150) / 10, "plateau since epoch 150"),
        (falls_until(100), lambda epoch: 20.0 + epoch / 10, "still improving"),
        (falls_until(190), lambda epoch: 20.0, "still improving"),
        (lambda epoch: 1 - 0.00025 * epoch, lambda epoch: 20.0, "still improving"),  # a step is below the tolerance
    ],
)
def test_verdict(loss, rank, found, noise):
    assert verdict(curve(loss, rank, noise)) == found


def test_noise_alone_is_a_plateau():
    assert verdict(curve(lambda epoch: 0.5, noise=0.002)) == "plateau since epoch 10"


def test_a_rising_loss_is_a_plateau():
    assert verdict(curve(lambda epoch: abs(epoch - 60) / 100 + 0.4)) == "plateau since epoch 60"


def test_collapse_is_named_even_if_the_loss_falls():
    found = verdict(curve(falls_until(1000), lambda epoch: 30.0 if epoch < 150 else 1.5))
    assert "collapsing" in found and "epoch 10's" in found
    assert verdict(curve(falls_until(1000), lambda epoch: 61 * 0.99**epoch + 17)) == "still improving"  # and not this


def test_alike_features_are_named_whatever_the_loss():
    for history in (curve(falls_until(1000), lambda epoch: 1.0), {0: {"rankme": 30.0}, 1: {"rankme": 1.2}}):
        assert "features are all alike, RankMe is below 2" in verdict(history)


def test_too_few_evaluations():
    values = {epoch: {"loss": 1 / (1 + epoch), "rankme": 9.0} for epoch in range(4)}
    assert verdict(values) == verdict({}) == "too early to tell"
    assert verdict(values | {4: {"loss": 0.1, "rankme": 9.0}}) == "still improving"


def test_evaluations_without_a_finite_value():
    history = {1: {}, 2: {"loss": 0.5}, 3: {}, 4: {}, 5: {}}
    assert last_improvement(history, "loss", -1) == 2 and last_improvement(history, "rankme", 1) == 0
    assert verdict(history) == "plateau since epoch 2"
