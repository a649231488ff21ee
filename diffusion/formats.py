"""Our UNet's config as the `config.json` of diffusers' `UNet2DModel`, both ways.

UNet weights as the diffusers library names them (its `UNet2DModel`), both ways.

A folder of theirs holds `config.json` and `diffusion_pytorch_model.safetensors`, or `.bin` as older
versions wrote it. Their model takes as its `timestep` what ours takes as `c_noise`. The tensors are
the same, bit for bit, but that our attention keeps its queries, keys and values in one matrix, and
that "no class", which ours knows as −1, must be a class of its own there: a last row of zeros.

UNets of the first latent-diffusion code (CompVis, Rombach et al. 2022) as ours.

Such a checkpoint holds its UNet under `model.diffusion_model.`, and its moving average, if it has
one, under `model_ema.` with the points of the names left out. There is no config in it: the sizes
are those of the tensors, but for the attention's heads, which no shape tells. Their blocks are
numbered in one row on the way down and one on the way up, ours within their level. Attention's 1-D
convolutions (3C, C, 1) are our linear layers (3C, C), with rows in the order heads × (q, k, v)
there, (q, k, v) × heads here. The tensors are the same otherwise, bit for bit.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from diffusion.unet import UNet, UNetConfig
from ldm.checkpoint import is_safetensors, read_safetensors, refuse_overstated, shown
from ldm.config import validate
from ldm.errors import LdmError
from ldm.files import read_json, to_json, write_together
from ldm.safe_pickle import read_foreign

CLASS_NAME = "UNet2DModel"

# what their config must say, and what it may say of the parts that are fixed here
SIZES = (
    "in_channels", "out_channels", "block_out_channels", "layers_per_block", "down_block_types",
    "up_block_types",
)  # fmt: skip
FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0,),
    "flip_sin_to_cos": (True,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1,),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "add_attention": (True,),
    "class_embed_type": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
}
# their kinds of levels: whether one has attention, and what changes its resolution; None: what
# downsample_type or upsample_type says
DOWN = {
    "DownBlock2D": (False, "conv"),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, "resnet"),
}
UP = {
    "UpBlock2D": (False, "conv"),
    "AttnUpBlock2D": (True, None),
    "ResnetUpsampleBlock2D": (False, "resnet"),
}


def diffusers_config(config: UNetConfig, sample_size: int | None = None) -> dict[str, Any]:
    """Our config as the `config.json` of a diffusers `UNet2DModel`.

    Args:
        sample_size: side of the latents that their pipelines shall sample.

    Raises:
        LdmError: theirs cannot express this network.
    """
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    if widths[0] != config.channels:
        raise _cannot(f"multipliers begin with {config.multipliers[0]}")
    groups = group_counts(config)
    if len(groups) > 1:
        raise _cannot(f"its widths are normalised in unequal numbers of groups, {groups}")
    head_width: int | None = config.head_width
    if config.heads:
        head_widths = {width // config.heads for width in config.attending_widths()}
        if config.heads > 1 and len(head_widths) > 1:
            raise _cannot(f"heads={config.heads}, of unequal widths {sorted(head_widths)}")
        head_width = None if config.heads == 1 else head_widths.pop()
    attends = [2**level in config.attention_factors for level in range(len(widths))]
    by = "resnet" if config.resample_blocks else "conv"
    down, up = (
        ["Attn" + plain if a else blocks if config.resample_blocks else plain for a in attends]
        for plain, blocks in (
            ("DownBlock2D", "ResnetDownsampleBlock2D"),
            ("UpBlock2D", "ResnetUpsampleBlock2D"),
        )
    )
    return {
        "_class_name": CLASS_NAME,
        "sample_size": sample_size,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        **{key: known[0] for key, known in FIXED.items()},
        "down_block_types": down,
        "up_block_types": up[::-1],
        "block_out_channels": widths,
        "layers_per_block": config.blocks,
        "downsample_type": by,
        "upsample_type": by,
        "dropout": config.dropout,
        "attention_head_dim": head_width,
        "norm_num_groups": groups[0],
        "attn_norm_num_groups": groups[0],
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "num_class_embeds": config.classes + 1 if config.classes else None,
    }


def config_from_diffusers(described: Any) -> UNetConfig:
    """Their `config.json`, parsed, as ours. Each of its classes is one of ours: a model that went
    out and came back has one more, the one that is no class.

    Raises:
        ValueError: it describes something other than our UNet.
        LdmError: its sizes are none that our UNet can have.
    """
    if not isinstance(described, dict) or described.get("_class_name") != CLASS_NAME:
        raise ValueError(f"its _class_name is not {CLASS_NAME}")
    missing = [key for key in SIZES if key not in described]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    for key, known in FIXED.items():
        if described.get(key, known[0]) not in known:
            only = " or ".join(repr(value) for value in known)
            raise ValueError(f"{key} is {described[key]!r}, only {only} is known")
    widths, size = described["block_out_channels"], described["in_channels"]
    if not widths or min(widths) < 1 or any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels {widths} are not multiples of the first")
    if described.get("time_embedding_dim") not in (None, 4 * widths[0]):
        raise ValueError("time_embedding_dim is not four times the first of block_out_channels")
    if described["out_channels"] != size:
        raise ValueError(f"it makes {described['out_channels']} channels of {size}")
    attends, by_blocks = _levels(described)
    head_width = described.get("attention_head_dim", 8)
    config = validate(
        UNetConfig,
        {
            "latent_channels": size,
            "classes": described.get("num_class_embeds") or 0,
            "channels": widths[0],
            "multipliers": [width // widths[0] for width in widths],
            "blocks": described["layers_per_block"],
            "attention_factors": [2**level for level, has in enumerate(attends) if has],
            **({"heads": 1} if head_width is None else {"head_width": head_width}),
            "scale_shift": described.get("resnet_time_scale_shift") == "scale_shift",
            "resample_blocks": by_blocks,
            "dropout": described.get("dropout", 0.0),
        },
    )
    groups, here = described.get("norm_num_groups", 32), group_counts(config)
    if here != [groups]:
        raise ValueError(f"norm_num_groups is {groups}, here its widths have {here}")
    middle = described.get("attn_norm_num_groups")
    if middle != groups and (middle is not None or config.scale_shift):
        raise ValueError(f"attn_norm_num_groups is {middle}, only {groups} is known")
    return config


def group_counts(config: UNetConfig) -> list[int]:
    """The numbers of groups that a network's GroupNorms have, each once, rising."""
    with torch.device("meta"):
        parts = UNet(config).modules()
    return sorted({part.num_groups for part in parts if isinstance(part, nn.GroupNorm)})


def _levels(described: Mapping[str, Any]) -> tuple[list[bool], bool]:
    """Which levels have attention, the finest first, and whether blocks change the resolution."""
    down = _kinds(described, "down_block_types", DOWN, described.get("downsample_type") or "conv")
    up = _kinds(described, "up_block_types", UP, described.get("upsample_type") or "conv")[::-1]
    attends = [has for has, _ in down]
    if len(down) != len(described["block_out_channels"]) or attends != [has for has, _ in up]:
        raise ValueError("down_block_types, up_block_types and block_out_channels do not match")
    ways = {by for _, by in (*down[:-1], *up[1:])}  # down from all but the last, up to all but it
    if len(ways) > 1:
        raise ValueError("some levels change the resolution by convolutions, some by blocks")
    return attends, ways == {"resnet"}


def _kinds(
    described: Mapping[str, Any], key: str, known: Mapping[str, tuple[bool, str | None]], by: str
) -> list[tuple[bool, str]]:
    names: Sequence[str] = described[key]
    other = next((name for name in names if name not in known), None)
    if other is not None:
        raise ValueError(f"{key} has {shown(other)}, only {', '.join(known)} are known")
    return [(known[name][0], known[name][1] or by) for name in names]


def _cannot(why: str) -> LdmError:
    return LdmError(f"no diffusers {CLASS_NAME} can express this network: {why}")


WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
PICKLED_FILE = "diffusion_pytorch_model.bin"

# what a part of a block is called there; where nothing is said, the same
RESIDUAL_WEIGHTS = {"shift": "time_emb_proj", "skip": "conv_shortcut"}
ATTENTION_WEIGHTS = {"norm": "group_norm", "proj": "to_out.0", "qkv": "to_"}
# what their attention was called at first, as the published models of 2022 have it
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# --------------------------------------------------------------------------------- weights
def to_diffusers(weights: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Weights of our UNet under the names of diffusers' `UNet2DModel`.

    What embeds augmentations stays behind: without one it adds nothing.
    """
    names, theirs = dict(_modules_weights(config)), {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        if module == "embed.augment":
            continue
        if module == "embed.classes":
            tensor = torch.cat([tensor, tensor.new_zeros(1, tensor.shape[1])])
        if module.endswith(".qkv"):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                theirs[f"{names[module]}{letter}.{kind}"] = part
        else:
            theirs[f"{names[module]}.{kind}"] = tensor
    return theirs


def from_diffusers(weights: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Weights of a `UNet2DModel`, with old or new attention names, under ours.

    Raises:
        LdmError: a tensor that the config describes is not there or has another shape, or there is
            one that it does not describe.
    """
    left = {_modern(name): tensor for name, tensor in weights.items()}
    names, ours = dict(_modules_weights(config)), {}

    def take(name: str, shape: torch.Size) -> Tensor:
        if name not in left:
            raise LdmError(f"it has no tensor {name}, which its config describes")
        if left[name].shape != shape:
            raise LdmError(f"its tensor {name} is {tuple(left[name].shape)}, not {tuple(shape)}")
        return left.pop(name)

    with torch.device("meta"):
        expected = UNet(config).state_dict()
    for name, tensor in expected.items():
        module, _, kind = name.rpartition(".")
        if module.endswith(".qkv"):
            third = tensor.chunk(3)[0].shape
            ours[name] = torch.cat([take(f"{names[module]}{x}.{kind}", third) for x in "qkv"])
        else:
            ours[name] = take(f"{names[module]}.{kind}", tensor.shape)
    if left:
        raise LdmError(f"it has a tensor {shown(next(iter(left)))} that its config does not name")
    return ours


def _modules_weights(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Every module of ours that can have weights, and what it is called there."""
    levels = len(config.multipliers)
    yield "embed.linear_in", "time_embedding.linear_1"
    yield "embed.linear_out", "time_embedding.linear_2"
    yield "embed.classes", "class_embedding"
    yield "enter.0", "conv_in"
    for level in range(levels):
        for index in range(config.blocks):
            yield from _block_weights(f"encoder.{level}.{index}", f"down_blocks.{level}", index)
        for index in range(config.blocks + 1):
            yield from _block_weights(f"decoder.{level}.{index}", f"up_blocks.{level}", index)
    yield from _block_weights("middle_in", "mid_block", 0)
    yield from _block_weights("middle_out", "mid_block", 1)
    for level in range(levels - 1):
        down, up = f"down_blocks.{level}.downsamplers.0", f"up_blocks.{level}.upsamplers.0"
        if config.resample_blocks:
            yield from _residual(f"enter.{level + 1}", down)
            yield from _residual(f"leave.{level}", up)
        else:
            yield f"enter.{level + 1}", f"{down}.conv"
            yield f"leave.{level}.conv", f"{up}.conv"
    yield f"leave.{levels - 1}.0", "conv_norm_out"
    yield f"leave.{levels - 1}.2", "conv_out"


def _block_weights(ours: str, level: str, index: int) -> Iterator[tuple[str, str]]:
    yield from _residual(f"{ours}.residual", f"{level}.resnets.{index}")
    for part, name in ATTENTION_WEIGHTS.items():
        yield f"{ours}.attention.{part}", f"{level}.attentions.{index}.{name}"


def _residual(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for part in ("norm1", "conv1", "shift", "norm2", "conv2", "skip"):
        yield f"{ours}.{part}", f"{theirs}.{RESIDUAL_WEIGHTS.get(part, part)}"


def _modern(name: str) -> str:
    if ".attentions." in name:
        for old, new in OLD_ATTENTION.items():
            name = name.replace(f".{old}.", f".{new}.")
    return name


# --------------------------------------------------------------------------------- folders
def read_diffusers(folder: Path) -> tuple[UNetConfig, dict[str, Tensor]]:
    """A diffusers `UNet2DModel` folder as (our config, weights by our names).

    Raises:
        LdmError: it is no UNet2DModel, of a structure that is not our UNet's, or has no weights
            that can be read.
    """
    described = read_json(folder / "config.json")
    if described is None:
        raise LdmError(f"{folder}/config.json describes no UNet to load here: not a JSON object")
    try:
        config = config_from_diffusers(described)
    except (ValueError, TypeError, LdmError) as error:
        raise LdmError(f"{folder}/config.json describes no UNet to load here: {error}") from error
    there = [path for name in (WEIGHTS_FILE, PICKLED_FILE) if (path := folder / name).is_file()]
    if not there:
        raise LdmError(f"{folder} holds neither {WEIGHTS_FILE} nor {PICKLED_FILE}")
    path = there[0]
    weights = read_safetensors(path) if path.name == WEIGHTS_FILE else _read_pickle(path)
    try:
        return config, from_diffusers(weights, config)
    except LdmError as error:
        raise LdmError(f"{path} does not fit its own config: {error}") from error


def write_diffusers(folder: Path, network: UNet, sample_size: int | None = None) -> list[Path]:
    """Write a folder for diffusers' `UNet2DModel.from_pretrained`; what was written.

    Raises:
        LdmError: theirs cannot express this network, or the folder cannot be written.
    """
    from safetensors.torch import save

    described = diffusers_config(network.config, sample_size)
    weights = to_diffusers(network.state_dict(), network.config)
    payload = save(
        {name: tensor.cpu().contiguous() for name, tensor in weights.items()},
        metadata={"format": "pt"},
    )
    paths = [folder / WEIGHTS_FILE, folder / "config.json"]
    write_together(
        {
            paths[0]: lambda file: file.write(payload),
            paths[1]: lambda file: file.write(to_json(described)),
        }
    )
    return paths


def _read_pickle(path: Path) -> dict[str, Tensor]:
    tree = read_foreign(path)
    tree = tree if isinstance(tree, dict) else {}
    weights = {
        name: value
        for name, value in tree.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    refuse_overstated(weights, path)
    # cloned: they are to outlive the file that they lie in
    return {name: tensor.clone() for name, tensor in weights.items()}


PREFIXES = ("model.diffusion_model.", "")
AVERAGE = "model_ema.diffusion_model"
FIRST = "input_blocks.0.0.weight"
PARTS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "out.", "label_emb.")
GROUPS = 32

RESIDUAL_COMPVIS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "shift": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
ATTENTION_COMPVIS = {"norm": "norm", "qkv": "qkv", "proj": "proj_out"}


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
    left, names, ours = dict(weights), dict(_modules_compvis(config)), {}
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


def _modules_compvis(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Every module of ours that can have weights, and what it is called there."""
    levels, way = len(config.multipliers), config.resample_blocks
    yield "embed.linear_in", "time_embed.0"
    yield "embed.linear_out", "time_embed.2"
    yield "embed.classes", "label_emb"
    row = 0
    for level in range(levels):
        enter = f"enter.{level}"
        if way and level > 0:
            yield from _named(enter, f"input_blocks.{row}.0", RESIDUAL_COMPVIS)
        else:
            yield enter, f"input_blocks.{row}.0.op" if level > 0 else f"input_blocks.{row}.0"
        for index in range(config.blocks):
            row += 1
            yield from _block_compvis(f"encoder.{level}.{index}", f"input_blocks.{row}")
        row += 1
    yield from _block_compvis("middle_in", "middle_block")
    yield from _named("middle_out.residual", "middle_block.2", RESIDUAL_COMPVIS)
    for level in range(levels):
        for index in range(config.blocks + 1):
            row = level * (config.blocks + 1) + index
            yield from _block_compvis(f"decoder.{level}.{index}", f"output_blocks.{row}")
        # after the level's last block, and its attention where it has one
        place = 2 if 2 ** (levels - 1 - level) in config.attention_factors else 1
        leave = f"output_blocks.{row}.{place}"
        if level == levels - 1:
            yield f"leave.{level}.0", "out.0"
            yield f"leave.{level}.2", "out.2"
        elif way:
            yield from _named(f"leave.{level}", leave, RESIDUAL_COMPVIS)
        else:
            yield f"leave.{level}.conv", f"{leave}.conv"


def _block_compvis(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield from _named(f"{ours}.residual", f"{theirs}.0", RESIDUAL_COMPVIS)
    yield from _named(f"{ours}.attention", f"{theirs}.1", ATTENTION_COMPVIS)


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
        return read_safetensors(path)
    tree: Any = read_foreign(path)
    tree = tree.get("state_dict", tree) if isinstance(tree, dict) else {}
    tree = tree if isinstance(tree, dict) else {}
    return {
        name: value
        for name, value in tree.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
