"""Stage one: autoencoders that learn a latent space from images."""

from autoencoders.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    AutoencoderOutput,
    DiagonalGaussian,
    build_autoencoder,
    load_autoencoder,
)
from autoencoders.tiling import decode_tiled, encode_tiled, reconstruct_tiled

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "AutoencoderOutput",
    "DiagonalGaussian",
    "build_autoencoder",
    "decode_tiled",
    "encode_tiled",
    "load_autoencoder",
    "reconstruct_tiled",
]
