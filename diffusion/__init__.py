"""Stage two: a diffusion model on standardised latents, and its samplers."""

from diffusion.discrete import DiscreteConfig, DiscreteDenoiser
from diffusion.edm import EDM, EDMConfig, EDMLoss, edm_loss, sample_sigma
from diffusion.edm2 import EDM2Config, EDM2UNet
from diffusion.guidance import guide, inpaint
from diffusion.samplers import (
    SAMPLERS,
    make_churn,
    no_churn,
    sample_dpmpp_2m,
    sample_euler,
    sample_heun,
)
from diffusion.schedules import SCHEDULES, cosine_sigmas, karras_sigmas, linear_sigmas
from diffusion.unet import UNet, UNetConfig

__all__ = [
    "EDM",
    "SAMPLERS",
    "SCHEDULES",
    "DiscreteConfig",
    "DiscreteDenoiser",
    "EDM2Config",
    "EDM2UNet",
    "EDMConfig",
    "EDMLoss",
    "UNet",
    "UNetConfig",
    "cosine_sigmas",
    "edm_loss",
    "guide",
    "inpaint",
    "karras_sigmas",
    "linear_sigmas",
    "make_churn",
    "no_churn",
    "sample_dpmpp_2m",
    "sample_euler",
    "sample_heun",
    "sample_sigma",
]
