"""SD-VAE weights as the first latent-diffusion code (CompVis, Rombach et al. 2022) names them.

Their `AutoencoderKL` comes as a checkpoint of its own, or under `first_stage_model.` in one of a
whole latent diffusion model; the published kl-f8 is of width 128, multipliers (1, 2, 4, 4), two
residual blocks, n_z 4. There is no config in it: the sizes are those of the tensors. Their levels
count from the image's resolution on the way down and on the way up; ours in the order they come.
Attention's 1×1 convolutions (C, C, 1, 1) are our linear layers (C, C). The tensors are the same
otherwise, bit for bit.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ldm.checkpoint import shown
from ldm.errors import LdmError

# (ours, theirs), replaced in this order in either direction
NAMES = (
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
FIRST = "encoder.down.0.block.0.conv1.weight"
ATTENTION = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")


def find_prefix(names: Iterable[str]) -> str | None:
    """What their names begin with in a checkpoint; None where there are none of theirs."""
    names = set(names)
    return next((prefix for prefix in PREFIXES if prefix + FIRST in names), None)


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
    channels, _ = _widths(weights, "encoder.conv_in.weight")
    _, n_z = _widths(weights, "decoder.conv_in.weight")
    moments, _ = _widths(weights, "encoder.conv_out.weight")
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
    swapped = [(theirs, ours) for ours, theirs in NAMES]
    last = _last_level(weights, "decoder.up")
    renamed = {}
    for name, tensor in weights.items():
        if name.endswith(ATTENTION) and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]
        renamed[_rename(_reverse(name, "decoder.up", last), swapped)] = tensor
    return renamed


def to_compvis(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of our SD-VAE (with `conv1x1`) under their names."""
    last = _last_level(weights, "decoder.levels")
    renamed = {}
    for name, tensor in weights.items():
        name = _rename(_reverse(name, "decoder.levels", last), NAMES)
        renamed[name] = tensor[:, :, None, None] if name.endswith(ATTENTION) else tensor
    return renamed


def _sizes(weights: Mapping[str, Tensor], levels: str, channels: int, more: int = 0) -> dict:
    """Base width, multipliers and blocks a level, of which the decoder has one `more`."""
    count = _last_level(weights, levels) + 1
    widths = [_widths(weights, f"{levels}.{i}.block.0.conv1.weight")[0] for i in range(count)]
    if not channels or any(not width or width % channels for width in widths):
        raise LdmError(f"its widths {widths} are not multiples of {channels}, the first one")
    found = {m[1] for name in weights if (m := re.match(rf"{levels}\.0\.block\.(\d+)\.", name))}
    multipliers = [width // channels for width in widths]
    return {"channels": channels, "multipliers": multipliers, "blocks": len(found) - more}


def _widths(weights: Mapping[str, Tensor], name: str) -> tuple[int, int]:
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


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name
