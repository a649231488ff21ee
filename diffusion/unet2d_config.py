"""Our UNet's config as the `config.json` of diffusers' `UNet2DModel`, both ways."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffusion.unet import UNet, UNetConfig
from ldm.checkpoint import shown
from ldm.config import validate
from ldm.errors import LdmError

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
