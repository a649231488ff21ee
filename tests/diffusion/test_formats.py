"""Our UNet and diffusers' UNet2DModel: configs, names and folders, both ways."""

import json

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from diffusion.formats import (
    config_from_diffusers,
    diffusers_config,
    from_diffusers,
    group_counts,
    read_diffusers,
    to_diffusers,
    write_diffusers,
)
from diffusion.unet import UNet, UNetConfig
from ldm.errors import LdmError
from ldm.foreign import PICKLED_FILE, WEIGHTS_FILE

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


def test_omitted_keys_have_diffusers_defaults():
    assert config_from_diffusers(DESCRIBED) == UNetConfig(
        channels=64, multipliers=(1, 2), blocks=1, attention_factors=(2,), head_width=32
    )
    del (bare := dict(DESCRIBED))["attention_head_dim"]
    assert config_from_diffusers(bare).head_width == 8  # their default


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "_class_name is 'UNet2DConditionModel', only"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu', only 'silu' or 'swish' is supported"),
        ({"freq_shift": 1}, "freq_shift is 1, only 0"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos is False"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06"),
        ({"norm_num_groups": 16}, r"norm_num_groups is 16, here its widths have \[32\]"),
        ({"block_out_channels": [32, 64]}, r"norm_num_groups is 32, here .* \[16, 32\]"),
        ({"block_out_channels": [64, 96]}, "are not multiples of the first one, "),
        ({"block_out_channels": []}, "are not multiples of the first one, "),
        ({"block_out_channels": [64, 128, 128]}, "do not match"),
        ({"out_channels": 8}, "out_channels is 8, only 4 is supported"),
        ({"time_embedding_dim": 128}, "time_embedding_dim"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "down_block_types has SkipDown"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "do not match"),
        ({"up_block_types": ["UpBlock2D", "KUpBlock2D"]}, "up_block_types has KUpBlock2D"),
        (
            {"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]},
            "some levels change the resolution by convolutions, some by blocks",
        ),
        ({"resnet_time_scale_shift": "ada_group"}, "resnet_time_scale_shift is 'ada_group'"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups is None, only 32 is"),
        ({"attn_norm_num_groups": 16}, "attn_norm_num_groups is 16, only 32 or None is"),
        ({"add_attention": False}, "add_attention is False"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"layers_per_block": 0}, "'blocks'"),
        ({"attention_head_dim": 24}, "must divide the 128 channels at factor 2"),
        ({"block_out_channels": "wide"}, None),
        ({"block_out_channels": {"a": 32}}, None),
        ({"down_block_types": 3}, None),
    ],
)
def test_other_structures_are_refused(change, said):
    with pytest.raises((TypeError, KeyError, LdmError), match=said):
        config_from_diffusers(DESCRIBED | change)


@pytest.mark.parametrize("key", ["in_channels", "up_block_types"])
def test_config_without_a_size_is_refused(key):
    lacking = {name: value for name, value in DESCRIBED.items() if name != key}
    with pytest.raises(LdmError, match=f"has no {key}"):
        config_from_diffusers(lacking)
    with pytest.raises(LdmError, match="_class_name"):
        config_from_diffusers({})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"channels": 32, "head_width": 16}, r"unequal numbers of groups, \[16, 32\]"),
        ({"multipliers": (2, 2)}, "multipliers begin with 2"),
        ({"heads": 4, "attention_factors": (1,)}, r"heads=4, of unequal widths \[16, 32\]"),
    ],
)
def test_networks_that_diffusers_cannot_express_are_refused(change, said):
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


# -------------------------------------------------------------------------------- weights
SMALL = UNetConfig(
    latent_channels=3, channels=64, multipliers=(1, 2), blocks=1, attention_factors=(2,),
    head_width=16,
)  # fmt: skip
CONFIGS = {
    "attention": {"multipliers": (1, 2, 3), "blocks": 2, "attention_factors": (2, 4)},
    "none": {"attention_factors": ()},
    "everywhere": {"attention_factors": (1, 2), "heads": 1, "head_width": 32},
    "scale-shift": {"scale_shift": True},
    "blocks": {"resample_blocks": True, "multipliers": (1, 1, 2), "attention_factors": (2,)},
    "all": {
        "scale_shift": True, "resample_blocks": True, "classes": 5, "augment_parameters": 9,
        "attention_factors": (1, 2),
    },
    "one level": {"multipliers": (1,), "attention_factors": ()},
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", list(CONFIGS))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scrambled(build):
    """A network whose layers that start at 0 count too, and whose answer is about 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build()
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    return network.eval()


def ours(name):
    config = SMALL.model_copy(update=CONFIGS[name])
    return scrambled(lambda: UNet(config))


def load(network, config, weights):
    with torch.device("meta"):
        network = network(config)
    network.load_state_dict(weights, assign=True)
    return network.eval()


def answers(unet, twin, labels=None, their_labels=None):
    """Both networks' answers, once with time steps, once with ¼ ln σ."""
    x = normal(2, 3, 8, 12)
    for c_noise in (torch.tensor([-1.3, 0.9]), torch.tensor([37.0, 999.0])):
        with torch.no_grad():
            yield unet(x, c_noise, labels), twin(x, c_noise, their_labels).sample


def assert_same(pairs):
    for one, other in pairs:
        assert 0.02 < other.std() < 50
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.abs().max().item())


@EVERY
def test_diffusers_opens_our_export_with_equal_outputs(name, tmp_path):
    network = ours(name)
    written = write_diffusers(tmp_path, network, sample_size=8)
    assert sorted(path.name for path in written) == ["config.json", WEIGHTS_FILE]
    twin, report = UNet2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert twin.config.sample_size == 8
    classes = network.config.classes
    if not classes:
        assert_same(answers(network, twin.eval()))
        return
    none = torch.full((2,), -1)
    assert_same(answers(network, twin.eval(), torch.tensor([4, -1]), torch.tensor([4, classes])))
    assert_same(answers(network, twin.eval(), None, none + classes + 1))


@EVERY
def test_export_and_import_round_trip(name, tmp_path):
    network = ours(name)
    write_diffusers(tmp_path, network)
    config, weights = read_diffusers(tmp_path)
    expected = network.state_dict()
    if network.config.classes:  # theirs has one more class, which is none, and no augmentation
        more = {"classes": network.config.classes + 1, "augment_parameters": 0}
        assert config == network.config.model_copy(update=more)
        assert weights["embed.classes.weight"][-1].abs().max() == 0
        weights["embed.classes.weight"] = weights["embed.classes.weight"][:-1]
        del expected["embed.augment.weight"]
    else:
        assert config == network.config
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


THEIRS = {
    "attention": {
        "block_out_channels": (64, 128, 128), "layers_per_block": 2,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
    },
    "scale-shift": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32},
    "blocks": {
        "downsample_type": "resnet", "upsample_type": "resnet",
        "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
    },
    "blocks without attention": {
        "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "UpBlock2D"),
    },
    "classes": {"num_class_embeds": 5},
    "one head": {"attention_head_dim": None},
}  # fmt: skip
BASE = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (64, 128), "layers_per_block": 1,
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"), "attention_head_dim": 16,
}  # fmt: skip


@pytest.mark.parametrize("name", list(THEIRS))
@pytest.mark.parametrize("safe", [True, False])
def test_their_folder_opens_here_with_equal_outputs(name, safe, tmp_path):
    twin = scrambled(lambda: UNet2DModel(**(BASE | THEIRS[name])))
    twin.save_pretrained(tmp_path, safe_serialization=safe)
    config, weights = read_diffusers(tmp_path)
    unet = load(UNet, config, weights)
    labels = torch.tensor([4, 0]) if config.classes else None
    assert_same(answers(unet, twin, labels, labels))
    assert config.classes == (5 if name == "classes" else 0)


def test_old_attention_names_are_read():
    network = ours("attention")
    theirs = to_diffusers(network.state_dict(), network.config)
    first = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in theirs.items():
        for new, before in first.items():
            name = name.replace(f".{new}.", f".{before}.")
        old[name] = tensor
    assert old.keys() != theirs.keys()
    weights = from_diffusers(old, network.config)
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())


# -------------------------------------------------------------------------------- refusals
def refusal(folder):
    with pytest.raises(LdmError) as caught:
        read_diffusers(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    write_diffusers(tmp_path, ours("none"))
    return tmp_path


def test_missing_or_damaged_weights_are_refused(folder):
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:5000])
    assert f"{WEIGHTS_FILE} is truncated or damaged" in refusal(folder)
    path.unlink()
    assert f"holds no {WEIGHTS_FILE}: save it again" in refusal(folder)
    (folder / PICKLED_FILE).write_bytes(b"no pickle")
    assert f"{PICKLED_FILE} is truncated or damaged" in refusal(folder)
    torch.save([1, 2], folder / PICKLED_FILE)
    assert "tensor time_embedding.linear_1.weight is none in the file" in refusal(folder)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"conv_in.bias": None}, "tensor conv_in.bias is none in the file, (64,) in the model"),
        (
            {"conv_in.bias": torch.zeros(65)},
            "tensor conv_in.bias is (65,) in the file, (64,) in the model",
        ),
        (
            {"mid_block.attentions.0.to_k.weight": torch.zeros(128, 64)},
            "mid_block.attentions.0.to_k.weight is (128, 64) in the file, (128, 128) in the model",
        ),
        ({"extra\n": torch.zeros(1)}, r"tensor extra\n is (1,) in the file, none in the model"),
    ],
)
def test_weights_that_do_not_fit_their_config_are_refused(folder, change, said):
    network = ours("none")
    weights = to_diffusers(network.state_dict(), network.config) | change
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    (folder / WEIGHTS_FILE).unlink()
    torch.save(weights, folder / PICKLED_FILE)
    assert f"{PICKLED_FILE} does not fit its own config: tensor " in (line := refusal(folder))
    assert said in line


def test_unreadable_config_is_refused(folder):
    path = folder / "config.json"
    for text in ("{", "[]"):
        path.write_text(text)
        assert f"{path} is damaged" in refusal(folder)
    path.write_text(json.dumps({"_class_name": "VQModel"}))
    assert f"{path} describes no network to load here: _class_name is 'VQModel'" in refusal(folder)
    path.unlink()
    assert f"{path} does not exist" in refusal(folder)


def test_refused_export_writes_nothing(tmp_path):
    network = UNet(UNetConfig(channels=32, multipliers=(1,), blocks=1))
    with pytest.raises(LdmError, match="no diffusers UNet2DModel can express this network"):
        write_diffusers(tmp_path / "out", network)
    assert not (tmp_path / "out").exists()
