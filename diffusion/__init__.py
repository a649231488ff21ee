"""Stage two: an EDM diffusion model on standardised latents, and its samplers."""

from diffusion.edm import EDM, EDMConfig, edm_loss, sample_sigma
from diffusion.samplers import karras_sigmas, make_churn, no_churn, sample_heun
from diffusion.unet import UNet, UNetConfig

__all__ = [
    "EDM",
    "EDMConfig",
    "UNet",
    "UNetConfig",
    "edm_loss",
    "karras_sigmas",
    "make_churn",
    "no_churn",
    "sample_heun",
    "sample_sigma",
]
