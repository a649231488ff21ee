"""Networks and denoisers by the `type` of their config."""

from typing import Annotated

from pydantic import Field
from torch import nn

from diffusion.discrete import DiscreteConfig, DiscreteDenoiser
from diffusion.edm import EDM, EDMConfig
from diffusion.edm2 import EDM2Config, EDM2UNet
from diffusion.unet import UNet, UNetConfig

NetworkConfig = Annotated[UNetConfig | EDM2Config, Field(discriminator="type")]
DenoiserConfig = Annotated[EDMConfig | DiscreteConfig, Field(discriminator="type")]

NETWORKS = {"ldm": UNet, "edm2": EDM2UNet}


def build_network(config: UNetConfig | EDM2Config) -> nn.Module:
    """Build the untrained network of a config."""
    return NETWORKS[config.type](config)


def build_denoiser(
    network: nn.Module, config: EDMConfig | DiscreteConfig
) -> EDM | DiscreteDenoiser:
    """Build D(x; σ) around a network."""
    if config.type == "edm":
        return EDM(network, config.sigma_data)
    return DiscreteDenoiser(network, config)
