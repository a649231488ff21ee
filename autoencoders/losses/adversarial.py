"""Adversarial losses, the weight they get, CutMix and LDL (Sadat et al. 2024, Tables 8, 15, 16).

Discriminators return one or more maps of logits. A loss averages each map over all its values, and
the maps count alike.
"""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoders.discriminators import Logits


# ---------------------------------------------------------------------------------- losses
def in_range(recon: Tensor) -> Tensor:
    """Clip reconstructions to [−1, 1], where all images are, for the discriminator.

    Outside, no real image bounds its logits: they grow with the distance, and the hinge loss would
    reward the decoder for any distance. A pixel outside gets no adversarial gradient.
    """
    return recon.clamp(-1, 1)


def hinge_generator(fake: Logits) -> Tensor:
    """Minus the logits of generated images."""
    # Lim & Ye 2017 (arXiv 1705.02894); Miyato et al. 2018 (arXiv 1802.05957), Equation 17
    return _mean(-f.float().mean() for f in fake)


def hinge_discriminator(real: Logits, fake: Logits) -> Tensor:
    """Penalty on real logits below 1 and fake logits above −1."""
    # Lim & Ye 2017; Miyato et al. 2018, Equation 16
    return _mean(
        F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean()
        for r, f in zip(real, fake, strict=True)
    )


def logistic_generator(fake: Logits) -> Tensor:
    """Non-saturating loss: −ln σ(logit) of generated images."""
    # Goodfellow et al. 2014 (arXiv 1406.2661), Section 3
    return _mean(F.softplus(-f.float()).mean() for f in fake)


def logistic_discriminator(real: Logits, fake: Logits) -> Tensor:
    """−ln σ(logit) of real images, −ln(1 − σ(logit)) of generated ones."""
    # Goodfellow et al. 2014, Equation 1
    return _mean(
        F.softplus(-r.float()).mean() + F.softplus(f.float()).mean()
        for r, f in zip(real, fake, strict=True)
    )


def bce_discriminator(real: Logits, fake: Logits) -> Tensor:
    """Binary cross-entropy with labels 1 (real) and 0 (fake), as U-Net GAN trains with it.

    Real and fake images count half each, and the losses of the maps add up (Schönfeld et al. 2020,
    arXiv 2002.12655, Equation 3); the generator's loss is the logistic one, as in their code.
    """
    return logistic_discriminator(real, fake) * len(real) / 2


ADVERSARIAL = {
    "hinge": (hinge_generator, hinge_discriminator),
    "logistic": (logistic_generator, logistic_discriminator),
    "bce": (logistic_generator, bce_discriminator),
}
"""Losses of the generator and of the discriminator, by name (Table 16)."""


def _mean(maps: Iterable[Tensor]) -> Tensor:
    losses = list(maps)
    return cast(Tensor, sum(losses)) / len(losses)


# ------------------------------------------------------------------------- adaptive weight
def gradient_ratio(
    recon_loss: Tensor,
    adversarial_loss: Tensor,
    weight: Tensor,
    reduce: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    delta: float = 1e-4,
) -> Tensor:
    """‖∇L_recon‖ / (‖∇L_adv‖ + δ) at one weight: a float32 scalar without gradient.

    No `.grad` is touched, and both graphs are kept for the backward pass.

    Args:
        recon_loss: L_recon, such as `Objective.recon_total`.
        adversarial_loss: L_adv, unweighted.
        weight: of the decoder's last layer, which all of both gradients pass through.
        reduce: averages a gradient over processes.
    """
    recon_norm, adversarial_norm = (
        reduce(torch.autograd.grad(loss, weight, retain_graph=True)[0].float()).norm()
        for loss in (recon_loss, adversarial_loss)
    )
    # Sadat et al. 2024, Equation 2, without its factor ½
    return (recon_norm / (adversarial_norm + delta)).detach()


def adaptive_weight(weight: float, ratio: Tensor) -> Tensor:
    """λ_adv = weight × ratio, the ratio at most 10⁴; a weight of 0.5 is the paper's Equation 2."""
    # Sadat et al. 2024, Equation 2; the bound is Esser et al.'s (2021, arXiv 2012.09841): without
    # one the weight diverges where the discriminator's gradient is 0
    return weight * ratio.clamp(0, 1e4)


# ---------------------------------------------------------------------------------- CutMix
def cutmix_consistency(mixed: Logits, real: Logits, fake: Logits, mask: Tensor) -> Tensor:
    """Mean squared difference of the mixture's pixel logits and the mixture of pixel logits.

    Args:
        mixed: logits of `torch.where(mask, images, recon)`, a map of all pixels first.
        real, fake: logits of the images and of their reconstructions.
        mask: bool (B, 1, H, W), true where the mixture is real.
    """
    mixed_map, real_map, fake_map = (logits[0].float() for logits in (mixed, real, fake))
    assert mixed_map.shape == mask.shape, "CutMix needs a logit for every pixel: the U-Net"
    # Schönfeld et al. 2020, Section 3.2: ‖D_dec(mix(x, x̂, M)) − mix(D_dec(x), D_dec(x̂), M)‖²
    return (mixed_map - torch.where(mask, real_map, fake_map)).square().mean()


def cutmix_augmentation(mixed: Logits, mask: Tensor) -> Tensor:
    """Cross-entropy of the mixture: each pixel has its own label, the image as a whole is fake.

    Args:
        mixed, mask: as for `cutmix_consistency`; the second map is the image's logit.
    """
    pixels, image = (logits.float() for logits in mixed)
    # Schönfeld et al. 2020, Section 3.2: labels M for the decoder, 0 for the encoder
    return F.binary_cross_entropy_with_logits(pixels, mask.float()) + F.softplus(image).mean()


def cutmix_masks(uniforms: Tensor, height: int, width: int) -> Tensor:
    """Boxes of the image's proportions, real or fake: (B, 4) → bool (B, 1, height, width).

    Args:
        uniforms: in [0, 1), four of each image: λ, then the box's position from the top and from
            the left; below ½, the fourth inverts the mask. The box covers 1 − λ of the image, to
            the nearest pixel, and lies inside.
    """
    # Yun et al. 2019 (arXiv 1905.04899), Equation 2: sides √(1 − λ), λ ~ Beta(1, 1), uniform
    share = (1 - uniforms[:, 0]).sqrt()
    rows = _interval(share, uniforms[:, 1], height)  # (B, H)
    columns = _interval(share, uniforms[:, 2], width)  # (B, W)
    box = rows[:, :, None] & columns[:, None, :]
    return (box ^ (uniforms[:, 3, None, None] < 0.5))[:, None]


def _interval(share: Tensor, start: Tensor, side: int) -> Tensor:
    """A run of `share` of a side's pixels, at random: (B,), (B,) → bool (B, side)."""
    length = (share * side).round()
    first = (start * (side - length + 1)).floor()[:, None]
    pixels = torch.arange(side, device=share.device)
    return (pixels >= first) & (pixels < first + length[:, None])


# ------------------------------------------------------------------------------------- LDL
def ldl(recon: Tensor, images: Tensor, averaged: Tensor | None = None) -> Tensor:
    """Mean absolute difference of two (B, C, H, W) in [−1, 1], weighted by `artifact_map`.

    Locally discriminative learning (Liang, Zeng & Zhang 2022, arXiv 2203.09195; Table 15): what
    looks like an artifact of adversarial training costs more.
    """
    # Liang et al. 2022, Section 3.3: ‖M_refine · (x − x̂)‖₁; no gradient passes through the map
    return (artifact_map(recon, images, averaged) * (recon - images)).abs().mean()


@torch.no_grad()
def artifact_map(recon: Tensor, images: Tensor, averaged: Tensor | None = None) -> Tensor:
    """Likelihood of an artifact at each pixel: images (B, C, H, W) in [−1, 1] → (B, 1, H, W), ≥ 0.

    The residual of an artifact varies within a few pixels, that of a smooth error does not. The
    map grows faster than the residual, so it is computed in the paper's range, [0, 1].

    Args:
        averaged: reconstruction by the averaged weights, which make fewer artifacts: the map is 0
            where the current reconstruction is the nearer one. None: it is 0 nowhere.
    """
    residual = _residual(recon, images)
    # Liang et al. 2022, Section 3.2: σ = var(R)^(1/5) of an image, M its variance in a window
    scale = residual.var(dim=(1, 2, 3), keepdim=True) ** 0.2
    local = scale * local_variance(residual)
    if averaged is None:
        return local
    # Liang et al. 2022, Section 3.2: 0 where |R₁| < |R₂|, the averaged model's residual
    return local.masked_fill(residual < _residual(averaged, images), 0)


def local_variance(x: Tensor, size: int = 7) -> Tensor:
    """Unbiased variance in a window of `size` pixels a side around each of (B, 1, H, W).

    The border reflects the image.
    """
    reach, count = size // 2, size**2
    # from the image's own mean: E[x²] − E[x]² loses its digits where the mean is far from 0
    x = F.pad(x - x.mean(dim=(2, 3), keepdim=True), (reach, reach, reach, reach), mode="reflect")
    mean, mean_square = (F.avg_pool2d(values, size, stride=1) for values in (x, x.square()))
    return (mean_square - mean.square()).clamp(min=0) * (count / (count - 1))


def _residual(recon: Tensor, images: Tensor) -> Tensor:
    """Absolute difference: (B, C, H, W) → (B, 1, H, W), in units of [0, 1].

    Summed over three colours; of another number of channels, three times their mean.
    """
    return (recon - images).abs().sum(dim=1, keepdim=True) / 2 * (3 / images.shape[1])
