"""Stage two: a diffusion model on standardised latents, and its samplers."""

from typing import Annotated

from pydantic import Field
from torch import nn

from diffusion.discrete import DiscreteConfig, DiscreteDenoiser
from diffusion.dit import DiT, DiTConfig
from diffusion.edm import (
    EDM,
    Denoiser,
    DenoisingLoss,
    EDMConfig,
    denoising_loss,
    sample_sigma,
)
from diffusion.edm2 import EDM2Config, EDM2UNet
from diffusion.flow import FlowConfig, FlowDenoiser
from diffusion.network import Network
from diffusion.samplers import (
    SAMPLERS,
    guide,
    inpaint,
    make_churn,
    no_churn,
    sample_dpmpp_2m,
    sample_euler,
    sample_heun,
)
from diffusion.schedules import (
    SCHEDULES,
    cosine_sigmas,
    flow_sigmas,
    karras_sigmas,
    linear_sigmas,
)
from diffusion.unet import UNet, UNetConfig

__all__ = [
    "EDM",
    "SAMPLERS",
    "SCHEDULES",
    "DenoiserConfig",
    "DenoisingLoss",
    "DiT",
    "DiTConfig",
    "DiscreteConfig",
    "DiscreteDenoiser",
    "EDM2Config",
    "EDM2UNet",
    "EDMConfig",
    "FlowConfig",
    "FlowDenoiser",
    "NetworkConfig",
    "UNet",
    "UNetConfig",
    "build_denoiser",
    "build_network",
    "cosine_sigmas",
    "denoising_loss",
    "flow_sigmas",
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

NetworkConfig = Annotated[UNetConfig | EDM2Config | DiTConfig, Field(discriminator="type")]
DenoiserConfig = Annotated[EDMConfig | DiscreteConfig | FlowConfig, Field(discriminator="type")]


def build_network(config: UNetConfig | EDM2Config | DiTConfig) -> Network:
    """Build the untrained network of a config."""
    if config.type == "dit":
        return DiT(config)
    return UNet(config) if config.type == "ldm" else EDM2UNet(config)


def build_denoiser(network: nn.Module, config: EDMConfig | DiscreteConfig | FlowConfig) -> Denoiser:
    """Build D(x; σ) around a network."""
    match config.type:
        case "edm":
            return EDM(network, config.sigma_data)
        case "flow":
            return FlowDenoiser(network, config)
        case "discrete":
            return DiscreteDenoiser(network, config)
