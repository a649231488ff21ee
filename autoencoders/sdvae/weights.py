"""SD-VAE weights as the diffusers library names them (its `AutoencoderKL`), both ways.

A folder of theirs holds `config.json` and `diffusion_pytorch_model.safetensors`, whole, in shards
or as a variant (`.fp16`); our names follow `Autoencoder`. The tensors are the same, bit for bit.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint import shown
from ldm.errors import LdmError

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
PICKLED_FILE = "diffusion_pytorch_model.bin"
STEM = WEIGHTS_FILE.removesuffix(".safetensors")
# `.fp16` before the number of a shard, or, as older versions wrote it, after it
SHARD = re.compile(
    rf"{STEM}(\.(?P<variant>[^.]+?))?(-(?P<number>\d{{1,9}})-of-(?P<count>\d{{1,9}}))?"
    r"(\.(?P<old_variant>[^.]+))?\.safetensors"
)

# (ours, theirs), replaced in this order in either direction
NAMES = (
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
SIZES = ("latent_channels", "block_out_channels", "layers_per_block")
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
FIRST = "encoder.down_blocks.0.resnets.0.conv1.weight"


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of our SD-VAE (with `conv1x1`) under the names of diffusers' `AutoencoderKL`."""
    return {_rename(name, NAMES): tensor for name, tensor in weights.items()}


def from_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a diffusers `AutoencoderKL`, with old or new attention names, under ours."""
    attention = ".mid_block.attentions.0."
    old = [(f"{attention}{new}.", f"{attention}{old}.") for old, new in OLD_ATTENTION.items()]
    swapped = [(ours, theirs) for theirs, ours in (*old, *NAMES)]
    return {_rename(name, swapped): tensor for name, tensor in weights.items()}


def read_diffusers(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A diffusers `AutoencoderKL` folder as (tree of an `AutoencoderConfig`, weights by our names).

    Raises:
        LdmError: it is no AutoencoderKL, of a structure that is not SD-VAE's, or has no readable
            safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tree = tree_from_diffusers(json.loads((folder / "config.json").read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise LdmError(f"{folder}/config.json describes no SD-VAE to load here: {error}") from error
    weights: dict[str, Tensor] = {}
    for path in weights_files(folder):
        try:
            weights |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise LdmError(f"{path} is truncated or damaged: copy or write it again") from error
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
    missing = [key for key in SIZES if key not in config]
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


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name
