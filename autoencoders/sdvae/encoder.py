"""SD-VAE's encoder (Rombach et al. 2022, arXiv 2112.10752), the baseline of LiteVAE."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders.cpu import chain, channels_last
from autoencoders.layers import Downsample, ResidualBlock, group_norm, middle
from ldm.config import Config


class SDVAEEncoderConfig(Config):
    """Widths and depth of SD-VAE's encoder; the defaults are the published kl-f8's."""

    type: Literal["sdvae"] = "sdvae"
    """Strided convolutions, with attention in the middle."""
    channels: PositiveInt = 128
    """Base width, in feature maps."""
    multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4, 4)
    """Width of each resolution, as a multiple of `channels`; between two, the image is halved."""
    blocks: PositiveInt = 2
    """Residual blocks at each resolution."""

    @property
    def downsampling(self) -> int:
        """f, pixels per latent along each side."""
        return 2 ** (len(self.multipliers) - 1)


class SDVAEEncoder(nn.Module):
    """Images (B, 3, H, W) in [−1, 1] → moments (B, 2·n_z, H/f, W/f): mean, log-variance."""

    def __init__(self, config: SDVAEEncoderConfig, latent_channels: int) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.levels = nn.ModuleList(
            DownLevel(in_width, out_width, config.blocks, downsample=i < last)
            for i, (in_width, out_width) in enumerate(pairwise([config.channels, *widths]))
        )
        self.middle = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(channels_last(images))
        for level in self.levels:
            x = level(x)
        x = self.middle(x)
        return chain(x, self.norm_out, F.silu, self.conv_out)


class DownLevel(nn.Module):
    """Residual blocks at one resolution, then a halving, except at the lowest."""

    def __init__(self, in_width: int, out_width: int, blocks: int, downsample: bool) -> None:
        super().__init__()
        widths = [in_width] + blocks * [out_width]
        self.blocks = nn.Sequential(*(ResidualBlock(a, b) for a, b in pairwise(widths)))
        self.downsample = Downsample(out_width) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H/2, W/2), or (B, out, H, W) at the lowest."""
        return self.downsample(self.blocks(x))
