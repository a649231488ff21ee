"""The UNet of latent diffusion (Rombach et al. 2022, arXiv 2112.10752), and its order of levels and
skips, which the network of EDM2 shares."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, Literal, cast

import torch
from einops import rearrange
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.network import Network, NetworkSizes, sinusoids, zeroed
from ldm.config import Depth, Levels, Width

Way = Literal["down", "up"]
Factors = Annotated[tuple[Width, ...], Field(max_length=16)]


# ------------------------------------------------------------------------ levels and skips
class UNetSizes(NetworkSizes):
    """The fields that the configs of both UNets share."""

    channels: Width
    """Width at full resolution, in channels."""
    multipliers: Levels = (1, 2, 3, 4)
    """Width of each level, in multiples of `channels`; every level halves the resolution."""

    @property
    def factor(self) -> int:
        """Both sides of a latent must be multiples of it: they are halved between levels."""
        return int(2 ** (len(self.multipliers) - 1))

    @field_validator("heads", "head_width", check_fields=False)
    @classmethod
    def _divides(cls, count: int | None, info: ValidationInfo) -> int | None:
        is_unused = info.field_name == "head_width" and info.data.get("heads")
        if count is not None and not is_unused:
            with suppress(KeyError):  # of a field that was itself refused
                for factor, width in attending(info.data).items():
                    if width % count:
                        raise ValueError(f"must divide the {width} channels at factor {factor}")
        return count


def attending(sizes: Mapping[str, Any]) -> dict[int, int]:
    """Width of every level with attention, by downsampling factor; the last is the middle's too."""
    widths = {2**level: sizes["channels"] * m for level, m in enumerate(sizes["multipliers"])}
    factors = {*sizes["attention_factors"], max(widths)}
    return {factor: width for factor, width in widths.items() if factor in factors}


class UNetBase(Network):
    """A network of levels of blocks, and skips between them.

    A level of the encoder is entered by a layer, from the second level on by one that halves both
    sides; that layer and every block leave a skip. A level of the decoder has as many blocks as
    there are skips to take up, and is left by a layer that doubles both sides, all but the last.
    Subclasses make the layers.

    Args:
        config, embed: see `Network`.
        first: the layer that enters the first level.
    """

    def __init__(self, config: Any, embed: nn.Module, first: nn.Module) -> None:
        super().__init__(config, embed)
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        attends = [2**level in config.attention_factors for level in range(len(widths))]

        width, skip_widths = config.channels, []
        self.enter, self.encoder = nn.ModuleList([first]), nn.ModuleList()
        for level, out_width in enumerate(widths):
            if level > 0:
                self.enter.append(self.make_resample(width, "down"))
            blocks = nn.ModuleList()
            for into in [width] + [out_width] * (config.blocks - 1):
                blocks.append(self.make_block(into, out_width, attends[level], encodes=True))
            self.encoder.append(blocks)
            skip_widths += [width] + [out_width] * config.blocks
            width = out_width

        self.middle_in = self.make_block(width, width, attends=True)
        self.middle_out = self.make_block(width, width, attends=False)

        self.leave, self.decoder = nn.ModuleList(), nn.ModuleList()
        for level, out_width in reversed(list(enumerate(widths))):
            blocks = nn.ModuleList()
            for _ in range(config.blocks + 1):
                into = width + skip_widths.pop()
                blocks.append(self.make_block(into, out_width, attends[level]))
                width = out_width
            self.decoder.append(blocks)
            if level > 0:
                self.leave.append(self.make_resample(width, "up"))

    @abstractmethod
    def make_block(
        self, in_width: int, out_width: int, attends: bool, encodes: bool = False
    ) -> nn.Module:
        """A block: x (B, in, H, W), embedding → (B, out, H, W)."""

    @abstractmethod
    def make_resample(self, width: int, way: Way) -> nn.Module:
        """A layer between two levels: x, embedding → x of half or twice the sides."""

    def concat(self, x: Tensor, skip: Tensor) -> Tensor:
        """The input of a block of the decoder."""
        return torch.cat([x, skip], dim=1)

    def transform(self, x: Tensor, embedding: Tensor) -> Tensor:
        skips = []
        for level, blocks in enumerate(self.encoder):
            x = self.run(self.enter[level], x, embedding) if level > 0 else self.enter[0](x)
            skips.append(x)
            for block in cast(nn.ModuleList, blocks):
                x = self.run(block, x, embedding)
                skips.append(x)
        x = self.run(self.middle_out, self.run(self.middle_in, x, embedding), embedding)
        for level, blocks in enumerate(self.decoder):
            x = self.run(self.leave[level - 1], x, embedding) if level > 0 else x
            for block in cast(nn.ModuleList, blocks):
                x = self.run(partial(self._join, block), x, skips.pop(), embedding)
        return x

    def _join(self, block: nn.Module, x: Tensor, skip: Tensor, embedding: Tensor) -> Tensor:
        return block(self.concat(x, skip), embedding)


# ------------------------------------------------------------- the network of latent diffusion
class UNetConfig(UNetSizes):
    """The defaults are the network of FFHQ-256 and CelebA-HQ-256: 274 M parameters."""

    type: Literal["ldm"] = "ldm"
    """Type of the network."""
    channels: Annotated[int, Field(gt=0, le=65_536, multiple_of=2)] = 224
    """Width at full resolution, in channels."""
    blocks: Depth = 2
    """Residual blocks a level on the way down; one more on the way up."""
    attention_factors: Factors = (2, 4, 8)
    """Downsampling factors at which blocks have attention; the middle always has it."""
    heads: Width | None = None
    """Heads of every attention; null: as many as are `head_width` wide."""
    head_width: Width = 32
    """Channels of an attention head where `heads` is null; divides every width with attention."""
    scale_shift: bool = False
    """Let the noise embedding scale and shift normalised activations, instead of a sum before."""
    resample_blocks: bool = False
    """Halve and double the resolution by residual blocks, instead of single convolutions."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping a value inside a residual block."""

    def head_width_of(self, width: int) -> int:
        """Channels of a head of attention over `width` channels."""
        return width // self.heads if self.heads else self.head_width


def group_norm(width: int) -> nn.GroupNorm:
    """32 groups where they divide the width, else the largest power of two that does.

    A group has at least two channels: normalised alone, a channel loses any constant added to it,
    and the noise embedding with it.
    """
    return nn.GroupNorm(min(math.gcd(32, width), width // 2), width, eps=1e-5)


def resample(x: Tensor, way: Way | None) -> Tensor:
    """Double H and W by nearest neighbours, or halve them by means; None: leave x as it is."""
    if way == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if way == "up" else x


class NoiseEmbedding(nn.Module):
    """Noise level, class and augmentation as the vector (B, 4·channels) that every block reads.

    A class adds its row of a table (Dhariwal and Nichol 2021, Section 3.1). An augmentation (Karras
    et al. 2022, Appendix F.2) is embedded linearly without a bias, so that zeros add nothing.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.channels, width = config.channels, 4 * config.channels
        parameters = config.augment_parameters
        self.linear_in = nn.Linear(config.channels, width)
        self.linear_out = nn.Linear(width, width)
        self.classes = nn.Embedding(config.classes, width) if config.classes else None
        self.augment = nn.Linear(parameters, width, bias=False) if parameters else None

    def forward(self, c_noise: Tensor, labels: Tensor, augment: Tensor) -> Tensor:
        """c_noise (B,), labels (B,), augment (B, A) → (B, 4·channels)."""
        weight = self.linear_in.weight
        waves = sinusoids(c_noise, self.channels).to(weight.dtype)
        embedding = self.linear_out(F.silu(self.linear_in(waves)))
        if self.classes is not None:
            is_known = (labels >= 0).to(weight.dtype)[:, None]  # (B, 1)
            embedding = embedding + is_known * self.classes(labels.clamp(min=0))
        if self.augment is not None:
            embedding = embedding + self.augment(augment.to(weight))
        return F.silu(embedding)


class UNetResidual(nn.Module):
    """Two 3×3 convolutions, the noise embedding between them: (B, in, H, W) → (B, out, H, W).

    With `scale_shift` the embedding scales and shifts the normalised activations (AdaGN, Dhariwal
    and Nichol 2021, Section 3.1) instead of being added before the normalisation. With a `way` H
    and W are doubled or halved, on the skip too, before the first convolution (BigGAN's blocks,
    Brock et al. 2019, Appendix B).
    """

    def __init__(self, in_width: int, out_width: int, config: UNetConfig, way: Way | None = None):
        super().__init__()
        self.scale_shift, self.way = config.scale_shift, way
        self.norm1 = group_norm(in_width)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.shift = nn.Linear(4 * config.channels, (2 if config.scale_shift else 1) * out_width)
        self.norm2 = group_norm(out_width)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zeroed(nn.Conv2d(out_width, out_width, 3, padding=1))
        same = in_width == out_width
        self.skip = nn.Identity() if same else nn.Conv2d(in_width, out_width, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        # sums are written to the convolutions' own output, which no gradient needs: on a CPU new
        # memory costs more than the sum
        h = F.silu(self.norm1(x))
        h = self.conv1(resample(h, self.way))
        shift = self.shift(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            # Dhariwal and Nichol 2021, Section 3.1, with the scale counted from 1
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h.add_(shift))
        h = self.conv2(self.dropout(F.silu(h)))
        return h.add_(self.skip(resample(x, self.way)))


class UNetAttention(nn.Module):
    """Multi-head attention between all positions, added to its input (B, width, H, W)."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.head_width = head_width
        self.norm = group_norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        query, key, value = rearrange(
            self.qkv(tokens), "b n (qkv heads d) -> qkv b heads n d", qkv=3, d=self.head_width
        )
        # Vaswani et al. 2017, Equation 1
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = self.proj(rearrange(mixed, "b heads n d -> b n (heads d)"))
        return x + rearrange(mixed, "b (h w) c -> b c h w", h=x.shape[2])


class UNetDownsample(nn.Conv2d):
    """Strided 3×3 convolution: (B, width, H, W) → (B, width, H/2, W/2); ignores the embedding."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        return super().forward(x)


class UNetUpsample(nn.Module):
    """Nearest neighbours, then a 3×3 convolution: (B, width, H, W) → (B, width, 2H, 2W)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        return self.conv(resample(x, "up"))


class UNetBlock(nn.Module):
    """A residual block, then attention where there is any: (B, in, H, W) → (B, out, H, W)."""

    def __init__(self, in_width: int, out_width: int, attends: bool, config: UNetConfig):
        super().__init__()
        self.residual = UNetResidual(in_width, out_width, config)
        head_width = config.head_width_of(out_width)
        self.attention = UNetAttention(out_width, head_width) if attends else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.residual(x, embedding))


class UNet(UNetBase):
    """The UNet of latent diffusion; untrained, it answers 0.

    Convolutions change the resolution, or residual blocks with `resample_blocks`. Both sides of a
    latent must be multiples of its `factor`.
    """

    config: UNetConfig

    def __init__(self, config: UNetConfig):
        embed = NoiseEmbedding(config)
        first = nn.Conv2d(config.latent_channels, config.channels, 3, padding=1)
        super().__init__(config, embed, first)
        width = config.channels * config.multipliers[0]
        last = zeroed(nn.Conv2d(width, config.latent_channels, 3, padding=1))
        self.leave.append(nn.Sequential(group_norm(width), nn.SiLU(), last))

    def make_block(
        self, in_width: int, out_width: int, attends: bool, encodes: bool = False
    ) -> UNetBlock:
        return UNetBlock(in_width, out_width, attends, self.config)

    def make_resample(self, width: int, way: Way) -> nn.Module:
        if self.config.resample_blocks:
            return UNetResidual(width, width, self.config, way)
        return UNetDownsample(width) if way == "down" else UNetUpsample(width)

    def transform(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.leave[-1](super().transform(x, embedding))
