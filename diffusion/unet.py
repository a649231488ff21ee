"""The UNet of latent diffusion (Rombach et al. 2022, arXiv 2112.10752)."""

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator
from torch import Tensor, nn

from diffusion.condition import check_condition
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
    classes: NonNegativeInt = 0
    """Classes it can be told, 0 for none; taken from the data."""
    augment_parameters: NonNegativeInt = 0
    """Values that tell it of an augmentation, 0 for none; taken from the recipe."""
    channels: Annotated[int, Field(gt=0, multiple_of=2)] = 224
    """Width at full resolution, in channels."""
    multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 3, 4)
    """Width of each level, in multiples of `channels`; every level halves the resolution."""
    blocks: PositiveInt = 2
    """Residual blocks a level on the way down; one more on the way up."""
    attention_factors: tuple[PositiveInt, ...] = (2, 4, 8)
    """Downsampling factors at which blocks have attention; the middle always has it."""
    heads: PositiveInt | None = None
    """Heads of every attention; null: as many as are `head_width` wide."""
    head_width: PositiveInt = 32
    """Channels of an attention head where `heads` is null; divides every width with attention."""
    scale_shift: bool = False
    """Whether the noise embedding scales and shifts what is normalised, instead of a sum before."""
    resample_blocks: bool = False
    """Whether residual blocks halve and double the resolution, instead of single convolutions."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping a value inside a residual block."""

    @field_validator("heads", "head_width")
    @classmethod
    def _divides(cls, count: int | None, info: ValidationInfo) -> int | None:
        known = info.data
        is_idle = count is None or (info.field_name == "head_width" and known.get("heads"))
        if not is_idle and {"channels", "multipliers", "attention_factors"} <= known.keys():
            sizes = known["channels"], known["multipliers"], known["attention_factors"]
            for factor, width in _attending(*sizes):
                if width % count:
                    raise ValueError(f"must divide the {width} channels at factor {factor}")
        return count

    def attending_widths(self) -> set[int]:
        """Widths, in channels, that some attention has."""
        sizes = self.channels, self.multipliers, self.attention_factors
        return {width for _, width in _attending(*sizes)}


def _attending(
    channels: int, multipliers: tuple[int, ...], attention_factors: tuple[int, ...]
) -> Iterator[tuple[int, int]]:
    """Downsampling factor and width of every level with attention; the last is the middle's too."""
    for level, multiplier in enumerate(multipliers):
        if level == len(multipliers) - 1 or 2**level in attention_factors:
            yield 2**level, channels * multiplier


def _residual(
    in_width: int,
    out_width: int,
    config: UNetConfig,
    resample: Literal["down", "up"] | None = None,
) -> ResidualBlock:
    rest = 4 * config.channels, config.dropout, config.scale_shift, resample
    return ResidualBlock(in_width, out_width, *rest)


def _halving(width: int, config: UNetConfig) -> nn.Module:
    return _residual(width, width, config, "down") if config.resample_blocks else Downsample(width)


def _doubling(width: int, config: UNetConfig) -> nn.Module:
    return _residual(width, width, config, "up") if config.resample_blocks else Upsample(width)


class Block(nn.Module):
    """A residual block, then attention where there is any: (B, in, H, W) → (B, out, H, W)."""

    def __init__(self, in_width: int, out_width: int, attends: bool, config: UNetConfig):
        super().__init__()
        self.residual = _residual(in_width, out_width, config)
        head_width = out_width // config.heads if config.heads else config.head_width
        self.attention = SelfAttention(out_width, head_width) if attends else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, in, H, W), embedding (B, 4·channels) → (B, out, H, W)."""
        return self.attention(self.residual(x, embedding))


class UNet(nn.Module):
    """F(x; c_noise), the network inside a denoiser; untrained, it answers 0.

    A level of the encoder is entered by a convolution (from the second on, a strided one, or a
    residual block that halves); that and every block leave a skip. A level of the decoder has as
    many blocks as there are skips to take up, and is left by upsampling, the last by the
    convolution to the output.

    Attributes:
        config: what it was built from.
        factor: both sides of a latent must be multiples of it.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        attends = [2**level in config.attention_factors for level in range(len(widths))]
        self.config = config
        self.factor = 2 ** (len(widths) - 1)
        self.embed = NoiseEmbedding(config.channels, config.classes, config.augment_parameters)

        width, skip_widths = config.channels, []
        first = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.enter, self.encoder = nn.ModuleList([first]), nn.ModuleList()
        for level, out_width in enumerate(widths):
            if level > 0:
                self.enter.append(_halving(width, config))
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
                self.leave.append(_doubling(width, config))
        last = zeroed(nn.Conv2d(width, config.latent_channels, 3, padding=1))
        self.leave.append(nn.Sequential(group_norm(width), nn.SiLU(), last))

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """What a denoiser makes its answer of: (B, n_z, H, W).

        Args:
            x: scaled noisy latents (B, n_z, H, W).
            c_noise: noise levels (B,) as the network counts them: ¼ ln σ, or a time step.
            labels: classes (B,), whole numbers below `config.classes`, −1 for no class; None: −1
                throughout. On a CPU, where they come from, their check costs a GPU no wait.
            augment: parameters of the augmentation (B, config.augment_parameters); None: zeros,
                which is none.

        Raises:
            LdmError: H or W cannot be halved once for each level but the last, or a label or a
                number of augmentation parameters that this network does not know.
        """
        height, width = x.shape[2:]
        if height % self.factor or width % self.factor:
            raise LdmError(
                f"latents of {height}×{width} do not fit this UNet: "
                f"both sides must be multiples of {self.factor}"
            )
        known = self.config.classes, self.config.augment_parameters
        check_condition(len(x), labels, augment, *known)
        embedding = self.embed(c_noise, labels, augment)  # (B, 4·channels)
        skips = []
        for enter, blocks in zip(self.enter, self.encoder, strict=True):
            x = _step(enter, x, embedding)
            skips.append(x)
            for block in blocks:
                x = block(x, embedding)
                skips.append(x)
        x = self.middle_out(self.middle_in(x, embedding), embedding)
        for blocks, leave in zip(self.decoder, self.leave, strict=True):
            for block in blocks:
                x = block(torch.cat([x, skips.pop()], dim=1), embedding)
            x = _step(leave, x, embedding)
        return x


def _step(layer: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
    """From one level to the next, by a layer that may read the noise embedding."""
    return layer(x, embedding) if isinstance(layer, ResidualBlock) else layer(x)
