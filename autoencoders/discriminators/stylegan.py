"""StyleGAN 2's residual discriminator: one logit for the image as a whole.

Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN" (arXiv 1912.04958).
"""

import math
from itertools import pairwise
from typing import Literal

import torch
from pydantic import PositiveInt, field_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

from autoencoders.discriminators.layers import LayerT, Logits, check_images
from ldm.config import Config

SMALLEST = 4
"""Side of the features that the last layers read as a whole."""


class StyleGANConfig(Config):
    """Widths of StyleGAN 2's discriminator; the defaults are the paper's at every resolution."""

    type: Literal["stylegan"] = "stylegan"
    """A logit for the image as a whole."""
    resolution: PositiveInt = 128
    """Side of the square images it takes, in pixels: a power of two, at least 8."""
    channels: PositiveInt | None = None
    """Width at the image's resolution, in feature maps; null: the paper's, 32768 / resolution.
    Every halving doubles it."""
    max_channels: PositiveInt = 512
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

    def check_resolution(self, resolution: int) -> None:
        """Raise a ValueError of one line if a side, in pixels, is not `resolution`."""
        if resolution != self.resolution:
            raise ValueError(
                "the StyleGAN discriminator takes one resolution, "
                f"discriminator.resolution={self.resolution}, not {resolution}: "
                f"set discriminator.resolution={resolution}, or train at {self.resolution}"
            )


class StyleGANDiscriminator(nn.Module):
    """Images (B, 3, R, R) in [−1, 1] → a logit for every image.

    One layer of the paper's is left out: the standard deviation over a minibatch makes a logit
    depend on the other images. It prevents mode collapse, which an autoencoder does not suffer.
    """

    def __init__(self, config: StyleGANConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.from_rgb = _equalize(nn.Conv2d(3, widths[0], 1))
        self.blocks = nn.ModuleList(
            StyleGANBlock(in_width, out_width) for in_width, out_width in pairwise(widths)
        )
        self.conv = _equalize(nn.Conv2d(widths[-1], widths[-1], 3, padding=1))
        self.linear = _equalize(nn.Linear(widths[-1] * SMALLEST**2, widths[-1]))
        self.logit = _equalize(nn.Linear(widths[-1], 1))

    def forward(self, images: Tensor) -> Logits:
        """Images (B, 3, R, R) in [−1, 1] → one map (B, 1)."""
        check_images(self.config, images)
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

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H/2, W/2)."""
        h = _activate(self.conv1(x))  # (B, in, H, W)
        h = _activate(self.conv2(blur(h, padding=2)))  # (B, out, H/2, W/2), from H + 1
        # a 1×1 convolution and a filter commute: blurring first is a quarter of the work
        return (h + self.skip(blur(x, padding=1, stride=2))) / math.sqrt(2)


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


def blur(x: Tensor, padding: int, stride: int = 1) -> Tensor:
    """Filter [1, 3, 3, 1]/8 along both sides of (B, C, H, W), zeros around: H → H + 2·padding − 3.

    It removes the frequencies that would alias when pixels are dropped (Zhang 2019, arXiv
    1904.11486).
    """
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 8
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, stride=stride, padding=padding, groups=x.shape[1])


def _activate(x: Tensor) -> Tensor:
    # √2 restores the variance lost below 0
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def _equalize(layer: LayerT) -> LayerT:
    nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    register_parametrization(layer, "weight", EqualizedRate())
    return layer
