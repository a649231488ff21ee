"""The kernel distance (KID, Bińkowski et al. 2018): an unbiased FID that needs fewer images."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldm.metrics.feature_set import paired_features
from ldm.seeds import generator

Array = NDArray[np.float64]


class KernelDistance(NamedTuple):
    """Of the subsets' distances. Papers show both ×10³."""

    mean: float
    std: float  # of one subset's distance, not of the mean


def kernel_distance(
    a: ArrayLike, b: ArrayLike, subsets: int = 100, size: int = 1000, seed: int = 0
) -> KernelDistance:
    """The squared MMD of two sets of features under the kernel (x·y / dim + 1)³, in float64.

    It is the mean over random subsets without replacement, as Bińkowski et al. and clean-fid have
    it. The estimate is unbiased: of two equal distributions it is about 0, and may be below.

    Args:
        a, b: (N, dim), (M, dim) features.
        subsets: so many pairs of subsets. Where both sets are as small as a subset, there is but
            one pair, and the deviation is 0.
        size: features of either set in a subset, cut to the smaller set.
        seed: decides the subsets.

    Raises:
        LdmError: a set has fewer than two features, or holds a NaN or an infinity.
        ValueError: the features are not of the same length.
    """
    a, b = paired_features(a, b, least=2, metric="KID")
    size = min(size, len(a), len(b))
    if size == len(a) == len(b):
        subsets = 1
    distances = []
    for subset in range(subsets):
        draw = generator(seed, "kid subset", subset)
        x, y = (rows[draw.choice(len(rows), size, replace=False)] for rows in (a, b))
        # Gretton et al. 2012, Equation 3
        distances.append(_mean_of_pairs(x) + _mean_of_pairs(y) - 2 * _kernel(x, y).mean())
    return KernelDistance(float(np.mean(distances)), float(np.std(distances)))


def _kernel(x: Array, y: Array) -> Array:
    """(n, dim), (m, dim) → (n, m)."""
    # Bińkowski et al. 2018, Section 4: k(x, y) = (x·y / d + 1)³
    base = x @ y.T / x.shape[1] + 1
    return base * base * base  # a power takes seven times as long


def _mean_of_pairs(x: Array) -> float:
    """The kernel's mean over pairs of different features."""
    kernel = _kernel(x, x)
    return float(kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))
