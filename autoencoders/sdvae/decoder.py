"""SD-VAE's decoder (Rombach et al. 2022), which LiteVAE keeps, with GroupNorm or without."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders.cpu import chain, channels_last
from autoencoders.layers import Norm, ResidualBlock, Upsample, group_norm, middle
from autoencoders.wavelet import haar_idwt
from ldm.config import Config


class SDVAEDecoderConfig(Config):
    """Widths, depth and normalisation of the decoder; the defaults are the published kl-f8's."""

    channels: PositiveInt = 128
    """Base width, in feature maps."""
    multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4, 4)
    """Width of each resolution, the highest first, as a multiple of `channels`."""
    blocks: PositiveInt = 2
    """Residual blocks at each resolution, as the encoder counts them: the decoder has one more."""
    norm: Norm = "group"
    """group: GroupNorm before each convolution. smc: self-modulated convolution instead."""
    output: Literal["image", "wavelet"] = "image"
    """image; wavelet: Haar sub-bands at half the size, then their inverse; one multiplier fewer."""

    @property
    def upsampling(self) -> int:
        """f, pixels per latent along each side."""
        doublings = len(self.multipliers) - 1
        return 2 ** (doublings + 1 if self.output == "wavelet" else doublings)


class SDVAEDecoder(nn.Module):
    """Latents (B, n_z, h, w) → images (B, 3, f·h, f·w), about [−1, 1], not clipped.

    With `norm="smc"` self-modulated convolution takes the place of GroupNorm and convolution in
    every residual block. The paper is silent on the two norms outside them; here
    - the **output norm** is left out: just before the pixels it would undo what self-modulation
      keeps, and make every pixel depend on the statistics of the whole image, hence on its size;
    - the **attention's norm** stays: it is on a branch, so the sum keeps the input's magnitudes;
      attention reads the whole image anyway; and without it the attention logits grow with the
      square of the features.

    With `output="wavelet"` the last convolution returns the sub-bands LL, H, V and D of three
    colours at half the size, divided by 2 like those that LiteVAE's encoder reads, and the image is
    their inverse Haar transform in float32.
    """

    def __init__(self, config: SDVAEDecoderConfig, latent_channels: int) -> None:
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.middle = middle(widths[0], config.norm)
        self.levels = nn.ModuleList(
            UpLevel(in_width, out_width, config.blocks + 1, config.norm, upsample=i < last)
            for i, (in_width, out_width) in enumerate(pairwise([widths[0], *widths]))
        )
        self.norm_out = group_norm(widths[-1]) if config.norm == "group" else nn.Identity()
        self.wavelet = config.output == "wavelet"
        self.conv_out = nn.Conv2d(widths[-1], 4 * 3 if self.wavelet else 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.middle(self.conv_in(channels_last(latents)))
        for level in self.levels:
            x = level(x)
        x = chain(x, self.norm_out, F.silu, self.conv_out)
        if not self.wavelet:
            return x
        # times 2, since LL has twice the range of the image
        low, horizontal, vertical, diagonal = (2 * x.float()).chunk(4, dim=1)
        return haar_idwt((low, horizontal, vertical, diagonal))  # 4 × (B, 3, f·h/2, …) → (B, 3, …)


class UpLevel(nn.Module):
    """Residual blocks at one resolution, then a doubling, except at the highest."""

    def __init__(
        self, in_width: int, out_width: int, blocks: int, norm: Norm, upsample: bool
    ) -> None:
        super().__init__()
        widths = [in_width] + blocks * [out_width]
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, norm) for a, b in pairwise(widths)))
        self.upsample = Upsample(out_width) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, w) → (B, out, 2h, 2w), or (B, out, h, w) at the highest."""
        return self.upsample(self.blocks(x))
