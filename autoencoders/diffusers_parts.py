"""Autoencoders of diffusers other than `AutoencoderKL`, run by diffusers itself: a part each.

`AutoencoderKL` is our SD-VAE and needs no diffusers (`sdvae.formats`). Of every other class, the
encoder and the decoder are parts of an `Autoencoder` like ours, so each also goes with a part of
ours: a LiteVAE encoder with the decoder whose latents it was taught.

The weights' names are theirs, after `encoder.model.` or `decoder.model.`.
"""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ValidationError, field_validator, model_validator
from torch import Tensor, nn

from ldm.checkpoint import refuse_damaged
from ldm.config import Config
from ldm.errors import LdmError
from ldm.foreign import OLD_ATTENTION, read_weights, renamed, weights_files, write_folder

ENCODING = ("encoder", "quant_conv")
"""The parts of their models that encode; all others decode."""
MOST, MOST_BLOCKS = 65_536, 64  # of any size in a config, and of blocks in a row
LEAST_LOGVAR = -30.0
"""The smallest log-variance that a posterior keeps: samples equal the mean to 3e-7."""


class Kind(NamedTuple):
    """One of diffusers' classes."""

    widths: str
    """Key of the config with an encoder's width at each resolution."""
    output: str
    """Field of `encode`'s output with the posterior, or the latents of a deterministic encoder."""


KINDS = {
    "AutoencoderTiny": Kind("encoder_block_out_channels", "latents"),
    "AutoencoderDC": Kind("encoder_block_out_channels", "latent"),
    "AsymmetricAutoencoderKL": Kind("down_block_out_channels", "latent_dist"),
    "ConsistencyDecoderVAE": Kind("encoder_block_out_channels", "latent_dist"),
    "VQModel": Kind("block_out_channels", "latents"),
}


class DiffusersConfig(Config):
    """An encoder or a decoder of a class of diffusers'."""

    type: Literal["diffusers"] = "diffusers"
    """A part of an imported model, which diffusers runs."""
    described: dict[str, Any]
    """config.json of the model."""

    @model_validator(mode="before")
    @classmethod
    def _without_defaults(cls, tree: Any) -> Any:
        """Drop the keys of the default decoder, which has no `type` that would replace them."""
        known = cls.model_fields
        return {k: v for k, v in tree.items() if k in known} if isinstance(tree, dict) else tree

    @field_validator("described")
    @classmethod
    def _is_known(cls, described: dict[str, Any]) -> dict[str, Any]:
        name = described.get("_class_name")
        if not isinstance(name, str) or name not in KINDS:
            raise ValueError(f"_class_name is {name}, not one of {', '.join(KINDS)}")
        widths = described.get(KINDS[name].widths)
        if not isinstance(widths, list | tuple) or not 0 < len(widths) < 12:
            raise ValueError(f"{name} has no {KINDS[name].widths}, the width of each resolution")
        channels = described.get("vq_embed_dim") or described.get("latent_channels")
        if type(channels) is not int or channels < 1:
            raise ValueError(f"{name} has no latent_channels")
        for key in ("in_channels", "out_channels", "encoder_in_channels"):
            if described.get(key, 3) != 3:
                raise ValueError(f"{key} is {described[key]}, only 3 is supported")
        for key, value in described.items():
            most = MOST_BLOCKS if re.search("layers|_blocks", key) else MOST
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, int) and abs(number) > most:
                    raise ValueError(f"{key} is {number}, at most {most} is supported")
        return described

    @property
    def kind(self) -> Kind:
        """The entry of `KINDS` for its class."""
        return KINDS[self.class_name]

    @property
    def class_name(self) -> str:
        """Name of its class in diffusers."""
        return self.described["_class_name"]

    @property
    def latent_channels(self) -> int:
        """n_z, channels of the latents."""
        return self.described.get("vq_embed_dim") or self.described["latent_channels"]

    @property
    def downsampling(self) -> int:
        """f, pixels per latent along each side."""
        return 2 ** (len(self.described[self.kind.widths]) - 1)

    @property
    def upsampling(self) -> int:
        """f, as for the encoder."""
        return self.downsampling

    def build(self) -> Any:
        """Build the model by diffusers, without weights on the meta device.

        Raises:
            LdmError: diffusers is not installed, or refuses the config.
        """
        try:
            import diffusers
            from accelerate import init_empty_weights
        except ImportError as error:
            raise LdmError(
                f"{self.class_name} is a class of diffusers, which is not installed here: "
                "pip install diffusers"
            ) from error
        kind = getattr(diffusers, self.class_name)
        known = signature(kind.__init__).parameters  # their config.json has more
        arguments = {key: value for key, value in self.described.items() if key in known}
        with ExitStack() as stack:
            if torch.get_default_device().type == "meta":
                # buffers keep their values: some are in no file
                stack.enter_context(torch.device("cpu"))
                stack.enter_context(init_empty_weights())
            try:
                return kind(**arguments)
            except Exception as error:  # whatever a constructor makes of values it did not expect
                brief = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                raise LdmError(f"diffusers cannot build this {self.class_name}: {brief}") from error


class DiffusersEncoder(nn.Module):
    """Images (B, 3, H, W) in [−1, 1] → moments (B, 2·n_z, H/f, W/f): mean, log-variance.

    The posterior of a deterministic encoder has no variance: its log-variance is −30.
    """

    def __init__(
        self, config: DiffusersConfig, latent_channels: int, image_channels: int = 3
    ) -> None:
        super().__init__()
        assert latent_channels == config.latent_channels  # `AutoencoderConfig` has checked both
        self.output, self.model = config.kind.output, config.build()
        _keep(self.model, True)

    def forward(self, images: Tensor) -> Tensor:
        found = getattr(self.model.encode(images.to(self.model.dtype)), self.output)
        if self.output == "latent_dist":
            return found.parameters
        return torch.cat([found, torch.full_like(found, LEAST_LOGVAR)], dim=1)


class DiffusersDecoder(nn.Module):
    """Latents (B, n_z, h, w) → images (B, 3, f·h, f·w), about [−1, 1], not clipped.

    A VQ model's replaces each latent by the nearest code first. The consistency decoder draws the
    same noise for every image, so that an image does not depend on its batch.
    """

    def __init__(
        self, config: DiffusersConfig, latent_channels: int, image_channels: int = 3
    ) -> None:
        super().__init__()
        assert latent_channels == config.latent_channels
        self.model = config.build()
        _keep(self.model, False)

    def forward(self, latents: Tensor) -> Tensor:
        decode = self.model.decode
        if hasattr(self.model, "decoder_scheduler"):
            noises = [torch.Generator().manual_seed(0) for _ in latents]
            decode = partial(decode, generator=noises)
        return decode(latents.to(self.model.dtype)).sample


def _keep(model: nn.Module, encoding: bool) -> None:
    """Delete the parts of a model that encode, or those that do not."""
    for name in [name for name, _ in model.named_children()]:
        if (name in ENCODING) != encoding:
            delattr(model, name)


# ----------------------------------------------------------------------------------- folders
def read_other(
    folder: Path, described: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a folder of one of `KINDS`, with this config.json: (tree of our config, weights)."""
    part = {"type": "diffusers", "described": dict(described)}
    paths = weights_files(folder)
    weights = read_weights(*paths)
    refuse_damaged(weights, paths[0] if len(paths) == 1 else folder)
    try:
        n_z = DiffusersConfig.model_validate(part).latent_channels
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise LdmError(f"{folder}/config.json: {reason.removeprefix('Value error, ')}") from error
    tree = {"latent_channels": n_z, "conv1x1": False, "encoder": part, "decoder": part}
    theirs = renamed(weights, OLD_ATTENTION)
    return tree, {
        f"{'encoder' if name.split('.')[0] in ENCODING else 'decoder'}.model.{name}": tensor
        for name, tensor in theirs.items()
    }


def write_other(folder: Path, ae: nn.Module, scaling_factor: float | None = None) -> list[Path]:
    """Write a folder for the `from_pretrained` of the model's class, and return its files."""
    config: Any = ae.config
    if config.encoder != config.decoder:
        raise LdmError("encoder and decoder are of two models: no class of diffusers has both")
    given = {} if scaling_factor is None else {"scaling_factor": scaling_factor}
    weights = {name.split(".model.", 1)[1]: tensor for name, tensor in ae.state_dict().items()}
    return write_folder(folder, {**config.encoder.described, **given}, weights)
