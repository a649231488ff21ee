"""Two rows image by image: whether other images might well have turned what is claimed of them.

Images are as hard for the one autoencoder as for the other, so that differences image by image
spread far less than either's numbers.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.reproduce.columns import Column
from pipelines.reproduce.tables import Relation

FEWEST = 30
"""Images below which two standard errors are too little: Student's t is at 2.05 there."""


class Pairs(NamedTuple):
    """A column's numbers of the same images, float64 (n,)."""

    ours: NDArray
    """Of the row that the claim is made of."""
    other: NDArray


def pair_images(
    ours: Mapping[str, NDArray], other: Mapping[str, NDArray], column: str
) -> Pairs | None:
    """The two rows of a column; None where they are not of the same images.

    Args:
        ours, other: by column the numbers of every image, and the images' own as `k`.
    """
    if column not in ours or column not in other or not np.array_equal(ours["k"], other["k"]):
        return None
    return Pairs(ours[column].astype(np.float64), other[column].astype(np.float64))


def margins(relation: Relation, kind: Column, pairs: Pairs) -> NDArray:
    """How far a claim is from turning, image by image (n,); it holds where their mean is above 0.

    Of a claim that may turn on either side, those of the nearer one.
    """
    gains = kind.gain(pairs.ours, pairs.other)
    if relation == "better":
        return gains
    yardsticks = kind.yardstick(pairs.other)
    if relation == "no_worse":
        return yardsticks + gains
    return min(yardsticks + gains, yardsticks - gains, key=np.mean)


def is_uncertain(margins: NDArray) -> bool:
    """Whether a mean is within two of its standard errors of 0."""
    error = standard_error(margins)
    return error is not None and error > 0 and bool(abs(margins.mean()) <= 2 * error)


def standard_error(values: NDArray) -> float | None:
    """Of the mean of (n,); None of fewer than two."""
    if len(values) < 2:
        return None
    with np.errstate(invalid="ignore"):  # of an infinity there is none, and that is told elsewhere
        return float(values.std(ddof=1) / np.sqrt(len(values)))
