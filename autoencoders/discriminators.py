"""Discriminators: images → logits, high where they look real (Sadat et al. 2024, Table 10)."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

from autoencoders.layers import group_norm
from ldm.config import (
    Config,
    Depth,
    Levels,
    Resolution,
    Width,
    format_size,
    height_width,
    resolution_of,
    shorter_side,
)
from ldm.errors import LdmError

Logits = tuple[Tensor, ...]
"""Maps of logits in float32, the finest first: each (B, 1) or (B, 1, h, w), high is real."""

LayerT = TypeVar("LayerT", nn.Conv2d, nn.Linear, nn.GroupNorm)


def split(logits: Logits, parts: int) -> list[Logits]:
    """Split logits of a batch into those of its equal parts, in order: real, fake, …."""
    assert len(logits[0]) % parts == 0, f"{len(logits[0])} images in {parts} equal parts"
    return list(zip(*(maps.chunk(parts) for maps in logits), strict=True))


def drawn(layer: LayerT, draw: Callable[..., Tensor], **options: float) -> LayerT:
    """The layer, its weight filled by `draw`, its bias at 0."""
    draw(layer.weight, **options)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def check_images(images: Tensor, check_resolution: Callable[[Resolution], None]) -> None:
    """Raise LdmError if a config's check refuses the size of images (B, C, H, W)."""
    size = resolution_of(*images.shape[-2:])
    try:
        check_resolution(size)
    except ValueError as error:
        raise LdmError(f"images of {format_size(size)} pixels: {error}") from error


# ----------------------------------------------------------------------------------- U-Net
class UNetDiscriminatorConfig(Config):
    """Widths of the U-Net discriminator; the defaults are the paper's for images of 128×128."""

    type: Literal["unet"] = "unet"
    """A logit for every pixel, and one for the image as a whole."""
    channels: Width = 64
    """Base width, in feature maps."""
    multipliers: Levels = (1, 2, 4, 8, 16)
    """Width after each halving of the image, as a multiple of `channels`, mirrored on the way up;
    for 256×256 U-Net GAN has (1, 2, 4, 8, 8, 16)."""

    def check_resolution(self, resolution: Resolution) -> None:
        """Raise a ValueError of one line if a side of such images cannot be halved."""
        factor = 2 ** len(self.multipliers)
        if any(side < factor or side % factor for side in height_width(resolution)):
            raise ValueError(
                f"the U-Net discriminator halves images {len(self.multipliers)} times, so their "
                f"sides must be multiples of {factor}: resize them, or give "
                "discriminator.multipliers fewer entries"
            )


class UNetDiscriminator(nn.Module):
    """Images (B, C, H, W) in [−1, 1] → logits of every pixel, and of every image.

    Schönfeld, Schiele & Khoreva 2020, "A U-Net Based Discriminator for GANs" (arXiv 2002.12655).
    Residual blocks halve the resolution and double it again. Each block on the way up but the first
    reads the features of its counterpart too. Fully convolutional: a network for 128×128 takes
    256×256 as well.
    """

    def __init__(self, config: UNetDiscriminatorConfig, image_channels: int = 3) -> None:
        super().__init__()
        self.config = config
        down = [config.channels * m for m in config.multipliers]
        up = [*reversed(down[:-1]), config.channels]
        self.down = nn.ModuleList(
            UNetDownBlock(in_width, out_width, first=i == 0)
            for i, (in_width, out_width) in enumerate(pairwise([image_channels, *down]))
        )
        bottleneck = drawn(nn.Linear(down[-1], 1), nn.init.orthogonal_)
        self.bottleneck = spectral_norm(bottleneck)
        below, skips = [down[-1], *up[:-1]], [0, *reversed(down[:-1])]
        self.up = nn.ModuleList(
            UNetUpBlock(width + skip, out)
            for width, skip, out in zip(below, skips, up, strict=True)
        )
        self.pixels = _conv(up[-1], 1, 1)

    def forward(self, images: Tensor) -> Logits:
        """Images (B, C, H, W) in [−1, 1] → pixel logits (B, 1, H, W), image logits (B, 1)."""
        check_images(images, self.config.check_resolution)
        x, skips = images, []
        for block in self.down:
            x = block(x)
            skips.append(x)
        image_logits = self.bottleneck(F.relu(skips.pop()).sum(dim=(2, 3)))  # (B, 1)
        x = self.up[0](x)
        for block in self.up[1:]:
            x = block(torch.cat([x, skips.pop()], dim=1))
        return self.pixels(x).float(), image_logits.float()


class DiscriminatorBlock(nn.Module):
    """Layers of a residual block, without the change of resolution."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.conv1 = spectral_norm(_conv(in_width, out_width, 3))
        self.conv2 = spectral_norm(_conv(out_width, out_width, 3))
        self.skip = spectral_norm(_conv(in_width, out_width, 1))


class UNetDownBlock(DiscriminatorBlock):
    """Pre-activation residual block that halves the resolution by averages at its end."""

    def __init__(self, in_width: int, out_width: int, first: bool) -> None:
        super().__init__(in_width, out_width)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H/2, W/2)."""
        h = x if self.first else F.relu(x)  # the first block reads pixels, not features
        h = self.conv2(F.relu(self.conv1(h)))
        # a 1×1 convolution and an average commute: averaging first is a quarter of the work
        return F.avg_pool2d(h, 2) + self.skip(F.avg_pool2d(x, 2))


class UNetUpBlock(DiscriminatorBlock):
    """Pre-activation residual block that doubles the resolution by nearest neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, w) → (B, out, 2h, 2w)."""
        h = self.conv1(F.interpolate(F.relu(x), scale_factor=2, mode="nearest"))
        h = self.conv2(F.relu(h))
        return h + F.interpolate(self.skip(x), scale_factor=2, mode="nearest")


def _conv(in_width: int, out_width: int, size: int) -> nn.Conv2d:
    layer = nn.Conv2d(in_width, out_width, size, padding=size // 2)
    return drawn(layer, nn.init.orthogonal_)


def spectral_norm(layer: LayerT) -> LayerT:
    """Divide the layer's weight by its largest singular value whenever it is used."""
    register_parametrization(layer, "weight", SpectralNorm(layer.weight))
    return layer


class SpectralNorm(nn.Module):
    """W → W / σ(W) (Miyato et al. 2018, arXiv 1802.05957).

    σ comes from one power iteration a training step, on vectors kept in the state, in the weight's
    own precision: PyTorch's module iterates in bfloat16 under autocast, which leaves σ two digits.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, warm_up: int = 15) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1)  # (out, in·k·k)
        # any start not orthogonal to the first singular vector will do: no random numbers
        self.register_buffer("u", F.normalize(matrix.sum(1), dim=0))
        self.register_buffer("v", torch.zeros_like(matrix[0]))
        for _ in range(warm_up):
            self._iterate(matrix)

    @torch.no_grad()
    def _iterate(self, matrix: Tensor) -> None:
        # Miyato et al. 2018, Algorithm 1
        self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))
        self.u.copy_(F.normalize(matrix @ self.v, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        """Normalise a weight (out, in, …)."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1)
            if self.training:
                self._iterate(matrix)
            # copies: a later forward pass may iterate before this one's backward
            u, v = self.u.clone(), self.v.clone()
            # Miyato et al. 2018, Equations 7 and 8: W / σ(W), σ(W) ≈ uᵀ W v
            return weight / torch.dot(u, matrix @ v)


# -------------------------------------------------------------------------------- PatchGAN
class PatchGANConfig(Config):
    """Width and receptive field of the PatchGAN; the defaults are latent diffusion's."""

    type: Literal["patchgan"] = "patchgan"
    """A logit for each of many overlapping patches."""
    channels: Width = 64
    """Base width, in feature maps; each layer doubles it, up to eight times this."""
    layers: Depth = 3
    """Halvings of the image; 3 make patches of 70×70 pixels."""

    def check_resolution(self, resolution: Resolution) -> None:
        """Raise a ValueError of one line if no logit is left of such images."""
        # two convolutions after the halvings take a row each
        smallest = 3 * 2**self.layers
        if shorter_side(resolution) < smallest:
            raise ValueError(
                f"the PatchGAN discriminator with {self.layers} layers needs images of at least "
                f"{smallest} pixels a side: use larger ones, or lower discriminator.layers"
            )


class PatchGAN(nn.Module):
    """Images (B, C, H, W) in [−1, 1] → a map of logits of overlapping patches.

    Isola, Zhu, Zhou & Efros 2017, "Image-to-Image Translation with Conditional Adversarial
    Networks" (arXiv 1611.07004), in the shape that latent diffusion uses (Rombach et al. 2022).
    It normalises by groups of channels of one image. Batch statistics, which latent diffusion uses,
    would mix real images with reconstructed ones, depend on how a batch is split over processes and
    micro-batches, and in eval mode lag behind the weights.
    """

    def __init__(self, config: PatchGANConfig, image_channels: int = 3) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * min(2**layer, 8) for layer in range(config.layers + 1)]
        layers = [_patch_conv(image_channels, widths[0], stride=2), nn.LeakyReLU(0.2)]
        for i in range(config.layers):
            stride = 2 if i + 1 < config.layers else 1
            # no bias: the norm would remove it
            layers += [_patch_conv(widths[i], widths[i + 1], stride, bias=False)]
            norm = drawn(group_norm(widths[i + 1]), nn.init.normal_, mean=1, std=0.02)
            layers += [norm, nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, _patch_conv(widths[-1], 1, stride=1))

    def forward(self, images: Tensor) -> Logits:
        """Images (B, C, H, W) in [−1, 1] → one map (B, 1, ⌊H/2^layers⌋ − 2, ⌊W/2^layers⌋ − 2)."""
        check_images(images, self.config.check_resolution)
        return (self.layers(images).float(),)


def _patch_conv(in_width: int, out_width: int, stride: int, bias: bool = True) -> nn.Conv2d:
    layer = nn.Conv2d(in_width, out_width, 4, stride, padding=1, bias=bias)
    # Isola et al. 2017, Section 6.2: weights from N(0, 0.02²)
    return drawn(layer, nn.init.normal_, std=0.02)


# ------------------------------------------------------------------------------ StyleGAN 2
SMALLEST = 4
"""Side of the features that the last layers read as a whole."""


class StyleGANConfig(Config):
    """Widths of StyleGAN 2's discriminator; the defaults are the paper's at every resolution."""

    type: Literal["stylegan"] = "stylegan"
    """A logit for the image as a whole."""
    resolution: Width = 128
    """Side of the square images it takes, in pixels: a power of two, at least 8."""
    channels: Width | None = None
    """Width at the image's resolution, in feature maps; null: the paper's, 32768 / resolution.
    Every halving doubles it."""
    max_channels: Width = 512
    """Largest width, in feature maps."""

    @field_validator("resolution")
    @classmethod
    def _halves_down_to_4(cls, resolution: int) -> int:
        if resolution < 2 * SMALLEST or resolution.bit_count() > 1:
            raise ValueError("must be a power of two, at least 8")
        return resolution

    @property
    def widths(self) -> list[int]:
        """Feature maps at each side: resolution, half of it, …, 4."""
        base = self.channels or max(1, 2**15 // self.resolution)
        halvings = (self.resolution // SMALLEST).bit_length()
        return [min(base * 2**i, self.max_channels) for i in range(halvings)]

    def check_resolution(self, resolution: Resolution) -> None:
        """Raise a ValueError of one line if images of such a size are not of `resolution`."""
        if not isinstance(resolution, int):
            raise ValueError(
                f"the StyleGAN discriminator takes square images, not {format_size(resolution)}: "
                "its last layer reads 4×4 features; use discriminator.type=unet or patchgan"
            )
        if resolution != self.resolution:
            raise ValueError(
                "the StyleGAN discriminator takes one resolution, "
                f"discriminator.resolution={self.resolution}, not {resolution}: "
                f"set discriminator.resolution={resolution}, or train at {self.resolution}"
            )


class StyleGANDiscriminator(nn.Module):
    """Images (B, C, R, R) in [−1, 1] → a logit for every image.

    Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN" (arXiv 1912.04958).
    One layer of the paper's is left out: the standard deviation over a minibatch makes a logit
    depend on the other images. It prevents mode collapse, which an autoencoder does not suffer.
    """

    def __init__(self, config: StyleGANConfig, image_channels: int = 3) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.from_rgb = _equalize(nn.Conv2d(image_channels, widths[0], 1))
        self.blocks = nn.ModuleList(
            StyleGANBlock(in_width, out_width) for in_width, out_width in pairwise(widths)
        )
        self.conv = _equalize(nn.Conv2d(widths[-1], widths[-1], 3, padding=1))
        self.linear = _equalize(nn.Linear(widths[-1] * SMALLEST**2, widths[-1]))
        self.logit = _equalize(nn.Linear(widths[-1], 1))

    def forward(self, images: Tensor) -> Logits:
        """Images (B, C, R, R) in [−1, 1] → one map (B, 1)."""
        check_images(images, self.config.check_resolution)
        x = _activate(self.from_rgb(images))
        for block in self.blocks:
            x = block(x)
        x = _activate(self.conv(x)).flatten(1)  # (B, width·4·4)
        return (self.logit(_activate(self.linear(x))).float(),)


class StyleGANBlock(nn.Module):
    """Residual block with half the resolution at its end (Karras et al. 2020, Section 4.1)."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.conv1 = _equalize(nn.Conv2d(in_width, in_width, 3, padding=1))
        self.conv2 = _equalize(nn.Conv2d(in_width, out_width, 3, stride=2))
        self.skip = _equalize(nn.Conv2d(in_width, out_width, 1, bias=False))
        self.blur = Blur()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H/2, W/2)."""
        h = _activate(self.conv1(x))  # (B, in, H, W)
        h = _activate(self.conv2(self.blur(h, padding=2)))  # (B, out, H/2, W/2), from H + 1
        # a 1×1 convolution and a filter commute: blurring first is a quarter of the work
        return (h + self.skip(self.blur(x, padding=1, stride=2))) / math.sqrt(2)


class EqualizedRate(nn.Module):
    """w → w/√n whenever it is used, n the inputs of an output (Karras et al. 2018, Section 4.1).

    With weights of unit variance, each step of Adam changes every weight by the same small share:
    the step's length is the learning rate, whatever the weight's size. Nothing else bounds this
    network, which has neither normalisation nor a gradient penalty.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """(out, in, …) of unit variance → He et al. 2015's variance."""
        # He et al. 2015 (arXiv 1502.01852), Equation 10; its √2 is in the activation
        return weight / math.sqrt(weight[0].numel())


class Blur(nn.Module):
    """Filter [1, 3, 3, 1]/8 along both sides: it removes the frequencies that would alias when
    pixels are dropped (Zhang 2019, arXiv 1904.11486)."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        # exact in every dtype; a buffer, since a GPU would wait for a constant made in a step
        self.register_buffer("kernel", torch.outer(taps, taps), persistent=False)

    def forward(self, x: Tensor, padding: int, stride: int = 1) -> Tensor:
        """(B, C, H, W), with zeros around: H → H + 2·padding − 3, every `stride`-th of them."""
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(x, kernel, stride=stride, padding=padding, groups=x.shape[1])


def _activate(x: Tensor) -> Tensor:
    # √2 restores the variance lost below 0
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def _equalize(layer: LayerT) -> LayerT:
    drawn(layer, nn.init.normal_)
    register_parametrization(layer, "weight", EqualizedRate())
    return layer


# ----------------------------------------------------------------------------------- names
DISCRIMINATORS = {
    "unet": UNetDiscriminator,
    "patchgan": PatchGAN,
    "stylegan": StyleGANDiscriminator,
}
DiscriminatorConfig = Annotated[
    UNetDiscriminatorConfig | PatchGANConfig | StyleGANConfig, Field(discriminator="type")
]


def build_discriminator(config: DiscriminatorConfig, image_channels: int = 3) -> nn.Module:
    """Build the network that a config describes: (B, C, H, W) in [−1, 1] → `Logits`."""
    return DISCRIMINATORS[config.type](config, image_channels)
