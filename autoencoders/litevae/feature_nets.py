"""The networks that read wavelet sub-bands, by name: LiteVAE's extraction and aggregation."""

from typing import Annotated

from pydantic import Field

from autoencoders.litevae.nafnet import NAFNet, NAFNetConfig
from autoencoders.litevae.unet import FeatureUNet, FeatureUNetConfig
from autoencoders.litevae.vit import ViT, ViTConfig

FEATURE_NETS = {"unet": FeatureUNet, "nafnet": NAFNet, "vit": ViT}
"""Each is built of (config, in_width, out_width) and keeps the resolution of what it is given."""

ExtractorConfig = Annotated[FeatureUNetConfig | NAFNetConfig, Field(discriminator="type")]
"""What can read the sub-bands of a level (Table 18)."""
AggregatorConfig = Annotated[FeatureUNetConfig | ViTConfig, Field(discriminator="type")]
"""What can join the levels (Table 20)."""
