"""SD-VAE against the diffusers library's AutoencoderKL, with random weights."""

import pytest
import torch
from diffusers import AutoencoderKL

from autoencoders import Autoencoder, AutoencoderConfig, load_autoencoder
from autoencoders.sdvae.formats import from_diffusers, to_diffusers, tree_from_diffusers
from ldm.config import validate
from tests.autoencoders.parameters import count
from tests.golden import SDVAE_DECODER_PARAMETERS, SDVAE_ENCODER_PARAMETERS

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
def test_names_go_there_and_back_bit_for_bit(config):
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
