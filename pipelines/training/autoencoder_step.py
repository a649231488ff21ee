"""One step of stage one: the generator's update, then the discriminator's, on the same images."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autoencoders.discriminators import split
from autoencoders.losses import (
    Objective,
    adaptive_weight,
    cutmix_consistency,
    cutmix_masks,
    gradient_ratio,
)
from ldm.run import Run, frozen
from ldm.seeds import normal, uniform
from pipelines.training.autoencoder_recipe import AutoencoderRecipe


class Draws(NamedTuple):
    """The random numbers of one micro-batch, each a function of its image."""

    noise: Tensor
    """Of the posterior (b, n_z, h, w), standard normal."""
    cutmix: Tensor | None
    """Of CutMix's boxes (b, 3), in [0, 1); None without CutMix."""


def draw(run: Run, recipe: AutoencoderRecipe, ks: Sequence[int], resolution: int) -> Draws:
    """The random numbers of images `ks` of the run."""
    side = resolution // recipe.encoder.downsampling
    shape = (recipe.latent_channels, side, side)
    noise = normal(run.seed, "posterior", ks, shape).to(run.device, non_blocking=True)
    if not recipe.adversarial.cutmix:
        return Draws(noise, None)
    return Draws(noise, uniform(run.seed, "cutmix", ks, (3,)).to(run.device, non_blocking=True))


def train_step(
    run: Run,
    ae: nn.Module,
    critic: nn.Module,
    opt_ae: torch.optim.Optimizer,
    opt_critic: torch.optim.Optimizer,
    images: Tensor,
    draws: Draws,
    objective: Objective,
    ramp: float,
    clip_norm: float | None,
    averaged: nn.Module | None = None,
    watch: bool = False,
) -> dict[str, Tensor | float]:
    """One generator update, then one discriminator update, on the same batch.

    Args:
        ae, critic: the wrapped modules: what goes through them syncs gradients between processes.
        images: (b, 3, H, W) in [−1, 1].
        ramp: of the adversarial weight, in [0, 1]; at 0 the discriminator rests.
        averaged: the autoencoder's averaged twin, where the objective compares with it.
        watch: measure the ratio of the gradients' norms (Figure 7) even if nothing needs it.

    Returns:
        The named, unweighted terms; the adversarial weight; and the norms of the gradients where
        an update was made.
    """
    adversarial = objective.adversarial
    weight: Tensor | float = ramp * adversarial.weight
    fights, watched = weight > 0, {}
    with run.accumulate(ae, critic):
        with run.autocast():
            out = ae(images, draws.noise)
            with torch.no_grad():
                steady = None if averaged is None else averaged(images, draws.noise).recon
        terms = objective.reconstruction(out, images, steady)  # l1, lpips, gaussian, wavelet, kl
        if fights:
            # the unwrapped critic, frozen: it passes gradients on and gets none
            with frozen(run.unwrap(critic)) as judge, run.autocast():
                terms["adversarial"] = objective.fool(judge(out.recon))
        if fights and (watch or adversarial.weighting == "adaptive"):
            last = run.unwrap(ae).decoder.conv_out.weight
            recon_loss = objective.recon_total(terms)
            ratio = gradient_ratio(recon_loss, terms["adversarial"], last, run.mean)
            watched["gradient_ratio"] = ratio
            if adversarial.weighting == "adaptive":
                weight = ramp * adaptive_weight(adversarial.weight, ratio)
        total = objective.total(terms, weight)
        norm = run.step(total, ae, opt_ae, "autoencoder", clip_norm)
        if norm is not None:
            watched["gradient_norm"] = norm

        if fights:
            pictures = [images, out.recon.detach()]
            if draws.cutmix is not None:
                mask = cutmix_masks(draws.cutmix, *images.shape[-2:])  # (b, 1, H, W)
                pictures.append(torch.where(mask, *pictures))
            # one forward for all of them: the power iteration in it runs once
            with run.autocast():
                real, fake, *mixed = split(critic(torch.cat(pictures)), len(pictures))
            terms["critic"] = objective.judge(real, fake)
            total = terms["critic"]
            if mixed:
                terms["cutmix"] = cutmix_consistency(mixed[0], real, fake, mask)
                total = total + adversarial.cutmix * terms["cutmix"]
            terms["logit_real"], terms["logit_fake"] = real[0].mean(), fake[0].mean()
            norm = run.step(total, critic, opt_critic, "discriminator", clip_norm)
            if norm is not None:
                watched["critic_gradient_norm"] = norm
    return terms | watched | {"adversarial_weight": weight}
