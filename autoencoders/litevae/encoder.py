"""LiteVAE's encoder: wavelets first, then small networks (Sadat et al. 2024, Section 4.1)."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders.litevae.feature_nets import FeatureUNet, FeatureUNetConfig
from autoencoders.wavelet import haar_dwt
from ldm.config import Config

LEVELS = 3
SUB_BAND_CHANNELS = 4 * 3
"""LL, H, V and D of three colours."""


class LiteVAEEncoderConfig(Config):
    """The two kinds of network in LiteVAE's encoder."""

    type: Literal["litevae"] = "litevae"
    """Haar wavelets and small UNets."""
    extractor: FeatureUNetConfig = FeatureUNetConfig()
    """Feature extraction: one such network reads the sub-bands of each wavelet level."""
    aggregator: FeatureUNetConfig = FeatureUNetConfig()
    """Feature aggregation: one network joins the levels into the posterior."""

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along each side."""
        return 2**LEVELS


class LiteVAEEncoder(nn.Module):
    """Images (B, 3, H, W) in [−1, 1] → moments (B, 2·n_z, H/8, W/8): mean, log-variance."""

    def __init__(self, config: LiteVAEEncoderConfig, latent_channels: int) -> None:
        super().__init__()
        self.extractors = nn.ModuleList(
            FeatureUNet(config.extractor, SUB_BAND_CHANNELS, SUB_BAND_CHANNELS)
            for _ in range(LEVELS)
        )
        self.aggregator = FeatureUNet(
            config.aggregator, LEVELS * SUB_BAND_CHANNELS, 2 * latent_channels
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → moments (B, 2·n_z, H/8, W/8)."""
        features = []
        low = images
        for level, extractor in enumerate(self.extractors, start=1):
            # each level transforms the low-pass band of the one before: the image's own, cheaper
            low, *edges = haar_dwt(low)  # 4 × (B, 3, H/2^l, W/2^l)
            # an orthonormal LL grows twofold a level: dividing keeps it in the image's range
            sub_bands = torch.cat([low, *edges], dim=1) / 2**level  # (B, 12, H/2^l, W/2^l)
            features.append(F.avg_pool2d(extractor(sub_bands), 2 ** (LEVELS - level)))
        return self.aggregator(torch.cat(features, dim=1))  # (B, 36, H/8, W/8) → moments
