"""Maximum mean discrepancy: under Gaussian (RBF) kernels for LiteVAE's Table 6, and KID.

The paper compares latent codes with a standard Gaussian by MMD (Gretton et al. 2012), for σ = 25,
50, 100, 250 and 500, and shows a ± (Section 5, Table 6). It does not give the form of the kernel,
the estimator, a factor, the number and scale of the codes, whether they are drawn from the
posterior or whether the value is squared, nor the meaning of the ±.

Here the kernel is exp(−‖x − y‖² / 2σ²), and the estimate Gretton's unbiased one of the squared MMD.
It is at most 2 for this kernel, so that the paper's 28.90 must have a factor: compare orders and
ratios between models, not values.

KID, the kernel distance (Bińkowski et al. 2018), is an unbiased FID that needs fewer images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ldm.errors import LdmError
from ldm.metrics.features import Array, paired_features
from ldm.seeds import generator

ROWS_AT_ONCE = 1024  # of either side: 8 MB of distances


def rbf_mmd(a: Tensor, b: Tensor, sigmas: Sequence[float]) -> dict[float, float]:
    """Squared MMD between two sets of vectors for each σ, in float64, on the device of `a`.

    The estimate is unbiased: for equal distributions it is about 0 and may be negative. Blocks of
    distances serve every σ.

    Args:
        a, b: (N, D), (M, D) floats.
        sigmas: the kernel's bandwidths, in the vectors' units.

    Returns:
        σ → squared MMD, 0..2 up to the noise of sampling.

    Raises:
        LdmError: a set has fewer than two vectors, or holds a NaN or an infinity.
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
    # Distances do not depend on the origin, but lose precision far from it.
    centre = b.mean(0, dtype=torch.float64)
    within_a = _kernel_sums(a, None, centre, sigmas)
    within_b = _kernel_sums(b, None, centre, sigmas)
    between = _kernel_sums(a, b, centre, sigmas)
    n, m = len(a), len(b)
    # Gretton et al. 2012, Equation 3
    squared = within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * between / (n * m)
    return dict(zip(sigmas, squared.tolist(), strict=True))


def _kernel_sums(a: Tensor, b: Tensor | None, centre: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Sum the kernel over all pairs (x, y) for each σ; without `b`, over distinct pairs in `a`."""
    scales = -0.5 / torch.tensor(sigmas, dtype=torch.float64, device=a.device) ** 2
    sums = torch.zeros_like(scales)
    for i, x in enumerate(a.split(ROWS_AT_ONCE)):
        for j, y in enumerate((a if b is None else b).split(ROWS_AT_ONCE)):
            if b is None and j < i:
                continue  # the kernel is symmetric: block (j, i) has counted twice
            p, q = x.double() - centre, y.double() - centre
            squared = p.square().sum(1)[:, None] + q.square().sum(1) - 2 * p @ q.mT  # (n, m)
            squared.clamp_(min=0)
            if b is None and i == j:
                squared.fill_diagonal_(torch.inf)
            # the Gaussian kernel: k(x, y) = exp(−‖x − y‖² / 2σ²)
            block = torch.stack([(squared * scale).exp().sum() for scale in scales])
            sums += 2 * block if b is None and i < j else block
    return sums


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets; papers show both ×10³."""

    mean: float
    std: float


def kernel_distance(
    a: ArrayLike, b: ArrayLike, subsets: int = 100, size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Squared MMD of features (N, dim), (M, dim) under the kernel (x·y / dim + 1)³, in float64.

    The mean over random subsets without replacement, as in Bińkowski et al. and clean-fid. The
    estimate is unbiased: for equal distributions it is about 0 and may be negative.

    Args:
        subsets: number of pairs of subsets; one if both sets have the size of a subset.
        size: features of either set in a subset, at most the smaller set.

    Raises:
        LdmError: a set has fewer than two features, or holds a NaN or an infinity.
    """
    pair = paired_features(a, b, least=2, metric="KID")
    size = min(size, *map(len, pair))
    if size == len(pair[0]) == len(pair[1]):
        subsets = 1
    distances = []
    for subset in range(subsets):
        draw = generator(seed, "kid subset", subset)
        x, y = (rows[draw.choice(len(rows), size, replace=False)] for rows in pair)
        # Gretton et al. 2012, Equation 3
        distances.append(_mean_of_pairs(x) + _mean_of_pairs(y) - 2 * _kernel(x, y).mean())
    return KernelDistance(float(np.mean(distances)), float(np.std(distances)))


def _kernel(x: Array, y: Array) -> Array:
    """(n, dim), (m, dim) → (n, m)."""
    # Bińkowski et al. 2018, Section 4: k(x, y) = (x·y / d + 1)³
    base = x @ y.T / x.shape[1] + 1
    return base * base * base  # seven times as fast as a power


def _mean_of_pairs(x: Array) -> float:
    """Average the kernel over pairs of different features."""
    kernel = _kernel(x, x)
    return float(kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))
