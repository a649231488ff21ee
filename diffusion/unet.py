"""What a network is told besides the noise level: refused in one line where it cannot know it.

The parts of the latent diffusion UNet (Rombach et al. 2022, arXiv 2112.10752).

The UNet of latent diffusion (Rombach et al. 2022, arXiv 2112.10752).
"""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from einops import rearrange
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config import Config
from ldm.errors import LdmError


def check_condition(
    batch: int,
    labels: Tensor | None,
    augment: Tensor | None,
    classes: int,
    augment_parameters: int,
) -> None:
    """Refuse labels (B,) and augmentations (B, A) that a network does not know.

    Labels are looked at: where they lie on a CPU, a GPU need not be waited for.

    Args:
        batch: B.
        classes: how many the network knows; −1 is no label, and always known.
        augment_parameters: how many it takes.

    Raises:
        LdmError: a label below −1 or not below `classes`, A is another number, or one of the two
            is of another shape, or labels are no whole numbers.
    """
    if labels is not None:
        if labels.shape != (batch,) or labels.dtype not in (torch.int32, torch.int64):
            raise LdmError(
                f"labels are {labels.dtype} {tuple(labels.shape)}: they must be int64 ({batch},)"
            )
        wrong = labels[(labels < -1) | (labels >= classes)]
        if len(wrong) and not classes:
            raise LdmError(
                f"label {wrong[0]} was given to a network without classes: leave labels out, or "
                "train one on labelled images"
            )
        if len(wrong):
            raise LdmError(
                f"label {wrong[0]} is none of this network's: they are 0 to {classes - 1}, and −1 "
                "for none"
            )
    if augment is not None and augment.shape != (batch, augment_parameters):
        raise LdmError(
            f"augmentation parameters {tuple(augment.shape)} were given to a network of "
            f"{augment_parameters} for {batch} image(s)"
        )


def group_norm(width: int) -> nn.GroupNorm:
    """32 groups where they divide the width, else the largest power of two that does.

    A group has two channels at least: normalised alone, a channel loses whatever constant was
    added to it, and the noise embedding with it.
    """
    return nn.GroupNorm(min(math.gcd(32, width), width // 2), width, eps=1e-5)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with its parameters at 0: what it ends starts out as the identity, or as 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of positions (B,) at falling frequencies → (B, width), width even.

    In float32, or in the positions' dtype where that is finer: a time step of 999 needs it.
    """
    # Vaswani et al. 2017, Section 3.5: frequencies 10000^(−i / (width/2))
    ramp = torch.arange(width // 2, dtype=torch.float32, device=positions.device)
    frequencies = torch.exp(-math.log(10_000) * ramp / (width // 2))
    angles = positions[:, None] * frequencies  # (B, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class NoiseEmbedding(nn.Module):
    """What every residual block reads: the noise level and, where the network knows them, the
    image's class and the parameters of its augmentation, in one vector of 4·channels values.

    Args:
        channels: the UNet's width, which is that of the noise level's sinusoids.
        classes: rows of the table of classes, added to the embedding (Dhariwal and Nichol 2021,
            Section 3.1); 0: it knows no classes.
        augment_parameters: values that describe an augmentation (Karras et al. 2022, Appendix F.2),
            embedded linearly without a bias, so that zeros add nothing; 0: it takes none.
    """

    def __init__(self, channels: int, classes: int = 0, augment_parameters: int = 0):
        super().__init__()
        self.channels = channels
        self.linear_in = nn.Linear(channels, 4 * channels)
        self.linear_out = nn.Linear(4 * channels, 4 * channels)
        self.classes = nn.Embedding(classes, 4 * channels) if classes else None
        self.augment = (
            nn.Linear(augment_parameters, 4 * channels, bias=False) if augment_parameters else None
        )

    def forward(
        self, c_noise: Tensor, labels: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """c_noise (B,), labels (B,) or None, augment (B, A) or None → (B, 4·channels)."""
        weight = self.linear_in.weight
        waves = sinusoids(c_noise, self.channels).to(weight.dtype)
        embedding = self.linear_out(F.silu(self.linear_in(waves)))
        # None is spelled out, so that these weights have a gradient in every step, as DDP expects
        if self.classes:
            if labels is None:
                labels = torch.full((len(c_noise),), -1, device=weight.device)
            labels = labels.to(weight.device)
            is_known = (labels >= 0).to(weight.dtype)[:, None]  # (B, 1)
            embedding = embedding + is_known * self.classes(labels.clamp(min=0))
        if self.augment:
            if augment is None:
                augment = weight.new_zeros(len(c_noise), self.augment.in_features)
            embedding = embedding + self.augment(augment.to(weight))
        return F.silu(embedding)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, the noise embedding between them: (B, in, H, W) → (B, out, H, W).

    Args:
        scale_shift: the embedding scales and shifts what is normalised (Dhariwal and Nichol 2021,
            Section 3.1, AdaGN) instead of being added before the normalisation.
        resample: halve or double H and W, on the skip too, before the first convolution (BigGAN's
            blocks, Brock et al. 2019, Appendix B).
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        embedding_width: int,
        dropout: float,
        scale_shift: bool = False,
        resample: Literal["down", "up"] | None = None,
    ):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = group_norm(in_width)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.shift = nn.Linear(embedding_width, (2 if scale_shift else 1) * out_width)
        self.norm2 = group_norm(out_width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_width, out_width, 3, padding=1))
        same = in_width == out_width
        self.skip = nn.Identity() if same else nn.Conv2d(in_width, out_width, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, in, H, W), embedding (B, 4·channels) → (B, out, H, W), or half or twice as large.

        The sums are made in the convolutions' own output, which no gradient asks for: new memory
        costs a CPU more than the sum.
        """
        h = F.silu(self.norm1(x))
        if self.resample:
            x, h = self._resampled(x), self._resampled(h)
        h = self.conv1(h)
        shift = self.shift(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            # Dhariwal and Nichol 2021, Section 3.1, with the scale counted from 1
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h.add_(shift))
        h = self.conv2(self.dropout(F.silu(h)))
        return h.add_(self.skip(x))

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest")


class SelfAttention(nn.Module):
    """Multi-head attention between all positions, added to its input (B, width, H, W)."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.head_width = head_width
        self.norm = group_norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) → (B, width, H, W)."""
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        query, key, value = rearrange(
            self.qkv(tokens), "b n (qkv heads d) -> qkv b heads n d", qkv=3, d=self.head_width
        )
        # Vaswani et al. 2017, Equation 1
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = self.proj(rearrange(mixed, "b heads n d -> b n (heads d)"))
        return x + rearrange(mixed, "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Conv2d):
    """Strided 3×3 convolution: (B, width, H, W) → (B, width, H/2, W/2)."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, stride=2, padding=1)


class Upsample(nn.Module):
    """Nearest neighbours, then a 3×3 convolution: (B, width, H, W) → (B, width, 2H, 2W)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) → (B, width, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


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
