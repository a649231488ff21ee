"""EDM: preconditioning, noise levels and loss of Karras et al. 2022 (arXiv 2206.00364).

EDM2's uncertainty is here, too (Karras et al. 2024): noise levels are tasks of one multi-task
problem, weighted as by Kendall et al. 2018 (arXiv 1705.07115), made continuous in Appendix B.2 of
arXiv 2312.02696. Dividing by the expected loss lets every noise level contribute alike to the
gradient, throughout training.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal, Protocol

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from diffusion.edm2 import MPFourier, MPLinear, MPModule
from ldm.config import Config
from ldm.device import to_device


class Uncertainty(MPModule):
    """u(σ), the logarithm of the expected loss at σ; needed in training only.

    One fully-connected layer on Fourier features, trained beside the network by the loss that it
    weights (`weigh`).
    """

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        self.fourier = MPFourier(features)
        self.linear = MPLinear(features, 1)

    def forward(self, c_noise: Tensor) -> Tensor:
        """Scaled noise levels c_noise = ln(σ)/4 (B,) → u (B,)."""
        return self.linear(self.fourier(c_noise)).squeeze(1)


def weigh(loss: Tensor, u: Tensor) -> Tensor:
    """Weight a loss by its uncertainty u, elementwise: minimal where e^u is the mean loss."""
    # Eq. 21: λ L / e^u + u, where λ L is the loss; by Eq. 25, e^u = λ L at the minimum
    return loss / u.exp() + u


class EDMConfig(Config):
    """The standard deviation of the data, and the noise levels seen in training."""

    type: Literal["edm"] = "edm"
    """Type of the denoiser."""
    sigma_data: PositiveFloat = 0.5
    """Standard deviation of the standardised latents."""
    noise_mean: float = -1.2
    """Mean of ln σ in training (the paper's P_mean)."""
    noise_std: PositiveFloat = 1.2
    """Standard deviation of ln σ in training (the paper's P_std)."""
    uncertainty: bool = False
    """Weight noise levels also by a learned uncertainty of their loss (EDM2)."""

    def log_sigma(self, normal_draws: Tensor) -> Tensor:
        """Turn standard normal draws (B,) into ln σ (B,)."""
        # Table 1, "Noise distribution": ln σ ~ N(P_mean, P_std²)
        return self.noise_mean + self.noise_std * normal_draws


class Denoiser(nn.Module, ABC):
    """D(x; σ) built around a network F.

    The network runs in its parameters' dtype, or under autocast; all else in x's dtype, and the
    network's c_noise in its own, both at least float32.

    Args:
        network: (x (B, C, H, W), c_noise (B,)) → (B, C, H, W); also takes `labels` and `augment`
            if they are given.
    """

    sigma_data: float
    """Standard deviation of the data."""
    sigma_min: float
    sigma_max: float
    """The range of noise levels for sampling."""
    words: dict[str, str]
    """c_skip, c_out, c_in and the network's time step in words, for files beside its weights."""
    schedule: str = "karras"
    """The schedule that sampling takes by default."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    @abstractmethod
    def precondition(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in and c_noise of noise levels σ > 0, each of sigma's shape."""

    def schedule_options(self, schedule: str) -> dict[str, Any]:
        """The arguments of a schedule by default, besides its number of steps."""
        return {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}

    def sampler_options(self, sampler: str) -> dict[str, Any]:
        """Further arguments of a sampler for this denoiser."""
        return {}

    def further_loss(
        self, z: Tensor, sigma: Tensor, noise: Tensor, denoised: Tensor
    ) -> Tensor | float:
        """A term of the loss of each image beside its squared error, (B,) or 0."""
        return 0.0

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Denoise latents: (B, C, H, W) → (B, C, H, W).

        Args:
            x: noisy latents (B, C, H, W).
            sigma: their noise levels σ > 0, (B,) or (); a number () is best left on the CPU.
            labels: classes (B,), −1 for none; None: none in the whole batch.
            augment: the parameters (B, A) of the augmentation; None: no augmentation.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        inner = next(self.network.parameters(), x).dtype
        if isinstance(sigma, Tensor) and sigma.ndim == 0 and sigma.device.type == "cpu":
            sigma = sigma if sigma.requires_grad else float(sigma)
        if not isinstance(sigma, Tensor):
            # a fill, where a GPU would wait for a copy
            sigma = torch.full((), sigma, dtype=dtype, device=x.device)
        sigma = to_device(sigma, x.device).to(dtype).expand(len(x))
        sigma = sigma.view(-1, 1, 1, 1)  # (B, 1, 1, 1), and so are the four
        c_skip, c_out, c_in, c_noise = self.precondition(sigma)
        given = {"labels": labels, "augment": augment}
        condition = {key: value for key, value in given.items() if value is not None}
        c_noise = c_noise.flatten().to(torch.promote_types(inner, torch.float32))  # (B,)
        output = self.network((c_in * x).to(inner), c_noise, **condition)
        # Eq. 7
        return c_skip * x + c_out * output


class EDM(Denoiser):
    """The denoiser D(x; σ) of a network of unit-variance input and output; see `Denoiser`."""

    sigma_min, sigma_max = 0.002, 80.0  # Table 1, "Time steps"

    def __init__(self, network: nn.Module, sigma_data: float = 0.5):
        super().__init__(network)
        self.sigma_data = sigma_data
        self.words = {
            "c_skip": "sigma_data^2 / (sigma^2 + sigma_data^2)",
            "c_out": "sigma sigma_data / sqrt(sigma^2 + sigma_data^2)",
            "c_in": "1 / sqrt(sigma^2 + sigma_data^2)",
            "timestep": "ln(sigma) / 4",
        }

    def precondition(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total = sigma**2 + self.sigma_data**2
        # Table 1, column "Ours": network input and effective target have unit variance
        c_skip = self.sigma_data**2 / total
        c_out = sigma * self.sigma_data / total.sqrt()
        c_in = 1 / total.sqrt()
        c_noise = sigma.log() / 4
        return c_skip, c_out, c_in, c_noise


class NoiseDistribution(Protocol):
    """The noise levels of training, such as an `EDMConfig`."""

    def log_sigma(self, normal_draws: Tensor) -> Tensor:
        """Turn standard normal draws (B,) into ln σ (B,)."""


def sample_sigma(normal_draws: Tensor, config: NoiseDistribution) -> Tensor:
    """Turn standard normal draws (B,) into the noise levels σ (B,) of a training batch."""
    return config.log_sigma(normal_draws).exp()


def denoising_loss(
    denoiser: Denoiser,
    z: Tensor,
    sigma: Tensor,
    noise: Tensor,
    labels: Tensor | None = None,
    augment: Tensor | None = None,
) -> Tensor:
    """λ(σ) ‖D(z + σn; σ) − z‖² per image, the mean over its latent's values: (B,).

    With λ = 1 / c_out² it is the squared error of the network's own output: of EDM's target of unit
    variance, or of a flow's velocity. `Denoiser.further_loss` is added.

    Args:
        z: standardised latents (B, C, H, W).
        sigma: noise levels (B,), as from `sample_sigma`.
        noise: standard normal n, of z's shape.
        labels, augment: conditions of the denoiser.
    """
    denoised = denoiser(z + sigma.view(-1, 1, 1, 1) * noise, sigma, labels, augment)
    # Karras et al. 2022, Table 1, "Loss weighting": λ(σ) c_out(σ)² = 1
    c_out = denoiser.precondition(sigma)[1]
    # Eq. 2, weighted as in Section 5
    loss = (denoised - z).square().mean(dim=(1, 2, 3)) / c_out.square()
    return loss + denoiser.further_loss(z, sigma, noise, denoised)


class DenoisingLoss(nn.Module):
    """A denoiser and its uncertainty, if any, as one module for DDP to wrap."""

    def __init__(self, denoiser: Denoiser, uncertainty: Uncertainty | None = None) -> None:
        super().__init__()
        self.denoiser, self.uncertainty = denoiser, uncertainty

    def forward(
        self,
        z: Tensor,
        sigma: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss to minimise, and `denoising_loss` to log; per image, (B,) each."""
        loss = denoising_loss(self.denoiser, z, sigma, noise, labels, augment)
        if self.uncertainty is None:
            return loss, loss.detach()
        return weigh(loss, self.uncertainty(sigma.log() / 4)), loss.detach()
