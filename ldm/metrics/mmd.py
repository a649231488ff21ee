"""Maximum mean discrepancy under Gaussian (RBF) kernels: LiteVAE's Table 6.

What the paper says: it compares latent codes with samples of a standard Gaussian, by MMD (Gretton
et al. 2012), for σ = 25, 50, 100, 250 and 500, and shows a ± (Section 5, Table 6). Where it is
silent: the kernel's form, the estimator, whether the value is squared, its factor, how many codes
of which images, whether they are scaled or drawn from the posterior, and what the ± is over.

Here the kernel is exp(−‖x − y‖² / 2σ²) and the estimate is Gretton's unbiased one of the squared
MMD, as it is, without a factor. A squared MMD of this kernel is at most 2, so that the paper's
28.90 must carry a factor of its own: compare orders and ratios between models, not the values.

The kernel distance (KID, Bińkowski et al. 2018): an unbiased FID that needs fewer images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ldm.errors import LdmError
from ldm.metrics.features import paired_features
from ldm.seeds import generator

ROWS_AT_ONCE = 1024  # of either side: 8 MB of distances


def rbf_mmd(a: Tensor, b: Tensor, sigmas: Sequence[float]) -> dict[float, float]:
    """Squared MMD between two sets of vectors for each σ, in float64, on the device of `a`.

    The estimate is unbiased: of two equal distributions it is about 0, and may be below. Distances
    are computed block by block and serve every σ.

    Args:
        a, b: (N, D), (M, D) floats.
        sigmas: the kernel's bandwidths, in the vectors' units.

    Returns:
        σ → squared MMD, 0..2 up to the noise of sampling.

    Raises:
        LdmError: a set has fewer than two vectors, or holds a NaN or an infinity.
        ValueError: the shapes do not fit, or a σ is not above 0.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"need (N, D) and (M, D), not {tuple(a.shape)} and {tuple(b.shape)}")
    if not all(sigma > 0 for sigma in sigmas):
        raise ValueError(f"a bandwidth must be above 0, not {min(sigmas)}")
    if min(len(a), len(b)) < 2:
        raise LdmError(f"MMD of {len(a)} and {len(b)} vectors: it needs two or more on either side")
    b = b.to(a.device)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise LdmError("MMD: the vectors hold a NaN or an infinity")
    # Distances do not change with the origin, but lose digits far from it.
    centre = b.mean(0, dtype=torch.float64)
    within_a, within_b = (
        _kernel_sums(a, None, centre, sigmas),
        _kernel_sums(b, None, centre, sigmas),
    )
    between = _kernel_sums(a, b, centre, sigmas)
    n, m = len(a), len(b)
    # Gretton et al. 2012, Equation 3
    squared = within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * between / (n * m)
    return dict(zip(sigmas, squared.tolist(), strict=True))


def _kernel_sums(a: Tensor, b: Tensor | None, centre: Tensor, sigmas: Sequence[float]) -> Tensor:
    """The kernel's sum over all pairs (x, y), for each σ; without `b` over pairs of two in `a`."""
    scales = -0.5 / torch.tensor(sigmas, dtype=torch.float64, device=a.device) ** 2
    sums = torch.zeros_like(scales)
    for i, x in enumerate(a.split(ROWS_AT_ONCE)):
        for j, y in enumerate((a if b is None else b).split(ROWS_AT_ONCE)):
            if b is None and j < i:
                continue  # the kernel is symmetric: the block (j, i) has counted twice
            squared = _squared_distances(x.double() - centre, y.double() - centre)
            if b is None and i == j:
                squared.fill_diagonal_(torch.inf)
            # the Gaussian kernel: k(x, y) = exp(−‖x − y‖² / 2σ²)
            block = torch.stack([(squared * scale).exp().sum() for scale in scales])
            sums += 2 * block if b is None and i < j else block
    return sums


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(n, D), (m, D) → (n, m)."""
    squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.mT
    return squared.clamp_(min=0)


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
