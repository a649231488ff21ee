"""SD-VAE, the KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752).

The encoder is the baseline of LiteVAE's, which keeps the decoder, with GroupNorm or without.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders.layers import (
    Downsample,
    Norm,
    ResidualBlock,
    Upsample,
    chain,
    channels_last,
    group_norm,
    middle,
)
from autoencoders.wavelet import haar_idwt
from ldm.config import Config, Depth, Levels, Width


# --------------------------------------------------------------------------------- encoder
class SDVAEEncoderConfig(Config):
    """Widths and depth of SD-VAE's encoder; the defaults are the published kl-f8's."""

    type: Literal["sdvae"] = "sdvae"
    """Strided convolutions, with attention in the middle."""
    variance: bool = True
    """A log-variance beside the mean. false: none, as in a VQ model; the posterior's is −30."""
    channels: Width = 128
    """Base width, in feature maps."""
    multipliers: Levels = (1, 2, 4, 4)
    """Width of each resolution, as a multiple of `channels`; between two, the image is halved."""
    blocks: Depth = 2
    """Residual blocks at each resolution."""
    group_channels: Width = 1
    """Least channels in a group of a GroupNorm, which has at most 32 groups."""

    @property
    def downsampling(self) -> int:
        """f, pixels per latent along each side."""
        return 2 ** (len(self.multipliers) - 1)


class SDVAEEncoder(nn.Module):
    """Images (B, C, H, W) in [−1, 1] → moments (B, 2·n_z, H/f, W/f): mean, log-variance.

    Without `variance`, the mean alone (B, n_z, H/f, W/f).
    """

    def __init__(
        self, config: SDVAEEncoderConfig, latent_channels: int, image_channels: int = 3
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(image_channels, config.channels, 3, padding=1)
        widths = [config.channels, *(config.channels * m for m in config.multipliers)]
        least = config.group_channels
        self.levels = _levels(widths, config.blocks, "group", least, "downsample", Downsample)
        self.middle = middle(widths[-1], "group", least)
        self.norm_out = group_norm(widths[-1], least)
        moments = (2 if config.variance else 1) * latent_channels
        self.conv_out = nn.Conv2d(widths[-1], moments, 3, padding=1)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The layer that gives the moments."""
        return self.conv_out

    def forward(self, images: Tensor) -> Tensor:
        x = channels_last(images.to(self.conv_in.weight.dtype))
        x = chain(x, self.conv_in, *self.levels, self.middle)
        return chain(x, self.norm_out, F.silu, self.conv_out)


# --------------------------------------------------------------------------------- decoder
class SDVAEDecoderConfig(Config):
    """Widths, depth and normalisation of the decoder; the defaults are the published kl-f8's."""

    channels: Width = 128
    """Base width, in feature maps."""
    multipliers: Levels = (1, 2, 4, 4)
    """Width of each resolution, the highest first, as a multiple of `channels`."""
    blocks: Depth = 2
    """Residual blocks at each resolution, as the encoder counts them: the decoder has one more."""
    norm: Norm = "group"
    """group: GroupNorm before each convolution. smc: self-modulated convolution instead."""
    group_channels: Width = 1
    """Least channels in a group of a GroupNorm, which has at most 32 groups."""
    output: Literal["image", "wavelet"] = "image"
    """image; wavelet: Haar sub-bands at half the size, then their inverse; one multiplier fewer."""

    @property
    def upsampling(self) -> int:
        """f, pixels per latent along each side."""
        doublings = len(self.multipliers) - 1
        return 2 ** (doublings + 1 if self.output == "wavelet" else doublings)


class SDVAEDecoder(nn.Module):
    """Latents (B, n_z, h, w) → images (B, C, f·h, f·w), about [−1, 1], not clipped.

    With `norm="smc"` self-modulated convolution takes the place of GroupNorm and convolution in
    every residual block. The paper is silent on the two norms outside them; here
    - the **output norm** is left out: just before the pixels it would undo what self-modulation
      keeps, and make every pixel depend on the statistics of the whole image, hence on its size;
    - the **attention's norm** stays: it is on a branch, so the sum keeps the input's magnitudes;
      attention reads the whole image anyway; and without it the attention logits grow with the
      square of the features.

    With `output="wavelet"` the last convolution gives the sub-bands LL, H, V and D of all channels
    at half the size, divided by 2 like those that LiteVAE's encoder reads, and the image is their
    inverse Haar transform in float32.
    """

    def __init__(
        self, config: SDVAEDecoderConfig, latent_channels: int, image_channels: int = 3
    ) -> None:
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        norm, least = config.norm, config.group_channels
        self.middle = middle(widths[0], norm, least)
        self.levels = _levels(
            [widths[0], *widths], config.blocks + 1, norm, least, "upsample", Upsample
        )
        self.norm_out = group_norm(widths[-1], least) if norm == "group" else nn.Identity()
        self.wavelet = config.output == "wavelet"
        values = 4 * image_channels if self.wavelet else image_channels
        self.conv_out = nn.Conv2d(widths[-1], values, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = chain(self.features(latents), self.norm_out, F.silu, self.conv_out)
        if not self.wavelet:
            return x
        # times 2, since LL has twice the range of the image
        low, horizontal, vertical, diagonal = (2 * x).chunk(4, dim=1)
        return haar_idwt((low, horizontal, vertical, diagonal))  # 4 × (B, C, f·h/2, …) → (B, C, …)

    def features(self, latents: Tensor) -> Tensor:
        """Latents (B, n_z, h, w) → features at the image's size, before the last convolution."""
        x = channels_last(latents.to(self.conv_in.weight.dtype))
        return chain(x, self.conv_in, self.middle, *self.levels)


# ---------------------------------------------------------------------------------- levels
def _levels(
    widths: Sequence[int],
    blocks: int,
    norm: Norm,
    least: int,
    change: str,
    resample: type[nn.Module],
) -> nn.ModuleList:
    """Residual blocks at each resolution; `resample`, named `change`, between two resolutions.

    Args:
        widths: of the input, then of each resolution.
        least: channels in a group of a GroupNorm, at least.
    """
    levels = nn.ModuleList()
    for in_width, out_width in pairwise(widths):
        if levels:
            levels[-1].add_module(change, resample(in_width))
        layers = [in_width] + blocks * [out_width]
        level = nn.Sequential()
        level.blocks = nn.Sequential(
            *(ResidualBlock(a, b, norm, least) for a, b in pairwise(layers))
        )
        levels.append(level)
    return levels
