"""Discriminators: images → logits, high where they look real (Sadat et al. 2024, Table 10)."""

from typing import Annotated

from pydantic import Field
from torch import nn

from autoencoders.discriminators.layers import Logits, split
from autoencoders.discriminators.patchgan import PatchGAN, PatchGANConfig
from autoencoders.discriminators.stylegan import StyleGANConfig, StyleGANDiscriminator
from autoencoders.discriminators.unet import UNetDiscriminator, UNetDiscriminatorConfig

DISCRIMINATORS = {
    "unet": UNetDiscriminator,
    "patchgan": PatchGAN,
    "stylegan": StyleGANDiscriminator,
}

DiscriminatorConfig = Annotated[
    UNetDiscriminatorConfig | PatchGANConfig | StyleGANConfig, Field(discriminator="type")
]


def build_discriminator(config: DiscriminatorConfig) -> nn.Module:
    """Build the network that a config describes: (B, 3, H, W) in [−1, 1] → `Logits`."""
    return DISCRIMINATORS[config.type](config)


__all__ = [
    "DISCRIMINATORS",
    "DiscriminatorConfig",
    "Logits",
    "PatchGAN",
    "PatchGANConfig",
    "StyleGANConfig",
    "StyleGANDiscriminator",
    "UNetDiscriminator",
    "UNetDiscriminatorConfig",
    "build_discriminator",
    "split",
]
