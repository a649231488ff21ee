"""Any autoencoder of ours as the `vae=` of a diffusers pipeline: `autoencoders.to_diffusers`.

This module imports diffusers, and nothing else here does until it is needed. A pipeline saved with
such an autoencoder names this module: import it before `from_pretrained` of the pipeline.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from autoencoders.autoencoder import OWN_NAMES, Autoencoder, AutoencoderConfig, rename_layers
from autoencoders.diffusers_parts import DiffusersConfig
from autoencoders.sdvae.formats import SCALING_FACTOR, check_settings, latent_statistics
from autoencoders.tiling import decode_tiled, encode_tiled
from ldm.config import to_tree, validate


class DiffusersVAE(ModelMixin, ConfigMixin):
    """An autoencoder of ours with the interface of diffusers' `AutoencoderKL`.

    Gradients flow through `encode` and `decode`, except by tiles. Latents are the autoencoder's
    own: pipelines scale them by `config`, whose other keys are `AutoencoderKL`'s.

    Args:
        model: tree of an `AutoencoderConfig`.
        block_out_channels: a width for each resolution; pipelines read their number, for f.
        shift_factor: mean of the latents, which Stable Diffusion 3 and later subtract first.
    """

    @register_to_config
    def __init__(
        self,
        model: dict[str, Any],
        block_out_channels: tuple[int, ...],
        latent_channels: int = 4,
        in_channels: int = 3,
        out_channels: int = 3,
        sample_size: int = 256,
        scaling_factor: float = SCALING_FACTOR,
        shift_factor: float = 0.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
    ) -> None:
        super().__init__()
        self.autoencoder = Autoencoder(validate(AutoencoderConfig, model))
        self.use_slicing = self.use_tiling = False
        self.tile, self.overlap = 512, 128
        self.register_state_dict_post_hook(_own_names)

    @property
    def post_quant_conv(self) -> nn.Module:
        """The first part that latents meet, by whose parameters SDXL's pipelines find its dtype."""
        ae = self.autoencoder
        return ae.post_quant_conv if ae.config.conv1x1 else ae.decoder

    def enable_tiling(self, tile: int = 512, overlap: int = 128) -> None:
        """Encode and decode images larger than a tile by tiles of that side, in pixels."""
        self.use_tiling, self.tile, self.overlap = True, tile, overlap

    def disable_tiling(self) -> None:
        """Encode and decode images in one piece."""
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Encode and decode one image at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode all images of a batch at once."""
        self.use_slicing = False

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Images (B, 3, H, W) in [−1, 1] → `latent_dist`, the posterior over latents."""
        posterior = DiagonalGaussianDistribution(self._sliced(self._moments, x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Latents (B, n_z, h, w) → `sample`, images (B, 3, f·h, f·w); `generator` is not used."""
        images = self._sliced(self._images, z)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Reconstruct images from the posterior's mode, or from a sample of it."""
        posterior = self.encode(sample).latent_dist
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latents, return_dict=return_dict)

    def _sliced(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        parts = x.split(1 if self.use_slicing else max(len(x), 1))
        return torch.cat([network(part) for part in parts]).to(self.dtype)

    def _moments(self, x: Tensor) -> Tensor:
        ae = self.autoencoder
        if self.use_tiling and max(x.shape[-2:]) > self.tile:
            posterior = encode_tiled(ae, x, self.tile, self.overlap)
        else:
            posterior = ae.encode(x)
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def _images(self, z: Tensor) -> Tensor:
        ae = self.autoencoder
        if self.use_tiling and max(z.shape[-2:]) * ae.downsampling > self.tile:
            return decode_tiled(ae, z, tile=self.tile, overlap=self.overlap)
        return ae.decode(z)


def _own_names(vae: nn.Module, tensors: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Undo the renaming for our files: diffusers loads tensors by the names of attributes."""
    rename_layers(OWN_NAMES, vae, tensors, f"{prefix}autoencoder.")


def wrap(ae: Autoencoder, **settings: Any) -> DiffusersVAE:
    """Wrap an autoencoder, without a copy; see `autoencoders.to_diffusers`."""
    n_z, decoder = ae.config.latent_channels, ae.config.decoder
    if isinstance(decoder, DiffusersConfig):
        widths = list(decoder.described[decoder.kind.widths])
    else:
        widths = [decoder.channels * m for m in decoder.multipliers]
    # of a decoder of sub-bands, the last doubling has no width
    widths = widths[:1] * (ae.downsampling.bit_length() - len(widths)) + widths
    usage = {"scaling_factor": SCALING_FACTOR, **ae.settings, **settings}
    latent_statistics(usage, None, n_z, "the autoencoder")
    check_settings(usage, "the autoencoder")
    with torch.device("meta"):
        channels = ae.config.image_channels
        vae = DiffusersVAE(
            to_tree(ae.config),
            block_out_channels=widths,
            latent_channels=n_z,
            in_channels=channels,
            out_channels=channels,
            **usage,
        )
    vae.autoencoder = ae
    return vae.train(ae.training)
