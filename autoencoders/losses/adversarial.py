"""Adversarial losses on a discriminator's judgement, which is one or more heads of logits.

A head is a map or a vector, averaged over all its values; the heads count alike.
"""

from collections.abc import Iterable

from torch import Tensor
from torch.nn import functional as F

from autoencoders.discriminators.judgement import Judgement


def hinge_generator(fake: Judgement) -> Tensor:
    """What the generator lowers: minus the logits of its images."""
    # Lim & Ye 2017 (arXiv 1705.02894); Miyato et al. 2018 (arXiv 1802.05957), Equation 17
    return _mean(-head.float().mean() for head in fake)


def hinge_discriminator(real: Judgement, fake: Judgement) -> Tensor:
    """What the discriminator lowers: real logits under 1, fake ones above −1."""
    # Lim & Ye 2017; Miyato et al. 2018, Equation 16
    return _mean(
        F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean()
        for r, f in zip(real, fake, strict=True)
    )


def logistic_generator(fake: Judgement) -> Tensor:
    """Non-saturating: −ln σ(logit) of the generator's images."""
    # Goodfellow et al. 2014 (arXiv 1406.2661), Section 3
    return _mean(F.softplus(-head.float()).mean() for head in fake)


def logistic_discriminator(real: Judgement, fake: Judgement) -> Tensor:
    """−ln σ(logit) of real images, −ln(1 − σ(logit)) of fake ones."""
    # Goodfellow et al. 2014, Equation 1
    return _mean(
        F.softplus(-r.float()).mean() + F.softplus(f.float()).mean()
        for r, f in zip(real, fake, strict=True)
    )


def bce_discriminator(real: Judgement, fake: Judgement) -> Tensor:
    """Binary cross-entropy of the labels, 1 for real and 0 for fake, over both as one set.

    The logistic loss adds the two halves, this averages them: half of it, to the same end. It
    is U-Net GAN's own (Schönfeld et al. 2020, arXiv 2002.12655); the generator's is the same.
    """
    return logistic_discriminator(real, fake) / 2


ADVERSARIAL = {
    "hinge": (hinge_generator, hinge_discriminator),
    "logistic": (logistic_generator, logistic_discriminator),
    "bce": (logistic_generator, bce_discriminator),
}


def _mean(heads: Iterable[Tensor]) -> Tensor:
    losses = list(heads)
    return sum(losses) / len(losses)
