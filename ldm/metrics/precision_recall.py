"""Precision and recall of made images (Kynkäänniemi et al. 2019): fidelity apart from coverage."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldm.metrics.features import paired_features

ROWS_AT_ONCE = 1024  # distances to all of the other set: 80 MB for 10,000 of them
ROUNDING = 1e-12  # of the largest squared length: what a squared distance may be off by

Array = NDArray[np.float64]


class PrecisionRecall(NamedTuple):
    """Both in 0..1, higher is better."""

    precision: float  # share of made images that lie among the real ones
    recall: float  # share of real images that lie among the made ones


def precision_recall(real: ArrayLike, made: ArrayLike, k: int = 3) -> PrecisionRecall:
    """How much of each set of features lies within the other's manifold.

    A set's manifold is the union of balls about its features, each as large as the distance to its
    k-th nearest neighbour in the set, itself not counted. Both numbers depend on how many features
    there are: compare only those of equally many.

    Args:
        real, made: (N, dim), (M, dim) features.
        k: the paper's 3.

    Raises:
        LdmError: a set has no more than k features, or holds a NaN or an infinity.
        ValueError: the features are not of the same length.
    """
    real, made = paired_features(real, made, least=k + 1, metric="precision and recall")
    # Distances do not change with the origin, but lose digits far from it.
    centre = real.mean(0)
    real, made = real - centre, made - centre
    real_radii, made_radii = _squared_radii(real, k), _squared_radii(made, k)
    # A feature on the edge of a ball, as of an image that both sets hold, is inside.
    slack = ROUNDING * max(np.square(real).sum(1).max(), np.square(made).sum(1).max())
    among_real, among_made = np.zeros(len(made), bool), np.zeros(len(real), bool)
    for rows, squared in _squared_distances(made, real):
        # Kynkäänniemi et al. 2019, Equation 1
        among_real[rows] = (squared <= real_radii + slack).any(1)
        among_made |= (squared <= made_radii[rows, None] + slack).any(0)
    # Kynkäänniemi et al. 2019, Equation 2
    return PrecisionRecall(float(among_real.mean()), float(among_made.mean()))


def _squared_radii(features: Array, k: int) -> Array:
    """Squared distance of each feature to its k-th nearest neighbour: (N,)."""
    radii = np.empty(len(features))
    for rows, squared in _squared_distances(features, features):
        squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = np.inf  # to itself
        radii[rows] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return radii


def _squared_distances(a: Array, b: Array) -> Iterator[tuple[slice, Array]]:
    """From some rows of `a` at a time to all of `b`: which rows, and (rows, M)."""
    lengths_a, lengths_b = np.square(a).sum(1), np.square(b).sum(1)
    for start in range(0, len(a), ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, len(a)))
        yield rows, lengths_a[rows, None] + lengths_b - 2 * (a[rows] @ b.T)
