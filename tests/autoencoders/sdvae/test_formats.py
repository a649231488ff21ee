"""SD-VAE and diffusers' AutoencoderKL: names, configs and folders, both ways."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from autoencoders import Autoencoder, AutoencoderConfig, build_autoencoder, load_autoencoder
from autoencoders.sdvae.formats import (
    diffusers_config,
    from_diffusers,
    groups_of,
    to_diffusers,
    tree_from_diffusers,
    write_compvis,
    write_diffusers,
)
from ldm.config import to_tree, validate
from ldm.errors import LdmError
from ldm.foreign import PICKLED_FILE, WEIGHTS_FILE
from tests.autoencoders.parameters import count
from tests.golden import SDVAE_DECODER_PARAMETERS, SDVAE_ENCODER_PARAMETERS
from tests.small import fill_disk_after_one_file

SMALL = {"block_out_channels": (32, 64, 64), "layers_per_block": 1}
REAL = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}


def theirs(block_out_channels, **config):
    levels = len(block_out_channels)
    return AutoencoderKL(
        block_out_channels=block_out_channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        **config,
    ).eval()


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def ours_of(model):
    config = validate(
        AutoencoderConfig, tree_from_diffusers({"_class_name": "AutoencoderKL", **model.config})
    )
    with torch.device("meta"):
        ours = Autoencoder(config).eval()
    ours.load_state_dict(from_diffusers(model.state_dict()), assign=True)
    return ours


@torch.no_grad()
@pytest.mark.parametrize(("config", "side"), [(SMALL, 64), (REAL, 32)])
@pytest.mark.parametrize("conv1x1", [True, False])
def test_encoder_and_decoder_agree(config, side, conv1x1):
    model = theirs(**config, use_quant_conv=conv1x1, use_post_quant_conv=conv1x1)
    ours = ours_of(model)
    images = torch.rand(1, 3, side, side + 16) * 2 - 1
    expected = model.encode(images).latent_dist
    posterior = ours.encode(images)
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(posterior.logvar, expected.logvar, rtol=0, atol=1e-4)
    torch.testing.assert_close(posterior.kl(), expected.kl(), rtol=1e-4, atol=0)
    latents = torch.randn_like(expected.mean)
    recon = model.decode(latents).sample
    torch.testing.assert_close(ours.decode(latents), recon, rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", [SMALL, REAL])
def test_renaming_round_trips_bit_for_bit(config):
    with torch.device("meta"):
        model = theirs(**config)
    state = {name: torch.randn(2) for name in model.state_dict()}
    back = to_diffusers(from_diffusers(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert not from_diffusers(state).keys() & state.keys() - {
        f"{part}.{layer}.{kind}"
        for part in ("encoder", "decoder")
        for layer in ("conv_in", "conv_out")
        for kind in ("weight", "bias")
    }


def test_old_attention_names_are_read():
    state = theirs(**SMALL).state_dict()
    old = {}
    for name, tensor in state.items():
        for new_part, old_part in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
            name = name.replace(f".{new_part}.", f".{old_part}.")
        old[name.replace(".to_out.0.", ".proj_attn.")] = tensor
    assert old.keys() != state.keys()
    expected = from_diffusers(state)
    assert {n: t.data_ptr() for n, t in from_diffusers(old).items()} == {
        n: t.data_ptr() for n, t in expected.items()
    }


def test_golden_parameters_of_theirs_are_ours():
    with torch.device("meta"):
        model = theirs(**REAL)
    assert count(model.encoder) == SDVAE_ENCODER_PARAMETERS
    assert count(model.decoder) == SDVAE_DECODER_PARAMETERS


@torch.no_grad()
def test_a_diffusers_folder_loads(tmp_path):
    model = theirs(**SMALL)
    model.save_pretrained(tmp_path)
    ours = load_autoencoder(tmp_path)
    assert not ours.training
    assert ours.downsampling == 4
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    expected = model.encode(images).latent_dist.mean
    torch.testing.assert_close(ours.encode(images).mean, expected, rtol=0, atol=1e-4)


def test_weights_of_ours_load_into_theirs(tmp_path):
    model = theirs(**SMALL)
    ours = Autoencoder(ours_of(model).config)
    model.load_state_dict(to_diffusers(ours.state_dict()))  # strict: every name, every shape
    assert torch.equal(model.decoder.conv_in.weight, ours.decoder.conv_in.weight)


# ------------------------------------------------------------------------------------ out
SIZES = {"channels": 32, "multipliers": [1, 2], "blocks": 1}


def small(encoder=SIZES, decoder=SIZES, **config):
    return build_autoencoder(
        "sdvae",
        **{"conv1x1": True} | config,
        encoder={"type": "sdvae", **encoder},
        decoder={**decoder},
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("conv1x1", [True, False])
@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ({"multipliers": [1, 3]}, 32),
        ({"channels": 16, "multipliers": [1, 3]}, 16),
        ({"multipliers": [1, 1], "group_channels": 4}, 8),
    ],
)
def test_diffusers_opens_the_folder_and_answers_the_same(tmp_path, conv1x1, sizes, groups):
    sizes = SIZES | sizes
    ours = small(sizes, sizes, conv1x1=conv1x1, latent_channels=6)
    written = write_diffusers(tmp_path / "vae", ours, scaling_factor=0.5)
    assert all(path.is_file() for path in written)
    theirs, unused = AutoencoderKL.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not any(unused.values())
    assert theirs.config.scaling_factor == 0.5 and theirs.config.norm_num_groups == groups
    images = torch.rand(1, 3, 32, 48) * 2 - 1
    expected, posterior = theirs.encode(images).latent_dist, ours.encode(images)
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(posterior.logvar, expected.logvar, rtol=0, atol=1e-4)
    latents = torch.randn_like(expected.mean)
    torch.testing.assert_close(
        ours.decode(latents), theirs.decode(latents).sample, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    "sizes",
    [{}, {"multipliers": [1, 1], "group_channels": 4}, {"group_channels": 64}],
)
def test_round_trips_are_bit_equal(tmp_path, sizes):
    ours = small(*[SIZES | sizes] * 2)
    write_diffusers(tmp_path / "a", ours)
    theirs = AutoencoderKL.from_pretrained(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")  # ours → theirs → ours
    back = load_autoencoder(tmp_path / "b")
    state = ours.state_dict()
    assert back.config == ours.config
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.state_dict().items())
    write_diffusers(tmp_path / "c", back)  # theirs → ours → theirs
    for name in (WEIGHTS_FILE, "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    again = AutoencoderKL.from_pretrained(tmp_path / "c").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in theirs.state_dict().items())


def test_settings_of_an_imported_config_are_exported_again(tmp_path):
    said = {
        "scaling_factor": 0.3611, "shift_factor": 0.1159, "latents_mean": [0.0, 0.1, 0.2, 0.3],
        "latents_std": [1.0, 1.1, 1.2, 1.3], "force_upcast": False, "sample_size": 1024,
    }  # fmt: skip
    ours = small()
    write_diffusers(tmp_path, ours, imported=said | {"act_fn": "mish"})
    theirs = AutoencoderKL.from_pretrained(tmp_path).config
    assert {key: theirs[key] for key in said} == said and theirs["act_fn"] == "silu"
    assert diffusers_config(ours.config, 0.5, said)["scaling_factor"] == 0.5
    nulls = diffusers_config(ours.config, imported=dict.fromkeys(said))
    assert nulls == diffusers_config(ours.config)
    assert nulls["scaling_factor"] == 0.18215


def test_a_failure_midway_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    write_diffusers(tmp_path, small())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fill_disk_after_one_file(monkeypatch)
    wide = SIZES | {"channels": 64}
    with pytest.raises(LdmError, match="earlier files are intact"):
        write_diffusers(tmp_path, small(wide, wide))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_published_config_is_the_sdvae_preset():
    """The values of the config.json that stabilityai's sd-vae-ft-mse comes with."""
    with torch.device("meta"):
        config = build_autoencoder("sdvae").config
    told = diffusers_config(config)
    assert told["block_out_channels"] == [128, 256, 512, 512]
    assert told["layers_per_block"] == 2 and told["norm_num_groups"] == 32
    assert told["latent_channels"] == 4 and told["sample_size"] == 256
    assert told["down_block_types"] == ["DownEncoderBlock2D"] * 4
    assert told["up_block_types"] == ["UpDecoderBlock2D"] * 4
    assert told["scaling_factor"] == 0.18215
    known = dict(AutoencoderKL.from_config(told).config)
    assert {key: known[key] for key in told if key != "_class_name"} == {
        key: value for key, value in told.items() if key != "_class_name"
    }
    tree = tree_from_diffusers(json.loads(json.dumps(told)))
    whole = to_tree(config)
    for key in ("channels", "multipliers", "blocks"):
        assert tree["encoder"][key] == whole["encoder"][key]
        assert tree["decoder"][key] == whole["decoder"][key]


@pytest.mark.parametrize(
    ("ae", "said"),
    [
        (lambda: build_autoencoder("tiny"), "encoder.type=litevae"),
        (lambda: small(decoder=SIZES | {"norm": "smc"}), "decoder.norm=smc"),
        (
            lambda: small(decoder=SIZES | {"multipliers": [1], "output": "wavelet"}),
            "decoder.output=wavelet",
        ),
        (lambda: small(decoder=SIZES | {"blocks": 2}), "encoder and decoder differ"),
        (lambda: small(decoder=SIZES | {"channels": 64}), "encoder and decoder differ"),
        (lambda: small(*[SIZES | {"channels": 16}] * 2), "in unequal numbers of groups"),
        (lambda: small(decoder=SIZES | {"group_channels": 4}), "in unequal numbers of groups"),
        (lambda: small(*[SIZES | {"multipliers": [2, 2]}] * 2), "multipliers begin with 2"),
    ],
)
def test_models_that_diffusers_cannot_express_are_refused(tmp_path, ae, said):
    with pytest.raises(LdmError) as caught:
        write_diffusers(tmp_path / "vae", ae())
    assert said in str(caught.value) and "--format hub" in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "vae").exists()


def test_models_that_compvis_cannot_express_are_refused(tmp_path):
    sizes = SIZES | {"channels": 16}
    for ae, said in (
        (small(sizes, sizes), "not normalised in 32 groups"),
        (small(conv1x1=False), "no 1×1 convolutions"),
        (build_autoencoder("tiny"), "encoder.type=litevae"),
    ):
        with pytest.raises(LdmError, match=said):
            write_compvis(tmp_path / "a.ckpt", ae)
    assert not (tmp_path / "a.ckpt").exists()


# ------------------------------------------------------------------------------- refusals
CONFIG = {
    "_class_name": "AutoencoderKL",
    "latent_channels": 4,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
}


def refusal(folder, config, weights=None):
    (folder / "config.json").write_text(json.dumps(config))
    if weights is not None:
        save_file(weights, folder / WEIGHTS_FILE)
    with pytest.raises(LdmError) as caught:
        load_autoencoder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "UNet2DModel"}, "_class_name is 'UNet2DModel', only 'AutoencoderKL' is"),
        (
            {"norm_num_groups": 16},
            "norm_num_groups is 16; here widths [32, 64] are normalised in 32",
        ),
        ({"block_out_channels": [16, 32]}, "normalised in unequal numbers of groups"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types has AttnDown"),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "up_block_types has"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False"),
        ({"use_quant_conv": False}, "one of the two 1×1 convolutions"),
        ({"block_out_channels": [64, 96]}, "are not multiples of the first one, "),
        ({"block_out_channels": [0, 32]}, "are not multiples of the first one, "),
        ({"block_out_channels": []}, "are not multiples of the first one, "),
        ({"block_out_channels": "wide"}, "describes no SD-VAE"),
    ],
)
def test_config_of_another_structure_is_refused(tmp_path, change, said):
    assert said in refusal(tmp_path, CONFIG | change)


def test_incomplete_or_unreadable_config_is_refused(tmp_path):
    assert "has no layers_per_block" in refusal(
        tmp_path, {key: value for key, value in CONFIG.items() if key != "layers_per_block"}
    )
    said = refusal(tmp_path, ["no", "config"])
    assert "config.json is damaged" in said and said.endswith("copy or fetch it again")
    nothing = {"x": torch.zeros(1)}
    assert "'latent_channels': " in refusal(tmp_path, CONFIG | {"latent_channels": -4}, nothing)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LdmError, match=r"config\.json is damaged"):
        load_autoencoder(tmp_path)


def test_folder_without_weights_is_refused(tmp_path):
    assert f"holds no {WEIGHTS_FILE}: save it again" in refusal(tmp_path, CONFIG)


def test_folder_with_only_a_pickle_is_read_without_running_it(tmp_path):
    model = theirs(**SMALL)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / PICKLED_FILE).is_file()
    read = load_autoencoder(tmp_path).state_dict()
    ours = from_diffusers(model.state_dict())
    assert all(torch.equal(tensor, ours[name]) for name, tensor in read.items())
    (tmp_path / PICKLED_FILE).write_bytes(b"")
    assert f"{PICKLED_FILE} is truncated or damaged" in refusal(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("widths", "least", "groups"),
    [
        ((32, 64, 96), (), 32),
        ((16, 48), (), 16),
        ((16, 32), (), None),
        ((8, 24), (), 8),
        ((128, 256), (4, 4), 32),
        ((32, 96), (4, 4), None),
        ((32, 64), (1, 2), None),
    ],
)
def test_groups_are_counted_only_where_equal(widths, least, groups):
    assert groups_of(widths, *least) == groups


def test_truncated_file_is_damaged(tmp_path):
    (tmp_path / WEIGHTS_FILE).write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert "truncated or damaged" in refusal(tmp_path, CONFIG)


def test_the_first_tensor_that_differs_is_named(tmp_path):
    said = refusal(tmp_path, CONFIG, {"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)})
    assert "encoder.conv_in.weight is (8, 3, 3, 3) in the file, (32, 3, 3, 3) in the model" in said
