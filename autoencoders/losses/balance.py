"""How the adversarial gradient stands to the reconstruction's (Sadat et al. 2024, Table 8)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

MOST = 1e4
"""Largest adaptive weight: one without a bound runs away where the critic gives no gradient."""


def gradient_ratio(
    recon_loss: Tensor,
    adversarial_loss: Tensor,
    weight: nn.Parameter,
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
    norms = (
        reduce(torch.autograd.grad(loss, weight, retain_graph=True)[0].float()).norm()
        for loss in (recon_loss, adversarial_loss)
    )
    recon_norm, adversarial_norm = norms
    # Sadat et al. 2024, Equation 2, but for its ½
    return (recon_norm / (adversarial_norm + delta)).detach()


def adaptive_weight(weight: float, ratio: Tensor) -> Tensor:
    """λ_adv = weight × ratio, in [0, 10⁴]; a weight of 0.5 is the paper's Equation 2."""
    # Sadat et al. 2024, Equation 2; the bound is Esser et al.'s (2021, arXiv 2012.09841)
    return (weight * ratio).clamp(0, MOST)
