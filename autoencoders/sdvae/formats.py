"""SD-VAE weights as the first latent-diffusion code (CompVis, Rombach et al. 2022) names them.

Their `AutoencoderKL` comes as a checkpoint of its own, or under `first_stage_model.` in one of a
whole latent diffusion model; the published kl-f8 is of width 128, multipliers (1, 2, 4, 4), two
residual blocks, n_z 4. There is no config in it: the sizes are those of the tensors. Their levels
count from the image's resolution on the way down and on the way up; ours in the order they come.
Attention's 1×1 convolutions (C, C, 1, 1) are our linear layers (C, C). The tensors are the same
otherwise, bit for bit.

SD-VAE weights as the diffusers library names them (its `AutoencoderKL`), both ways.

A folder of theirs holds `config.json` and `diffusion_pytorch_model.safetensors`, whole, in shards
or as a variant (`.fp16`); our names follow `Autoencoder`. The tensors are the same, bit for bit.

Our SD-VAE as others open it: a diffusers `AutoencoderKL` folder, or a CompVis checkpoint.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save
from torch import Tensor

from autoencoders.sdvae.decoder import SDVAEDecoderConfig
from autoencoders.sdvae.encoder import SDVAEEncoderConfig
from ldm.checkpoint import read_safetensors, shown
from ldm.errors import LdmError
from ldm.files import read_json, to_json, write_atomically, write_together

# (ours, theirs), replaced in this order in either direction
NAMES_COMPVIS = (
    ("encoder.levels.", "encoder.down."),
    ("decoder.levels.", "decoder.up."),
    (".blocks.", ".block."),
    (".skip.", ".nin_shortcut."),
    (".middle.0.", ".mid.block_1."),
    (".middle.1.norm.", ".mid.attn_1.norm."),
    (".middle.1.query.", ".mid.attn_1.q."),
    (".middle.1.key.", ".mid.attn_1.k."),
    (".middle.1.value.", ".mid.attn_1.v."),
    (".middle.1.out.", ".mid.attn_1.proj_out."),
    (".middle.2.", ".mid.block_2."),
    ("post_conv.", "post_quant_conv."),
    ("pre_conv.", "quant_conv."),
)
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
PREFIXES = ("", "first_stage_model.")
FIRST_COMPVIS = "encoder.down.0.block.0.conv1.weight"
ATTENTION = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")


def find_prefix(names: Iterable[str]) -> str | None:
    """What their names begin with in a checkpoint; None where there are none of theirs."""
    names = set(names)
    return next((prefix for prefix in PREFIXES if prefix + FIRST_COMPVIS in names), None)


def pick(weights: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The autoencoder alone, without the prefix: no discriminator, no LPIPS, no diffusion model.

    Raises:
        LdmError: it is an autoencoder of another structure than SD-VAE's.
    """
    if any(name.startswith(f"{prefix}quantize.") for name in weights):
        raise LdmError("it is a vector-quantised autoencoder: only KL autoencoders are read")
    short = {
        name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)
    }
    ours = {name: short[name] for name in short if name.startswith(PARTS)}
    inside = next((name for name in ours if re.search(r"\.(down|up)\.\d+\.attn\.", name)), None)
    if inside:
        raise LdmError(
            f"it has attention inside a level ({shown(inside)}), which SD-VAE has in the "
            "middle alone: such models (kl-f16, kl-f32) are not read"
        )
    return {name: tensor for name, tensor in ours.items() if isinstance(tensor, Tensor)}


def tree_from_compvis(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The tree of an `AutoencoderConfig`, from the tensors' shapes, by their names.

    Raises:
        LdmError: a tensor that tells a size is not there or has another number of dimensions, or
            the sizes are no SD-VAE's.
    """
    channels, _ = _widths_compvis(weights, "encoder.conv_in.weight")
    _, n_z = _widths_compvis(weights, "decoder.conv_in.weight")
    moments, _ = _widths_compvis(weights, "encoder.conv_out.weight")
    if moments != 2 * n_z:
        raise LdmError(
            f"its encoder has {moments} channels for {n_z} latent ones: it has no variance "
            "(double_z is false), and is no KL autoencoder"
        )
    return {
        "latent_channels": n_z,
        "conv1x1": "quant_conv.weight" in weights,
        "encoder": {"type": "sdvae", **_sizes(weights, "encoder.down", channels)},
        "decoder": {**_sizes(weights, "decoder.up", channels, more=1), "norm": "group"},
    }


def from_compvis(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by their names (no prefix) under ours."""
    swapped = [(theirs, ours) for ours, theirs in NAMES_COMPVIS]
    last = _last_level(weights, "decoder.up")
    renamed = {}
    for name, tensor in weights.items():
        if name.endswith(ATTENTION) and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]
        renamed[_rename_compvis(_reverse(name, "decoder.up", last), swapped)] = tensor
    return renamed


def to_compvis(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of our SD-VAE (with `conv1x1`) under their names."""
    last = _last_level(weights, "decoder.levels")
    renamed = {}
    for name, tensor in weights.items():
        name = _rename_compvis(_reverse(name, "decoder.levels", last), NAMES_COMPVIS)
        renamed[name] = tensor[:, :, None, None] if name.endswith(ATTENTION) else tensor
    return renamed


def _sizes(weights: Mapping[str, Tensor], levels: str, channels: int, more: int = 0) -> dict:
    """Base width, multipliers and blocks a level, of which the decoder has one `more`."""
    count = _last_level(weights, levels) + 1
    widths = [
        _widths_compvis(weights, f"{levels}.{i}.block.0.conv1.weight")[0] for i in range(count)
    ]
    if not channels or any(not width or width % channels for width in widths):
        raise LdmError(f"its widths {widths} are not multiples of {channels}, the first one")
    found = {m[1] for name in weights if (m := re.match(rf"{levels}\.0\.block\.(\d+)\.", name))}
    multipliers = [width // channels for width in widths]
    return {"channels": channels, "multipliers": multipliers, "blocks": len(found) - more}


def _widths_compvis(weights: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Feature maps that a convolution gives, and takes."""
    if name not in weights or weights[name].ndim != 4:
        shape = tuple(weights[name].shape) if name in weights else "none"
        raise LdmError(f"tensor {name} is {shape}, where a convolution's four dimensions belong")
    return weights[name].shape[0], weights[name].shape[1]


def _last_level(weights: Iterable[str], levels: str) -> int:
    pattern = re.compile(rf"{re.escape(levels)}\.(\d+)\.")
    return max((int(found[1]) for name in weights if (found := pattern.match(name))), default=-1)


def _reverse(name: str, levels: str, last: int) -> str:
    """Level i of n counted from the other end."""
    pattern = rf"^{re.escape(levels)}\.(\d+)\."
    return re.sub(pattern, lambda found: f"{levels}.{last - int(found[1])}.", name)


def _rename_compvis(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
PICKLED_FILE = "diffusion_pytorch_model.bin"
STEM = WEIGHTS_FILE.removesuffix(".safetensors")
# `.fp16` before the number of a shard, or, as older versions wrote it, after it
SHARD = re.compile(
    rf"{STEM}(\.(?P<variant>[^.]+?))?(-(?P<number>\d{{1,9}})-of-(?P<count>\d{{1,9}}))?"
    r"(\.(?P<old_variant>[^.]+))?\.safetensors"
)

# (ours, theirs), replaced in this order in either direction
NAMES_WEIGHTS = (
    ("encoder.levels.", "encoder.down_blocks."),
    ("decoder.levels.", "decoder.up_blocks."),
    (".middle.0.", ".mid_block.resnets.0."),
    (".middle.1.norm.", ".mid_block.attentions.0.group_norm."),
    (".middle.1.query.", ".mid_block.attentions.0.to_q."),
    (".middle.1.key.", ".mid_block.attentions.0.to_k."),
    (".middle.1.value.", ".mid_block.attentions.0.to_v."),
    (".middle.1.out.", ".mid_block.attentions.0.to_out.0."),
    (".middle.2.", ".mid_block.resnets.1."),
    (".blocks.", ".resnets."),
    (".skip.", ".conv_shortcut."),
    (".downsample.", ".downsamplers.0."),
    (".upsample.", ".upsamplers.0."),
    (".norm_out.", ".conv_norm_out."),
    ("post_conv.", "post_quant_conv."),
    ("pre_conv.", "quant_conv."),
)
# what their attention was called at first, as the published SD-VAE files have it
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# what their config must say, and what it may say of the parts that are fixed here
SIZES_WEIGHTS = ("latent_channels", "block_out_channels", "layers_per_block")
FIXED = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "mid_block_add_attention": True,
}
# what every level must be: SD-VAE has attention in the middle alone
LEVELS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
GROUPS = 32
# what a config says of using the latents and images: it is kept for who opens the model next
SAID = (
    "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "sample_size",
)  # fmt: skip
# a tensor that every model of theirs has
FIRST_WEIGHTS = "encoder.down_blocks.0.resnets.0.conv1.weight"


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of our SD-VAE (with `conv1x1`) under the names of diffusers' `AutoencoderKL`."""
    return {_rename_weights(name, NAMES_WEIGHTS): tensor for name, tensor in weights.items()}


def from_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a diffusers `AutoencoderKL`, with old or new attention names, under ours."""
    attention = ".mid_block.attentions.0."
    old = [(f"{attention}{new}.", f"{attention}{old}.") for old, new in OLD_ATTENTION.items()]
    swapped = [(ours, theirs) for theirs, ours in (*old, *NAMES_WEIGHTS)]
    return {_rename_weights(name, swapped): tensor for name, tensor in weights.items()}


def read_diffusers(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A diffusers `AutoencoderKL` folder as (tree of an `AutoencoderConfig`, weights by our names).

    Raises:
        LdmError: it is no AutoencoderKL, of a structure that is not SD-VAE's, or has no readable
            safetensors.
    """
    described = read_json(folder / "config.json")
    if described is None:
        raise LdmError(f"{folder}/config.json describes no SD-VAE to load here: not a JSON object")
    try:
        tree = tree_from_diffusers(described)
    except (ValueError, TypeError) as error:
        raise LdmError(f"{folder}/config.json describes no SD-VAE to load here: {error}") from error
    weights: dict[str, Tensor] = {}
    for path in weights_files(folder):
        weights |= read_safetensors(path)
    return tree, from_diffusers(weights)


def weights_files(folder: Path) -> list[Path]:
    """The safetensors of a diffusers folder: the plain file, else its shards, else one variant.

    Raises:
        LdmError: there is none, or not every shard.
    """
    # by (variant, number of shards, 0 where it is whole), then by the shard's own number
    found: dict[tuple[str, int], dict[int, Path]] = {}
    for path in sorted(folder.glob(f"{STEM}*.safetensors")):
        if parts := SHARD.fullmatch(path.name):
            key = (parts["variant"] or parts["old_variant"] or "", int(parts["count"] or 0))
            found.setdefault(key, {})[int(parts["number"] or 0)] = path
    if not found:
        how = "save it again as safetensors"
        if (folder / PICKLED_FILE).is_file():
            how = f"{PICKLED_FILE} is a pickle, which diffusers' save_pretrained turns into one"
        raise LdmError(f"{folder} holds no {WEIGHTS_FILE}: {how}")
    (_, count), paths = min(found.items())
    missing = next((number for number in range(1, count + 1) if number not in paths), None)
    if missing:
        raise LdmError(
            f"{folder} lacks shard {missing} of {count}, beside {next(iter(paths.values())).name}: "
            "copy or fetch it again"
        )
    return list(paths.values())


def tree_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Their `config.json` as the tree of an `AutoencoderConfig`.

    Raises:
        ValueError: it describes something other than an SD-VAE.
    """
    if not isinstance(config, dict) or config.get("_class_name") != "AutoencoderKL":
        raise ValueError("its _class_name is not AutoencoderKL")
    missing = [key for key in SIZES_WEIGHTS if key not in config]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} is {config[key]!r}, only {value!r} is known")
    for key, level in LEVELS.items():
        other = next((name for name in config.get(key, ()) if name != level), None)
        if other:
            raise ValueError(f"{key} has {shown(other)}, only {level} is known")
    conv1x1 = [config.get(key, True) for key in ("use_quant_conv", "use_post_quant_conv")]
    if conv1x1[0] != conv1x1[1]:
        raise ValueError("it has one of the two 1×1 convolutions around the latent, not both")
    widths = config["block_out_channels"]
    if not widths or min(widths) < 1 or any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels {widths} are not multiples of the first")
    groups = config.get("norm_num_groups", GROUPS)
    if groups_of(widths) != groups:
        raise ValueError(
            f"norm_num_groups is {groups}; here widths {widths} are normalised in "
            f"{groups_of(widths) or 'unequal numbers of'} groups"
        )
    sizes = {
        "channels": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "blocks": config["layers_per_block"],
    }
    return {
        "latent_channels": config["latent_channels"],
        "conv1x1": conv1x1[0],
        "encoder": {"type": "sdvae", **sizes},
        "decoder": {**sizes, "norm": "group"},
    }


def pick_said(config: Any) -> dict[str, Any]:
    """What a config says of using the model (`SAID`), nulls aside; of no config nothing."""
    config = config if isinstance(config, dict) else {}
    return {key: config[key] for key in SAID if config.get(key) is not None}


def groups_of(widths: Sequence[int]) -> int | None:
    """The one number of groups that our GroupNorms of these widths have; None: not the same."""
    found = {math.gcd(GROUPS, width) for width in widths}
    return found.pop() if len(found) == 1 else None


def _rename_weights(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


# 1 ÷ the standard deviation of the published SD-VAE's latents (Rombach et al. 2022, Appendix G)
SCALING_FACTOR = 0.18215
SIZES_EXPORT = {"type", "channels", "multipliers", "blocks"}


class Model(Protocol):
    """A model of `AutoencoderConfig`, which stands above this module."""

    config: Any

    def state_dict(self) -> Mapping[str, Tensor]:
        """Weights by our names."""


def diffusers_config(
    config: Any,
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
    widths = _widths_export(config, "diffusers")
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
    ae: Model,
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


def write_compvis(path: Path, ae: Model) -> list[Path]:
    """Write one file by CompVis's names, a `.safetensors` or a `.ckpt` by its ending.

    Raises:
        LdmError: theirs cannot express this model, or the file cannot be written.
    """
    widths = _widths_export(ae.config, "compvis")
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


def _widths_export(config: Any, to: str) -> list[int]:
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
            if key not in SIZES_EXPORT and getattr(part, key) != field.get_default():
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
