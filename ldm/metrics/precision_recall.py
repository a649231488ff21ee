"""Precision and recall of generated images (Kynkäänniemi et al. 2019): fidelity and coverage."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldm.metrics.features import paired_features

ROWS_AT_ONCE = 1024  # distances to all of the other set: 80 MB for 10,000 of them
ROUNDING = 1e-12  # bound on the error of a squared distance, relative to the largest squared length

Array = NDArray[np.float64]


class PrecisionRecall(NamedTuple):
    """Both in 0..1, higher is better."""

    precision: float  # fraction of fake images in the manifold of the real ones
    recall: float  # fraction of real images in the manifold of the fake ones


def precision_recall(real: ArrayLike, fake: ArrayLike, k: int = 3) -> PrecisionRecall:
    """Measure how much of each set of features lies in the other's manifold.

    The manifold of a set is the union of balls about its features, each with the distance to its
    k-th nearest neighbour in the set as its radius. Both numbers depend on the size of the sets:
    compare them for equal sizes only.

    Args:
        real, fake: (N, dim), (M, dim) features.
        k: 3 in the paper.

    Raises:
        LdmError: a set has k features or fewer, or holds a NaN or an infinity.
    """
    x, y = paired_features(real, fake, least=k + 1, metric="precision and recall")
    # Distances do not depend on the origin, but lose precision far from it.
    centre = x.mean(0)
    x, y = x - centre, y - centre
    x_radii, y_radii = _squared_radii(x, k), _squared_radii(y, k)
    # A feature on the surface of a ball, such as that of an image in both sets, is inside.
    slack = ROUNDING * max(np.square(x).sum(1).max(), np.square(y).sum(1).max())
    y_inside, x_inside = np.zeros(len(y), np.bool_), np.zeros(len(x), np.bool_)
    for rows, squared in _squared_distances(y, x):
        # Kynkäänniemi et al. 2019, Equation 1
        y_inside[rows] = (squared <= x_radii + slack).any(1)
        x_inside |= (squared <= y_radii[rows, None] + slack).any(0)
    # Kynkäänniemi et al. 2019, Equation 2
    return PrecisionRecall(float(y_inside.mean()), float(x_inside.mean()))


def _squared_radii(features: Array, k: int) -> Array:
    """Return the squared distance (N,) of each feature to its k-th nearest neighbour."""
    radii = np.empty(len(features))
    for rows, squared in _squared_distances(features, features):
        squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = np.inf  # to itself
        radii[rows] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return radii


def _squared_distances(a: Array, b: Array) -> Iterator[tuple[slice, Array]]:
    """Yield slices of the rows of `a`, and their squared distances (rows, M) to all of `b`."""
    lengths_a, lengths_b = np.square(a).sum(1), np.square(b).sum(1)
    for start in range(0, len(a), ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, len(a)))
        yield rows, lengths_a[rows, None] + lengths_b - 2 * (a[rows] @ b.T)
