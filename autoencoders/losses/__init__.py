"""Stage one's losses: each a small function, and the objective that names and weighs them."""

from autoencoders.losses.adversarial import (
    adaptive_weight,
    cutmix_consistency,
    cutmix_masks,
    gradient_ratio,
)
from autoencoders.losses.objective import AdversarialConfig, LossConfig, Objective
from autoencoders.losses.perceptual import LPIPS, find_lpips, load_esrgan, load_lpips

__all__ = [
    "LPIPS",
    "AdversarialConfig",
    "LossConfig",
    "Objective",
    "adaptive_weight",
    "cutmix_consistency",
    "cutmix_masks",
    "find_lpips",
    "gradient_ratio",
    "load_esrgan",
    "load_lpips",
]
