"""Encoder without parameters: wavelet sub-bands as latents (Sadat et al. 2024, Appendix B)."""

from typing import Annotated, Literal

import torch
from einops import rearrange
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from autoencoders.wavelet import WaveletName, dwt_cascade
from ldm.config import Config, Depth


class DWTEncoderConfig(Config):
    """Sub-bands that the encoder keeps of a wavelet transform; the defaults are the paper's."""

    type: Literal["dwt"] = "dwt"
    """Wavelet sub-bands, nothing learned."""
    wavelet: WaveletName = "haar"
    """Wavelet, by its name in PyWavelets: haar, db2, sym4, bior2.2 …"""
    depth: Annotated[int, Field(ge=1, le=5)] = 3
    """Wavelet levels; each halves the image, so f = 2^depth."""
    levels: Depth = 1
    """Number of deepest levels kept: 1 is the paper's DWT, 2 its DWT-2 (Table 12)."""

    @field_validator("levels")
    @classmethod
    def _levels_there_are(cls, levels: int, info: ValidationInfo) -> int:
        depth = info.data.get("depth")  # absent if it was itself refused
        if depth is not None and levels > depth:
            raise ValueError(f"must be at most depth, {depth}")
        return levels

    @property
    def downsampling(self) -> int:
        """f, pixels per latent along each side."""
        return 2**self.depth

    @property
    def latent_channels(self) -> int:
        """n_z of three colours: 12, 48 or 192 for 1, 2 or 3 levels; of C channels C/3 as many."""
        return 12 * 4 ** (self.levels - 1)


class DWTEncoder(nn.Module):
    """Images (B, C, H, W) in [−1, 1] → moments (B, 2·n_z, H/f, W/f): mean, log-variance of −30."""

    def __init__(
        self, config: DWTEncoderConfig, latent_channels: int, image_channels: int = 3
    ) -> None:
        super().__init__()
        # `AutoencoderConfig` has checked it
        assert latent_channels == config.latent_channels // 3 * image_channels
        self.config = config

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) → moments (B, 2·n_z, H/f, W/f), in float32 or float64."""
        depth, kept = self.config.depth, self.config.levels
        # dividing level l by 2^l keeps it in the image's range
        transform = dwt_cascade(images, depth, self.config.wavelet)
        latents = [torch.cat(transform[-1], dim=1) / 2**depth]  # (B, 4·C, H/f, W/f)
        for level in range(depth - 1, depth - kept, -1):
            _, *edges = transform[level - 1]  # 3 × (B, C, H/2^l, W/2^l)
            side = 2 ** (depth - level)
            bands = torch.cat(edges, dim=1) / 2**level
            latents.append(rearrange(bands, "b c (h i) (w j) -> b (c i j) h w", i=side, j=side))
        mean = torch.cat(latents, dim=1)  # (B, n_z, H/f, W/f)
        # the smallest log-variance that a posterior keeps: samples equal the mean to 3e-7
        return torch.cat([mean, torch.full_like(mean, -30.0)], dim=1)
