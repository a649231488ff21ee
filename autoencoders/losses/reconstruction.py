"""How far the reconstruction is from the image, and the posterior from its prior."""

from torch import Tensor

from autoencoders.posterior import DiagonalGaussian


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
