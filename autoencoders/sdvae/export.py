"""Our SD-VAE as others open it: a diffusers `AutoencoderKL` folder, or a CompVis checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from autoencoders.autoencoder import Autoencoder, AutoencoderConfig
from autoencoders.sdvae.compvis import to_compvis
from autoencoders.sdvae.decoder import SDVAEDecoderConfig
from autoencoders.sdvae.encoder import SDVAEEncoderConfig
from autoencoders.sdvae.weights import (
    GROUPS,
    LEVELS,
    WEIGHTS_FILE,
    groups_of,
    pick_said,
    to_diffusers,
)
from ldm.errors import LdmError
from ldm.files import to_json, write_atomically, write_together

# 1 ÷ the standard deviation of the published SD-VAE's latents (Rombach et al. 2022, Appendix G)
SCALING_FACTOR = 0.18215
SIZES = {"type", "channels", "multipliers", "blocks"}


def diffusers_config(
    config: AutoencoderConfig,
    scaling_factor: float | None = None,
    said: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Our config as the `config.json` of a diffusers `AutoencoderKL`.

    Args:
        scaling_factor: what their pipelines multiply latents by, to give them unit variance. None:
            what `said` says, else SD-VAE's.
        said: what the config that the model came with said, of which `SAID` is kept.

    Raises:
        LdmError: it is no SD-VAE, or one that theirs cannot express.
    """
    widths = _widths(config, "diffusers")
    if config.encoder.multipliers[0] != 1:
        raise _cannot(
            "diffusers", f"encoder.multipliers begin with {config.encoder.multipliers[0]}"
        )
    groups = groups_of(widths)
    if groups is None:
        raise _cannot("diffusers", f"widths {widths} are normalised in unequal numbers of groups")
    kept = pick_said(said or {})
    if scaling_factor is not None:
        kept["scaling_factor"] = scaling_factor
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        **{key: [level] * len(widths) for key, level in LEVELS.items()},
        "block_out_channels": widths,
        "layers_per_block": config.encoder.blocks,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": groups,
        "use_quant_conv": config.conv1x1,
        "use_post_quant_conv": config.conv1x1,
        "mid_block_add_attention": True,
        "sample_size": 256,
        "scaling_factor": SCALING_FACTOR,
        "force_upcast": True,
        **kept,
    }


def write_diffusers(
    folder: Path,
    ae: Autoencoder,
    scaling_factor: float | None = None,
    said: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a folder for diffusers' `AutoencoderKL.from_pretrained`; what was written.

    Raises:
        LdmError: theirs cannot express this model, or the folder cannot be written.
    """
    config = diffusers_config(ae.config, scaling_factor, said)
    weights = {
        name: tensor.contiguous().cpu() for name, tensor in to_diffusers(ae.state_dict()).items()
    }
    payload = save(weights, metadata={"format": "pt"})
    paths = [folder / "config.json", folder / WEIGHTS_FILE]
    write_together(
        {
            paths[1]: lambda file: file.write(payload),
            paths[0]: lambda file: file.write(to_json(config)),
        }
    )
    return paths


def write_compvis(path: Path, ae: Autoencoder) -> list[Path]:
    """Write one file by CompVis's names, a `.safetensors` or a `.ckpt` by its ending.

    Raises:
        LdmError: theirs cannot express this model, or the file cannot be written.
    """
    widths = _widths(ae.config, "compvis")
    if groups_of(widths) != GROUPS:
        raise _cannot("compvis", f"widths {widths} are no multiples of {GROUPS}")
    if not ae.config.conv1x1:
        raise _cannot("compvis", "it has no 1×1 convolutions around the latent (conv1x1)")
    weights = {
        name: tensor.contiguous().cpu() for name, tensor in to_compvis(ae.state_dict()).items()
    }
    if path.suffix == ".safetensors":
        payload = save(weights, metadata={"format": "pt"})
        write_atomically(path, lambda file: file.write(payload))
    else:
        write_atomically(path, lambda file: torch.save({"state_dict": weights}, file))
    return [path]


def _widths(config: AutoencoderConfig, to: str) -> list[int]:
    """Width of each resolution, the same on the way down and up.

    Raises:
        LdmError: something in the config is not plain SD-VAE's.
    """
    parts = (("encoder", SDVAEEncoderConfig), ("decoder", SDVAEDecoderConfig))
    for name, plain in parts:
        part = getattr(config, name)
        if not isinstance(part, plain):
            raise _cannot(to, f"{name}.type={part.type}")
        for key, field in plain.model_fields.items():
            if key not in SIZES and getattr(part, key) != field.get_default():
                raise _cannot(to, f"{name}.{key}={getattr(part, key)}")
    down, up = (
        ([part.channels * m for m in part.multipliers], part.blocks)
        for part in (config.encoder, config.decoder)
    )
    if down != up:
        raise _cannot(to, "encoder and decoder differ in widths or blocks")
    return down[0]


def _cannot(to: str, why: str) -> LdmError:
    return LdmError(f"no {to} model can express this autoencoder: {why}; --format hub can")
