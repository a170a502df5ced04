"""Measures of features by their spectrum, without labels, on any number of ranks.

N images of a rank, D width of the features. The sums over images are fp64, so singular values are exact down to 1e-8 of
the largest; fp32 features have no more.
"""

import math

import numpy as np
import torch
from torch import Tensor

from launch.training.world import gather, sum_over_ranks

EPS = 1e-7  # of RankMe
SMALLEST = 1e-10  # eigenvalues below this share of the largest are rounding errors


def spectra(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Singular values of all ranks' features [N, D] and eigenvalues of their covariance, in descending order.

    Their lengths are D or, with few images, the number of images and one less. All ranks call this. NaN if a feature is
    not finite.
    """
    images, x = sum(gather(len(x))), x.double()
    products, total = sum_over_ranks(x.T @ x), sum_over_ranks(x.sum(0))
    mean = total / images
    covariance = products / images - torch.outer(mean, mean)
    lengths = min(len(total), images), min(len(total), images - 1)
    if not torch.isfinite(products).all():
        return tuple(np.full(length, math.nan) for length in lengths)
    squares, variances = (torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0).cpu() for matrix in (products, covariance))
    return squares.sqrt().numpy()[: lengths[0]], variances.numpy()[: lengths[1]]


def rankme(singular: np.ndarray) -> float:
    """RankMe, a soft rank: exp of the entropy of the normalised singular values (2210.02885, equations 1 and 2).

    Between 1 (all features are multiples of one) and their number. NaN if all are zero.
    """
    if not singular.sum() > 0:
        return math.nan
    share = singular / singular.sum() + EPS
    return float(np.exp(-(share * np.log(share)).sum()))


def alpha_req(variances: np.ndarray) -> float:
    """The decay alpha of a power law j^-alpha of the covariance's eigenvalues (2202.05808, section 3).

    The slope of a straight line through (log j, log eigenvalue) with weights 1 / j, so that each octave counts alike: 0
    for an isotropic distribution; the source found features to generalise best near 1. NaN for fewer than two of them.
    """
    used = variances[variances > SMALLEST * variances[:1]]
    if len(used) < 2:
        return math.nan
    j = np.arange(1, len(used) + 1)
    slope, _ = np.polyfit(np.log(j), np.log(used), 1, w=j**-0.5)  # polyfit squares its weights
    return float(-slope)
