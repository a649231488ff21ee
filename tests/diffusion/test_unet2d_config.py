"""What is and is not a UNet2DModel that our UNet can be, and the other way round."""

import pytest
import torch
from diffusers import UNet2DModel

from diffusion.formats import config_from_diffusers, diffusers_config, group_counts
from diffusion.unet import UNet, UNetConfig
from ldm.errors import LdmError

DESCRIBED = {
    "_class_name": "UNet2DModel", "in_channels": 4, "out_channels": 4,
    "block_out_channels": [64, 128], "layers_per_block": 1, "attention_head_dim": 32,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip


def test_the_default_is_diffusers_default_but_for_latents_and_heads():
    described = diffusers_config(UNetConfig())
    with torch.device("meta"):
        default = UNet2DModel(in_channels=4, out_channels=4, attention_head_dim=32).config
    ours = {key: tuple(v) if isinstance(v, list) else v for key, v in described.items()}
    same = {key: value for key, value in ours.items() if default.get(key) == value}
    assert ours.keys() - same.keys() == {"_class_name", "attn_norm_num_groups"}
    assert config_from_diffusers(described) == UNetConfig()


def test_a_config_says_what_is_left_out():
    assert config_from_diffusers(DESCRIBED) == UNetConfig(
        channels=64, multipliers=(1, 2), blocks=1, attention_factors=(2,), head_width=32
    )
    del (bare := dict(DESCRIBED))["attention_head_dim"]
    assert config_from_diffusers(bare).head_width == 8  # their default


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "_class_name is not UNet2DModel"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu', only 'silu' or 'swish' is known"),
        ({"freq_shift": 1}, "freq_shift is 1, only 0"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos is False"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06"),
        ({"norm_num_groups": 16}, r"norm_num_groups is 16, here its widths have \[32\]"),
        ({"block_out_channels": [32, 64]}, r"norm_num_groups is 32, here .* \[16, 32\]"),
        ({"block_out_channels": [64, 96]}, "are not multiples of the first"),
        ({"block_out_channels": []}, "are not multiples of the first"),
        ({"block_out_channels": [64, 128, 128]}, "do not match"),
        ({"out_channels": 8}, "makes 8 channels of 4"),
        ({"time_embedding_dim": 128}, "time_embedding_dim"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "down_block_types has SkipDown"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "do not match"),
        ({"up_block_types": ["UpBlock2D", "KUpBlock2D"]}, "up_block_types has KUpBlock2D"),
        (
            {"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]},
            "some levels change the resolution by convolutions, some by blocks",
        ),
        ({"resnet_time_scale_shift": "ada_group"}, "resnet_time_scale_shift is 'ada_group'"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups is None, only 32"),
        ({"attn_norm_num_groups": 16}, "attn_norm_num_groups is 16, only 32"),
        ({"add_attention": False}, "add_attention is False"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"layers_per_block": 0}, "'blocks'"),
        ({"attention_head_dim": 24}, "must divide the 128 channels at factor 2"),
        ({"block_out_channels": "wide"}, None),
        ({"down_block_types": 3}, None),
    ],
)
def test_other_structures_are_refused(change, said):
    with pytest.raises((ValueError, TypeError, LdmError), match=said):
        config_from_diffusers(DESCRIBED | change)


@pytest.mark.parametrize("key", ["in_channels", "up_block_types"])
def test_a_config_that_lacks_a_size(key):
    lacking = {name: value for name, value in DESCRIBED.items() if name != key}
    with pytest.raises(ValueError, match=f"has no {key}"):
        config_from_diffusers(lacking)
    with pytest.raises(ValueError, match="_class_name"):
        config_from_diffusers([DESCRIBED])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"channels": 32, "head_width": 16}, r"unequal numbers of groups, \[16, 32\]"),
        ({"multipliers": (2, 2)}, "multipliers begin with 2"),
        ({"heads": 4, "attention_factors": (1,)}, r"heads=4, of unequal widths \[16, 32\]"),
    ],
)
def test_networks_that_theirs_cannot_be_are_refused(change, said):
    config = UNetConfig(channels=64, multipliers=(1, 2), blocks=1)
    with pytest.raises(LdmError, match=said) as caught:
        diffusers_config(config.model_copy(update=change))
    assert "\n" not in str(caught.value)


def test_heads_of_one_width_are_expressed_by_it():
    config = UNetConfig(channels=64, multipliers=(1, 2), heads=4, attention_factors=())
    assert diffusers_config(config)["attention_head_dim"] == 32


def test_group_counts_are_those_of_the_network():
    config = UNetConfig(channels=32, multipliers=(1, 3), blocks=1)
    parts = UNet(config).modules()
    norms = {part.num_groups for part in parts if isinstance(part, torch.nn.GroupNorm)}
    assert group_counts(config) == sorted(norms) == [16, 32]
