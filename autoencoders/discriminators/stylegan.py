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

from autoencoders.discriminators.layers import Logits, check_images
from ldm.config import Config

SMALLEST = 4
"""Side of the features that the last layers read whole."""


class StyleGANConfig(Config):
    """Widths of StyleGAN's discriminator; the defaults are the paper's at every resolution."""

    type: Literal["stylegan"] = "stylegan"
    """Judges the image as a whole."""
    resolution: PositiveInt = 128
    """Side of the square images it is made for, in pixels: a power of two, at least 8."""
    channels: PositiveInt | None = None
    """Width at the image's resolution, in feature maps; null: the paper's, 32768 / resolution.
    It doubles whenever the features are halved."""
    max_channels: PositiveInt = 512
    """The width beyond which it does not grow."""

    @field_validator("resolution")
    @classmethod
    def _halves_down_to_4(cls, resolution: int) -> int:
        if resolution < 2 * SMALLEST or resolution.bit_count() > 1:
            raise ValueError("must be a power of two, at least 8")
        return resolution

    @property
    def widths(self) -> list[int]:
        """Feature maps at every side: resolution, half of it, …, 4."""
        base = self.channels or max(1, 2**15 // self.resolution)
        halvings = (self.resolution // SMALLEST).bit_length()
        return [min(base * 2**i, self.max_channels) for i in range(halvings)]

    def check_resolution(self, resolution: int) -> None:
        """Raise a ValueError of one line where a side, in pixels, is another than its own."""
        if resolution != self.resolution:
            raise ValueError(
                "the StyleGAN discriminator is made for one resolution: "
                f"discriminator.resolution={self.resolution}, not {resolution}; train at the one, "
                "or set the other"
            )


class StyleGANDiscriminator(nn.Module):
    """Images (B, 3, R, R) in [−1, 1] → a logit for every image.

    One part of the paper's is left out: the standard deviation over a minibatch would make a logit
    depend on an image's neighbours. It is there against a generator that makes one image over and
    over, and here each stands beside its original.
    """

    def __init__(self, config: StyleGANConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        self.from_rgb = _equalize(nn.Conv2d(3, widths[0], 1))
        self.blocks = nn.ModuleList(
            DownBlock(in_width, out_width) for in_width, out_width in pairwise(widths)
        )
        self.conv = _equalize(nn.Conv2d(widths[-1], widths[-1], 3, padding=1))
        self.linear = _equalize(nn.Linear(widths[-1] * SMALLEST**2, widths[-1]))
        self.logit = _equalize(nn.Linear(widths[-1], 1))

    def forward(self, images: Tensor) -> Logits:
        """Images (B, 3, R, R) in [−1, 1] → one head (B, 1).

        Raises:
            LdmError: the images are of another resolution than the config's.
        """
        check_images(self.config, images)
        x = _activate(self.from_rgb(images))
        for block in self.blocks:
            x = block(x)
        x = _activate(self.conv(x)).flatten(1)  # (B, width·4·4)
        return (self.logit(_activate(self.linear(x))).float(),)


class DownBlock(nn.Module):
    """Residual block that ends in half the resolution (Karras et al. 2020, Section 4.1)."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.conv1 = _equalize(nn.Conv2d(in_width, in_width, 3, padding=1))
        self.conv2 = _equalize(nn.Conv2d(in_width, out_width, 3, stride=2))
        self.skip = _equalize(nn.Conv2d(in_width, out_width, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H/2, W/2)."""
        h = _activate(self.conv1(x))  # (B, in, H, W)
        h = _activate(self.conv2(blur(h, padding=2)))  # blurred to H + 1, then every other
        # a 1×1 convolution and a filter commute: the pixels it would drop are never computed
        return (h + self.skip(blur(x, padding=1, stride=2))) / math.sqrt(2)


class EqualizedRate(nn.Module):
    """w → w/√n whenever it is used, n the inputs of an output (Karras et al. 2018, Section 4.1).

    Kept at unit variance, every weight moves by the same share of itself a step, and slowly: Adam's
    step is as long as the learning rate, whatever the weight's size. Nothing else bounds this
    network, which has neither normalisation nor a gradient penalty.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """(out, in, …) of unit variance → the weight that He et al. 2015 begin with."""
        # He et al. 2015 (arXiv 1502.01852), Equation 10; its √2 is in the activation
        return weight / math.sqrt(weight[0].numel())


def blur(x: Tensor, padding: int, stride: int = 1) -> Tensor:
    """Filter [1, 3, 3, 1]/8 along both sides of (B, C, H, W), zeros around: H → H + 2·padding − 3.

    Before pixels are dropped, it takes out what would alias (Zhang 2019, arXiv 1904.11486).
    """
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 8
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, stride=stride, padding=padding, groups=x.shape[1])


def _activate(x: Tensor) -> Tensor:
    # √2 keeps the variance that the half of the features below 0 loses
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def _equalize(layer: nn.Module) -> nn.Module:
    nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    register_parametrization(layer, "weight", EqualizedRate())
    return layer
