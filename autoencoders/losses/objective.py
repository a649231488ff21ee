"""Objective of stage one: named terms and their weighted sum (Sadat et al. 2024, Equation 1).

The high-frequency losses are LiteVAE's (Section 4.3). A blur and a wavelet transform are linear:
both are applied once, to the difference of the images.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple, cast

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor
from torch.nn import functional as F

from autoencoders.autoencoder import AutoencoderOutput, DiagonalGaussian
from autoencoders.losses.adversarial import ADVERSARIAL, ldl
from autoencoders.losses.perceptual import LPIPSNetwork
from autoencoders.wavelet import haar_dwt
from ldm.config import Config

Fraction = Annotated[float, Field(ge=0, le=1)]
Perceptual = Callable[[Tensor, Tensor], Tensor]


class LossConfig(Config):
    """Weights of the generator's terms; a term of weight 0 is not computed."""

    l1: NonNegativeFloat = 1.0
    """Mean absolute difference of the pixels."""
    l2: NonNegativeFloat = 0.0
    """Mean squared difference of the pixels."""
    lpips: NonNegativeFloat = 1.0
    """Perceptual distance, learned (LPIPS)."""
    esrgan: NonNegativeFloat = 0.0
    """ESRGAN's perceptual loss: VGG-19's features before activation (Table 14)."""
    ldl: NonNegativeFloat = 0.0
    """LDL: ℓ1 weighted by the likelihood of adversarial artifacts (Table 15); twice its source's,
    whose images are in [0, 1]."""
    kl: NonNegativeFloat = 1e-6
    """KL of the posterior to N(0, I), in nats per image value."""
    gaussian: NonNegativeFloat = 0.5
    """ℓ1 of the images less their Gaussian blur (Table 9)."""
    wavelet: NonNegativeFloat = 1.0
    """Charbonnier loss of the high-frequency Haar sub-bands (Table 9)."""
    latent: NonNegativeFloat = 1.0
    """With a teacher: mean absolute difference of the posteriors' means, in standard deviations of
    each channel of the teacher's latents."""
    logvar: NonNegativeFloat = 0.1
    """With a teacher: mean absolute difference of the posteriors' log-variances."""
    lpips_network: LPIPSNetwork = "vgg"
    """Backbone of LPIPS: VGG-16 (vgg), AlexNet (alex) or SqueezeNet 1.1 (squeeze)."""

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every term."""
        return self.model_dump(exclude={"lpips_network"})


class AdversarialConfig(Config):
    """Weight, kind and schedule of the adversarial term."""

    weight: NonNegativeFloat = 0.1
    """λ_adv after the ramp; 0 trains without a discriminator. With adaptive weighting it multiplies
    the ratio of the gradients' norms: 0.5 is the paper's Equation 2."""
    loss: Literal["hinge", "logistic", "bce"] = "hinge"
    """hinge; logistic: the non-saturating one; bce: U-Net GAN's (Table 16). The discriminator's
    hinge and logistic losses are twice those of latent diffusion, which halves the sum."""
    weighting: Literal["constant", "adaptive"] = "constant"
    """constant; adaptive: λ_adv follows the ratio of the gradients' norms (Table 8)."""
    start: Fraction = 0.2
    """Step at which the term begins, as a fraction of all generator steps."""
    ramp: Fraction = 0.05
    """Duration of the linear rise from 0, as a fraction of all generator steps."""
    cutmix: NonNegativeFloat = 0.0
    """Weight of CutMix consistency in the discriminator's loss; U-Net GAN has 1. U-Net only."""
    cutmix_augmentation: NonNegativeFloat = 0.0
    """Weight of the adversarial loss of CutMix's mixtures; U-Net GAN has 1. U-Net only."""

    @property
    def mixes(self) -> bool:
        """True if the discriminator also sees CutMix's mixtures."""
        return self.cutmix > 0 or self.cutmix_augmentation > 0


class TeacherPosterior(NamedTuple):
    """Posterior of a batch of images that a student's encoder learns to give."""

    posterior: DiagonalGaussian
    """The teacher's posterior of the images (B, n_z, h, w)."""
    std: Tensor
    """Standard deviation of each channel of the teacher's latents over the data (n_z,)."""


class Objective:
    """Loss terms of stage one, in float32 under autocast too.

    Args:
        perceptual: (recon, images) → scalar by the name of its term, for each of a weight above 0:
            "lpips": `load_lpips()`, "esrgan": `load_esrgan()`.

    Attributes:
        generator_loss: (logits of fake images) → the generator's adversarial term, unweighted.
        discriminator_loss: (logits of real images, of fake ones) → the discriminator's loss.

    Raises:
        ValueError: a perceptual loss of a weight above 0 is missing.
    """

    def __init__(
        self,
        loss: LossConfig,
        adversarial: AdversarialConfig,
        perceptual: Mapping[str, Perceptual] = MappingProxyType({}),
    ) -> None:
        for name in ("lpips", "esrgan"):
            if loss.weights[name] and name not in perceptual:
                raise ValueError(
                    f"loss.{name} needs its network, perceptual={{'{name}': load_{name}()}}, "
                    f"or loss.{name}=0"
                )
        self.loss, self.adversarial, self.perceptual = loss, adversarial, perceptual
        self.generator_loss, self.discriminator_loss = ADVERSARIAL[adversarial.loss]

    @property
    def needs_averaged(self) -> bool:
        """True if a term needs the reconstruction by the averaged weights."""
        return self.loss.ldl > 0

    def reconstruction(
        self,
        out: AutoencoderOutput,
        images: Tensor,
        averaged: Tensor | None = None,
        target: TeacherPosterior | None = None,
    ) -> dict[str, Tensor]:
        """Unweighted scalars named as in `LossConfig`, of the terms with a weight above 0.

        Args:
            images: (B, C, H, W) in [−1, 1] that `out` was computed from.
            averaged: their reconstruction by the averaged (EMA) weights, for LDL; see `ldl`.
            target: the teacher's posterior of them; None leaves out `latent` and `logvar`.
        """
        recon, images = out.recon.float(), images.float()
        averaged = averaged if averaged is None else averaged.float()
        terms = {
            "l1": lambda: (recon - images).abs().mean(),
            "l2": lambda: (recon - images).square().mean(),
            "lpips": lambda: self.perceptual["lpips"](recon, images),
            "esrgan": lambda: self.perceptual["esrgan"](recon, images),
            "ldl": lambda: ldl(recon, images, averaged),
            "kl": lambda: kl(out.posterior, images),
            "gaussian": lambda: gaussian(recon, images),
            "wavelet": lambda: wavelet(recon, images),
        }
        if target is not None:
            terms["latent"] = lambda: latent(out.posterior, target)
            terms["logvar"] = lambda: logvar(out.posterior, target)
        weights = self.loss.weights
        with torch.autocast(recon.device.type, enabled=False):
            return {name: term() for name, term in terms.items() if weights[name]}

    def ramp(self, progress: float) -> float:
        """Factor of the adversarial weight at a fraction of all generator steps.

        0 before the start, then a linear rise to 1.
        """
        config = self.adversarial
        if progress < config.start:
            return 0.0
        if progress >= config.start + config.ramp:
            return 1.0
        return (progress - config.start) / config.ramp

    def total(self, terms: Mapping[str, Tensor], adversarial_weight: float | Tensor) -> Tensor:
        """Weighted sum that the generator minimises; "adversarial" is one of its terms."""
        # Sadat et al. 2024, Equation 1: L_recon + λ_reg L_reg + λ_adv L_adv
        weights = {**self.loss.weights, "adversarial": adversarial_weight}
        return cast(Tensor, sum(weights[name] * term for name, term in terms.items()))

    def recon_total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """L_recon of Equation 1: the weighted sum of the terms that compare images."""
        others = ("kl", "latent", "logvar", "adversarial")
        recon = {name: term for name, term in terms.items() if name not in others}
        return self.total(recon, adversarial_weight=0.0)


# ----------------------------------------------------------------------------------- terms
def kl(posterior: DiagonalGaussian, images: Tensor) -> Tensor:
    """KL to N(0, I) in nats per image value, averaged over the batch (L_reg of Equation 1).

    The sum over an image's latents is divided by its CHW values, as in latent diffusion (Rombach et
    al. 2022), so that its weight relative to ℓ1 does not depend on the resolution.
    """
    return posterior.kl().mean() / images[0].numel()


def latent(posterior: DiagonalGaussian, target: TeacherPosterior) -> Tensor:
    """Mean absolute difference of the means, each channel in the teacher's standard deviations."""
    difference = posterior.mean - target.posterior.mean  # (B, n_z, h, w)
    return (difference / target.std.view(1, -1, 1, 1)).abs().mean()


def logvar(posterior: DiagonalGaussian, target: TeacherPosterior) -> Tensor:
    """Mean absolute difference of the log-variances."""
    return (posterior.logvar - target.posterior.logvar).abs().mean()


def gaussian(recon: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference of two (B, C, H, W), each less its Gaussian blur (Table 9)."""
    difference = recon - images
    # Sadat et al. 2024, Section 4.3: ℓ1 between x − h(x) and x̂ − h(x̂)
    return (difference - blur(difference)).abs().mean()


def wavelet(recon: Tensor, images: Tensor, eps: float = 1e-3) -> Tensor:
    """Mean Charbonnier loss of the Haar sub-bands H, V, D of two (B, C, H, W) (Table 9)."""
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
    x = _reflect(images, reach)
    x = cast(Tensor, sum(tap * x[..., i : i + height, :] for i, tap in enumerate(taps)))
    return cast(Tensor, sum(tap * x[..., i : i + width] for i, tap in enumerate(taps)))


def _reflect(images: Tensor, reach: int) -> Tensor:
    """Pad (B, C, H, W) by reflection, `reach` pixels on every side."""
    if not torch.are_deterministic_algorithms_enabled():
        return F.pad(images, (reach, reach, reach, reach), mode="reflect")
    for side in (-2, -1):  # PyTorch's padding has no deterministic gradient on a GPU
        count = images.shape[side]
        before = images.narrow(side, 1, reach).flip(side)
        after = images.narrow(side, count - 1 - reach, reach).flip(side)
        images = torch.cat([before, images, after], dim=side)
    return images
