"""LiteVAE's feature UNet, for extraction and for aggregation (Sadat et al. 2024, 4.1, G)."""

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from autoencoders.layers import ResidualBlock, quick_layout
from ldm.config import Config


class FeatureUNetConfig(Config):
    """Widths and depth of a `FeatureUNet`; the defaults are LiteVAE-B's (Tables 23, 24)."""

    type: Literal["unet"] = "unet"
    """A UNet of residual blocks at one resolution."""
    channels: PositiveInt = 32
    """Base width, in feature maps."""
    multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 3)
    """Width of each level, as a multiple of `channels`."""
    blocks: PositiveInt = 2
    """Residual blocks a level, on the way in and on the way out."""


class FeatureUNet(nn.Module):
    """A UNet of residual blocks that never changes resolution (Sadat et al. 2024, 4.1, G).

    ADM's UNet (Dhariwal & Nichol 2021) without its down- and upsampling, attention and time
    embedding: "levels" differ in width alone. Every block on the way out reads the output of its
    counterpart on the way in.
    """

    def __init__(self, config: FeatureUNetConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers for _ in range(config.blocks)]
        self.conv_in = nn.Conv2d(in_width, config.channels, 3, padding=1)
        width, inward = config.channels, []
        for out in widths:
            inward.append(ResidualBlock(width, out))
            width = out
        self.inward = nn.ModuleList(inward)
        self.middle = nn.Sequential(ResidualBlock(width, width), ResidualBlock(width, width))
        outward = []
        for out in reversed(widths):
            outward.append(ResidualBlock(width + out, out))  # `out` is its counterpart's width too
            width = out
        self.outward = nn.ModuleList(outward)
        self.conv_out = nn.Conv2d(width, out_width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H, W)."""
        x = self.conv_in(quick_layout(x))
        skips = []
        for block in self.inward:
            x = block(x)
            skips.append(x)
        x = self.middle(x)
        for block in self.outward:
            x = torch.cat([x, skips.pop()], dim=1)  # a line of its own: the old x is not kept alive
            x = block(x)
        return self.conv_out(x)
