"""The UNet of latent diffusion (Rombach et al. 2022, arXiv 2112.10752), unconditional."""

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, ValidationInfo, field_validator
from torch import Tensor, nn

from diffusion.layers import (
    Downsample,
    NoiseEmbedding,
    ResidualBlock,
    SelfAttention,
    Upsample,
    group_norm,
    zeroed,
)
from ldm.config import Config
from ldm.errors import LdmError


class UNetConfig(Config):
    """The defaults are the network of FFHQ-256 and CelebA-HQ-256: 274 M parameters."""

    type: Literal["ldm"] = "ldm"
    """Which network this is."""
    latent_channels: PositiveInt = 4
    """Channels of the latents, in and out."""
    channels: Annotated[int, Field(gt=0, multiple_of=2)] = 224
    """Width at full resolution, in channels."""
    multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 3, 4)
    """Width of each level, in multiples of `channels`; every level halves the resolution."""
    blocks: PositiveInt = 2
    """Residual blocks a level on the way down; one more on the way up."""
    attention_factors: tuple[PositiveInt, ...] = (2, 4, 8)
    """Downsampling factors at which blocks have attention; the middle always has it."""
    head_width: PositiveInt = 32
    """Channels of an attention head; divides every width that has attention."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping a value inside a residual block."""

    @field_validator("head_width")
    @classmethod
    def _divides(cls, head_width: int, info: ValidationInfo) -> int:
        known = info.data
        if {"channels", "multipliers", "attention_factors"} <= known.keys():
            last = len(known["multipliers"]) - 1
            for level, multiplier in enumerate(known["multipliers"]):
                width = known["channels"] * multiplier
                attends = level == last or 2**level in known["attention_factors"]
                if attends and width % head_width:
                    raise ValueError(f"must divide the {width} channels at factor {2**level}")
        return head_width


class Block(nn.Module):
    """A residual block, then attention where there is any: (B, in, H, W) → (B, out, H, W)."""

    def __init__(self, in_width: int, out_width: int, attends: bool, config: UNetConfig):
        super().__init__()
        self.residual = ResidualBlock(in_width, out_width, 4 * config.channels, config.dropout)
        self.attention = SelfAttention(out_width, config.head_width) if attends else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.residual(x, embedding))


class UNet(nn.Module):
    """F(x; c_noise), the network inside `EDM`; untrained, it answers 0.

    A level of the encoder is entered by a convolution (from the second on, a strided one); that
    and every block leave a skip. A level of the decoder has as many blocks as there are skips to
    take up, and is left by upsampling, the last by the convolution to the output.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        attends = [2**level in config.attention_factors for level in range(len(widths))]
        self.factor = 2 ** (len(widths) - 1)
        self.embed = NoiseEmbedding(config.channels)

        width, skip_widths = config.channels, []
        first = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.enter, self.encoder = nn.ModuleList([first]), nn.ModuleList()
        for level, out_width in enumerate(widths):
            if level > 0:
                self.enter.append(Downsample(width))
            into = [width] + [out_width] * (config.blocks - 1)
            self.encoder.append(
                nn.ModuleList(Block(i, out_width, attends[level], config) for i in into)
            )
            skip_widths += [width] + [out_width] * config.blocks
            width = out_width

        self.middle_in = Block(width, width, True, config)
        self.middle_out = Block(width, width, False, config)

        self.leave, self.decoder = nn.ModuleList(), nn.ModuleList()
        for level, out_width in reversed(list(enumerate(widths))):
            blocks = nn.ModuleList()
            for _ in range(config.blocks + 1):
                blocks.append(Block(width + skip_widths.pop(), out_width, attends[level], config))
                width = out_width
            self.decoder.append(blocks)
            if level > 0:
                self.leave.append(Upsample(width))
        last = zeroed(nn.Conv2d(width, config.latent_channels, 3, padding=1))
        self.leave.append(nn.Sequential(group_norm(width), nn.SiLU(), last))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Latents x (B, n_z, H, W), scaled noise levels c_noise (B,) → (B, n_z, H, W).

        Raises:
            LdmError: H or W cannot be halved once for each level but the last.
        """
        height, width = x.shape[2:]
        if height % self.factor or width % self.factor:
            raise LdmError(
                f"latents of {height}×{width} do not fit this UNet: "
                f"both sides must be multiples of {self.factor}"
            )
        embedding = self.embed(c_noise)  # (B, 4·channels)
        skips = []
        for enter, blocks in zip(self.enter, self.encoder, strict=True):
            x = enter(x)
            skips.append(x)
            for block in blocks:
                x = block(x, embedding)
                skips.append(x)
        x = self.middle_out(self.middle_in(x, embedding), embedding)
        for blocks, leave in zip(self.decoder, self.leave, strict=True):
            for block in blocks:
                x = block(torch.cat([x, skips.pop()], dim=1), embedding)
            x = leave(x)
        return x
