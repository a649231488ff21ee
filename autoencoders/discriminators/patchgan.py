"""PatchGAN: logits of overlapping patches, of 70×70 pixels with three layers.

Isola, Zhu, Zhou & Efros 2017, "Image-to-Image Translation with Conditional Adversarial Networks"
(arXiv 1611.07004), in the shape that latent diffusion uses (Rombach et al. 2022).
"""

from typing import Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from autoencoders.discriminators.layers import Logits, check_images
from autoencoders.layers import group_norm
from ldm.config import Config


class PatchGANConfig(Config):
    """Width and receptive field of the PatchGAN; the defaults are latent diffusion's."""

    type: Literal["patchgan"] = "patchgan"
    """A logit for each of many overlapping patches."""
    channels: PositiveInt = 64
    """Base width, in feature maps; each layer doubles it, up to eight times this."""
    layers: PositiveInt = 3
    """Halvings of the image; 3 make patches of 70×70 pixels."""

    def check_resolution(self, resolution: int) -> None:
        """Raise a ValueError of one line if no logit is left of such a side, in pixels."""
        # two convolutions after the halvings take a row each
        smallest = 3 * 2**self.layers
        if resolution < smallest:
            raise ValueError(
                f"the PatchGAN discriminator with {self.layers} layers needs images of at least "
                f"{smallest} pixels a side: use larger ones, or lower discriminator.layers"
            )


class PatchGAN(nn.Module):
    """Images (B, 3, H, W) in [−1, 1] → a map of logits, one per patch.

    It normalises by groups of channels of one image. Batch statistics, which latent diffusion uses,
    would mix real images with reconstructed ones, depend on how a batch is split over processes and
    micro-batches, and in eval mode lag behind the weights.
    """

    def __init__(self, config: PatchGANConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * min(2**layer, 8) for layer in range(config.layers + 1)]
        layers = [_conv(3, widths[0], stride=2), nn.LeakyReLU(0.2)]
        for i in range(config.layers):
            stride = 2 if i + 1 < config.layers else 1
            # no bias: the norm would remove it
            layers += [_conv(widths[i], widths[i + 1], stride, bias=False)]
            layers += [_norm(widths[i + 1]), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, _conv(widths[-1], 1, stride=1))

    def forward(self, images: Tensor) -> Logits:
        """Images (B, 3, H, W) in [−1, 1] → one map (B, 1, ⌊H/2^layers⌋ − 2, ⌊W/2^layers⌋ − 2)."""
        check_images(self.config, images)
        return (self.layers(images).float(),)


def _conv(in_width: int, out_width: int, stride: int, bias: bool = True) -> nn.Conv2d:
    layer = nn.Conv2d(in_width, out_width, 4, stride, padding=1, bias=bias)
    # Isola et al. 2017, Section 6.2: weights from N(0, 0.02²)
    nn.init.normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _norm(width: int) -> nn.GroupNorm:
    layer = group_norm(width)
    nn.init.normal_(layer.weight, mean=1, std=0.02)
    return layer
