"""What stage one minimises: named terms, and their weighted sum (Sadat et al. 2024, Equation 1)."""

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from autoencoders.autoencoder import AutoencoderOutput
from autoencoders.losses.adversarial import ADVERSARIAL, Judgement
from autoencoders.losses.frequency import gaussian, wavelet
from autoencoders.losses.reconstruction import kl, l1
from ldm.config import Config

Fraction = Annotated[float, Field(ge=0, le=1)]


class LossConfig(Config):
    """Weights of the generator's terms; a term of weight 0 is not computed."""

    l1: NonNegativeFloat = 1.0
    """Mean absolute difference of the pixels."""
    lpips: NonNegativeFloat = 1.0
    """Perceptual distance (VGG-16)."""
    kl: NonNegativeFloat = 1e-6
    """KL of the posterior to N(0, I), in nats per image value."""
    gaussian: NonNegativeFloat = 0.5
    """ℓ1 of what a Gaussian blur takes away."""
    wavelet: NonNegativeFloat = 1.0
    """Charbonnier loss of the high-frequency Haar sub-bands."""


class AdversarialConfig(Config):
    """The adversarial term: how strong, which, and when."""

    weight: NonNegativeFloat = 0.1
    """λ_adv, constant once the ramp is over; 0 trains without a discriminator."""
    loss: Literal["hinge", "logistic"] = "hinge"
    """hinge, or logistic: the non-saturating one (Table 16)."""
    start: Fraction = 0.2
    """Where it begins, as a fraction of all generator steps."""
    ramp: Fraction = 0.05
    """How long its weight takes to rise from 0, as a fraction of all generator steps."""


class Objective:
    """The terms of stage one's losses, in float32 whatever surrounds them.

    Args:
        perceptual: (recon, images) → scalar, such as `load_lpips()`; None where `loss.lpips` is 0.

    Raises:
        ValueError: `loss.lpips` is not 0, and there is no perceptual loss.
    """

    def __init__(
        self,
        loss: LossConfig,
        adversarial: AdversarialConfig,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if loss.lpips and perceptual is None:
            raise ValueError("loss.lpips needs a perceptual loss: load_lpips(), or loss.lpips=0")
        self.loss, self.adversarial, self.perceptual = loss, adversarial, perceptual
        self._fool, self._judge = ADVERSARIAL[adversarial.loss]

    def reconstruction(self, out: AutoencoderOutput, images: Tensor) -> dict[str, Tensor]:
        """Terms named as in `LossConfig`, unweighted scalars; only those of a weight above 0.

        Args:
            images: (B, 3, H, W) in [−1, 1], which `out` was computed from.
        """
        recon, images = out.recon.float(), images.float()
        terms = {
            "l1": lambda: l1(recon, images),
            "lpips": lambda: self.perceptual(recon, images),
            "kl": lambda: kl(out.posterior, images),
            "gaussian": lambda: gaussian(recon, images),
            "wavelet": lambda: wavelet(recon, images),
        }
        with torch.autocast(recon.device.type, enabled=False):
            return {name: term() for name, term in terms.items() if getattr(self.loss, name)}

    def fool(self, fake: Judgement) -> Tensor:
        """The generator's adversarial term, unweighted, from the judgement of its images."""
        return self._fool(fake)

    def judge(self, real: Judgement, fake: Judgement) -> Tensor:
        """The discriminator's loss, from its judgements of real and of reconstructed images."""
        return self._judge(real, fake)

    def adversarial_weight(self, progress: float) -> float:
        """λ_adv at a fraction of all generator steps: 0, then a linear ramp, then constant."""
        config = self.adversarial
        if progress < config.start:
            return 0.0
        if progress >= config.start + config.ramp:
            return config.weight
        return config.weight * (progress - config.start) / config.ramp

    def total(self, terms: Mapping[str, Tensor], adversarial_weight: float) -> Tensor:
        """The weighted sum that the generator minimises; "adversarial" is one of its terms."""
        # Sadat et al. 2024, Equation 1: L_recon + λ_reg L_reg + λ_adv L_adv
        weights = {**self.loss.model_dump(), "adversarial": adversarial_weight}
        return sum(weights[name] * term for name, term in terms.items())
