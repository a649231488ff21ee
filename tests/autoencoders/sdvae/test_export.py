"""Our SD-VAE written for others, opened by diffusers itself."""

import json

import pytest
import torch
from diffusers import AutoencoderKL

from autoencoders import build_autoencoder, load_autoencoder
from autoencoders.sdvae.formats import (
    WEIGHTS_FILE,
    diffusers_config,
    tree_from_diffusers,
    write_compvis,
    write_diffusers,
)
from ldm.config import to_tree
from ldm.errors import LdmError
from tests.small import fill_disk_after_one_file

SIZES = {"channels": 32, "multipliers": [1, 2], "blocks": 1}


def small(encoder=SIZES, decoder=SIZES, **config):
    return build_autoencoder(
        "sdvae",
        **{"conv1x1": True} | config,
        encoder={"type": "sdvae", **encoder},
        decoder={**decoder},
    ).eval()


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@torch.no_grad()
@pytest.mark.parametrize("conv1x1", [True, False])
@pytest.mark.parametrize("channels", [32, 16])  # 16: sixteen groups
def test_diffusers_opens_the_folder_and_answers_the_same(tmp_path, conv1x1, channels):
    sizes = SIZES | {"channels": channels, "multipliers": [1, 3]}
    ours = small(sizes, sizes, conv1x1=conv1x1, latent_channels=6)
    written = write_diffusers(tmp_path / "vae", ours, scaling_factor=0.5)
    assert all(path.is_file() for path in written)
    theirs, unused = AutoencoderKL.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not any(unused.values())
    assert theirs.config.scaling_factor == 0.5 and theirs.config.norm_num_groups == channels
    images = torch.rand(1, 3, 32, 48) * 2 - 1
    expected, posterior = theirs.encode(images).latent_dist, ours.encode(images)
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(posterior.logvar, expected.logvar, rtol=0, atol=1e-4)
    latents = torch.randn_like(expected.mean)
    torch.testing.assert_close(
        ours.decode(latents), theirs.decode(latents).sample, rtol=0, atol=1e-4
    )


def test_round_trips_are_bit_equal(tmp_path):
    ours = small()
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


def test_what_a_config_said_is_said_again(tmp_path):
    said = {
        "scaling_factor": 0.3611, "shift_factor": 0.1159, "latents_mean": [0.0, 0.1, 0.2, 0.3],
        "latents_std": [1.0, 1.1, 1.2, 1.3], "force_upcast": False, "sample_size": 1024,
    }  # fmt: skip
    ours = small()
    write_diffusers(tmp_path, ours, said=said | {"act_fn": "mish"})
    theirs = AutoencoderKL.from_pretrained(tmp_path).config
    assert {key: theirs[key] for key in said} == said and theirs["act_fn"] == "silu"
    assert diffusers_config(ours.config, 0.5, said)["scaling_factor"] == 0.5
    nulls = diffusers_config(ours.config, said=dict.fromkeys(said))
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


def test_their_config_of_the_published_model():
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
        (lambda: small(*[SIZES | {"multipliers": [2, 2]}] * 2), "multipliers begin with 2"),
    ],
)
def test_models_that_diffusers_cannot_express(tmp_path, ae, said):
    with pytest.raises(LdmError) as caught:
        write_diffusers(tmp_path / "vae", ae())
    assert said in str(caught.value) and "--format hub" in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "vae").exists()


def test_models_that_compvis_cannot_express(tmp_path):
    sizes = SIZES | {"channels": 16}
    for ae, said in (
        (small(sizes, sizes), "no multiples of 32"),
        (small(conv1x1=False), "no 1×1 convolutions"),
        (build_autoencoder("tiny"), "encoder.type=litevae"),
    ):
        with pytest.raises(LdmError, match=said):
            write_compvis(tmp_path / "a.ckpt", ae)
    assert not (tmp_path / "a.ckpt").exists()
