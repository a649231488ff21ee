"""How far the reconstruction is from the image, and the posterior from its prior.

The two high-frequency losses of LiteVAE (Sadat et al. 2024, Section 4.3, Table 9).

Both filters are linear, so each filters the difference of the images, once, instead of both.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoders.posterior import DiagonalGaussian
from autoencoders.wavelet import haar_dwt


def l1(recon: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference of two (B, 3, H, W) (Sadat et al. 2024, Section 3: ℓ1)."""
    return (recon - images).abs().mean()


def l2(recon: Tensor, images: Tensor) -> Tensor:
    """Mean squared difference of two (B, 3, H, W)."""
    return (recon - images).square().mean()


def kl(posterior: DiagonalGaussian, images: Tensor) -> Tensor:
    """KL to N(0, I) in nats per image value, averaged over the batch (L_reg of Equation 1).

    Summed over an image's latents and divided by its 3HW values, as latent diffusion does
    (Rombach et al. 2022): its weight then means the same beside ℓ1 at every resolution.
    """
    return posterior.kl().mean() / images[0].numel()


def gaussian(recon: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference of what a Gaussian blur takes from each of two (B, 3, H, W)."""
    difference = recon - images
    # Sadat et al. 2024, Section 4.3: ℓ1 between x − h(x) and x̂ − h(x̂)
    return (difference - blur(difference)).abs().mean()


def wavelet(recon: Tensor, images: Tensor, eps: float = 1e-3) -> Tensor:
    """Charbonnier loss on the Haar sub-bands H, V, D of two (B, 3, H, W), one level, mean."""
    _, *edges = haar_dwt(recon - images)
    # Charbonnier et al. 1994: √(d² + ε²), smooth at 0 and as tolerant as ℓ1 far from it
    return torch.stack([(band.square() + eps**2).sqrt().mean() for band in edges]).mean()


def blur(images: Tensor, size: int = 5, sigma: float = 1.0) -> Tensor:
    """Gaussian filter of `size` pixels a side on (B, C, H, W), reflected at the border.

    Two sums of shifted images, not a convolution: those may run in TF32 or under autocast.
    """
    (height, width), reach = images.shape[-2:], size // 2
    taps = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-reach, reach + 1)]
    taps = [tap / sum(taps) for tap in taps]
    x = F.pad(images, (reach, reach, reach, reach), mode="reflect")
    x = sum(tap * x[..., i : i + height, :] for i, tap in enumerate(taps))
    return sum(tap * x[..., i : i + width] for i, tap in enumerate(taps))
