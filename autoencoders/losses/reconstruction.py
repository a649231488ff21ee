"""Reconstruction losses and the KL term; the high-frequency losses are LiteVAE's (Section 4.3).

A blur and a wavelet transform are linear: both are applied once, to the difference of the images.
"""

import math
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoders.autoencoder import DiagonalGaussian
from autoencoders.wavelet import haar_dwt


def l1(recon: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference of two (B, 3, H, W) (Section 3)."""
    return (recon - images).abs().mean()


def l2(recon: Tensor, images: Tensor) -> Tensor:
    """Mean squared difference of two (B, 3, H, W)."""
    return (recon - images).square().mean()


def kl(posterior: DiagonalGaussian, images: Tensor) -> Tensor:
    """KL to N(0, I) in nats per image value, averaged over the batch (L_reg of Equation 1).

    The sum over an image's latents is divided by its 3HW values, as in latent diffusion (Rombach et
    al. 2022), so that its weight relative to ℓ1 does not depend on the resolution.
    """
    return posterior.kl().mean() / images[0].numel()


def gaussian(recon: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference of two (B, 3, H, W), each less its Gaussian blur (Table 9)."""
    difference = recon - images
    # Sadat et al. 2024, Section 4.3: ℓ1 between x − h(x) and x̂ − h(x̂)
    return (difference - blur(difference)).abs().mean()


def wavelet(recon: Tensor, images: Tensor, eps: float = 1e-3) -> Tensor:
    """Mean Charbonnier loss of the Haar sub-bands H, V, D of two (B, 3, H, W) (Table 9)."""
    _, *edges = haar_dwt(recon - images)
    # Charbonnier et al. 1994: √(d² + ε²), smooth at 0 and like ℓ1 far from it
    return torch.stack([(band.square() + eps**2).sqrt().mean() for band in edges]).mean()


def blur(images: Tensor, size: int = 5, sigma: float = 1.0) -> Tensor:
    """Gaussian filter of `size` pixels a side on (B, C, H, W), reflected at the border.

    Sums of shifted images: a convolution may run in TF32 or under autocast.
    """
    (height, width), reach = images.shape[-2:], size // 2
    taps = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-reach, reach + 1)]
    taps = [tap / sum(taps) for tap in taps]
    x = F.pad(images, (reach, reach, reach, reach), mode="reflect")
    x = cast(Tensor, sum(tap * x[..., i : i + height, :] for i, tap in enumerate(taps)))
    return cast(Tensor, sum(tap * x[..., i : i + width] for i, tap in enumerate(taps)))
