"""CompVis's names and sizes, against the architecture written down anew, and against diffusers."""

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file

from autoencoders import Autoencoder, AutoencoderConfig, load_autoencoder
from autoencoders.pretrained import read_autoencoder
from autoencoders.sdvae import SDVAEDecoderConfig, SDVAEEncoderConfig
from autoencoders.sdvae.formats import (
    COMPVIS_FIRST,
    COMPVIS_PARTS,
    COMPVIS_PREFIXES,
    diffusers_config,
    from_compvis,
    to_compvis,
    write_compvis,
)
from ldm.errors import LdmError
from ldm.foreign import find_prefix, pick
from tests.autoencoders.sdvae.compvis_model import KL
from tests.golden import SDVAE_DECODER_PARAMETERS, SDVAE_ENCODER_PARAMETERS


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def training_extras():
    """Entries of their checkpoints beside the autoencoder."""
    return {
        "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4),
        "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 64, 1, 1),
        "loss.logvar": torch.zeros(()),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.encoderconv_inweight": torch.zeros(1),
    }


class Trainer:
    """A class that weights_only refuses."""


def write(path, model, prefix="", dtype=torch.float32):
    state = {f"{prefix}{name}": t.to(dtype) for name, t in model.state_dict().items()}
    if prefix:
        state["model.diffusion_model.out.2.weight"] = torch.zeros(2)
        state["cond_stage_model.x"] = torch.zeros(2)
    state |= training_extras()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        tree = {"state_dict": state, "callbacks": {Trainer: Trainer()}, "global_step": 7}
        torch.save(tree, path, _use_new_zipfile_serialization=path.suffix == ".ckpt")
    return path


@torch.no_grad()
def agree(model, ours, side=32):
    images = torch.rand(1, 3, side, side + 16) * 2 - 1
    mean, logvar = model.moments(images).chunk(2, dim=1)
    posterior = ours.encode(images)
    torch.testing.assert_close(posterior.mean, mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(posterior.logvar, logvar, rtol=0, atol=1e-4)
    latents = torch.randn_like(mean)
    torch.testing.assert_close(ours.decode(latents), model.decode(latents), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["vae.ckpt", "legacy.pt", "vae.safetensors"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_checkpoint_gives_the_same_outputs(tmp_path, name, prefix):
    model = KL().eval()
    path = write(tmp_path / name, model, prefix)
    ours = load_autoencoder(path)
    path.write_bytes(b"")  # the weights have been taken out of the file
    assert not ours.training
    agree(model, ours)


@pytest.mark.parametrize(
    "sizes",
    [
        {"ch": 32, "mult": (2, 3), "blocks": 1, "z": 3},  # conv_in narrower than the first level
        {"ch": 32, "mult": (1, 2, 1, 2), "blocks": 2, "z": 8},
        {"ch": 64, "mult": (1,), "blocks": 3, "z": 4},
    ],
)
def test_config_follows_from_tensor_shapes(tmp_path, sizes):
    model = KL(**sizes).eval()
    ours = load_autoencoder(write(tmp_path / "vae.ckpt", model))
    config = ours.config
    assert config.latent_channels == sizes["z"] and config.conv1x1
    for part in (config.encoder, config.decoder):
        assert (part.channels, part.multipliers, part.blocks) == (
            sizes["ch"], sizes["mult"], sizes["blocks"]
        )  # fmt: skip
    agree(model, ours)


def test_decoder_of_other_sizes_is_found(tmp_path):
    sizes = {"channels": 32, "multipliers": (1, 2), "blocks": 1}
    decoder = SDVAEDecoderConfig(channels=32, multipliers=(1, 3), blocks=2)
    encoder = SDVAEEncoderConfig(type="sdvae", **sizes)
    ae = Autoencoder(
        AutoencoderConfig(encoder=encoder, decoder=decoder, conv1x1=True, latent_channels=4)
    )
    torch.save(to_compvis(ae.state_dict()), tmp_path / "vae.ckpt")
    assert load_autoencoder(tmp_path / "vae.ckpt").config.decoder == decoder


def test_extras_need_not_be_whole(tmp_path):
    path = write(tmp_path / "vae.ckpt", KL(32, (1, 2), 1, 4))
    tree = torch.load(path, weights_only=False)
    tree["state_dict"]["loss.mask"] = torch.zeros(1).expand(8)
    torch.save(tree, path)
    assert load_autoencoder(path).config.latent_channels == 4


def test_published_sizes_are_found(tmp_path):
    """kl-f8: 128, (1, 2, 4, 4), 2, 4. On the meta device: shapes alone."""
    with torch.device("meta"):
        model = KL(128, (1, 2, 4, 4), 2, 4)
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder)]
    assert counts == [SDVAE_ENCODER_PARAMETERS, SDVAE_DECODER_PARAMETERS]
    state = {n: torch.zeros(t.shape) for n, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    ours = load_autoencoder(write(tmp_path / "kl-f8.ckpt", model))
    config = ours.config
    assert (config.encoder.channels, config.encoder.multipliers) == (128, (1, 2, 4, 4))
    assert (config.decoder.blocks, config.latent_channels) == (2, 4)


def test_half_precision_is_read_as_float32(tmp_path):
    ours = load_autoencoder(write(tmp_path / "vae.safetensors", KL(), dtype=torch.float16))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


def test_renaming_round_trips_bit_for_bit(tmp_path):
    model = KL()
    theirs = model.state_dict()
    back = to_compvis(from_compvis(theirs))
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["out.ckpt", "out.safetensors"])
def test_export_equals_their_checkpoint_bit_for_bit(tmp_path, name):
    model = KL()
    ours = load_autoencoder(write(tmp_path / "vae.ckpt", model))
    assert write_compvis(tmp_path / name, ours) == [tmp_path / name]
    again = KL()
    read = read_autoencoder(tmp_path / name)
    assert read.format == "compvis" and read.files == (tmp_path / name,)
    again.load_state_dict(to_compvis(read.weights))
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())


@torch.no_grad()
def test_diffusers_reads_the_export_alike(tmp_path):
    model = KL().eval()
    ours = load_autoencoder(write(tmp_path / "vae.ckpt", model))
    config = diffusers_config(ours.config)
    theirs = AutoencoderKL.from_config(config).eval()
    theirs.load_state_dict(convert_ldm_vae_checkpoint(model.state_dict(), config))
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    expected = theirs.encode(images).latent_dist
    torch.testing.assert_close(ours.encode(images).mean, expected.mean, rtol=0, atol=1e-4)
    latents = torch.randn_like(expected.mean)
    recon = theirs.decode(latents).sample
    torch.testing.assert_close(ours.decode(latents), recon, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------- refusals
def refusal(path, state):
    torch.save({"state_dict": state}, path)
    with pytest.raises(LdmError) as caught:
        load_autoencoder(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_other_structures_are_refused(tmp_path):
    state, path = KL().state_dict(), tmp_path / "a.ckpt"
    inside = {"encoder.down.2.attn.0.norm.weight": torch.zeros(96)}
    assert "attention inside a level (encoder.down.2.attn.0.norm" in refusal(path, state | inside)
    odd = {"encoder.down.2.attn.0.\n\x1b[2J": torch.zeros(96)}
    assert r"(encoder.down.2.attn.0.\n\x1b[2J)" in refusal(path, state | odd)
    odd = {"encoder.conv_out.weight": torch.zeros(6, 96, 3, 3)}
    assert "has 6 channels for 4 latent ones, neither" in refusal(path, state | odd)
    flat = {"encoder.conv_in.weight": torch.zeros(32)}
    assert "tensor encoder.conv_in.weight is (32,), not of 4 dim" in refusal(path, state | flat)
    odd = {"encoder.down.1.block.0.conv1.weight": torch.zeros(48, 32, 3, 3)}
    assert "widths [32, 48, 96] are not multiples of the first one, 32" in refusal(
        path, state | odd
    )
    for stray in ("encoder.down.9999999999.x", "encoder.down.0.block.100000000.conv1.weight"):
        assert refusal(path, state | {stray: torch.zeros(1)})  # and no memory for as many parts


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path):
    state, path = KL().state_dict(), tmp_path / "a.ckpt"
    wide = {"decoder.mid.attn_1.q.weight": torch.zeros(96, 95, 1, 1)}
    said = refusal(path, state | wide)
    assert "decoder.middle.1.query.weight is (96, 95) in the file, (96, 96) in the model" in said
    lacking = {name: t for name, t in state.items() if name != "encoder.norm_out.bias"}
    assert "encoder.norm_out.bias is none in the file, (96,) in the model" in refusal(path, lacking)
    missing = {name: t for name, t in state.items() if name != "decoder.conv_in.weight"}
    assert "tensor decoder.conv_in.weight is none, not of" in refusal(path, missing)


def test_prefix_is_found_only_under_their_names():
    assert (
        find_prefix(
            ["encoder.down_blocks.0.resnets.0.conv1.weight"], COMPVIS_PREFIXES, COMPVIS_FIRST
        )
        is None
    )
    inside = "first_stage_model."
    assert (
        find_prefix(
            [f"{inside}encoder.down.0.block.0.conv1.weight"], COMPVIS_PREFIXES, COMPVIS_FIRST
        )
        == inside
    )
    weights = {"encoder.conv_in.weight": torch.zeros(1), "loss.x": torch.zeros(1)}
    kept = pick(weights, "", COMPVIS_PARTS)
    assert kept.keys() == {"encoder.conv_in.weight"}
