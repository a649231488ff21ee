"""SD-VAE as other toolkits name and store it: diffusers' `AutoencoderKL`, and CompVis's.

A diffusers folder holds `config.json` and `diffusion_pytorch_model.safetensors`, whole, in shards
or as a variant (`.fp16`).

CompVis's (Rombach et al. 2022) comes as a checkpoint of its own, or under `first_stage_model.` in
one of a whole latent diffusion model. It has no config: the sizes are those of the tensors. Its
decoder's levels count from the image's resolution, ours in the order they come; its attention's 1×1
convolutions (C, C, 1, 1) are our linear layers (C, C).

A VQ model (`VQModel`) is the same with a quantizer before the decoder and without a variance.

All else is a matter of names. Models go in and out as the tree of an `AutoencoderConfig` and the
weights by our names, bit for bit: the class itself stands above this module.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoencoders.layers import count_groups
from autoencoders.sdvae import SDVAEDecoderConfig, SDVAEEncoderConfig
from ldm.checkpoint import refuse_damaged, to_safetensors
from ldm.errors import LdmError
from ldm.files import write_atomically
from ldm.foreign import (
    OLD_ATTENTION,
    Pairs,
    as_multiples,
    check_described,
    layer_sizes,
    pick,
    read_weights,
    rename,
    renamed,
    reverse,
    weights_files,
    write_folder,
)

GROUPS = 32
# 1 ÷ the standard deviation of the published SD-VAE's latents (Rombach et al. 2022, Appendix G)
SCALING_FACTOR = 0.18215


# ------------------------------------------------------------------------- diffusers: weights
DIFFUSERS_NAMES: Pairs = (
    ("encoder.levels", "encoder.down_blocks"),
    ("decoder.levels", "decoder.up_blocks"),
    ("middle.0", "mid_block.resnets.0"),
    ("middle.1.norm", "mid_block.attentions.0.group_norm"),
    ("middle.1.query", "mid_block.attentions.0.to_q"),
    ("middle.1.key", "mid_block.attentions.0.to_k"),
    ("middle.1.value", "mid_block.attentions.0.to_v"),
    ("middle.1.out", "mid_block.attentions.0.to_out.0"),
    ("middle.2", "mid_block.resnets.1"),
    ("blocks", "resnets"),
    ("skip", "conv_shortcut"),
    ("downsample", "downsamplers.0"),
    ("upsample", "upsamplers.0"),
    ("norm_out", "conv_norm_out"),
    ("post_conv", "post_quant_conv"),
    ("pre_conv", "quant_conv"),
)
DIFFUSERS_FIRST = "encoder.down_blocks.0.resnets.0.conv1.weight"
"""A tensor that every model of theirs has."""


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of our SD-VAE to those of diffusers' `AutoencoderKL`."""
    return renamed(weights, DIFFUSERS_NAMES)


def from_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an `AutoencoderKL`, with old or new attention names, to ours."""
    return renamed(weights, [*OLD_ATTENTION, *reverse(DIFFUSERS_NAMES)])


# -------------------------------------------------------------------------- diffusers: config
SIZES = ("_class_name", "latent_channels", "block_out_channels", "layers_per_block")
FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu",),
    "mid_block_add_attention": (True,),
}
# every level's kind: SD-VAE has attention in the middle alone
LEVELS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
# what their config says of using the latents and images: it is kept for who opens the model next
SETTINGS = (
    "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "sample_size",
)  # fmt: skip


def tree_from_diffusers(described: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a diffusers config.json into the tree of an `AutoencoderConfig`, or refuse it."""
    check_described(described, FIXED, SIZES)
    for key, level in LEVELS.items():
        others = [name for name in described.get(key, ()) if name != level]
        if others:
            raise LdmError(f"{key} has {others[0]}, only {level} is supported")
    channels, out = (described.get(key, 3) for key in ("in_channels", "out_channels"))
    if channels != out:
        raise LdmError(f"in_channels is {channels} and out_channels {out}: only equal ones fit")
    conv1x1 = described.get("use_quant_conv", True)
    if conv1x1 != described.get("use_post_quant_conv", True):
        raise LdmError("it has one of the two 1×1 convolutions around the latent, not both")
    widths, blocks = described["block_out_channels"], described["layers_per_block"]
    sizes = _sizes(widths[0] if widths else 0, widths, blocks)
    groups = described.get("norm_num_groups", GROUPS)
    least = next((c for c in _channels(widths, groups) if groups_of(widths, c) == groups), None)
    if least is None:
        raise LdmError(
            f"norm_num_groups is {groups}; here widths {widths} are normalised in "
            f"{groups_of(widths) or 'unequal numbers of'} groups"
        )
    sizes["group_channels"] = least
    return _tree(described["latent_channels"], conv1x1, sizes, sizes, channels)


def _channels(widths: Sequence[int], groups: Any) -> list[int]:
    """Numbers that the least channels in a group can be, where there are so many groups."""
    if type(groups) is not int or groups < 1:
        return [1]
    return [1, max(min(widths) // groups, 1), max(max(widths) // groups, 1)]


def diffusers_config(
    config: Any, scaling_factor: float | None = None, imported: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Turn an `AutoencoderConfig` into the config.json of `write_diffusers`."""
    widths = _plain_widths(config, "diffusers")
    if config.encoder.multipliers[0] != 1:
        first = config.encoder.multipliers[0]
        raise _cannot("diffusers", f"encoder.multipliers begin with {first}")
    groups = groups_of(widths, *_least_of(config))
    if config.codes or not config.encoder.variance:
        raise _cannot("diffusers", "it has a quantizer, or an encoder without a variance")
    if groups is None:
        raise _cannot("diffusers", f"widths {widths} are normalised in unequal numbers of groups")
    given = {} if scaling_factor is None else {"scaling_factor": scaling_factor}
    return {
        **{key: known[0] for key, known in FIXED.items()},
        **{key: [level] * len(widths) for key, level in LEVELS.items()},
        **dict.fromkeys(("in_channels", "out_channels"), config.image_channels),
        "block_out_channels": widths,
        "layers_per_block": config.encoder.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": groups,
        "use_quant_conv": config.conv1x1,
        "use_post_quant_conv": config.conv1x1,
        "sample_size": 256,
        "scaling_factor": SCALING_FACTOR,
        "force_upcast": True,
        **pick_settings(imported),
        **given,
    }


def pick_settings(described: Any) -> dict[str, Any]:
    """The `SETTINGS` in a config.json that are not null; none where there is no config."""
    described = described if isinstance(described, dict) else {}
    return {key: described[key] for key in SETTINGS if described.get(key) is not None}


def latent_statistics(
    settings: Mapping[str, Any], scale_factor: float | None, n_z: int, path: Path | str
) -> tuple[float, list[float], list[float]]:
    """The scale of latents, their mean and their divisor besides the scale, per channel."""
    given: Any = settings.get("scaling_factor") if scale_factor is None else scale_factor
    if given is None:
        raise LdmError(
            f"{path} has no scale for its latents: give --scale-factor, the scale_factor of its "
            "yaml, or 1 if there is none"
        )
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    if not (is_number and 0 < given <= sys.float_info.max):
        raise LdmError(
            f"{path} scales its latents by {given}, not a number above 0: correct "
            "scaling_factor there, or with --diffusion give --scale-factor"
        )
    mean = settings.get("latents_mean", [settings.get("shift_factor", 0.0)] * n_z)
    table = np.empty(0)
    with suppress(TypeError, ValueError):
        table = np.array([mean, settings.get("latents_std", [1.0] * n_z)])
    are_numbers = table.shape == (2, n_z) and table.dtype.kind in "iuf"
    if not (are_numbers and np.isfinite(table).all() and table[1].min() > 0):
        raise LdmError(f"{path}: latents_mean, latents_std or shift_factor are not {n_z} numbers")
    return float(given), *table.astype(float).tolist()


def scalar_statistics(mean: Sequence[float], std: Sequence[float]) -> dict[str, float]:
    """The scaling and shift of all channels as one, of latents with these statistics of each."""
    means, stds = np.array(mean), np.array(std)
    shift = means.mean()
    variance = (stds**2 + (means - shift) ** 2).mean()
    return {"scaling_factor": float(variance**-0.5), "shift_factor": float(shift)}


def check_settings(settings: Mapping[str, Any], path: Path | str) -> None:
    """Refuse `SETTINGS` of images that cannot be; for latents see `latent_statistics`."""
    size, upcast = settings.get("sample_size"), settings.get("force_upcast")
    for side in size if isinstance(size, list) and size else [size]:
        if not (side is None or (type(side) is int and side > 0)):
            raise LdmError(f"{path}: sample_size is {size!r}, not a whole number above 0")
    if upcast not in (None, True, False):
        raise LdmError(f"{path}: force_upcast is {upcast!r}, neither true nor false")


def groups_of(widths: Sequence[int], *least: int) -> int | None:
    """The number of groups in each of our GroupNorms of these widths; None where it varies.

    Args:
        least: channels in a group, at least: of each part.
    """
    found = {count_groups(width, channels) for width in widths for channels in least or (1,)}
    return found.pop() if len(found) == 1 else None


# -------------------------------------------------------------------------- diffusers: folder
def read_diffusers(
    folder: Path, described: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a folder of an `AutoencoderKL` with this config.json: (tree of our config, weights)."""
    try:
        tree = tree_from_diffusers(described)
    except (LdmError, TypeError, KeyError) as error:
        raise LdmError(f"{folder}/config.json describes no SD-VAE to load here: {error}") from error
    paths = weights_files(folder)
    weights = read_weights(*paths)
    refuse_damaged(weights, paths[0] if len(paths) == 1 else folder)
    return tree, from_diffusers(weights)


def write_diffusers(
    folder: Path,
    ae: nn.Module,
    scaling_factor: float | None = None,
    imported: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a folder for diffusers' `AutoencoderKL.from_pretrained`, and return its files.

    Args:
        scaling_factor: factor of their pipelines that gives latents unit variance. None: that of
            `imported`, else SD-VAE's.
        imported: the config that the model came with, of which `SETTINGS` are kept.
    """
    described = diffusers_config(ae.config, scaling_factor, imported)
    return write_folder(folder, described, to_diffusers(ae.state_dict()))


# -------------------------------------------------------------------------------- CompVis
COMPVIS_PREFIXES = ("", "first_stage_model.")
COMPVIS_FIRST = "encoder.down.0.block.0.conv1.weight"
COMPVIS_PARTS = ("encoder.", "decoder.", "quant_conv.", "quantize.", "post_quant_conv.")
COMPVIS_ATTENTION = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")


def compvis_names(levels: int) -> Pairs:
    """Our names and CompVis's of a decoder of `levels` levels, and of any encoder."""
    return [
        *((f"decoder.levels.{i}", f"decoder.up.{levels - 1 - i}") for i in range(levels)),
        ("encoder.levels", "encoder.down"),
        ("blocks", "block"),
        ("skip", "nin_shortcut"),
        ("middle.0", "mid.block_1"),
        ("middle.1.norm", "mid.attn_1.norm"),
        ("middle.1.query", "mid.attn_1.q"),
        ("middle.1.key", "mid.attn_1.k"),
        ("middle.1.value", "mid.attn_1.v"),
        ("middle.1.out", "mid.attn_1.proj_out"),
        ("middle.2", "mid.block_2"),
        ("post_conv", "post_quant_conv"),
        ("pre_conv", "quant_conv"),
        ("quantizer.codes", "quantize.embedding.weight"),
    ]


def to_compvis(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of our SD-VAE (with `conv1x1`) to CompVis's."""
    theirs = renamed(weights, compvis_names(_count(weights, "decoder.levels")))
    return {
        name: tensor[:, :, None, None] if name.endswith(COMPVIS_ATTENTION) else tensor
        for name, tensor in theirs.items()
    }


def from_compvis(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename CompVis's weights, without a prefix, to ours."""
    names = reverse(compvis_names(_count(weights, "decoder.up")))
    return {
        rename(name, names): (
            tensor[:, :, 0, 0] if name.endswith(COMPVIS_ATTENTION) and tensor.ndim == 4 else tensor
        )
        for name, tensor in weights.items()
    }


def read_compvis(
    weights: Mapping[str, Tensor], prefix: str, path: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Take an autoencoder out of a checkpoint's weights: (tree of our config, weights)."""
    theirs = pick(weights, prefix, COMPVIS_PARTS)  # no discriminator, LPIPS or diffusion model
    try:
        tree = tree_from_compvis(theirs)
    except LdmError as error:
        raise LdmError(f"{path} cannot be read: {error}") from error
    refuse_damaged(theirs, path)
    # cloned: they are to outlive the file that they lie in
    return tree, {name: tensor.clone() for name, tensor in from_compvis(theirs).items()}


def tree_from_compvis(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Find the tree of an `AutoencoderConfig` in the shapes of CompVis's tensors (no prefix)."""
    inside = next((name for name in weights if re.search(r"\.(down|up)\.\d+\.attn\.", name)), None)
    if inside:
        raise LdmError(
            f"it has attention inside a level ({inside}), as kl-f16 and kl-f32: only models "
            "with attention in the middle alone are supported"
        )
    channels, image_channels = layer_sizes(weights, "encoder.conv_in.weight")
    _, n_z = layer_sizes(weights, "decoder.conv_in.weight")
    moments, _ = layer_sizes(weights, "encoder.conv_out.weight")
    if moments not in (n_z, 2 * n_z):
        raise LdmError(
            f"its encoder has {moments} channels for {n_z} latent ones, neither as many (a VQ "
            "model) nor twice as many (a KL autoencoder)"
        )
    codes = "quantize.embedding.weight"

    def sizes(levels: str, more: int = 0) -> dict[str, Any]:
        firsts = [f"{levels}.{i}.block.0.conv1.weight" for i in range(_count(weights, levels))]
        widths = [layer_sizes(weights, name)[0] for name in firsts]
        return _sizes(channels, widths, _count(weights, f"{levels}.0.block") - more)

    # a level of the decoder has one block more
    encoder, decoder = sizes("encoder.down"), sizes("decoder.up", more=1)
    tree = _tree(n_z, "quant_conv.weight" in weights, encoder, decoder, image_channels)
    tree["encoder"]["variance"] = moments != n_z
    return tree | ({"codes": layer_sizes(weights, codes, 2)[0]} if codes in weights else {})


def _count(names: Iterable[str], numbered: str) -> int:
    """The number of parts `numbered.0`, `numbered.1`, … that the names have."""
    pattern = re.compile(rf"{re.escape(numbered)}\.(\d+)\.")
    # distinct, not the largest: a stray number must not ask for as many parts
    return len({int(found[1]) for name in names if (found := pattern.match(name))})


def write_compvis(path: Path, ae: nn.Module) -> list[Path]:
    """Write one file by CompVis's names, a `.safetensors` or a `.ckpt` by its ending."""
    config: Any = ae.config
    widths = _plain_widths(config, "compvis")
    if groups_of(widths, *_least_of(config)) != GROUPS:
        raise _cannot("compvis", f"widths {widths} are not normalised in {GROUPS} groups")
    if not config.conv1x1:
        raise _cannot("compvis", "it has no 1×1 convolutions around the latent (conv1x1)")
    if config.encoder.variance == bool(config.codes):
        raise _cannot("compvis", "of a variance and a quantizer it has both, or neither")
    theirs = to_compvis(ae.state_dict())
    if path.suffix == ".safetensors":
        write_atomically(path, to_safetensors(theirs, format="pt"))
    else:
        tree = {"state_dict": {name: t.contiguous().cpu() for name, t in theirs.items()}}
        write_atomically(path, partial(torch.save, tree))
    return [path]


# ---------------------------------------------------------------------- what both can express
def _sizes(channels: int, widths: Sequence[int], blocks: int) -> dict[str, Any]:
    return {"channels": channels, "multipliers": as_multiples(widths, channels), "blocks": blocks}


def _tree(
    latent_channels: int,
    conv1x1: bool,
    encoder: dict[str, Any],
    decoder: dict[str, Any],
    image_channels: int,
) -> dict[str, Any]:
    """The tree of an `AutoencoderConfig`, from the sizes of its two parts."""
    return {
        "latent_channels": latent_channels,
        **({} if image_channels == 3 else {"image_channels": image_channels}),
        "conv1x1": conv1x1,
        "encoder": {"type": "sdvae", **encoder},
        "decoder": {**decoder, "norm": "group"},
    }


def _plain_widths(config: Any, to: str) -> list[int]:
    """Widths of all resolutions, equal on the way down and up, of a plain SD-VAE."""
    encoder, decoder = config.encoder, config.decoder
    if not isinstance(encoder, SDVAEEncoderConfig):
        raise _cannot(to, f"encoder.type={encoder.type}")
    if not isinstance(decoder, SDVAEDecoderConfig):
        raise _cannot(to, f"decoder.type={decoder.type}")
    for key, plain in (("norm", "group"), ("output", "image")):
        if getattr(decoder, key) != plain:
            raise _cannot(to, f"decoder.{key}={getattr(decoder, key)}")
    down, up = ([part.channels * m for m in part.multipliers] for part in (encoder, decoder))
    if down != up or encoder.blocks != decoder.blocks:
        raise _cannot(to, "encoder and decoder differ in widths or blocks")
    return down


def _least_of(config: Any) -> tuple[int, int]:
    """The least channels in a group, of encoder and decoder."""
    return config.encoder.group_channels, config.decoder.group_channels


def _cannot(to: str, why: str) -> LdmError:
    return LdmError(f"no {to} model can express this autoencoder: {why}; --format hub can")
