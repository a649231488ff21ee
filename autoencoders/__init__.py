"""Stage one: autoencoders that learn a latent space from images."""

from typing import TYPE_CHECKING, Any

from autoencoders.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    AutoencoderOutput,
    DiagonalGaussian,
    build_autoencoder,
    load_autoencoder,
)
from autoencoders.tiling import decode_tiled, encode_tiled, reconstruct_tiled
from ldm.errors import LdmError

if TYPE_CHECKING:
    from autoencoders.diffusers_vae import DiffusersVAE

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
    "to_diffusers",
]


def to_diffusers(ae: Autoencoder, **settings: Any) -> "DiffusersVAE":
    """Wrap an autoencoder as the `vae=` of diffusers' pipelines, with `AutoencoderKL`'s interface.

    It shares the weights; `encode(x).latent_dist`, `decode(z).sample`, `config`, `enable_tiling`,
    `save_pretrained` and `from_pretrained` are as in diffusers, and gradients flow.

    Args:
        settings: scaling_factor, shift_factor, latents_mean, latents_std, force_upcast or
            sample_size of `config`. Default: the model's own (`ae.settings`), which an imported one
            came with, or for the autoencoder of a latent diffusion model one factor and shift for
            all channels, from the statistics that were measured; else SD-VAE's 0.18215, as
            `ldm export` writes.

    Raises:
        LdmError: diffusers is not installed, or a setting cannot be.
    """
    try:
        from autoencoders.diffusers_vae import wrap
    except ImportError as error:
        raise LdmError(f"to_diffusers needs diffusers ({error}): pip install diffusers") from error
    return wrap(ae, **settings)
