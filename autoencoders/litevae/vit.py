"""A vision transformer for feature aggregation (Sadat et al. 2024, Appendix D.5, Table 20)."""

from typing import Literal

import torch
from einops import rearrange
from pydantic import PositiveInt, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders.layers import Block
from ldm.config import Config


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
