"""UNets of the first latent-diffusion code (CompVis, Rombach et al. 2022) as ours.

Such a checkpoint holds its UNet under `model.diffusion_model.`, and its moving average, if it has
one, under `model_ema.` with the points of the names left out. There is no config in it: the sizes
are those of the tensors, but for the attention's heads, which no shape tells. Their blocks are
numbered in one row on the way down and one on the way up, ours within their level. Attention's 1-D
convolutions (3C, C, 1) are our linear layers (3C, C), with rows in the order heads × (q, k, v)
there, (q, k, v) × heads here. The tensors are the same otherwise, bit for bit.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from diffusion.unet import UNet, UNetConfig
from diffusion.unet2d_config import group_counts
from ldm.checkpoint import Damaged, is_safetensors, refuse_overstated, shown
from ldm.config import validate
from ldm.errors import LdmError
from ldm.foreign import read_foreign

PREFIXES = ("model.diffusion_model.", "")
AVERAGE = "model_ema.diffusion_model"
FIRST = "input_blocks.0.0.weight"
PARTS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "out.", "label_emb.")
GROUPS = 32

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "shift": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
ATTENTION = {"norm": "norm", "qkv": "qkv", "proj": "proj_out"}


def find_prefix(names: Iterable[str]) -> str | None:
    """What the UNet's names begin with in a checkpoint; None where there is no UNet of theirs."""
    names = set(names)
    return next((prefix for prefix in PREFIXES if prefix + FIRST in names), None)


def read_compvis(
    path: Path, head_width: int = 32, heads: int | None = None, average: bool = True
) -> tuple[UNetConfig, dict[str, Tensor]]:
    """A CompVis checkpoint's UNet as (our config, weights by our names).

    Args:
        path: a `.ckpt`, `.pt` or `.safetensors`.
        head_width: channels of an attention head (`num_head_channels` in their configs).
        heads: heads of every attention, instead (`num_heads`, 8 for LSUN churches). Neither is told
            by a shape, and nor is `use_new_attention_order`, which must be off, as it is in all of
            theirs.
        average: take the moving average where the checkpoint has one, as their samples do.

    Raises:
        LdmError: it cannot be read, holds no UNet of theirs, or one that ours cannot be.
    """
    weights = _read(path)
    prefix = find_prefix(weights)
    if prefix is None:
        raise LdmError(f"{path} holds no UNet of CompVis' latent diffusion")
    theirs = pick(weights, prefix, average)
    refuse_overstated(theirs, path)
    try:
        config = config_from_compvis(theirs, head_width, heads)
        ours = from_compvis(theirs, config)
    except LdmError as error:
        raise LdmError(f"{path} cannot be read: {error}") from error
    # cloned: they are to outlive the file that they lie in
    return config, {name: tensor.clone() for name, tensor in ours.items()}


def pick(weights: Mapping[str, Tensor], prefix: str, average: bool = True) -> dict[str, Tensor]:
    """The UNet alone, without the prefix; of its moving average where there is one and it is asked
    for.

    Raises:
        LdmError: there is an average of some of its tensors alone.
    """
    theirs, averages = {}, {}
    for name, tensor in weights.items():
        short = name.removeprefix(prefix)
        if name.startswith(prefix) and short.startswith(PARTS):
            theirs[short] = tensor
            averaged = f"{AVERAGE}{short.replace('.', '')}"
            if averaged in weights:
                averages[short] = weights[averaged]
    if not (average and averages):
        return theirs
    if theirs.keys() != averages.keys():
        missing = next(name for name in theirs if name not in averages)
        raise LdmError(f"its moving average lacks {shown(missing)}: the file is not whole")
    return averages


def config_from_compvis(
    weights: Mapping[str, Tensor], head_width: int = 32, heads: int | None = None
) -> UNetConfig:
    """The config of a UNet by their names (no prefix), from the tensors' shapes.

    Raises:
        LdmError: it reads a text or another condition by cross-attention, a tensor that tells a
            size is not there, or the sizes are none that our UNet can have.
    """
    crossed = next((name for name in weights if ".transformer_blocks." in name), None)
    if crossed:
        raise LdmError(
            f"it has cross-attention ({shown(crossed)}): models conditioned on text, images or "
            "classes by a SpatialTransformer are not read, only unconditional and class-embedding "
            "ones"
        )
    channels, latent_channels = _widths(weights, FIRST)
    answered, _ = _widths(weights, "out.2.weight")
    if answered != latent_channels:
        raise LdmError(
            f"it answers {answered} channels to {latent_channels}: it also predicts a variance, or "
            "is conditioned by concatenation"
        )
    # a level of the decoder, but for the last, ends in a convolution or another residual block
    found = [re.fullmatch(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.2)\.weight", name)
             for name in weights]  # fmt: skip
    ways = [match[1] for match in found if match]
    rows = {int(m[1]) for name in weights if (m := re.match(r"input_blocks\.(\d+)\.", name))}
    levels, per_level = len(ways) + 1, len(rows) // (len(ways) + 1)
    if len(set(ways)) > 1 or per_level < 2 or rows != set(range(levels * per_level)):
        raise LdmError("its blocks do not divide into levels of as many each")
    first_rows = [1 + level * per_level for level in range(levels)]
    widths = [
        _widths(weights, f"input_blocks.{row}.0.out_layers.3.weight")[0] for row in first_rows
    ]
    if not channels or any(not width or width % channels for width in widths):
        raise LdmError(f"its widths {widths} are not multiples of {channels}, the first one")
    embedded, _ = _widths(weights, "input_blocks.1.0.emb_layers.1.weight", dimensions=2)
    labelled = "label_emb.weight" in weights
    config = validate(
        UNetConfig,
        {
            "latent_channels": latent_channels,
            "classes": _widths(weights, "label_emb.weight", 2)[0] if labelled else 0,
            "channels": channels,
            "multipliers": [width // channels for width in widths],
            "blocks": per_level - 1,
            "attention_factors": [
                2**level
                for level, row in enumerate(first_rows)
                if f"input_blocks.{row}.1.qkv.weight" in weights
            ],
            "heads": heads,
            "head_width": head_width,
            "scale_shift": embedded == 2 * widths[0],
            "resample_blocks": "in_layers.2" in ways,
        },
    )
    if group_counts(config) != [GROUPS]:
        raise LdmError(f"{GROUPS} groups do not divide its widths as they do here")
    return config


def from_compvis(weights: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Weights by their names (no prefix) under ours.

    Raises:
        LdmError: a tensor that the config describes is not there or has another shape, or there is
            one that it does not describe.
    """
    left, names, ours = dict(weights), dict(_modules(config)), {}
    with torch.device("meta"):
        expected = UNet(config).state_dict()
    for name, tensor in expected.items():
        module, _, kind = name.rpartition(".")
        theirs = f"{names[module]}.{kind}"
        if theirs not in left:
            raise LdmError(f"it has no tensor {theirs}, which a UNet of its sizes has")
        found = left.pop(theirs)
        if found.ndim == 3 and found.shape[2] == 1:  # a 1-D convolution of kernel 1
            found = found[:, :, 0]
        if found.shape != tensor.shape:
            raise LdmError(
                f"its tensor {theirs} is {tuple(found.shape)}, not {tuple(tensor.shape)}"
            )
        if not found.is_floating_point():
            raise LdmError(f"its tensor {theirs} is of {found.dtype}, not floating point")
        if module.endswith(".qkv"):
            heads = config.heads or len(found) // 3 // config.head_width
            found = rearrange(found, "(heads qkv d) ... -> (qkv heads d) ...", heads=heads, qkv=3)
        ours[name] = found
    if left:
        raise LdmError(f"it has a tensor {shown(next(iter(left)))}, unknown to a UNet of its sizes")
    return ours


def _modules(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Every module of ours that can have weights, and what it is called there."""
    levels, way = len(config.multipliers), config.resample_blocks
    yield "embed.linear_in", "time_embed.0"
    yield "embed.linear_out", "time_embed.2"
    yield "embed.classes", "label_emb"
    row = 0
    for level in range(levels):
        enter = f"enter.{level}"
        if way and level > 0:
            yield from _named(enter, f"input_blocks.{row}.0", RESIDUAL)
        else:
            yield enter, f"input_blocks.{row}.0.op" if level > 0 else f"input_blocks.{row}.0"
        for index in range(config.blocks):
            row += 1
            yield from _block(f"encoder.{level}.{index}", f"input_blocks.{row}")
        row += 1
    yield from _block("middle_in", "middle_block")
    yield from _named("middle_out.residual", "middle_block.2", RESIDUAL)
    for level in range(levels):
        for index in range(config.blocks + 1):
            row = level * (config.blocks + 1) + index
            yield from _block(f"decoder.{level}.{index}", f"output_blocks.{row}")
        # after the level's last block, and its attention where it has one
        place = 2 if 2 ** (levels - 1 - level) in config.attention_factors else 1
        leave = f"output_blocks.{row}.{place}"
        if level == levels - 1:
            yield f"leave.{level}.0", "out.0"
            yield f"leave.{level}.2", "out.2"
        elif way:
            yield from _named(f"leave.{level}", leave, RESIDUAL)
        else:
            yield f"leave.{level}.conv", f"{leave}.conv"


def _block(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield from _named(f"{ours}.residual", f"{theirs}.0", RESIDUAL)
    yield from _named(f"{ours}.attention", f"{theirs}.1", ATTENTION)


def _named(ours: str, theirs: str, parts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for part, name in parts.items():
        yield f"{ours}.{part}", f"{theirs}.{name}"


def _widths(weights: Mapping[str, Tensor], name: str, dimensions: int = 4) -> tuple[int, int]:
    """Feature maps that a layer gives, and takes."""
    if name not in weights or weights[name].ndim != dimensions:
        shape = tuple(weights[name].shape) if name in weights else "none"
        raise LdmError(f"tensor {name} is {shape}, where {dimensions} dimensions belong")
    return weights[name].shape[0], weights[name].shape[1]


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their full names."""
    if is_safetensors(path):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise Damaged(f"{path} is truncated or damaged: copy or write it again") from error
    tree: Any = read_foreign(path)
    tree = tree.get("state_dict", tree) if isinstance(tree, dict) else {}
    tree = tree if isinstance(tree, dict) else {}
    return {
        name: value
        for name, value in tree.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
