"""Stage one's losses: each a small function, and the objective that names and weighs them."""

from autoencoders.losses.objective import AdversarialConfig, LossConfig, Objective
from autoencoders.losses.perceptual import LPIPS, find_lpips, load_esrgan, load_lpips, random_lpips

__all__ = [
    "LPIPS",
    "AdversarialConfig",
    "LossConfig",
    "Objective",
    "find_lpips",
    "load_esrgan",
    "load_lpips",
    "random_lpips",
]
