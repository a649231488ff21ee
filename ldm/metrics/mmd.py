"""Maximum mean discrepancy under Gaussian (RBF) kernels: LiteVAE's Table 6.

What the paper says: it compares latent codes with samples of a standard Gaussian, by MMD (Gretton
et al. 2012), for σ = 25, 50, 100, 250 and 500, and shows a ± (Section 5, Table 6). Where it is
silent: the kernel's form, the estimator, whether the value is squared, its factor, how many codes
of which images, whether they are scaled or drawn from the posterior, and what the ± is over.

Here the kernel is exp(−‖x − y‖² / 2σ²) and the estimate is Gretton's unbiased one of the squared
MMD, as it is, without a factor. A squared MMD of this kernel is at most 2, so that the paper's
28.90 must carry a factor of its own: compare orders and ratios between models, not the values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.errors import LdmError

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
