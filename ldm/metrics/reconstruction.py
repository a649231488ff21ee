"""PSNR and SSIM of reconstructions, per image."""

import torch
from torch import Tensor

from ldm.errors import LdmError

DATA_RANGE = 2.0  # images lie in [−1, 1]
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # Wang et al. 2004, Section III-B
SSIM_K1, SSIM_K2 = 0.01, 0.03


def psnr(images: Tensor, recon: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB, float64; infinite for identical images.

    Args:
        images, recon: (B, C, H, W) floats in [−1, 1].
    """
    _assert_pair(images, recon)
    error = (images.double() - recon.double()).square().flatten(1).mean(1)  # (B,)
    # PSNR = 10 log₁₀(range² / MSE)
    return 10 * torch.log10(DATA_RANGE**2 / error)


def ssim(images: Tensor, recon: Tensor) -> Tensor:
    """Structural similarity (B,) (Wang et al. 2004), float64; 1 for identical images.

    The mean over positions and channels of an 11×11 Gaussian window of σ = 1.5 inside the image,
    with population covariance. It equals scikit-image's `structural_similarity` of the 8-bit pixels
    with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`. Packages that pad the
    border give other numbers.

    Args:
        images, recon: (B, C, H, W) floats in [−1, 1], at least as large as the window.
    """
    _assert_pair(images, recon)
    if min(images.shape[-2:]) < SSIM_WINDOW:
        height, width = images.shape[-2:]
        raise LdmError(
            f"SSIM needs images of {SSIM_WINDOW}×{SSIM_WINDOW} pixels or more, "
            f"not {height}×{width}: evaluate at a higher resolution"
        )
    # Luminance starts at 0 in the definition: with means about 0, grey images would be dissimilar.
    # float64, because the variances are small differences of squares.
    x, y = images.double() + 1, recon.double() + 1
    mean_x, mean_y = _window_mean(x), _window_mean(y)  # (B, C, H−10, W−10)
    var_x = _window_mean(x * x) - mean_x**2
    var_y = _window_mean(y * y) - mean_y**2
    cov_xy = _window_mean(x * y) - mean_x * mean_y
    c1, c2 = (SSIM_K1 * DATA_RANGE) ** 2, (SSIM_K2 * DATA_RANGE) ** 2
    # Wang et al. 2004, Equation 13
    similarity = ((2 * mean_x * mean_y + c1) * (2 * cov_xy + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return similarity.flatten(1).mean(1)


def _window_mean(images: Tensor) -> Tensor:
    """Compute the Gaussian-weighted mean of every window inside the image, axis by axis."""
    offsets = torch.arange(SSIM_WINDOW, dtype=images.dtype, device=images.device)
    weights = torch.exp(-((offsets - SSIM_WINDOW // 2) ** 2) / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()
    rows = images.unfold(-1, SSIM_WINDOW, 1) @ weights  # (B, C, H, W−10)
    return rows.unfold(-2, SSIM_WINDOW, 1) @ weights  # (B, C, H−10, W−10)


def _assert_pair(images: Tensor, recon: Tensor) -> None:
    if images.shape != recon.shape or images.ndim != 4:
        raise ValueError(
            f"need two batches (B, C, H, W), not {tuple(images.shape)} and {tuple(recon.shape)}"
        )
    if not (images.is_floating_point() and recon.is_floating_point()):
        raise TypeError(f"images must be floats in [−1, 1], not {images.dtype}, {recon.dtype}")
