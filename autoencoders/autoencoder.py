"""The autoencoder: an encoder, a posterior and a decoder, of exchangeable types."""

import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self, cast

import torch
from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from autoencoders.diffusers_parts import (
    LEAST_LOGVAR,
    DiffusersConfig,
    DiffusersDecoder,
    DiffusersEncoder,
)
from autoencoders.dwt import DWTEncoder, DWTEncoderConfig
from autoencoders.layers import PIXELS_AT_ONCE, Quantizer, fuse, in_small_batches
from autoencoders.litevae.encoder import LiteVAEEncoder, LiteVAEEncoderConfig
from autoencoders.pretrained import AutoencoderFile, HubMixin, find_pretrained, read_autoencoder
from autoencoders.sdvae import SDVAEDecoder, SDVAEDecoderConfig, SDVAEEncoder, SDVAEEncoderConfig
from autoencoders.sdvae.formats import pick_settings
from autoencoders.wavelet import check_size
from ldm.checkpoint import build_with
from ldm.config import (
    Config,
    Resolution,
    Width,
    height_width,
    load_preset,
    merge,
    to_tree,
    validate,
)
from ldm.device import memory_format
from ldm.errors import LdmError, UsageError
from ldm.images import Pixels

ENCODERS = {
    "litevae": LiteVAEEncoder,
    "sdvae": SDVAEEncoder,
    "dwt": DWTEncoder,
    "diffusers": DiffusersEncoder,
}
DECODERS: dict[str, Any] = {"sdvae": SDVAEDecoder, "diffusers": DiffusersDecoder}
EncoderConfig = Annotated[
    LiteVAEEncoderConfig | SDVAEEncoderConfig | DWTEncoderConfig | DiffusersConfig,
    Field(discriminator="type"),
]


def decoder_type(section: Any) -> str:
    """The type of a decoder's section: only an imported one has the key."""
    given = section.get("type") if isinstance(section, dict) else getattr(section, "type", None)
    return "diffusers" if given == "diffusers" else "sdvae"


DecoderConfig = Annotated[
    Annotated[SDVAEDecoderConfig, Tag("sdvae")] | Annotated[DiffusersConfig, Tag("diffusers")],
    Discriminator(decoder_type),
]

FILE_KEYS = {"quant_conv": "pre_conv", "post_quant_conv": "post_conv"}
"""Layers whose key in state dicts, and so in all files, differs from their name."""
LARGEST = 10.0
"""Value of an image that is surely not in [−1, 1], but in [0, 255]."""
OWN_NAMES = {key: name for name, key in FILE_KEYS.items()}


class AutoencoderConfig(Config):
    """Model of stage one. The defaults are LiteVAE-B with SD-VAE's decoder."""

    latent_channels: Width = 4
    """n_z, channels of the latents."""
    image_channels: Width = 3
    """C, channels of the images: 1 for grey."""
    pixels: Pixels = Pixels()
    """Pixel values of the files that it was trained on; training notes them, see data.range."""
    conv1x1: bool = False
    """1×1 convolutions around the latent: after the encoder, before the decoder (Table 17)."""
    codes: Width | None = None
    """Codes of an imported VQ model, the nearest of which replaces each latent vector in decoding;
    null: latents are decoded as they are. They are not trained."""
    encoder: EncoderConfig = LiteVAEEncoderConfig()
    """Images to posteriors."""
    decoder: DecoderConfig = SDVAEDecoderConfig()
    """Latents to images."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        encoder, decoder = self.encoder, self.decoder
        if decoder.upsampling != encoder.downsampling:
            # each entry after the first doubles, and so does the inverse of a wavelet transform
            is_wavelet = getattr(decoder, "output", "image") == "wavelet"
            count = encoder.downsampling.bit_length() - is_wavelet
            advice = []
            if hasattr(encoder, "depth"):
                advice += [f"set encoder.depth={decoder.upsampling.bit_length() - 1}"]
            elif encoder.type == "sdvae":
                advice += [f"give encoder.multipliers {decoder.upsampling.bit_length()} entries"]
            if decoder_type(decoder) != "diffusers":
                advice += [f"give decoder.multipliers {count} entries"]
            raise ValueError(
                f"the decoder upsamples {decoder.upsampling}×, the encoder downsamples "
                f"{encoder.downsampling}×: {', or '.join(advice)}"
            )
        parts: tuple[Any, ...] = (encoder, decoder)
        for part, word in zip(parts, ("encoder gives", "decoder takes"), strict=True):
            # a transform without parameters and an imported part fix the number of channels
            n_z = getattr(part, "latent_channels", self.latent_channels)
            kind = getattr(part, "type", "sdvae")
            if kind == "diffusers" and self.image_channels != 3:
                raise ValueError(
                    f"image_channels is {self.image_channels}, and {kind} parts take 3: set "
                    "image_channels=3"
                )
            n_z = n_z // 3 * self.image_channels if kind == "dwt" else n_z
            if n_z != self.latent_channels:
                raise ValueError(
                    f"latent_channels is {self.latent_channels}, and the {part.type} {word} {n_z}: "
                    f"set latent_channels={n_z}"
                    + (", or change encoder.levels" if part.type == "dwt" else "")
                )
        return self

    def latent_shape(self, resolution: Resolution) -> tuple[int, int, int]:
        """Shape (n_z, h, w) of the latents of an image whose sides are multiples of f."""
        height, width = (side // self.encoder.downsampling for side in height_width(resolution))
        return self.latent_channels, height, width

    def check_size(self, resolution: Resolution) -> None:
        """Raise LdmError if images of a resolution are too small for the wavelet transform."""
        if isinstance(self.encoder, LiteVAEEncoderConfig | DWTEncoderConfig):
            check_size(height_width(resolution), self.encoder.depth, self.encoder.wavelet)


class DiagonalGaussian:
    """Posterior over latents: q(z|x) = N(mean, exp(logvar)), independent in every latent value.

    Kingma & Welling 2014 (arXiv 1312.6114). Both are kept in float32, whatever the precision of the
    encoder.

    Args:
        mean: (B, n_z, h, w).
        logvar: (B, n_z, h, w), clamped to [−30, 20] so that its exponential stays finite.
    """

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        self.mean = mean.float()
        self.logvar = logvar.float().clamp(-30, 20)

    @classmethod
    def from_moments(cls, moments: Tensor) -> "DiagonalGaussian":
        """Build it from an encoder's output (B, 2·n_z, h, w): the mean, then the log-variance."""
        return cls(*moments.chunk(2, dim=1))

    def sample(
        self, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Draw one sample (B, n_z, h, w).

        Args:
            generator: source of the noise if `noise` is None; None is torch's default.
            noise: standard normal values (B, n_z, h, w), so that each sample can own its noise.

        Raises:
            ValueError: noise of another shape, which would broadcast silently.
        """
        if noise is None:
            device = self.mean.device if generator is None else generator.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device)
        if noise.shape != self.mean.shape:
            raise ValueError(f"noise {tuple(noise.shape)} for latents {tuple(self.mean.shape)}")
        # Kingma & Welling 2014, Section 2.4: z = μ + σ ε
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)

    def isfinite(self) -> Tensor:
        """Return of each image whether all its values are finite: bool (B,)."""
        return (self.mean.isfinite() & self.logvar.isfinite()).flatten(1).all(1)

    def mode(self) -> Tensor:
        """Most likely latents (B, n_z, h, w)."""
        return self.mean

    def kl(self) -> Tensor:
        """KL(q ‖ N(0, I)) of each image (B,), in nats, summed over its latent values."""
        # Kingma & Welling 2014, Appendix B: ½ Σ (μ² + σ² − 1 − ln σ²)
        excess = self.mean.square() + self.logvar.exp() - 1 - self.logvar
        return 0.5 * excess.flatten(1).sum(1)


class AutoencoderOutput(NamedTuple):
    """Result of a forward pass."""

    recon: Tensor
    """Reconstruction (B, C, H, W), float32, about [−1, 1], not clipped."""
    posterior: DiagonalGaussian
    """Posterior over latents (B, n_z, H/f, W/f)."""
    latents: Tensor
    """Latents that were decoded (B, n_z, H/f, W/f), float32."""


class Autoencoder(HubMixin):
    """Images (B, C, H, W) in [−1, 1] ↔ latents (B, n_z, H/f, W/f).

    Attributes:
        encoder: images → moments (B, 2·n_z, H/f, W/f).
        quantizer: latents → the nearest codes, in a VQ model; `encode` gives latents before it.
        decoder: latents → images.
        downsampling: f, pixels per latent along each side.
        settings: how others use its latents, by diffusers' names (scaling_factor, shift_factor,
            …): what an imported model came with, or what stage two measured. Nothing here reads
            them but exports.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        n_z, channels = config.latent_channels, config.image_channels
        self.config = config
        self.downsampling = config.encoder.downsampling
        self.encoder = ENCODERS[config.encoder.type](config.encoder, n_z, channels)
        self.decoder: Any = DECODERS[decoder_type(config.decoder)](config.decoder, n_z, channels)
        moments = 2 * n_z if getattr(config.encoder, "variance", True) else n_z
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.conv1x1 else nn.Identity()
        self.quantizer = Quantizer(config.codes, n_z) if config.codes else nn.Identity()
        self.post_quant_conv = nn.Conv2d(n_z, n_z, 1) if config.conv1x1 else nn.Identity()
        self.settings: dict[str, Any] = {}
        self._range_checked = False
        self.register_state_dict_post_hook(partial(rename_layers, FILE_KEYS))
        self.register_load_state_dict_pre_hook(partial(rename_layers, OWN_NAMES))

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Images (B, C, H, W) in [−1, 1] → posterior over latents (B, n_z, ⌈H/f⌉, ⌈W/f⌉).

        Sides that are no multiples of f are padded by `pad`; `decode` crops the padding off.

        Raises:
            LdmError: the images have another rank, type or number of channels, or a side is smaller
                than f; or those of the first call are not in [−1, 1].
        """
        self._check(images)
        images = self.pad(images)
        learns = any(p.requires_grad for p in self._encoding_parameters())
        if torch.is_grad_enabled() and not (learns or images.requires_grad):
            with torch.no_grad():  # a CPU is faster then, in a layout that is slow in training
                posterior = self.encode(images)
            layout = memory_format(images.device)
            return DiagonalGaussian(
                posterior.mean.contiguous(memory_format=layout),
                posterior.logvar.contiguous(memory_format=layout),
            )
        pixels, at_once = math.prod(images.shape[-2:]), PIXELS_AT_ONCE[self.config.encoder.type]
        moments = in_small_batches(self._moments, images, pixels, at_once)  # (B, 2·n_z, H/f, W/f)
        return DiagonalGaussian.from_moments(moments)

    def _check(self, images: Tensor) -> None:
        """Refuse images that are none; the range of the first call's alone, for it is read back."""
        channels = self.config.image_channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise LdmError(f"images have shape {tuple(images.shape)}: give (B, {channels}, H, W)")
        if not images.is_floating_point():
            raise LdmError(f"images are {images.dtype}: give floats in [−1, 1], as by `to_float`")
        is_plain = type(images) is Tensor and not images.is_meta and not is_compiling()
        if self._range_checked or not is_plain or not images.numel():
            return
        low, high = (bound.item() for bound in images.detach().aminmax())
        if low < -LARGEST or high > LARGEST:
            raise LdmError(f"images have values from {low:g} to {high:g}: give them in [−1, 1]")
        self._range_checked = True

    def pad(self, images: Tensor) -> Tensor:
        """Repeat the last column and row of images (B, C, H, W) up to multiples of f."""
        f, (height, width) = self.downsampling, images.shape[-2:]
        if min(height, width) < f:
            raise LdmError(
                f"images of {height}×{width} pixels are smaller than one latent of {f}×{f}: "
                "use larger images, or an autoencoder with fewer levels"
            )
        if not (height % f or width % f):
            return images
        return F.pad(images, (0, -width % f, 0, -height % f), mode="replicate")

    def decode(self, latents: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Latents (B, n_z, h, w) → images (B, C, f·h, f·w), float32, not clipped.

        Args:
            size: height and width to crop to, those of the encoded images.
        """
        pixels = self.downsampling**2 * math.prod(latents.shape[-2:])
        recon = in_small_batches(self._recon, latents, pixels, PIXELS_AT_ONCE["decoder"])
        return recon if size is None else recon[..., : size[0], : size[1]]

    def forward(
        self, images: Tensor, noise: Tensor | None = None, sample: bool = True
    ) -> AutoencoderOutput:
        """Encode, sample the posterior, decode; the reconstruction has the images' size.

        Args:
            images: (B, C, H, W) in [−1, 1], of any size from f up.
            noise: standard normal (B, n_z, ⌈H/f⌉, ⌈W/f⌉), so that noise belongs to samples.
            sample: False decodes the posterior's mode instead of a sample.
        """
        posterior = self.encode(images)
        latents = posterior.sample(noise=noise) if sample else posterior.mode()
        return AutoencoderOutput(self.decode(latents, images.shape[-2:]), posterior, latents)

    def _encoding_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.encoder.parameters()
        yield from self.quant_conv.parameters()

    def _moments(self, images: Tensor) -> Tensor:
        moments = self.encoder(images)
        if self.config.conv1x1:
            moments = self.quant_conv(moments.to(self.quant_conv.weight.dtype))
        if moments.shape[1] == self.config.latent_channels:  # the mean alone
            moments = torch.cat([moments, torch.full_like(moments, LEAST_LOGVAR)], dim=1)
        return moments

    def _recon(self, latents: Tensor) -> Tensor:
        latents = self.quantizer(latents)
        if self.config.conv1x1:
            dtype = next(self.post_quant_conv.parameters()).dtype
            latents = self.post_quant_conv(latents.to(dtype))
        return self.decoder(latents).float()

    @torch.no_grad()
    def adjust_posterior(self, mean_gain: float = 1.0, logvar_shift: float = 0.0) -> None:
        """Scale the last layer's part of all means, and add to all log-variances."""
        last: Any = self.quant_conv if self.config.conv1x1 else self.encoder.last_layer
        n_z = self.config.latent_channels
        last.weight[:n_z] *= mean_gain
        last.bias[:n_z] *= mean_gain
        last.bias[n_z:] += logvar_shift

    def fuse(self) -> "Autoencoder":
        """Copy this autoencoder for faster inference; see `layers.fuse`.

        The copy is frozen and cannot be saved: save this one.
        """
        return cast(Autoencoder, fuse(self))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        revision: str | None = None,
        subfolder: str | None = None,
        device: str | torch.device = "cpu",
    ) -> "Autoencoder":
        """Load a trained autoencoder, in eval mode, from this machine or the Hugging Face Hub.

        Args:
            name_or_path: a path for `load_autoencoder`, or a repository (`owner/name`) of ours or
                of a diffusers `AutoencoderKL`.
            revision: branch, tag or commit of the repository.
            subfolder: folder of the model inside it, such as `vae`.

        Raises:
            LdmError: it is neither here nor on the Hub, or cannot be read.
        """
        return load_autoencoder(find_pretrained(name_or_path, revision, subfolder), device)


def build_autoencoder(preset_or_config: str | AutoencoderConfig, **overrides: Any) -> Autoencoder:
    """Build an autoencoder with fresh weights from a preset's name ("litevae-b") or a config.

    Args:
        overrides: top-level keys (`latent_channels=12`); for a section a dict of the keys to change
            in it (`decoder={"norm": "smc"}`).

    Raises:
        UsageError: no such preset, an unknown key, or a bad value.
    """
    if isinstance(preset_or_config, str):
        # a preset holds the training's settings too
        preset = load_preset("ae", preset_or_config)
        tree = {key: preset[key] for key in AutoencoderConfig.model_fields if key in preset}
    else:
        tree = to_tree(preset_or_config)
    return Autoencoder(validate(AutoencoderConfig, merge(tree, overrides)))


def load_autoencoder(path: str | Path, device: str | torch.device = "cpu") -> Autoencoder:
    """Load a trained autoencoder, in eval mode.

    Args:
        path: our `.pt` or `.safetensors`, a run folder, a folder of `save_pretrained`, a diffusers
            `AutoencoderKL` folder, a CompVis checkpoint (`.ckpt`, `.pt` or `.safetensors`) of a KL
            or VQ autoencoder or of a latent diffusion model that has one, or a folder of another
            autoencoder of diffusers (`diffusers_parts.KINDS`), which needs diffusers.

    Raises:
        LdmError: it cannot be read, or its tensors are not those its config describes.
    """
    return assemble(read_autoencoder(path), path).to(device).eval()


def assemble(file: AutoencoderFile, path: str | Path) -> Autoencoder:
    """Build the autoencoder that was read from a path."""
    try:
        config = validate(AutoencoderConfig, file.tree)
    except UsageError as error:
        raise LdmError(f"the config in {path} is not one of this version: {error}") from error
    ae = build_with(lambda: Autoencoder(config), file.weights, path)
    ae.settings = pick_settings(file.provenance.get("imported"))
    return ae


def grey_weights(
    ae: Autoencoder, parts: Sequence[str] = ("encoder", "decoder")
) -> dict[str, Tensor]:
    """The weights of an autoencoder as one of a single channel takes them, in some of its parts.

    The first convolutions' are summed over the channels, the last one's averaged: on a grey image
    it gives the mean over the channels of what `ae` gives for the image repeated.

    Raises:
        LdmError: the encoder has no first convolution, or its latents show the channels.
    """
    weights, channels = ae.state_dict(), ae.config.image_channels
    first = [n for n in weights if re.fullmatch(r"encoder\.(extractors\.\d+\.)?conv_in\.weight", n)]
    if "encoder" not in parts:
        first = []
    elif not first or getattr(ae.config.encoder, "shortcut", "none") != "none":
        raise LdmError(
            "only encoders of type sdvae, and litevae without a shortcut, can be adapted"
        )
    for name in first:  # sub-bands come channel by channel: LL of all, H of all, …
        weights[name] = weights[name].unflatten(1, (-1, channels)).sum(2)
    last = ("decoder.conv_out.weight", "decoder.conv_out.bias") if "decoder" in parts else ()
    for name in last:
        weights[name] = weights[name].unflatten(0, (-1, channels)).mean(1)
    return weights


def rename_layers(
    names: dict[str, str], module: nn.Module, tensors: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Rename layers in a state dict, by a table of names, as a hook of the module."""
    for (old, new), tensor in product(names.items(), ("weight", "bias")):
        if f"{prefix}{old}.{tensor}" in tensors:
            tensors[f"{prefix}{new}.{tensor}"] = tensors.pop(f"{prefix}{old}.{tensor}")
