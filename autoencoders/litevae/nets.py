"""LiteVAE's feature UNet, for extraction and for aggregation (Sadat et al. 2024, 4.1, G).

NAFNet, a network without activation functions (Chen et al. 2022, arXiv 2204.04676).

A vision transformer for feature aggregation (Sadat et al. 2024, Appendix D.5, Table 20).

The networks that read wavelet sub-bands, by name: LiteVAE's extraction and aggregation.
"""

from typing import Annotated, Literal

import torch
from einops import rearrange
from pydantic import Field, PositiveInt, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders.cpu import channels_last
from autoencoders.layers import Block, ResidualBlock
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
        x = self.conv_in(channels_last(x))
        skips = []
        for block in self.inward:
            x = block(x)
            skips.append(x)
        x = self.middle(x)
        for block in self.outward:
            x = torch.cat([x, skips.pop()], dim=1)  # a line of its own: the old x is not kept alive
            x = block(x)
        return self.conv_out(x)


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


class ViTConfig(Config):
    """Size of a `ViT`; the defaults make 0.83 M parameters at n_z 4, the paper's LiteVAE-B 0.84."""

    type: Literal["vit"] = "vit"
    """Transformer blocks on the grid of latents, with learned positions."""
    width: PositiveInt = 128
    """Values a token."""
    depth: PositiveInt = 4
    """Transformer blocks, one after the other."""
    heads: PositiveInt = 4
    """Attention heads a block; they divide the width."""
    grid: PositiveInt = 16
    """Side of the grid of learned positions, in latents: 16 are images of 128² at f = 8."""

    @field_validator("heads")
    @classmethod
    def _divide_the_width(cls, heads: int, info: ValidationInfo) -> int:
        width = info.data.get("width")  # absent if it was itself refused
        if width is not None and width % heads:
            raise ValueError(f"it must divide the width, {width}")
        return heads


class ViT(nn.Module):
    """Dosovitskiy et al. 2021 (arXiv 2010.11929), a patch being one pixel of the feature maps.

    It belongs to one resolution, as the paper says: on a grid of another size than `grid` the
    learned positions are interpolated (bicubic), which works and is less good. Attention takes time
    in the square of the number of latents.
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

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H, W)."""
        height, width = x.shape[-2:]
        x = self.embed(x) + self.positions_on(height, width)
        tokens = self.blocks(rearrange(x, "b c h w -> b (h w) c"))
        return rearrange(self.out(self.norm_out(tokens)), "b (h w) c -> b c h w", h=height)

    def positions_on(self, height: int, width: int) -> Tensor:
        """The positions of a grid of height × width tokens: (1, width of a token, H, W)."""
        if self.positions.shape[-2:] == (height, width):
            return self.positions
        return F.interpolate(self.positions, (height, width), mode="bicubic", align_corners=False)


class TransformerBlock(Block):
    """Attention, then an MLP four times as wide, each on normalised tokens, each added."""

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
        """(B, tokens, width) → the same."""
        # Dosovitskiy et al. 2021, Equations 2 and 3
        query, key, value = rearrange(
            self.query_key_value(self.norm1(tokens)),
            "b n (three heads c) -> three b heads n c",
            three=3,
            heads=self.heads,
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.mix(rearrange(attended, "b heads n c -> b n (heads c)"))
        return tokens + self.mlp(self.norm2(tokens))


FEATURE_NETS = {"unet": FeatureUNet, "nafnet": NAFNet, "vit": ViT}
"""Each is built of (config, in_width, out_width) and keeps the resolution of what it is given."""

ExtractorConfig = Annotated[FeatureUNetConfig | NAFNetConfig, Field(discriminator="type")]
"""What can read the sub-bands of a level (Table 18)."""
AggregatorConfig = Annotated[FeatureUNetConfig | ViTConfig, Field(discriminator="type")]
"""What can join the levels (Table 20)."""
