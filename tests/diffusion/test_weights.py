"""UNets to and from diffusers' UNet2DModel: the same numbers come out on both sides."""

import json

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from diffusion.formats import (
    PICKLED_FILE,
    WEIGHTS_FILE,
    from_diffusers,
    read_diffusers,
    to_diffusers,
    write_diffusers,
)
from diffusion.unet import UNet, UNetConfig
from ldm.errors import LdmError

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
def test_what_we_write_diffusers_answers_the_same_with(name, tmp_path):
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
def test_what_we_write_we_read(name, tmp_path):
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
def test_what_diffusers_writes_answers_the_same_here(name, safe, tmp_path):
    twin = scrambled(lambda: UNet2DModel(**(BASE | THEIRS[name])))
    twin.save_pretrained(tmp_path, safe_serialization=safe)
    config, weights = read_diffusers(tmp_path)
    unet = load(UNet, config, weights)
    labels = torch.tensor([4, 0]) if config.classes else None
    assert_same(answers(unet, twin, labels, labels))
    assert config.classes == (5 if name == "classes" else 0)


def test_attention_by_its_first_names_is_read():
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


def test_a_folder_without_weights_or_with_damaged_ones(folder):
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:5000])
    assert f"{WEIGHTS_FILE} is truncated or damaged" in refusal(folder)
    path.unlink()
    assert f"holds neither {WEIGHTS_FILE} nor {PICKLED_FILE}" in refusal(folder)
    (folder / PICKLED_FILE).write_bytes(b"no pickle")
    assert f"{PICKLED_FILE} is truncated or damaged" in refusal(folder)
    torch.save([1, 2], folder / PICKLED_FILE)
    assert "has no tensor time_embedding.linear_1.weight, which its config" in refusal(folder)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"conv_in.bias": None}, "has no tensor conv_in.bias"),
        ({"conv_in.bias": torch.zeros(65)}, r"tensor conv_in.bias is (65,), not (64,)"),
        (
            {"mid_block.attentions.0.to_k.weight": torch.zeros(128, 64)},
            "mid_block.attentions.0.to_k.weight is (128, 64), not (128, 128)",
        ),
        ({"extra\n": torch.zeros(1)}, r"a tensor 'extra\n' that its config does not name"),
    ],
)
def test_weights_that_do_not_fit_their_config(folder, change, said):
    network = ours("none")
    weights = to_diffusers(network.state_dict(), network.config) | change
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    (folder / WEIGHTS_FILE).unlink()
    torch.save(weights, folder / PICKLED_FILE)
    assert f"{PICKLED_FILE} does not fit its own config: it" in (line := refusal(folder))
    assert said in line


def test_a_config_that_is_none(folder):
    for text, said in (
        ("{", "not a JSON object"),
        (json.dumps({"_class_name": "VQModel"}), "_class_name"),
    ):
        (folder / "config.json").write_text(text)
        assert "config.json describes no UNet to load here" in (line := refusal(folder))
        assert said in line
    (folder / "config.json").unlink()
    assert "config.json describes no UNet to load here" in refusal(folder)


def test_what_cannot_be_expressed_leaves_nothing_behind(tmp_path):
    network = UNet(UNetConfig(channels=32, multipliers=(1,), blocks=1))
    with pytest.raises(LdmError, match="no diffusers UNet2DModel can express this network"):
        write_diffusers(tmp_path / "out", network)
    assert not (tmp_path / "out").exists()
