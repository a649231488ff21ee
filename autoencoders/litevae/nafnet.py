"""NAFNet, a network without activation functions (Chen et al. 2022, arXiv 2204.04676)."""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from autoencoders.layers import Block
from ldm.config import Config


class NAFNetConfig(Config):
    """Width and depth of a `NAFNet`.

    LiteVAE's paper gives neither (Table 18): these come nearest to LiteVAE-B's extraction UNet,
    1.693 M parameters against 1.686 M.
    """

    type: Literal["nafnet"] = "nafnet"
    """Blocks of gated convolutions, without activation functions."""
    channels: PositiveInt = 128
    """Width throughout, in feature maps."""
    blocks: PositiveInt = 14
    """NAFNet blocks, one after the other."""


class NAFNet(nn.Module):
    """NAFNet's blocks at one resolution between two 3×3 convolutions.

    Channel attention averages over the whole image: unlike the UNet's, a feature depends on every
    pixel, and features of a crop or a tile differ from the image's.
    """

    def __init__(self, config: NAFNetConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_width, config.channels, 3, padding=1)
        self.blocks = nn.Sequential(*(NAFBlock(config.channels) for _ in range(config.blocks)))
        self.conv_out = nn.Conv2d(config.channels, out_width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H, W)."""
        return self.conv_out(self.blocks(self.conv_in(x)))


class NAFBlock(Block):
    """Chen et al. 2022, Figure 3d: x + β·(gated, attended convolutions), then + γ·(gated MLP).

    β and γ start at 0, as theirs: a fresh network is its two outer convolutions, a linear map that
    passes the sub-bands on. The first step moves β and γ, and from then on everything learns.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Sequential(
            ChannelNorm(width),
            nn.Conv2d(width, 2 * width, 1),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width),
            SimpleGate(),
            ChannelAttention(width),
            nn.Conv2d(width, width, 1),
        )
        self.pointwise = nn.Sequential(
            ChannelNorm(width),
            nn.Conv2d(width, 2 * width, 1),
            SimpleGate(),
            nn.Conv2d(width, width, 1),
        )
        self.beta = nn.Parameter(torch.zeros(width, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(width, 1, 1))

    def transform(self, x: Tensor) -> Tensor:
        """(B, width, H, W) → the same."""
        x = x + self.beta * self.spatial(x)
        return x + self.gamma * self.pointwise(x)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel: (B, width, H, W) → the same."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) → the same."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SimpleGate(nn.Module):
    """One half of the channels times the other: (B, 2·width, H, W) → (B, width, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2·width, H, W) → (B, width, H, W)."""
        # Chen et al. 2022, Section 3.4: SimpleGate(X, Y) = X ⊙ Y
        half, other = x.chunk(2, dim=1)
        return half * other


class ChannelAttention(nn.Module):
    """Simplified channel attention: each channel scaled by the image's mean of all of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) → the same."""
        # Chen et al. 2022, Section 3.4: SCA(X) = X ∗ W pool(X)
        return x * self.conv(x.mean(dim=(2, 3), keepdim=True))
