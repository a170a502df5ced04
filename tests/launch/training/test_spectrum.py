"""RankMe and alpha-ReQ against plain formulas and known spectra, on one and two ranks."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from launch.training.spectrum import alpha_req, rankme, spectra
from tests.processes import on_ranks


def features(images: int, spread: np.ndarray, shift: float = 0.0) -> torch.Tensor:
    """Gaussian features [images, D] with these standard deviations in rotated directions, around `shift`."""
    random = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(random.normal(size=(len(spread), len(spread))))
    return torch.from_numpy(random.normal(size=(images, len(spread))) * spread @ rotation + shift).float()


@pytest.fixture(autouse=True)
def alone():
    """A process group of one rank."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("images", "width"), [(200, 12), (10, 30)])
def test_spectra_are_scipys(images, width):
    x = features(images, np.geomspace(1, 1e-3, width), shift=2.0)
    singular, variances = spectra(x)
    np.testing.assert_allclose(singular, scipy.linalg.svdvals(x.double().numpy()), rtol=1e-6)
    expected = scipy.linalg.eigvalsh(np.cov(x.double().numpy().T, bias=True))[::-1][: images - 1]
    np.testing.assert_allclose(variances, expected, rtol=1e-6)
    assert (len(singular), len(variances)) == (min(images, width), min(images - 1, width))


def test_rankme():
    assert rankme(np.array([3.0, 1.0])) == pytest.approx(np.exp(scipy.stats.entropy([3, 1])), rel=1e-5)
    singular, _ = spectra(torch.outer(torch.rand(50) + 1, torch.rand(8)))
    assert rankme(singular) == pytest.approx(1, abs=1e-4)  # all are multiples of one
    singular, _ = spectra(features(20_000, np.ones(16)))
    assert rankme(singular) == pytest.approx(16, rel=0.01)  # isotropic
    assert math.isnan(rankme(np.zeros(4)))


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0, 2.0])
def test_alpha_of_a_power_law(slope):
    assert alpha_req(np.arange(1.0, 65) ** -slope) == pytest.approx(slope, abs=1e-9)
    _, variances = spectra(features(20_000, np.arange(1.0, 65) ** (-slope / 2), shift=5.0))
    assert alpha_req(variances) == pytest.approx(slope, abs=0.05)


def test_each_octave_counts_alike():
    """Half of the weight is on the first eigenvalues: a cliff at the end changes little."""
    law = np.arange(1.0, 65) ** -1.0
    law[60:] *= 1e-3
    unweighted = -np.polyfit(np.log(np.arange(1, 65)), np.log(law), 1)[0]
    assert 1 < alpha_req(law) < 0.5 * (1 + unweighted)


def test_undefined_values_are_nan():
    _, variances = spectra(torch.outer(torch.rand(50), torch.rand(8)))
    assert math.isnan(alpha_req(variances))  # one direction has no slope
    singular, variances = spectra(torch.tensor([[1.0, torch.inf], [0.0, 1.0]]))
    assert math.isnan(rankme(singular)) and math.isnan(alpha_req(variances))
    assert math.isnan(alpha_req(spectra(torch.rand(1, 4))[1]))


def both(rank: int, x: torch.Tensor, ends: list[int]) -> list[list[float]]:
    """In a rank: the spectra of all ranks' parts."""
    return [values.tolist() for values in spectra(x[([0, *ends])[rank] : ends[rank]])]


def test_two_ranks_have_the_spectra_of_one(tmp_path):
    x = features(101, np.geomspace(1, 0.1, 8), shift=1.0)
    first, second = on_ranks(2, both, tmp_path, x, [30, 101])
    assert first == second
    for found, expected in zip(first, spectra(x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
