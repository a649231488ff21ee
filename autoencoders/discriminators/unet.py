"""U-Net discriminator: a logit for every pixel, and one for the image as a whole.

Schönfeld, Schiele & Khoreva 2020, "A U-Net Based Discriminator for GANs" (arXiv 2002.12655).
"""

from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders.discriminators.layers import LayerT, check_images, spectral_norm
from ldm.config import Config


class UNetDiscriminatorConfig(Config):
    """Widths of the U-Net discriminator; the defaults are the paper's for images of 128×128."""

    type: Literal["unet"] = "unet"
    """A logit for every pixel, and one for the image as a whole."""
    channels: PositiveInt = 64
    """Base width, in feature maps."""
    multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4, 8, 16)
    """Width after each halving of the image, as a multiple of `channels`, mirrored on the way up;
    for 256×256 U-Net GAN has (1, 2, 4, 8, 8, 16)."""

    def check_resolution(self, resolution: int) -> None:
        """Raise a ValueError of one line if a side of that many pixels cannot be halved."""
        factor = 2 ** len(self.multipliers)
        if resolution < factor or resolution % factor:
            raise ValueError(
                f"the U-Net discriminator halves images {len(self.multipliers)} times, so their "
                f"sides must be multiples of {factor}: resize them, or give "
                "discriminator.multipliers fewer entries"
            )


class UNetLogits(NamedTuple):
    """Logits of a batch; high is real."""

    pixels: Tensor
    """(B, 1, H, W), float32."""
    bottleneck: Tensor
    """(B, 1), float32, of each image as a whole."""


class UNetDiscriminator(nn.Module):
    """Images (B, 3, H, W) in [−1, 1] → logits of every pixel, and of every image.

    Residual blocks halve the resolution and double it again. Each block on the way up but the first
    reads the features of its counterpart too. Fully convolutional: a network for 128×128 takes
    256×256 as well.
    """

    def __init__(self, config: UNetDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        down = [config.channels * m for m in config.multipliers]
        up = [*reversed(down[:-1]), config.channels]
        self.down = nn.ModuleList(
            UNetDownBlock(in_width, out_width, first=i == 0)
            for i, (in_width, out_width) in enumerate(pairwise([3, *down]))
        )
        self.bottleneck = spectral_norm(_orthogonal(nn.Linear(down[-1], 1)))
        below, skips = [down[-1], *up[:-1]], [0, *reversed(down[:-1])]
        self.up = nn.ModuleList(
            UNetUpBlock(width + skip, out)
            for width, skip, out in zip(below, skips, up, strict=True)
        )
        self.pixels = _conv(up[-1], 1, 1)

    def forward(self, images: Tensor) -> UNetLogits:
        """Images (B, 3, H, W) in [−1, 1] → pixel logits (B, 1, H, W), image logits (B, 1)."""
        check_images(self.config, images)
        x, skips = images, []
        for block in self.down:
            x = block(x)
            skips.append(x)
        image_logits = self.bottleneck(F.relu(skips.pop()).sum(dim=(2, 3)))  # (B, 1)
        x = self.up[0](x)
        for block in self.up[1:]:
            x = block(torch.cat([x, skips.pop()], dim=1))
        return UNetLogits(self.pixels(F.relu(x)).float(), image_logits.float())


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
    return _orthogonal(nn.Conv2d(in_width, out_width, size, padding=size // 2))


def _orthogonal(layer: LayerT) -> LayerT:
    assert layer.bias is not None
    nn.init.orthogonal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
