"""The autoencoder: one encoder, a posterior, one decoder, each of which can be exchanged."""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, PositiveInt, ValidationInfo, field_validator
from torch import Tensor, nn

from autoencoders.litevae.encoder import LiteVAEEncoder, LiteVAEEncoderConfig
from autoencoders.posterior import DiagonalGaussian
from autoencoders.sdvae.decoder import SDVAEDecoder, SDVAEDecoderConfig
from autoencoders.sdvae.encoder import SDVAEEncoder, SDVAEEncoderConfig
from autoencoders.sdvae.weights import read_diffusers
from ldm.checkpoint import build_with, load_model
from ldm.config import Config, load_preset, merge, to_tree, validate
from ldm.errors import LdmError, UsageError

ENCODERS = {"litevae": LiteVAEEncoder, "sdvae": SDVAEEncoder}


class AutoencoderConfig(Config):
    """Stage one's model. The defaults are LiteVAE-B with SD-VAE's decoder."""

    latent_channels: PositiveInt = 4
    """n_z, channels of the latents."""
    conv1x1: bool = False
    """1×1 convolutions around the latent: after the encoder, before the decoder (Table 17)."""
    encoder: Annotated[LiteVAEEncoderConfig | SDVAEEncoderConfig, Field(discriminator="type")] = (
        LiteVAEEncoderConfig()
    )
    """Images to posteriors."""
    decoder: SDVAEDecoderConfig = SDVAEDecoderConfig()
    """Latents to images."""

    @field_validator("decoder")
    @classmethod
    def _undoes_the_encoder(
        cls, decoder: SDVAEDecoderConfig, info: ValidationInfo
    ) -> SDVAEDecoderConfig:
        encoder = info.data.get("encoder")  # absent if it was itself refused
        if encoder is not None and decoder.upsampling != encoder.downsampling:
            raise ValueError(
                f"it upsamples {decoder.upsampling}×, the encoder downsamples "
                f"{encoder.downsampling}×: each entry of multipliers after the first doubles"
            )
        return decoder


class AutoencoderOutput(NamedTuple):
    """What a forward pass answers."""

    recon: Tensor
    """Reconstruction (B, 3, H, W), float32, about [−1, 1], not clipped."""
    posterior: DiagonalGaussian
    """The encoder's answer, over latents (B, n_z, H/f, W/f)."""
    latents: Tensor
    """What was decoded (B, n_z, H/f, W/f), float32."""


class Autoencoder(nn.Module):
    """Images (B, 3, H, W) in [−1, 1] ↔ latents (B, n_z, H/f, W/f).

    Attributes:
        encoder: images → moments (B, 2·n_z, H/f, W/f).
        decoder: latents → images.
        downsampling: f, pixels per latent along each side.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        n_z = config.latent_channels
        self.config = config
        self.downsampling = config.encoder.downsampling
        self.encoder = ENCODERS[config.encoder.type](config.encoder, n_z)
        self.decoder = SDVAEDecoder(config.decoder, n_z)
        self.pre_conv = nn.Conv2d(2 * n_z, 2 * n_z, 1) if config.conv1x1 else nn.Identity()
        self.post_conv = nn.Conv2d(n_z, n_z, 1) if config.conv1x1 else nn.Identity()

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Images (B, 3, H, W) in [−1, 1] → posterior over latents (B, n_z, H/f, W/f).

        Raises:
            LdmError: H or W is not a multiple of f.
        """
        f, (height, width) = self.downsampling, images.shape[-2:]
        if height % f or width % f or not height * width:
            raise LdmError(
                f"images of {height}×{width} pixels: both sides must be multiples of {f}, "
                "the autoencoder's downsampling; crop or resize them"
            )
        return DiagonalGaussian.from_moments(self.pre_conv(self.encoder(images)))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, n_z, h, w) → images (B, 3, f·h, f·w), float32, not clipped."""
        return self.decoder(self.post_conv(latents)).float()

    def forward(
        self, images: Tensor, noise: Tensor | None = None, sample: bool = True
    ) -> AutoencoderOutput:
        """Encode, draw, decode.

        Args:
            images: (B, 3, H, W) in [−1, 1].
            noise: standard normal (B, n_z, H/f, W/f), so that noise belongs to samples.
            sample: False decodes the posterior's mode instead of a draw.
        """
        posterior = self.encode(images)
        latents = posterior.sample(noise=noise) if sample else posterior.mode()
        return AutoencoderOutput(self.decode(latents), posterior, latents)


def build_autoencoder(preset_or_config: str | AutoencoderConfig, **overrides: Any) -> Autoencoder:
    """A fresh autoencoder: of a preset's name ("litevae-b") or a config, and what differs from it.

    Args:
        overrides: top-level keys (`latent_channels=12`); a section takes a dict of what differs
            in it (`decoder={"norm": "smc"}`).

    Raises:
        UsageError: no such preset, an unknown key, or a bad value.
    """
    if isinstance(preset_or_config, str):
        # a preset says how to train its model, too: that is not for here
        preset = load_preset("ae", preset_or_config)
        tree = {key: preset[key] for key in AutoencoderConfig.model_fields if key in preset}
    else:
        tree = to_tree(preset_or_config)
    return Autoencoder(validate(AutoencoderConfig, merge(tree, overrides)))


def load_autoencoder(path: str | Path, device: str | torch.device = "cpu") -> Autoencoder:
    """A trained autoencoder in eval mode.

    Args:
        path: our `.pt` or `.safetensors`, a run folder, or a diffusers `AutoencoderKL` folder.

    Raises:
        LdmError: it cannot be read, or its tensors are not those its config describes.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        tree, weights = read_diffusers(path)
    else:
        model = load_model(path, "autoencoder")
        tree, weights = model.config, model.weights
    try:
        config = validate(AutoencoderConfig, tree)
    except UsageError as error:
        raise LdmError(f"the config in {path} is not one of this version: {error}") from error
    return build_with(lambda: Autoencoder(config), weights, path).to(device).eval()
