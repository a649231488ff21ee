"""Networks that read wavelet sub-bands: LiteVAE's UNet, NAFNet and ViT (Sadat et al. 2024, App. D).

Each keeps the resolution of its input.
"""

from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

import torch
from einops import rearrange
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders.layers import Block, ResidualBlock, channels_last
from ldm.config import Config, Depth, Levels, Width


# ------------------------------------------------------------------------------------ UNet
class FeatureUNetConfig(Config):
    """Widths and depth of a `FeatureUNet`; the defaults are LiteVAE-B's (Tables 23, 24)."""

    type: Literal["unet"] = "unet"
    """A UNet of residual blocks at one resolution."""
    channels: Width = 32
    """Base width, in feature maps."""
    multipliers: Levels = (1, 2, 3)
    """Width of each level, as a multiple of `channels`."""
    blocks: Depth = 2
    """Residual blocks a level, before the middle and after it."""
    group_channels: Width = 1
    """Least channels in a group of a GroupNorm, which has at most 32 groups."""


class FeatureUNet(nn.Module):
    """UNet of residual blocks at one resolution (Sadat et al. 2024, Section 4.1, Appendix G).

    ADM's UNet (Dhariwal & Nichol 2021) without its down- and upsampling, attention and time
    embedding: its levels differ in width alone. Each block after the middle reads the output of its
    counterpart before it.
    """

    def __init__(self, config: FeatureUNetConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers for _ in range(config.blocks)]
        self.conv_in = nn.Conv2d(in_width, config.channels, 3, padding=1)
        down, up = pairwise([config.channels, *widths]), pairwise([widths[-1], *reversed(widths)])
        block = partial(ResidualBlock, least=config.group_channels)
        self.inward = nn.ModuleList(block(width, out) for width, out in down)
        self.middle = nn.Sequential(*(block(widths[-1], widths[-1]) for _ in range(2)))
        # a block after the middle reads the features of its counterpart, of width `out`, too
        self.outward = nn.ModuleList(block(width + out, out) for width, out in up)
        self.conv_out = nn.Conv2d(widths[0], out_width, 3, padding=1)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The layer that gives the output."""
        return self.conv_out

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H, W)."""
        x = self.conv_in(channels_last(x))
        skips = []
        for block in self.inward:
            x = block(x)
            skips.append(x)
        x = self.middle(x)
        for block in self.outward:
            x = torch.cat([x, skips.pop()], dim=1)  # a line of its own frees the old x
            x = block(x)
        return self.conv_out(x)


# ---------------------------------------------------------------------------------- NAFNet
class NAFNetConfig(Config):
    """Width and depth of a `NAFNet`.

    LiteVAE's paper gives neither (Table 18): the defaults come nearest to LiteVAE-B's extraction
    UNet, 1.693 M parameters against 1.686 M.
    """

    type: Literal["nafnet"] = "nafnet"
    """Blocks of gated convolutions, without activation functions."""
    channels: Width = 128
    """Width throughout, in feature maps."""
    blocks: Depth = 14
    """NAFNet blocks, one after the other."""


class NAFNet(nn.Module):
    """NAFNet (Chen et al. 2022, arXiv 2204.04676) at one resolution, between two 3×3 convolutions.

    Channel attention averages over the whole image: unlike the UNet's, each feature depends on
    every pixel, and features of a crop or a tile differ from the image's.
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
    """x + β·(gated, attended convolutions), then + γ·(gated MLP) (Chen et al. 2022, Figure 3d).

    β and γ start at 0, as theirs: a fresh network is its two outer convolutions, a linear map. The
    first step changes β and γ, and from then on everything learns.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Sequential(
            ChannelNorm(width, eps=1e-6),
            nn.Conv2d(width, 2 * width, 1),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width),
            SimpleGate(),
            ChannelAttention(width),
            nn.Conv2d(width, width, 1),
        )
        self.pointwise = nn.Sequential(
            ChannelNorm(width, eps=1e-6),
            nn.Conv2d(width, 2 * width, 1),
            SimpleGate(),
            nn.Conv2d(width, width, 1),
        )
        self.beta = nn.Parameter(torch.zeros(width, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(width, 1, 1))

    def transform(self, x: Tensor) -> Tensor:
        """(B, width, H, W) → the same shape."""
        x = x + self.beta * self.spatial(x)
        return x + self.gamma * self.pointwise(x)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) → the same shape."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SimpleGate(nn.Module):
    """Product of the two halves of the channels."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2·width, H, W) → (B, width, H, W)."""
        # Chen et al. 2022, Section 3.4: SimpleGate(X, Y) = X ⊙ Y
        half, other = x.chunk(2, dim=1)
        return half * other


class ChannelAttention(nn.Module):
    """Simplified channel attention: channels scaled by a linear map of their means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) → the same shape."""
        # Chen et al. 2022, Section 3.4: SCA(X) = X ∗ W pool(X)
        return x * self.conv(x.mean(dim=(2, 3), keepdim=True))


# ------------------------------------------------------------------------------------- ViT
class ViTConfig(Config):
    """Size of a `ViT`; the defaults make 0.83 M parameters at n_z 4, the paper's LiteVAE-B 0.84."""

    type: Literal["vit"] = "vit"
    """Transformer blocks on the grid of latents, with learned positions."""
    width: Width = 128
    """Width of a token."""
    depth: Depth = 4
    """Transformer blocks, one after the other."""
    heads: Width = 4
    """Attention heads of a block; they divide the width."""
    grid: Width = 16
    """Side of the grid of learned positions, in latents; 16 fit images of 128² at f = 8."""

    @field_validator("heads")
    @classmethod
    def _divide_the_width(cls, heads: int, info: ValidationInfo) -> int:
        width = info.data.get("width")  # absent if it was itself refused
        if width is not None and width % heads:
            raise ValueError(f"must divide width, {width}")
        return heads


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) on patches of one pixel.

    It fits one resolution, as the paper notes: on a grid of another size than `grid` the learned
    positions are interpolated (bicubic), which works less well. The time of attention grows with
    the square of the number of latents.
    """

    def __init__(self, config: ViTConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_width, config.width, 1)
        self.positions = nn.Parameter(torch.empty(1, config.width, config.grid, config.grid))
        nn.init.normal_(self.positions, std=0.02)
        self.blocks = nn.Sequential(
            *(TransformerBlock(config.width, config.heads) for _ in range(config.depth))
        )
        self.norm_out = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, out_width)

    @property
    def last_layer(self) -> nn.Linear:
        """The layer that gives the output."""
        return self.out

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H, W)."""
        height, width = x.shape[-2:]
        x = self.embed(x) + self.positions_on(height, width)
        tokens = self.blocks(rearrange(x, "b c h w -> b (h w) c"))
        return rearrange(self.out(self.norm_out(tokens)), "b (h w) c -> b c h w", h=height)

    def positions_on(self, height: int, width: int) -> Tensor:
        """Positions of a grid of height × width tokens: (1, width of a token, H, W)."""
        if self.positions.shape[-2:] == (height, width):
            return self.positions
        return F.interpolate(self.positions, (height, width), mode="bicubic", align_corners=False)


class TransformerBlock(Block):
    """Self-attention, then an MLP four times as wide, both residual on normalised tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def transform(self, tokens: Tensor) -> Tensor:
        """(B, tokens, width) → the same shape."""
        # Dosovitskiy et al. 2021, Equations 2 and 3
        projected = self.query_key_value(self.norm1(tokens)).unflatten(-1, (3, self.heads, -1))
        query, key, value = rearrange(projected, "b n three heads c -> three b heads n c")
        attended = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.mix(rearrange(attended, "b heads n c -> b n (heads c)"))
        return tokens + self.mlp(self.norm2(tokens))


# ----------------------------------------------------------------------------------- names
FEATURE_NETS = {"unet": FeatureUNet, "nafnet": NAFNet, "vit": ViT}
ExtractorConfig = Annotated[FeatureUNetConfig | NAFNetConfig, Field(discriminator="type")]
"""Networks that read the sub-bands of a level (Table 18)."""
AggregatorConfig = Annotated[FeatureUNetConfig | ViTConfig, Field(discriminator="type")]
"""Networks that join the levels (Table 20)."""
