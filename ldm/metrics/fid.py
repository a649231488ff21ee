"""Fréchet distance, its bootstrap interval, and precision and recall, of two sets of features; and
the Inception Score of one set."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ldm.logbook import show_progress
from ldm.metrics.features import Array, FeatureStatistics, paired_features
from ldm.seeds import generator

NORMAL_QUANTILE = 1.959964  # of 97.5 %
ROWS_AT_ONCE = 4096  # 64 MiB of Inception's features in float64
DISTANCES_AT_ONCE = 1024  # rows of distances to all of the other set: 400 MB for 50,000 of them
ROUNDING = 1e-12  # bound on the error of a squared distance, relative to the largest squared length


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


# ------------------------------------------------------------------------- bootstrap interval
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
    with show_progress("bootstrap", draws, unit="draws") as advance:
        for draw in range(draws):
            resampled = _resample(features, centre, generator(seed, "bootstrap", draw))
            found.append(frechet_distance(mean, covariance, *resampled))
            advance(1)
    # Efron & Tibshirani 1993, Sections 6.2 and 10.2
    std = float(np.std(found, ddof=1))
    bias = float(np.mean(found)) - fid
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
        weights = times[block][drawn, None]
        deviations = rows[drawn] - centre
        total += (weights * deviations).sum(0)
        scatter += deviations.T @ (weights * deviations)
    shift = total / count
    # about a centre near the mean, so that the difference costs no precision
    scatter -= count * np.outer(shift, shift)
    return centre + shift, scatter / (count - 1)


# ------------------------------------------------------------------------ precision and recall
class PrecisionRecall(NamedTuple):
    """Fidelity and coverage of generated images, both in 0..1; higher is better."""

    precision: float  # fraction of fake images in the manifold of the real ones
    recall: float  # fraction of real images in the manifold of the fake ones


def precision_recall(real: ArrayLike, fake: ArrayLike, k: int = 3) -> PrecisionRecall:
    """Measure how much of each set of features lies in the other's manifold.

    The manifold of a set (Kynkäänniemi et al. 2019) is the union of balls about its features, each
    with the distance to its k-th nearest neighbour in the set as its radius. Both numbers depend on
    the size of the sets: compare them for equal sizes only.

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
    for start in range(0, len(a), DISTANCES_AT_ONCE):
        rows = slice(start, min(start + DISTANCES_AT_ONCE, len(a)))
        yield rows, lengths_a[rows, None] + lengths_b - 2 * (a[rows] @ b.T)


# ----------------------------------------------------------------------------- Inception Score
class InceptionScore:
    """Inception Score (Salimans et al. 2016) of images 0 … total − 1, in any order.

    As in ADM's evaluator (Dhariwal & Nichol 2021), it is the mean of the scores of splits of 5,000
    images that follow each other; the last may have fewer.

    Args:
        classes: number of classes, 1,008 of Inception.
    """

    SPLIT = 5000

    def __init__(self, classes: int, total: int) -> None:
        splits = -(-total // self.SPLIT)
        self._count = torch.zeros(splits, dtype=torch.float64)
        self._negentropy = torch.zeros(splits, dtype=torch.float64)  # Σ_x Σ_y p(y|x) log p(y|x)
        self._sum = torch.zeros(splits, classes, dtype=torch.float64)  # Σ_x p(y|x)

    def update(self, probabilities: Tensor, ks: Tensor | Sequence[int]) -> None:
        """Add p(y|x), (B, classes), of the images numbered `ks` (B,)."""
        p = probabilities.detach().cpu().double()
        split = torch.as_tensor(ks, device="cpu") // self.SPLIT
        self._count.index_add_(0, split, torch.ones(len(p), dtype=torch.float64))
        self._negentropy.index_add_(0, split, torch.xlogy(p, p).sum(1))
        self._sum.index_add_(0, split, p)

    def merge(self, other: "InceptionScore") -> None:
        """Add the images that another process has seen of the same set."""
        for mine, theirs in zip(self._sums(), other._sums(), strict=True):
            mine += theirs

    def value(self) -> float:
        """Return the score, 1 … classes."""
        seen = self._count > 0
        marginal = self._sum[seen] / self._count[seen, None]
        # Salimans et al. 2016, Section 4: exp of the mean KL(p(y|x) ‖ p(y)), which is Σ p log p of
        # either, one less the other
        kl = self._negentropy[seen] / self._count[seen] - torch.xlogy(marginal, marginal).sum(1)
        return float(kl.exp().mean())

    def _sums(self) -> tuple[Tensor, ...]:
        return self._count, self._negentropy, self._sum
