"""LiteVAE's encoder: a wavelet transform, then small networks (Sadat et al. 2024, Section 4.1)."""

from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders.litevae.nets import (
    FEATURE_NETS,
    AggregatorConfig,
    ExtractorConfig,
    FeatureUNetConfig,
)
from autoencoders.wavelet import WaveletName, dwt_cascade
from ldm.config import Config, Levels


class LiteVAEEncoderConfig(Config):
    """Wavelet transform of LiteVAE's encoder and the networks that read it; by default B's."""

    type: Literal["litevae"] = "litevae"
    """A wavelet transform, read by small networks."""
    wavelet: WaveletName = "haar"
    """Wavelet, by its name in PyWavelets: haar, db2, sym4, bior2.2 …"""
    depth: Annotated[int, Field(ge=1, le=5)] = 3
    """Wavelet levels; each halves the image, so f = 2^depth."""
    levels: Levels | None = None
    """Levels whose sub-bands are read, ascending, 1 the finest; null: all ([2, 3]: Table 21)."""
    shared: bool = False
    """One extractor for all levels, instead of one each (Table 19)."""
    extractor: ExtractorConfig = FeatureUNetConfig()
    """Feature extraction: the network that reads the sub-bands of a level (Table 18)."""
    aggregator: AggregatorConfig = FeatureUNetConfig()
    """Feature aggregation: the network that joins the levels into the posterior (Table 20)."""

    @field_validator("levels")
    @classmethod
    def _levels_there_are(
        cls, levels: tuple[int, ...] | None, info: ValidationInfo
    ) -> tuple[int, ...] | None:
        depth = info.data.get("depth")  # absent if it was itself refused
        if levels is None or depth is None:
            return levels
        if list(levels) != sorted(set(levels)) or levels[-1] > depth:
            raise ValueError(f"must ascend, without repeats, from 1 to at most depth, {depth}")
        return levels

    @property
    def levels_read(self) -> tuple[int, ...]:
        """The levels whose sub-bands are read, ascending."""
        return self.levels or tuple(range(1, self.depth + 1))

    @property
    def downsampling(self) -> int:
        """f, pixels per latent along each side."""
        return 2**self.depth


class LiteVAEEncoder(nn.Module):
    """Images (B, 3, H, W) in [−1, 1] → moments (B, 2·n_z, H/f, W/f): mean, log-variance."""

    def __init__(self, config: LiteVAEEncoderConfig, latent_channels: int) -> None:
        super().__init__()
        self.config = config
        extract, aggregate = (FEATURE_NETS[c.type] for c in (config.extractor, config.aggregator))
        levels = len(config.levels_read)
        width = 4 * 3  # LL, H, V and D of three colours
        self.extractors = nn.ModuleList(
            extract(config.extractor, width, width) for _ in range(1 if config.shared else levels)
        )
        self.aggregator = aggregate(config.aggregator, levels * width, 2 * latent_channels)

    def forward(self, images: Tensor) -> Tensor:
        depth, features = self.config.depth, []
        transform = dwt_cascade(images, depth, self.config.wavelet)
        for i, level in enumerate(self.config.levels_read):
            # LL grows twofold a level: dividing keeps it in the image's range
            sub_bands = torch.cat(transform[level - 1], dim=1) / 2**level  # (B, 12, H/2^l, W/2^l)
            extractor = self.extractors[0 if self.config.shared else i]
            sub_bands = sub_bands.to(next(extractor.parameters()).dtype)  # from float32
            features.append(F.avg_pool2d(extractor(sub_bands), 2 ** (depth - level)))
        return self.aggregator(torch.cat(features, dim=1))  # (B, 12·levels, H/f, W/f) → moments
