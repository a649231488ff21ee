"""How far an FID would move with other samples: resampling the features of those there are.

Efron & Tibshirani 1993, Algorithm 6.1: the statistic of as many samples, drawn from them with
replacement, again and again; the standard deviation of these is its standard error. The interval is
the standard normal one (their Section 13.2), about the measured FID. Their percentile interval
would not do: a set drawn with replacement holds each image several times and is poorer than the
samples, so that its FID lies above theirs, by the `bias` that is told; often the whole of a
percentile interval does. The reference is held fixed, as it is between the models of a table.
"""

from collections.abc import Iterator
from tempfile import TemporaryFile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import LdmError
from ldm.logbook import progress_bar
from ldm.metrics import FeatureStatistics, frechet_distance
from ldm.seeds import generator

NORMAL_QUANTILE = 1.959964  # of 97.5 %
ROWS_AT_ONCE = 4096  # 64 MiB of Inception's features in float64

Array = NDArray[np.float64]


class FidInterval(NamedTuple):
    """How sure an FID is.

    Attributes:
        low, high: ends of the interval that holds 95 % of FIDs of other samples, as many.
        std: standard error of the FID.
        bias: by how much resampling raises it: what too few samples cost, roughly.
        draws: sets that were drawn.
    """

    low: float
    high: float
    std: float
    bias: float
    draws: int


class FeatureRows:
    """The features of a stream of images, in a temporary file that is gone when this is.

    Args:
        dim: length of a feature vector.
    """

    def __init__(self, dim: int) -> None:
        self.dim, self.count = dim, 0
        self._file = TemporaryFile(prefix="ldm-features-")  # noqa: SIM115  it goes with this object

    def add(self, features: Tensor) -> None:
        """Take in features (B, dim).

        Raises:
            LdmError: there is no room for them.
        """
        try:
            # written, not mapped: a full disk kills a process that writes to a map
            self._file.write(features.float().numpy().tobytes())
            self._file.flush()
        except OSError as error:
            raise LdmError(
                f"could not keep the features for --bootstrap ({error.strerror}): make room in the "
                "folder for temporary files, or name another by TMPDIR"
            ) from error
        self.count += len(features)

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """Some features at a time: which, and (rows, dim) in float64."""
        rows = np.memmap(self._file, np.float32, "r", shape=(self.count, self.dim))
        for start in range(0, self.count, ROWS_AT_ONCE):
            chosen = slice(start, min(start + ROWS_AT_ONCE, self.count))
            yield chosen, rows[chosen].astype(np.float64)


def bootstrap_fid(
    made: FeatureRows, real: FeatureStatistics, fid: float, draws: int, seed: int = 0
) -> FidInterval:
    """The interval of an FID over `made`, by `draws` resamplings.

    Each takes about as long as the FID itself, whose matrix roots are most of it: with Inception's
    features some seconds.

    Args:
        real: the reference's, held fixed.
        fid: what was measured.
        draws: a hundred give the standard error to within some 7 %; at least two.

    Raises:
        ValueError: fewer than two draws or samples.
    """
    if draws < 2 or made.count < 2:
        raise ValueError(f"{draws} draws of {made.count} samples: need two or more of both")
    centre = sum(rows.sum(0) for _, rows in made.blocks()) / made.count
    mean, covariance = real.mean, real.covariance
    found = []
    with progress_bar("draws") as bar:
        task = bar.add_task("bootstrap", total=draws, speed="", note="")
        for draw in range(draws):
            again = _resampled(made, centre, generator(seed, "bootstrap", draw))
            found.append(frechet_distance(mean, covariance, *again))
            bar.update(task, advance=1)
    # Efron & Tibshirani 1993, Sections 6.2 and 10.2
    std, bias = float(np.std(found, ddof=1)), float(np.mean(found)) - fid
    reach = NORMAL_QUANTILE * std
    return FidInterval(max(fid - reach, 0.0), fid + reach, std, bias, draws)


def _resampled(made: FeatureRows, centre: Array, draw: np.random.Generator) -> tuple[Array, Array]:
    """Mean (dim,) and covariance (dim, dim) of as many features, drawn with replacement."""
    times = np.bincount(draw.integers(made.count, size=made.count), minlength=made.count)
    total, scatter = np.zeros(made.dim), np.zeros((made.dim, made.dim))
    for chosen, rows in made.blocks():
        drawn = times[chosen] > 0
        weights, deviations = times[chosen][drawn, None], rows[drawn] - centre
        total += (weights * deviations).sum(0)
        scatter += deviations.T @ (weights * deviations)
    shift = total / made.count
    # about a centre near the mean, so that the difference costs no digits
    scatter -= made.count * np.outer(shift, shift)
    return centre + shift, scatter / (made.count - 1)
