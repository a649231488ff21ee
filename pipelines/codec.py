"""The frozen first stage with standardised latents: pixels to z and back, here and nowhere else.

The diffusion model sees z: latents of stage one, standardised per channel to mean 0 and standard
deviation σ_data.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from autoencoders import Autoencoder
from autoencoders.posterior import DiagonalGaussian
from ldm.device import memory_format
from ldm.errors import LdmError
from ldm.images import assert_range


class Codec(nn.Module):
    """images (B, 3, H, W) in [−1, 1] ↔ z (B, n_z, H/f, W/f), by a frozen autoencoder.

    Args:
        autoencoder: stage one; frozen and put into eval mode.
        mean, std: per-channel statistics (n_z,) of its latents, from `measure_latents`.
        sigma_data: standard deviation of z (EDM's σ_data).

    Raises:
        LdmError: the statistics are not finite, or a channel does not vary.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, autoencoder: Autoencoder, mean: Tensor, std: Tensor, sigma_data: float = 0.5
    ) -> None:
        super().__init__()
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 1e-6).all()):
            raise LdmError(
                f"latent statistics are degenerate (mean {_brief(mean)}, std {_brief(std)}): "
                "train the autoencoder first"
            )
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.sigma_data = sigma_data
        self.register_buffer("mean", mean.float().view(1, -1, 1, 1))
        self.register_buffer("std", std.float().view(1, -1, 1, 1))

    def train(self, mode: bool = True) -> "Codec":
        """Keep eval mode: the autoencoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """images (B, 3, H, W) in [−1, 1] → posterior of their raw latents (B, n_z, h, w)."""
        assert_range(images)
        return self.autoencoder.encode(images)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) in [−1, 1] → z: drawn with noise (B, n_z, h, w), else the mean."""
        return self.standardise(self.posterior(images), noise)

    @torch.no_grad()
    def standardise(self, posterior: DiagonalGaussian, noise: Tensor | None = None) -> Tensor:
        """posterior → z (B, n_z, h, w): drawn with noise of that shape, else the mean."""
        latents = posterior.mode() if noise is None else posterior.sample(noise=noise)
        z = (latents - self.mean) * (self.sigma_data / self.std)
        # an encoder without gradients may have chosen a layout that is slow in training
        return z.contiguous(memory_format=memory_format(z.device))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """z (B, n_z, h, w) → images (B, 3, H, W) in [−1, 1]."""
        latents = z.float() * (self.std / self.sigma_data) + self.mean
        return self.autoencoder.decode(latents).float().clamp(-1, 1)

    def statistics(self) -> dict[str, Any]:
        """The statistics as plain values, for a checkpoint."""
        return {
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "sigma_data": self.sigma_data,
        }

    @classmethod
    def from_statistics(cls, autoencoder: Autoencoder, statistics: dict[str, Any]) -> "Codec":
        """Build a codec from its `statistics()`."""
        mean, std = (torch.tensor(statistics[key]) for key in ("mean", "std"))
        return cls(autoencoder, mean, std, statistics["sigma_data"])


@torch.no_grad()
def measure_latents(
    posteriors: Iterable[DiagonalGaussian],
    drawn: bool = True,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> tuple[Tensor, Tensor]:
    """Measure the per-channel mean and standard deviation (n_z,) of latents.

    Each posterior is summed in closed form, E[z] = E[μ] and E[z²] = E[μ² + σ²], in float64.

    Args:
        posteriors: posteriors of batches of images.
        drawn: measure draws from the posteriors; else their means, E[z²] = E[μ²].
        reduce: adds the sums (3, n_z) of several processes.
    """
    sums: Tensor | float = 0.0
    for posterior in posteriors:
        mean = posterior.mean.double()
        squares = mean.square() + (posterior.logvar.double().exp() if drawn else 0)
        count = torch.full_like(mean[0, :, 0, 0], mean[:, 0].numel())
        over = (0, 2, 3)
        sums = sums + torch.stack([mean.sum(over), squares.sum(over), count])
    first, second, count = reduce(torch.as_tensor(sums))
    mean = first / count
    return mean, (second / count - mean.square()).clamp_min(0).sqrt()


def _brief(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.3g}" for value in values.flatten()[:4].tolist()) + "]"
