"""Whole transformers in and out: against diffusers' DiTPipeline, and beside an autoencoder."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

from diffusion import DiTConfig
from ldm.checkpoint import load_model
from ldm.errors import LdmError, UsageError
from ldm.seeds import normal
from pipelines import LatentDiffusionPipeline
from pipelines.exchange import export_network, import_diffusion
from pipelines.sampling.settings import Sampling
from tests.diffusion.test_dit_formats import AUTHORS, authors_tensors
from tests.pipelines.exchange.foreign_models import LEVELS, SCALE, SIZE
from tests.pipelines.exchange.test_diffusion import SHAPE, at_whole_time_steps, evaluate
from tests.pipelines.untrained import make_model


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def imported(source, **options):
    """The pipeline of a source, through a file."""
    import_diffusion(str(source), Path("out.pt"), **options)
    return LatentDiffusionPipeline.from_pretrained("out.pt", "cpu", "fp32")


def autoencoder(n_z: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64), latent_channels=n_z, scaling_factor=SCALE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def dit_pipeline(**scheduler) -> DiTPipeline:
    """Their pipeline of random weights, with a variance."""
    levels = {
        "num_train_timesteps": LEVELS.timesteps, "beta_start": LEVELS.beta_start,
        "beta_end": LEVELS.beta_end, "beta_schedule": LEVELS.schedule, "clip_sample": False,
        "timestep_spacing": "trailing",
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=24, num_layers=2, out_channels=8,
            sample_size=SIZE // 2, num_embeds_ada_norm=3, norm_eps=1e-6,
        ).eval()  # fmt: skip
        for parameter in transformer.parameters():
            nn.init.normal_(parameter, std=0.15)
        vae = autoencoder()
    first = transformer.transformer_blocks[0].norm1.emb.state_dict()
    for block in transformer.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    scheduler = DDIMScheduler(**levels | scheduler)
    return DiTPipeline(transformer, vae, scheduler, {0: "cat", 1: "dog", 2: "emu"})


def test_a_folder_gives_the_images_of_their_pipeline(monkeypatch):
    theirs = dit_pipeline()
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained("pipeline")
    _, notes = import_diffusion("pipeline", Path("out.pt"))
    assert notes[0].startswith("DiT of ") and "3 classes" in notes[0]
    assert notes[2].startswith("its last layer has twice the channels")
    assert notes[3].startswith("it reads the time step as diffusers does")
    pipe = LatentDiffusionPipeline.from_pretrained("out.pt", "cpu", "fp32")
    assert pipe.recipe.network.grid == SIZE // 4 and pipe.recipe.resolution == SIZE
    expected = theirs(
        [2, 0], guidance_scale=1.0, generator=torch.Generator().manual_seed(3),
        num_inference_steps=LEVELS.timesteps, output_type="np", return_dict=False,
    )[0]  # fmt: skip
    expected = torch.from_numpy(expected).permute(0, 3, 1, 2) * 2 - 1
    assert expected.std() > 0.05 and (expected.abs() < 1).float().mean() > 0.9

    alpha_bars = theirs.scheduler.alphas_cumprod.double()
    at_whole_time_steps(monkeypatch, alpha_bars)
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    # they begin with noise alone, we with noise · σ: x_T = noise is √(1 − ᾱ) of it
    noise = noise / (1 - alpha_bars[-1]).sqrt().float()
    how = Sampling(steps=LEVELS.timesteps, sampler="euler")
    images = pipe.sample(range(2), 0, how, [2, 0], noise=noise)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-3)
    other = pipe.sample(range(2), 0, how, [1, 0], noise=noise)
    assert (other - expected).abs().amax(dim=(1, 2, 3))[0] > 0.01
    how = {"labels": [1], "guidance": 3.0, "size": 2 * SIZE}
    assert pipe(n=1, steps=LEVELS.timesteps, **how).isfinite().all()


def write_checkpoint(name="dit", path="dit.pt"):
    """A checkpoint of the authors' code and an autoencoder's folder: (network, AutoencoderKL)."""
    tensors, network = authors_tensors(AUTHORS[name])
    torch.save(tensors, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = autoencoder(AUTHORS[name].latent_channels)
    vae.save_pretrained("vae")
    return network, vae


@torch.no_grad()
def test_a_checkpoint_is_imported_beside_its_autoencoder():
    network, vae = write_checkpoint()
    _, notes = import_diffusion("dit.pt", Path("out.pt"), autoencoder="vae")
    assert "5 classes; latents 4 × 8 × 8, times 0.25; images 16×16" in notes[0]
    assert notes[1] == "it predicts epsilon; 1000 noise levels, β 0.0001 to 0.02 (linear)"
    assert notes[2].startswith("its last layer has twice the channels")
    assert notes[3].startswith("attention is assumed to have 6 heads")
    assert notes[4].startswith("a DiT and a SiT have the same tensors")
    pipe = LatentDiffusionPipeline.from_pretrained("out.pt", "cpu", "fp32")
    said = load_model("out.pt", "diffusion").provenance["imported"]
    assert (said["format"], said["autoencoder"], list(said["sha256"])) == ("dit", "vae", ["dit.pt"])

    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - betas).cumprod(0)[400]
    sigma, x = ((1 - alpha_bar) / alpha_bar).sqrt(), normal(1, "x", [0, 1], SHAPE)
    labels = torch.tensor([4, -1])
    # Karras et al. 2022, Table 1, column "VP"
    epsilon = network((x * alpha_bar.sqrt()).float(), torch.full((2,), 400.0), labels)
    expected = x - sigma.float() * epsilon
    torch.testing.assert_close(pipe.denoiser(x, sigma, labels), expected, rtol=0, atol=1e-3)
    decoded = vae.decode(x / SCALE).sample.clamp(-1, 1)
    torch.testing.assert_close(pipe.codec.decode(x), decoded, rtol=0, atol=1e-4)
    assert pipe(n=2, steps=2, labels=[0, -1]).shape == (2, 3, SIZE, SIZE)


@torch.no_grad()
def test_a_sit_samples_as_its_own_equation():
    """Ma et al. 2024: x moves from noise at t = 0 to data at t = 1 by the network's velocity."""
    network, vae = write_checkpoint()
    _, notes = import_diffusion("dit.pt", Path("out.pt"), autoencoder="vae", denoiser="flow")
    assert notes[1] == "it predicts a velocity (rectified flow)" and len(notes) == 4
    pipe = LatentDiffusionPipeline.from_pretrained("out.pt", "cpu", "fp32")
    labels = torch.tensor([4, 1])
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    x, steps = noise.double(), 20
    for step in range(steps):
        t = torch.full((2,), step / steps)
        x = x + network(x.float(), t, labels).double() / steps
    expected = vae.decode(x.float() / SCALE).sample.clamp(-1, 1)
    how = Sampling(steps=steps, sampler="euler")
    images = pipe.sample(range(2), 0, how, labels.tolist(), noise=noise)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-3)
    assert expected.std() > 0.05


def test_a_named_denoiser_needs_no_note():
    write_checkpoint()
    how = {"autoencoder": "vae", "denoiser": "discrete", "scale_factor": 0.5, "resolution": 32}
    how["heads"] = 6
    _, notes = import_diffusion("dit.pt", Path("out.pt"), **how)
    assert len(notes) == 3 and "times 0.5; images 32×32" in notes[0]
    config = load_model("out.pt", "diffusion").config
    assert (config["resolution"], config["network"]["grid"]) == (32, 4)


@pytest.mark.parametrize(
    ("source", "options", "kind", "told"),
    [
        ("dit.pt", {"autoencoder": None}, UsageError, "dit.pt holds a DiT without its autoencoder"),
        ("dit.pt", {"denoiser": "edm"}, UsageError, "--denoiser edm: must be discrete or flow"),
        ("dit.pt", {"resolution": 18}, UsageError, "must be a multiple of 4, by which its autoenc"),
        ("dit.pt", {"heads": 7}, LdmError, "heads: 7 do not divide the 384 channels of width"),
        ("no.pt", {}, LdmError, "no model at no.pt: --diffusion takes a file or a folder on this"),
        ("dit.pt", {"head_width": 64}, UsageError, "--head-width is for a UNet: give --heads"),
        ("wide.pt", {}, LdmError, "its DiT is for latents of 6 channels, its autoencoder's have 4"),
        ("pipeline", {}, UsageError, "pipeline is no checkpoint of a DiT: leave out --ae and --de"),
    ],
)
def test_refused_import_is_one_line_and_writes_nothing(source, options, kind, told):
    write_checkpoint("lightning", "wide.pt")
    write_checkpoint()
    dit_pipeline().save_pretrained("pipeline")
    how = {"autoencoder": "vae", "denoiser": "discrete"} | options
    if source == "wide.pt":
        how["denoiser"] = "discrete"
    with pytest.raises(kind) as caught:
        import_diffusion(source, Path("out.pt"), **how)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert not list(Path().glob("*out*"))


# ------------------------------------------------------------------------------------ out
DIT = "network={type: dit, width: 32, depth: 2, heads: 2, grid: 2, frequency_shift: 1}"


@pytest.mark.parametrize("names", [(), ("cat", "dog")])
@torch.no_grad()
def test_exported_network_denoises_as_ldm_json_describes(names):
    model = make_model(Path("run"), 0, names, settings=(DIT,))
    export_network(Path("dit"), model, form="transformer")
    pipe = LatentDiffusionPipeline.from_pretrained(model, "cpu", "fp32")
    x, sigma = 2 * normal(0, "x", [0, 1], pipe.latent_shape), torch.tensor(1.7)
    told = json.loads(Path("dit/ldm.json").read_text("utf-8"))
    terms, none = told["denoiser"], told["classes"]["class_of_none"]
    assert none == len(names) and "frequencies" not in terms
    numbers = {"sigma": sigma, "sigma_data": told["latents"]["sigma_data"]}
    skip, out, c_in, time = (
        evaluate(terms[name], **numbers) for name in ("c_skip", "c_out", "c_in", "timestep")
    )
    network = DiTTransformer2DModel.from_pretrained("dit").eval()
    for label in (1, -1) if names else (-1,):
        given = torch.tensor([label, label])
        theirs = torch.tensor([none if label == -1 else label] * 2)
        answer = network(c_in * x, time.expand(2), class_labels=theirs).sample
        expected = pipe.denoiser(x, sigma, given)
        torch.testing.assert_close(skip * x + out * answer, expected, rtol=1e-4, atol=1e-4)
    assert network.config.sample_size == 4


def test_imported_network_is_exported_unchanged():
    dit_pipeline().save_pretrained("pipeline")
    imported("pipeline")
    export_network(Path("dit"), Path("out.pt"), form="transformer")
    ours, theirs = (
        DiTTransformer2DModel.from_pretrained(at) for at in ("dit", "pipeline/transformer")
    )
    kept = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        other = kept[name]
        if name.startswith("proj_out_2"):  # without the variance
            other = other.unflatten(0, (4, 8))[:, :4].flatten(0, 1)
        assert torch.equal(tensor, other), name


def test_a_network_of_our_frequencies_is_exported_with_a_note():
    make_model(Path("run"), 0, settings=(DIT.replace("shift: 1", "shift: 0"),))
    export_network(Path("dit"), Path("run"), form="transformer")
    told = json.loads(Path("dit/ldm.json").read_text("utf-8"))
    assert "downscale_freq_shift = 0" in told["denoiser"]["frequencies"]


@pytest.mark.parametrize(
    ("form", "settings", "told"),
    [
        ("unet", (DIT,), "a network of type dit, which no diffusers UNet2DModel can express"),
        ("transformer", (), "a network of type ldm, which no diffusers DiTTransformer2DModel can"),
        ("transformer", (DIT.replace("grid", "norm: rms, grid"),), "its norm is rms, not layer"),
    ],
)
def test_refused_export_is_one_line_and_writes_nothing(form, settings, told):
    make_model(Path("run"), 0, settings=settings)
    with pytest.raises(LdmError) as caught:
        export_network(Path("out"), Path("run"), form=form)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("out").exists()


def test_a_config_of_a_dit_is_saved_and_read_as_it_is():
    make_model(Path("run"), 0, settings=(DIT,))
    network = LatentDiffusionPipeline.from_pretrained("run", "cpu", "fp32").recipe.network
    assert network == DiTConfig(width=32, depth=2, heads=2, grid=2, frequency_shift=1)
