"""Fréchet distance between two sets of features, with a bootstrap interval."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ldm.logbook import progress_bar
from ldm.seeds import generator

Array = NDArray[np.float64]


class FeatureStatistics:
    """Mean and covariance of a stream of feature vectors, in float64.

    Sets are merged by Chan, Golub & LeVeque 1983, Equations 2.1, which sum squares about the means,
    so that a large mean costs no precision.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self._mean: Array = np.zeros(dim)
        self._scatter: Array = np.zeros((dim, dim))  # Σ (x − mean)(x − mean)ᵀ

    @classmethod
    def from_moments(
        cls, count: int, mean: ArrayLike, covariance: ArrayLike
    ) -> "FeatureStatistics":
        """Build the statistics of `count` features from mean (dim,) and covariance (dim, dim).

        Raises:
            ValueError: the shapes do not fit, a number is not finite, or `count` is below two.
        """
        mu, sigma = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
        if mu.ndim != 1 or sigma.shape != mu.shape * 2:
            raise ValueError(
                f"mean {mu.shape} and covariance {sigma.shape} do not fit: need (dim,) and "
                "(dim, dim)"
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError("mean or covariance hold a NaN or an infinity")
        if count < 2:
            raise ValueError(f"a covariance needs two features or more, not {count}")
        statistics = cls(len(mu))
        statistics._add(count, mu, sigma * (count - 1))
        return statistics

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return len(self._mean)

    @property
    def mean(self) -> Array:
        """Mean (dim,); a ValueError without features."""
        if self.count < 1:
            raise ValueError("the mean of no features: update first")
        return self._mean.copy()

    @property
    def covariance(self) -> Array:
        """Covariance (dim, dim), divided by count − 1 as in published FIDs."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two features or more, not {self.count}")
        return self._scatter / (self.count - 1)

    def update(self, features: Tensor | Array) -> None:
        """Add features (B, dim); a ValueError if the shape is wrong or one is not finite."""
        if isinstance(features, Tensor):
            features = features.detach().cpu().double().numpy()
        values = np.asarray(features, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] != self.dim:
            raise ValueError(f"features must be (B, {self.dim}), not {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError("features hold a NaN or an infinity")
        if len(values):
            mean = values.mean(0)
            deviations = values - mean
            self._add(len(values), mean, deviations.T @ deviations)

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the features of other statistics."""
        if other.dim != self.dim:
            raise ValueError(f"cannot merge features of {other.dim} into those of {self.dim}")
        if other.count:
            self._add(other.count, other._mean, other._scatter)

    def _add(self, count: int, mean: Array, scatter: Array) -> None:
        total = self.count + count
        shift = mean - self._mean
        self._scatter += scatter + np.outer(shift, shift) * (self.count * count / total)
        self._mean = self._mean + shift * (count / total)
        self.count = total


def frechet_distance(
    mean_a: ArrayLike, cov_a: ArrayLike, mean_b: ArrayLike, cov_b: ArrayLike
) -> float:
    """Squared Fréchet distance between two Gaussians (Dowson & Landau 1982).

    On Inception's features it is the FID (Heusel et al. 2017, Equation 6). For symmetric
    covariances, also rank-deficient ones, tr (Σ_a Σ_b)^½ = tr (Σ_a^½ Σ_b Σ_a^½)^½ is a sum over
    real eigenvalues and needs no general matrix root.

    Args:
        mean_a, mean_b: (dim,).
        cov_a, cov_b: (dim, dim), symmetric, positive semi-definite.
    """
    mu_a, mu_b = np.asarray(mean_a, np.float64), np.asarray(mean_b, np.float64)
    sigma_a, sigma_b = np.asarray(cov_a, np.float64), np.asarray(cov_b, np.float64)
    shapes = {mu_a.shape * 2, mu_b.shape * 2, sigma_a.shape, sigma_b.shape}
    if len(shapes) > 1 or mu_a.ndim != 1:
        raise ValueError(
            f"means {mu_a.shape}, {mu_b.shape} and covariances {sigma_a.shape}, {sigma_b.shape} "
            "do not fit: need (dim,) and (dim, dim)"
        )
    values, vectors = np.linalg.eigh(sigma_a)
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = root_a @ sigma_b @ root_a
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    trace_root = np.sqrt(eigenvalues.clip(min=0)).sum()
    # Heusel et al. 2017, Equation 6
    distance = np.square(mu_a - mu_b).sum() + np.trace(sigma_a + sigma_b) - 2 * trace_root
    return max(float(distance), 0.0)  # rounding may leave −1e-13 between equal sets


NORMAL_QUANTILE = 1.959964  # of 97.5 %
ROWS_AT_ONCE = 4096  # 64 MiB of Inception's features in float64


class FidInterval(NamedTuple):
    """Confidence interval of an FID.

    Attributes:
        low, high: ends of the 95 % interval of the FIDs of as many other samples.
        std: standard error of the FID.
        bias: increase of the FID by resampling, roughly that of having few samples.
        draws: number of resampled sets.
    """

    low: float
    high: float
    std: float
    bias: float
    draws: int


def bootstrap_fid(
    features: NDArray[np.float32], real: FeatureStatistics, fid: float, draws: int, seed: int = 0
) -> FidInterval:
    """Estimate the interval of an FID by resampling the samples' features (n, dim).

    Efron & Tibshirani 1993, Algorithm 6.1, with the standard normal interval (Section 13.2) about
    the measured FID. The percentile interval does not apply: a set drawn with replacement repeats
    images and is less diverse, so that its FID is higher, by `bias`.

    Each draw takes as long as the FID itself, some seconds with Inception's features. A hundred
    draws give the standard error to within 7 %.
    """
    if draws < 2 or len(features) < 2:
        raise ValueError(f"{draws} draws of {len(features)} samples: need two or more of both")
    centre = sum(rows.sum(0) for _, rows in _blocks(features)) / len(features)
    mean, covariance = real.mean, real.covariance
    found = []
    with progress_bar("draws") as bar:
        task = bar.add_task("bootstrap", total=draws, speed="", note="")
        for draw in range(draws):
            resampled = _resample(features, centre, generator(seed, "bootstrap", draw))
            found.append(frechet_distance(mean, covariance, *resampled))
            bar.update(task, advance=1)
    # Efron & Tibshirani 1993, Sections 6.2 and 10.2
    std, bias = float(np.std(found, ddof=1)), float(np.mean(found)) - fid
    reach = NORMAL_QUANTILE * std
    return FidInterval(max(fid - reach, 0.0), fid + reach, std, bias, draws)


def _blocks(features: NDArray[np.float32]) -> Iterator[tuple[slice, Array]]:
    for start in range(0, len(features), ROWS_AT_ONCE):
        block = slice(start, start + ROWS_AT_ONCE)
        yield block, features[block].astype(np.float64)


def _resample(
    features: NDArray[np.float32], centre: Array, draw: np.random.Generator
) -> tuple[Array, Array]:
    """Return mean (dim,) and covariance (dim, dim) of n features drawn with replacement."""
    count, dim = features.shape
    times = np.bincount(draw.integers(count, size=count), minlength=count)
    total, scatter = np.zeros(dim), np.zeros((dim, dim))
    for block, rows in _blocks(features):
        drawn = times[block] > 0
        weights, deviations = times[block][drawn, None], rows[drawn] - centre
        total += (weights * deviations).sum(0)
        scatter += deviations.T @ (weights * deviations)
    shift = total / count
    # about a centre near the mean, so that the difference costs no precision
    scatter -= count * np.outer(shift, shift)
    return centre + shift, scatter / (count - 1)
