"""`to_diffusers` against diffusers' own AutoencoderKL of the same weights, and against ours."""

import copy
import sys

import pytest
import torch
from diffusers import AutoencoderKL

from autoencoders import build_autoencoder, load_autoencoder, to_diffusers
from autoencoders.diffusers_vae import DiffusersVAE
from autoencoders.sdvae.formats import SETTINGS, scalar_statistics, write_diffusers
from ldm.checkpoint import ModelFile, save_model
from ldm.config import to_tree
from ldm.errors import LdmError
from tests import small
from tests.pipelines.untrained import make_model, pipeline

SETTLED = {
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "latents_mean": [0.0, 0.1, 0.2, 0.3],
    "latents_std": [1.0, 1.1, 1.2, 1.3], "force_upcast": False, "sample_size": 1024,
}  # fmt: skip


def litevae():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_autoencoder("tiny", decoder={"channels": 8}).eval()


def images(size=32, count=2):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def seeded():
    return torch.Generator().manual_seed(5)


@pytest.fixture
def both(tmp_path):
    """An imported SD-VAE as ours in diffusers' clothes, and as diffusers' own."""
    write_diffusers(tmp_path / "vae", small.sdvae(), imported=SETTLED)
    ae = load_autoencoder(tmp_path / "vae").requires_grad_(False)
    return to_diffusers(ae), AutoencoderKL.from_pretrained(tmp_path / "vae").requires_grad_(False)


def test_it_encodes_and_decodes_as_diffusers_own_does(both):
    ours, theirs = both
    x = images()
    mine, other = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
    for name in ("mean", "std", "var", "logvar"):
        torch.testing.assert_close(getattr(mine, name), getattr(other, name), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine.kl(), other.kl(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(mine.sample(seeded()), other.sample(seeded()), atol=1e-5, rtol=1e-5)
    z = other.mode()
    recon = theirs.decode(z).sample
    torch.testing.assert_close(ours.decode(z).sample, recon, atol=1e-5, rtol=1e-5)
    as_tuple = ours.decode(z, return_dict=False, generator=seeded())
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], ours.decode(z).sample)
    assert torch.equal(ours.encode(x, return_dict=False)[0].mean, mine.mean)
    whole = ours(x, sample_posterior=True, generator=seeded()).sample
    expected = theirs(x, sample_posterior=True, generator=seeded()).sample
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)


def test_its_config_has_what_diffusers_own_has(both):
    ours, theirs = both
    same = ("in_channels", "out_channels", "latent_channels", *SETTINGS)
    for name in same:
        assert getattr(ours.config, name) == ours.config[name] == theirs.config[name], name
    assert len(ours.config.block_out_channels) == len(theirs.config.block_out_channels)
    assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)


@pytest.mark.parametrize(
    ("decoder", "count"),
    [({"channels": 8}, 4), ({"channels": 8, "output": "wavelet", "multipliers": [1, 2, 2]}, 4)],
)
def test_the_number_of_widths_gives_the_downsampling(decoder, count):
    ae = build_autoencoder("tiny", decoder=decoder)
    config = to_diffusers(ae).config
    assert len(config.block_out_channels) == count and 2 ** (count - 1) == ae.downsampling
    assert config.scaling_factor == 0.18215 and config.shift_factor == 0


def test_settings_are_the_imported_ones_or_those_given(both):
    ours, _ = both
    assert to_diffusers(ours.autoencoder, scaling_factor=0.5).config.scaling_factor == 0.5
    assert to_diffusers(ours.autoencoder, scaling_factor=0.5).config.shift_factor == 0.1159
    with pytest.raises(LdmError, match="the autoencoder scales its latents by -1"):
        to_diffusers(ours.autoencoder, scaling_factor=-1)


def test_stage_two_gives_the_measured_scale_and_shift_as_scalars(tmp_path):
    drawn = torch.randn(4, 3, 50_000, generator=seeded(), dtype=torch.float64)
    drawn = drawn * torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1) + torch.arange(4).view(4, 1, 1)
    channels = drawn.flatten(1)
    found = scalar_statistics(channels.mean(1).tolist(), channels.std(1, correction=0).tolist())
    scaled = (drawn - found["shift_factor"]) * found["scaling_factor"]
    assert abs(scaled.mean()) < 1e-9 and abs(scaled.std() - 1) < 1e-5

    make_model(tmp_path, 0, std=4.0, mean=0.5)
    from pipelines import LatentDiffusionPipeline

    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path, "cpu", "fp32")
    config = to_diffusers(pipe.codec.autoencoder).config
    assert config.scaling_factor == pytest.approx(0.25) and config.shift_factor == 0.5


def test_settings_of_an_import_survive_hub_folders_and_checkpoints(tmp_path, both):
    ae = both[0].autoencoder
    ae.save_pretrained(tmp_path / "hub")
    origin = {"imported": {"source": "a", **SETTLED}}
    file = ModelFile("autoencoder", to_tree(ae.config), ae.state_dict(), provenance=origin)
    save_model(tmp_path / "ckpt.pt", file)
    for name in ("hub", "ckpt.pt"):
        config = to_diffusers(load_autoencoder(tmp_path / name)).config
        assert {key: config[key] for key in SETTLED} == SETTLED


@pytest.mark.parametrize("make", [litevae, small.sdvae])
@pytest.mark.parametrize("how", [{}, {"low_cpu_mem_usage": False}])
def test_it_is_saved_and_loaded_as_diffusers_models_are(tmp_path, make, how):
    vae = to_diffusers(make(), scaling_factor=0.4)
    vae.save_pretrained(tmp_path)
    again = DiffusersVAE.from_pretrained(tmp_path, **how)
    assert again.config.scaling_factor == 0.4 and not again.training
    assert list(again.state_dict()) == list(vae.state_dict())
    x = images()
    with torch.no_grad():
        assert torch.equal(again.encode(x).latent_dist.mean, vae.encode(x).latent_dist.mean)
        assert torch.equal(again(x).sample, vae(x).sample)


@pytest.mark.parametrize("make", [litevae, small.sdvae])
def test_it_takes_another_dtype(make):
    vae = to_diffusers(make()).to(torch.bfloat16)
    with torch.no_grad():
        latents = vae.encode(images().bfloat16()).latent_dist.sample(seeded())
        recon = vae.decode(latents).sample
    assert vae.dtype == latents.dtype == recon.dtype == torch.bfloat16
    # where SDXL's pipelines look after `force_upcast`
    assert next(vae.post_quant_conv.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [litevae, small.sdvae])
def test_gradients_flow_through_both_directions_and_into_the_shared_weights(make):
    ae = make()
    vae = to_diffusers(ae)
    x = images().requires_grad_()
    vae.decode(vae.encode(x).latent_dist.sample(seeded())).sample.square().mean().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ae.parameters())


def test_slices_and_tiles_give_the_same_up_to_seams():
    ae = litevae().requires_grad_(False)
    vae, x = to_diffusers(ae), images(64)
    whole = vae(x).sample
    vae.enable_slicing()
    torch.testing.assert_close(vae(x).sample, whole, atol=1e-5, rtol=1e-5)
    vae.disable_slicing()
    vae.enable_tiling(tile=64, overlap=16)  # no larger than a tile: in one piece
    assert torch.equal(vae(x).sample, whole)
    vae.enable_tiling(tile=32, overlap=16)
    tiled = vae(x).sample
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    vae.disable_tiling()
    assert torch.equal(vae(x).sample, whole)


def test_without_diffusers_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "autoencoders.diffusers_vae", None)
    with pytest.raises(LdmError, match=r"^to_diffusers needs diffusers .*: pip install diffusers$"):
        to_diffusers(litevae())


def test_the_model_itself_is_left_as_it_was():
    ae = litevae()
    before = copy.deepcopy(ae.state_dict())
    to_diffusers(ae)
    assert list(ae.state_dict()) == list(before) and not ae.training
    assert pipeline().codec.autoencoder.settings["scaling_factor"] == pytest.approx(0.25)
