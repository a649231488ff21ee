"""Stage one's losses: each a small function, and the objective that names and weighs them."""

from autoencoders.losses.balance import adaptive_weight, gradient_ratio
from autoencoders.losses.cutmix import cutmix_consistency, cutmix_masks
from autoencoders.losses.esrgan import load_esrgan
from autoencoders.losses.objective import AdversarialConfig, LossConfig, Objective
from autoencoders.losses.perceptual import LPIPS, find_lpips, load_lpips

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
