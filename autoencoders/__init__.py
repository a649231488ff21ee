"""Stage one: autoencoders that learn a latent space from images."""

from autoencoders.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    AutoencoderOutput,
    build_autoencoder,
)
from autoencoders.loading import load_autoencoder
from autoencoders.posterior import DiagonalGaussian

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "AutoencoderOutput",
    "DiagonalGaussian",
    "build_autoencoder",
    "load_autoencoder",
]
