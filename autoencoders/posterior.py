"""Posterior over latents: a diagonal Gaussian (Kingma & Welling 2014, arXiv 1312.6114)."""

import torch
from torch import Tensor


class DiagonalGaussian:
    """q(z|x) = N(mean, exp(logvar)), independent in every latent value.

    Args:
        mean: (B, n_z, h, w).
        logvar: (B, n_z, h, w), clamped to [−30, 20] so that its exponential stays finite.

    Both are kept in float32, whatever the precision of the encoder.
    """

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        self.mean = mean.float()
        self.logvar = logvar.float().clamp(-30, 20)

    @classmethod
    def from_moments(cls, moments: Tensor) -> "DiagonalGaussian":
        """Build it from an encoder's output (B, 2·n_z, h, w): the mean, then the log-variance."""
        return cls(*moments.chunk(2, dim=1))

    def sample(
        self, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Draw one sample (B, n_z, h, w).

        Args:
            generator: source of the noise if `noise` is None; None is torch's default.
            noise: standard normal values (B, n_z, h, w), so that each sample can own its noise.

        Raises:
            ValueError: noise of another shape, which would broadcast silently.
        """
        if noise is None:
            device = self.mean.device if generator is None else generator.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device)
        if noise.shape != self.mean.shape:
            raise ValueError(f"noise {tuple(noise.shape)} for latents {tuple(self.mean.shape)}")
        # Kingma & Welling 2014, Section 2.4: z = μ + σ ε
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def mode(self) -> Tensor:
        """Most likely latents (B, n_z, h, w)."""
        return self.mean

    def kl(self) -> Tensor:
        """KL(q ‖ N(0, I)) of each image (B,), in nats, summed over its latent values."""
        # Kingma & Welling 2014, Appendix B: ½ Σ (μ² + σ² − 1 − ln σ²)
        excess = self.mean.square() + self.logvar.exp() - 1 - self.logvar
        return 0.5 * excess.flatten(1).sum(1)
