"""LiteVAE's encoder: a wavelet transform, then small networks (Sadat et al. 2024, Section 4.1)."""

from typing import Annotated, Literal

import torch
from einops import rearrange
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
    reduction: Literal["average", "space_to_depth"] = "average"
    """Finer levels on their way to the aggregator: average takes the mean of a patch of features;
    space_to_depth all of them, as channels, with more parameters than the paper's counts."""
    shortcut: Literal["none", "wavelet"] = "none"
    """wavelet: the deepest sub-bands are added to the mean (before a 1×1 convolution, if there is
    one), and need not be learned. Not in the paper."""

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

    def reduced_channels(self, width: int) -> int:
        """Channels that the aggregator reads, of levels of `width` features each."""
        if self.reduction == "average":
            return width * len(self.levels_read)
        return sum(width * 4 ** (self.depth - level) for level in self.levels_read)

    @property
    def downsampling(self) -> int:
        """f, pixels per latent along each side."""
        return 2**self.depth


class LiteVAEEncoder(nn.Module):
    """Images (B, C, H, W) in [−1, 1] → moments (B, 2·n_z, H/f, W/f): mean, log-variance.

    Each level has as many features as it has sub-bands, LL, H, V and D of each channel; but grey
    images have the 12 of colour images, so that a model of these can be adapted to them.
    """

    def __init__(
        self, config: LiteVAEEncoderConfig, latent_channels: int, image_channels: int = 3
    ) -> None:
        super().__init__()
        self.config = config
        extract, aggregate = (FEATURE_NETS[c.type] for c in (config.extractor, config.aggregator))
        levels = len(config.levels_read)
        bands, width = 4 * image_channels, 4 * max(image_channels, 3)
        self.extractors = nn.ModuleList(
            extract(config.extractor, bands, width) for _ in range(1 if config.shared else levels)
        )
        read = config.reduced_channels(width)
        self.aggregator = aggregate(config.aggregator, read, 2 * latent_channels)

    @property
    def last_layer(self) -> nn.Conv2d | nn.Linear:
        """The layer that gives the moments."""
        return self.aggregator.last_layer

    def forward(self, images: Tensor) -> Tensor:
        depth, features = self.config.depth, []
        transform = dwt_cascade(images, depth, self.config.wavelet)
        reduce = F.avg_pool2d if self.config.reduction == "average" else F.pixel_unshuffle
        for i, level in enumerate(self.config.levels_read):
            # LL grows twofold a level: dividing keeps it in the image's range
            sub_bands = torch.cat(transform[level - 1], dim=1) / 2**level  # (B, 4·C, H/2^l, W/2^l)
            extractor = self.extractors[0 if self.config.shared else i]
            sub_bands = sub_bands.to(next(extractor.parameters()).dtype)  # from float32
            features.append(reduce(extractor(sub_bands), 2 ** (depth - level)))
        # averaged, of C ≤ 3: (B, 12·levels, H/f, W/f)
        moments = self.aggregator(torch.cat(features, dim=1))
        if self.config.shortcut == "none":
            return moments
        mean, logvar = moments.chunk(2, dim=1)
        # in float32, whatever the networks compute in
        deepest = torch.cat(transform[-1], dim=1) / 2**depth
        return torch.cat([mean + wavelet_latents(deepest, mean.shape[1]), logvar], dim=1)


def wavelet_latents(sub_bands: Tensor, latent_channels: int) -> Tensor:
    """The sub-bands LL, H, V, D of all channels as latents: an orthonormal map without parameters.

    From as many latent channels on they are the first, and the others are 0. Fewer are the first;
    of three colours the first of: luminance and two colour differences of LL; luminance of H, V and
    D; their colour differences.

    Args:
        sub_bands: (B, 4·C, h, w).

    Returns:
        (B, n_z, h, w).
    """
    if latent_channels >= (bands := sub_bands.shape[1]):
        return F.pad(sub_bands, (0, 0, 0, 0, 0, latent_channels - bands))
    if bands != 12:
        return sub_bands[:, :latent_channels]
    # 3 × (B, 4, h, w)
    red, green, blue = rearrange(sub_bands, "b (bands rgb) h w -> rgb b bands h w", rgb=3)
    colours = torch.stack([
        (red + green + blue) / 3**0.5,
        (red - blue) / 2**0.5,
        (red - 2 * green + blue) / 6**0.5,
    ], dim=1)  # (B, 3, 4, h, w)  # fmt: skip
    low, edges = colours[:, :, 0], colours[:, :, 1:].flatten(1, 2)
    return torch.cat([low, edges], dim=1)[:, :latent_channels]
