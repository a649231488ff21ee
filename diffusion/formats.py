"""Our UNet as other toolkits name and store it: diffusers' `UNet2DModel`, and CompVis's UNets.

diffusers' `timestep` is our `c_noise`. Our attention keeps its queries, keys and values in one
matrix, theirs in three; "no class", our label −1, must be a class of its own there: a last row of
zeros.

A checkpoint of CompVis (Rombach et al. 2022) has its UNet under `model.diffusion_model.`, and the
moving average, if any, under `model_ema.` with the points of the names left out. It has no config:
the sizes are those of the tensors, but the attention's heads must be given. Its blocks are numbered
in one row on the way down and one on the way up, ours within their level. Attention's 1-D
convolutions (3C, C, 1) are our linear layers (3C, C), with rows in the order heads × (q, k, v)
there, (q, k, v) × heads here.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from diffusion.discrete import DiscreteConfig, find_schedule
from diffusion.unet import UNet, UNetConfig, attending
from ldm import foreign
from ldm.checkpoint import Damaged, refuse_damaged
from ldm.config import validate
from ldm.errors import LdmError

ConfigT = TypeVar("ConfigT")

# -------------------------------------------------------------------------- diffusers: config
SIZES = (
    "_class_name", "in_channels", "out_channels", "block_out_channels", "layers_per_block",
    "down_block_types", "up_block_types",
)  # fmt: skip
FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DModel",),
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


def diffusers_config(
    config: UNetConfig, sample_size: int | list[int] | None = None
) -> dict[str, Any]:
    """Turn our config into the config.json of a `UNet2DModel`, whose pipelines sample this size."""
    widths, groups = [config.channels * m for m in config.multipliers], group_counts(config)
    head_widths = {config.head_width_of(width) for width in attending(dict(config)).values()}
    if config.multipliers[0] != 1:
        raise _cannot(f"multipliers begin with {config.multipliers[0]}")
    if len(groups) > 1:
        raise _cannot(f"its widths are normalised in unequal numbers of groups, {groups}")
    if config.heads != 1 and len(head_widths) > 1:
        raise _cannot(f"heads={config.heads}, of unequal widths {sorted(head_widths)}")
    by = "resnet" if config.resample_blocks else "conv"
    plain = "Resnet{}sampleBlock2D" if config.resample_blocks else "{}Block2D"
    kinds = [
        "Attn{}Block2D" if 2**level in config.attention_factors else plain
        for level in range(len(widths))
    ]
    return {
        **{key: known[0] for key, known in FIXED.items()},
        "sample_size": sample_size,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "down_block_types": [kind.format("Down") for kind in kinds],
        "up_block_types": [kind.format("Up") for kind in reversed(kinds)],
        "block_out_channels": widths,
        "layers_per_block": config.blocks,
        "downsample_type": by,
        "upsample_type": by,
        "dropout": config.dropout,
        "attention_head_dim": None if config.heads == 1 else head_widths.pop(),
        "norm_num_groups": groups[0],
        "attn_norm_num_groups": groups[0],
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "num_class_embeds": config.classes + 1 if config.classes else None,
    }


def config_from_diffusers(described: Mapping[str, Any]) -> UNetConfig:
    """Turn the config.json of a `UNet2DModel` into ours, or refuse it.

    Each of its classes is one of ours: a model exported and imported again has one more.
    """
    foreign.check_described(described, FIXED, SIZES)
    widths, size = described["block_out_channels"], described["in_channels"]
    multipliers = foreign.as_multiples(widths, widths[0] if widths else 0)
    attends, by_blocks = _levels(described)
    head_width = described.get("attention_head_dim", 8)
    config = validate(
        UNetConfig,
        {
            "latent_channels": size,
            "classes": described.get("num_class_embeds") or 0,
            "channels": widths[0],
            "multipliers": multipliers,
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
        raise LdmError(f"norm_num_groups is {groups}, here its widths have {here}")
    known = {
        "out_channels": (size,),
        "time_embedding_dim": (None, 4 * widths[0]),
        "attn_norm_num_groups": (groups,) if config.scale_shift else (groups, None),
    }
    foreign.check_described({"attn_norm_num_groups": None, **described}, known)
    return config


def group_counts(config: UNetConfig) -> list[int]:
    """The numbers of groups in a network's GroupNorms, each once, rising."""
    return sorted({m.num_groups for m in _sketch(config).modules() if isinstance(m, nn.GroupNorm)})


def _sketch(config: UNetConfig) -> UNet:
    """A network without memory for its values."""
    with torch.device("meta"):
        return UNet(config)


def _levels(described: Mapping[str, Any]) -> tuple[list[bool], bool]:
    """The levels with attention, the finest first, and whether blocks change the resolution."""
    found: list[list[tuple[bool, str]]] = []
    for way in ("down", "up"):
        key, part = f"{way}_block_types", way.title()
        known = {  # (has attention, what changes the resolution)
            f"{part}Block2D": (False, "conv"),
            f"Attn{part}Block2D": (True, described.get(f"{way}sample_type", "conv")),
            f"Resnet{part}sampleBlock2D": (False, "resnet"),
        }
        if other := [name for name in described[key] if name not in known]:
            raise LdmError(f"{key} has {other[0]}, only {', '.join(known)} are supported")
        found.append([known[name] for name in described[key]])
    down, up = found[0], found[1][::-1]
    attends = [has for has, _ in down]
    if len(down) != len(described["block_out_channels"]) or attends != [has for has, _ in up]:
        raise LdmError("down_block_types, up_block_types and block_out_channels do not match")
    ways = {by for _, by in (*down[:-1], *up[1:])}  # all but the coarsest, all but the finest
    if len(ways) > 1:
        raise LdmError("some levels change the resolution by convolutions, some by blocks")
    return attends, ways == {"resnet"}


def _cannot(why: str) -> LdmError:
    return LdmError(f"no diffusers UNet2DModel can express this network: {why}")


# ------------------------------------------------------------------------- diffusers: weights
DIFFUSERS_PARTS: foreign.Pairs = (
    ("enter.0", "conv_in"),
    ("embed.linear_in", "time_embedding.linear_1"),
    ("embed.linear_out", "time_embedding.linear_2"),
    ("embed.classes", "class_embedding"),
    ("middle_in.residual", "mid_block.resnets.0"),
    ("middle_in.attention", "mid_block.attentions.0"),
    ("middle_out.residual", "mid_block.resnets.1"),
    # parts of a residual block, then of attention
    ("shift", "time_emb_proj"),
    ("skip", "conv_shortcut"),
    ("norm", "group_norm"),
    ("proj", "to_out.0"),
)


def to_diffusers(weights: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Turn the weights of our UNet into those of diffusers' `UNet2DModel`.

    The embedding of augmentations is left out: without one it adds nothing.
    """
    ours = {name: weights[name] for name in weights if name != "embed.augment.weight"}
    if config.classes:
        classes = ours["embed.classes.weight"]
        none = classes.new_zeros(1, classes.shape[1])
        ours["embed.classes.weight"] = torch.cat([classes, none])
    return foreign.renamed(split_qkv(ours), list(_diffusers_names(config)))


def from_diffusers(weights: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Turn the weights of a `UNet2DModel`, with old or new attention names, into ours."""
    expected = split_qkv(_sketch(config).state_dict())
    names = list(_diffusers_names(config))
    return join_qkv(foreign.fit(foreign.renamed(weights, foreign.OLD_ATTENTION), expected, names))


def _diffusers_names(config: UNetConfig) -> Iterator[tuple[str, str]]:
    last = len(config.multipliers) - 1
    yield f"leave.{last}.0", "conv_norm_out"
    yield f"leave.{last}.2", "conv_out"
    down = "downsamplers.0" if config.resample_blocks else "downsamplers.0.conv"
    for level in range(last + 1):
        for ours, theirs in (("encoder", "down_blocks"), ("decoder", "up_blocks")):
            for index in range(config.blocks + 1):  # the encoder's last does not exist
                yield f"{ours}.{level}.{index}.residual", f"{theirs}.{level}.resnets.{index}"
                yield f"{ours}.{level}.{index}.attention", f"{theirs}.{level}.attentions.{index}"
        yield f"enter.{level + 1}", f"down_blocks.{level}.{down}"
        yield f"leave.{level}", f"up_blocks.{level}.upsamplers.0"
    yield from DIFFUSERS_PARTS


def split_qkv(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every `….qkv.…` as three of a third of its rows: to_q, to_k and to_v."""
    split = {}
    for name, tensor in weights.items():
        parts = tensor.chunk(3) if ".qkv." in name else [tensor]
        for letter, part in zip("qkv", parts, strict=False):
            split[name.replace(".qkv.", f".to_{letter}.")] = part
    return split


def join_qkv(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `split_qkv`."""
    joined: dict[str, list[Tensor]] = {}
    for name, tensor in weights.items():
        joined.setdefault(re.sub(r"\.to_[qkv]\.", ".qkv.", name), []).append(tensor)
    return {name: torch.cat(parts) for name, parts in joined.items()}


# -------------------------------------------------------------------------- diffusers: folder
def read_diffusers(folder: Path) -> tuple[UNetConfig, dict[str, Tensor]]:
    """Read a diffusers `UNet2DModel` folder: (our config, weights by our names)."""
    return read_folder(folder, config_from_diffusers, from_diffusers)


def read_folder(
    folder: Path,
    config_from: Callable[[Mapping[str, Any]], ConfigT],
    weights_from: Callable[[Mapping[str, Tensor], ConfigT], dict[str, Tensor]],
) -> tuple[ConfigT, dict[str, Tensor]]:
    """Read a network's diffusers folder: (our config, weights by our names)."""
    described = foreign.read_described(folder / "config.json")
    try:
        config = config_from(described)
    except (ValueError, TypeError, KeyError, LdmError) as error:
        what = "describes no network to load here"
        raise LdmError(f"{folder}/config.json {what}: {error}") from error
    paths = foreign.weights_files(folder)
    weights = foreign.read_weights(*paths)
    refuse_damaged(weights, paths[0] if len(paths) == 1 else folder)
    try:
        return config, weights_from(weights, config)
    except LdmError as error:
        raise LdmError(f"{paths[0]} does not fit its own config: {error}") from error


def write_diffusers(
    folder: Path, network: UNet, sample_size: int | list[int] | None = None, **notes: Any
) -> list[Path]:
    """Write a folder for diffusers' `UNet2DModel.from_pretrained`, with NAME.json of each note, and
    return its files."""
    described = diffusers_config(network.config, sample_size)
    weights = to_diffusers(network.state_dict(), network.config)
    return foreign.write_folder(folder, described, weights, **notes)


def read_scheduler(path: Path) -> DiscreteConfig:
    """Read the noise levels and the prediction of a diffusers scheduler, from its JSON file."""
    described = foreign.read_described(path)
    try:
        predictions = ("epsilon", "v_prediction")
        fixed = {"prediction_type": predictions, "rescale_betas_zero_snr": (False, None)}
        foreign.check_described(described, fixed)
        if described.get("trained_betas"):
            config = find_schedule(torch.tensor(described["trained_betas"], dtype=torch.float64))
        else:
            spaced = {"beta_schedule": ("linear", "scaled_linear")}
            foreign.check_described(described, spaced, needed=spaced)
            tree = {  # with the defaults of diffusers' schedulers
                "timesteps": described.get("num_train_timesteps", 1000),
                "beta_start": described.get("beta_start", 0.0001),
                "beta_end": described.get("beta_end", 0.02),
                "schedule": described["beta_schedule"],
            }
            config = validate(DiscreteConfig, tree)
    except (LdmError, TypeError, ValueError) as error:
        raise LdmError(f"{path} cannot be used: {error}") from error
    prediction = described.get("prediction_type", "epsilon").removesuffix("_prediction")
    return config.model_copy(update={"prediction": prediction})


# ------------------------------------------------------------------------------------ CompVis
PREFIXES = ("model.diffusion_model.", "")
AVERAGE = "model_ema.diffusion_model"
FIRST = "input_blocks.0.0.weight"
PARTS = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "out.", "label_emb.")
GROUPS = 32
COMPVIS_PARTS: foreign.Pairs = (
    ("embed.linear_in", "time_embed.0"),
    ("embed.linear_out", "time_embed.2"),
    ("embed.classes", "label_emb"),
    ("middle_in.residual", "middle_block.0"),
    ("middle_in.attention", "middle_block.1"),
    ("middle_out.residual", "middle_block.2"),
    # parts of a residual block, then of attention
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("shift", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("skip", "skip_connection"),
    ("proj", "proj_out"),
)


def read_compvis(
    path: Path, head_width: int | None = None, heads: int | None = None
) -> tuple[UNetConfig, dict[str, Tensor]]:
    """Read the UNet of a CompVis checkpoint: (our config, weights by our names).

    Its moving average is taken where there is one, as their samples do. No shape tells the heads
    of its attention: give their width (`num_head_channels` in their configs; None: 32), or their
    number (`num_heads`, 8 for LSUN churches). `use_new_attention_order` must be off, as in all of
    their models.
    """
    weights = foreign.read_weights(path)
    prefix = foreign.find_prefix(weights, PREFIXES, FIRST)
    if prefix is None:
        raise LdmError(f"{path} holds no UNet of CompVis' latent diffusion")
    try:
        theirs = _averaged(weights, foreign.pick(weights, prefix, PARTS))
        refuse_damaged(theirs, path)
        config = config_from_compvis(theirs, head_width, heads)
        return config, from_compvis(theirs, config)
    except Damaged:
        raise
    except LdmError as error:
        raise LdmError(f"{path} cannot be read: {error}") from error


def _averaged(weights: Mapping[str, Tensor], plain: dict[str, Tensor]) -> dict[str, Tensor]:
    averages = {name: f"{AVERAGE}{name.replace('.', '')}" for name in plain}
    lacking = [name for name, average in averages.items() if average not in weights]
    if len(lacking) == len(plain):
        return plain
    if lacking:
        raise LdmError(f"its moving average lacks {lacking[0]}: the file is not whole")
    return {name: weights[average] for name, average in averages.items()}


def config_from_compvis(
    weights: Mapping[str, Tensor], head_width: int | None = None, heads: int | None = None
) -> UNetConfig:
    """Find the config of a UNet in the shapes of CompVis's tensors (no prefix), or refuse them."""
    crossed = next((name for name in weights if ".transformer_blocks." in name), None)
    if crossed:
        raise LdmError(
            f"it has cross-attention ({crossed}): only unconditional and class-embedding "
            "models are supported, not a SpatialTransformer's"
        )
    channels, latent_channels = foreign.layer_sizes(weights, FIRST)
    answered, _ = foreign.layer_sizes(weights, "out.2.weight")
    if answered != latent_channels:
        raise LdmError(
            f"it answers {answered} channels to {latent_channels}: it also predicts a variance, or "
            "is conditioned by concatenation"
        )
    first_rows, blocks, by_blocks = _compvis_rows(weights)
    firsts = [f"input_blocks.{row}.0.out_layers.3.weight" for row in first_rows]
    widths = [foreign.layer_sizes(weights, name)[0] for name in firsts]
    embedded, _ = foreign.layer_sizes(weights, "input_blocks.1.0.emb_layers.1.weight", 2)
    labelled = "label_emb.weight" in weights
    config = validate(
        UNetConfig,
        {
            "latent_channels": latent_channels,
            "classes": foreign.layer_sizes(weights, "label_emb.weight", 2)[0] if labelled else 0,
            "channels": channels,
            "multipliers": foreign.as_multiples(widths, channels),
            "blocks": blocks,
            "attention_factors": [
                2**level
                for level, row in enumerate(first_rows)
                if f"input_blocks.{row}.1.qkv.weight" in weights
            ],
            "heads": heads,
            **({"head_width": head_width} if head_width else {}),
            "scale_shift": embedded == 2 * widths[0],
            "resample_blocks": by_blocks,
        },
    )
    if group_counts(config) != [GROUPS]:
        raise LdmError(f"{GROUPS} groups do not divide its widths as they do here")
    return config


def _compvis_rows(names: Iterable[str]) -> tuple[list[int], int, bool]:
    """Each level's first row on the way down, blocks in a level, and whether blocks resample."""
    # a level on the way up, but for the last, ends in a convolution or another residual block
    ends = re.compile(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.2)\.weight")
    ways = [found[1] for name in names if (found := ends.fullmatch(name))]
    rows = {int(m[1]) for name in names if (m := re.match(r"input_blocks\.(\d+)\.", name))}
    levels, per_level = len(ways) + 1, len(rows) // (len(ways) + 1)
    if len(set(ways)) > 1 or per_level < 2 or rows != set(range(levels * per_level)):
        raise LdmError("its blocks do not divide into levels of as many each")
    return [1 + level * per_level for level in range(levels)], per_level - 1, "in_layers.2" in ways


def from_compvis(weights: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Turn CompVis's weights, without a prefix, into ours."""
    theirs = {  # 1-D convolutions of kernel 1 as linear layers
        name: tensor[:, :, 0] if tensor.ndim == 3 and tensor.shape[2] == 1 else tensor
        for name, tensor in weights.items()
    }
    ours = foreign.fit(theirs, _sketch(config).state_dict(), list(_compvis_names(config)))
    for name, rows in ours.items():
        if ".qkv." in name:
            d = config.head_width_of(len(rows) // 3)
            ours[name] = rearrange(rows, "(heads qkv d) ... -> (qkv heads d) ...", qkv=3, d=d)
    return ours


def _compvis_names(config: UNetConfig) -> Iterator[tuple[str, str]]:
    last, per_level = len(config.multipliers) - 1, config.blocks + 1
    yield f"leave.{last}", "out"
    for level in range(last + 1):
        first = level * per_level
        down = "0.op" if level > 0 and not config.resample_blocks else "0"
        # after the level's last block, and its attention where it has one
        up = 2 if 2 ** (last - level) in config.attention_factors else 1
        yield f"enter.{level}", f"input_blocks.{first}.{down}"
        yield f"leave.{level}", f"output_blocks.{first + config.blocks}.{up}"
        for index in range(per_level):  # the encoder's last does not exist
            yield f"encoder.{level}.{index}.residual", f"input_blocks.{first + index + 1}.0"
            yield f"encoder.{level}.{index}.attention", f"input_blocks.{first + index + 1}.1"
            yield f"decoder.{level}.{index}.residual", f"output_blocks.{first + index}.0"
            yield f"decoder.{level}.{index}.attention", f"output_blocks.{first + index}.1"
    yield from COMPVIS_PARTS
