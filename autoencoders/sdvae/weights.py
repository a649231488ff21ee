"""SD-VAE weights as the diffusers library names them (its `AutoencoderKL`), both ways.

A folder of theirs holds `config.json` and `diffusion_pytorch_model.safetensors`; ours are named
after `Autoencoder`. The tensors are the same, bit for bit.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import LdmError

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

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
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
}


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

    path = folder / WEIGHTS_FILE
    try:
        tree = tree_from_diffusers(json.loads((folder / "config.json").read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise LdmError(f"{folder}/config.json describes no SD-VAE to load here: {error}") from error
    if not path.is_file():
        raise LdmError(f"{folder} holds no {WEIGHTS_FILE}: save it again as safetensors")
    try:
        return tree, from_diffusers(load_file(path))
    except (SafetensorError, OSError) as error:
        raise LdmError(f"{path} is truncated or damaged: copy or write it again") from error


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
    conv1x1 = [config.get(key, True) for key in ("use_quant_conv", "use_post_quant_conv")]
    if conv1x1[0] != conv1x1[1]:
        raise ValueError("it has one of the two 1×1 convolutions around the latent, not both")
    widths = config["block_out_channels"]
    if not widths or min(widths) < 1 or any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels {widths} are not multiples of the first")
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


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name
