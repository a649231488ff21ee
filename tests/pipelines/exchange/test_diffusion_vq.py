"""Latent diffusion models with a VQ first stage, as those of FFHQ and CelebA-HQ, sampled."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

from autoencoders import to_diffusers
from diffusion.schedules import SCHEDULES
from ldm.checkpoint import load_model
from ldm.seeds import normal
from pipelines import LatentDiffusionPipeline
from pipelines.exchange import import_diffusion, read_checkpoint
from pipelines.sample import sample_images
from pipelines.sampling.settings import Sampling
from tests.autoencoders.sdvae import compvis_vq
from tests.diffusion.compvis_unet import answer, checkpoint
from tests.pipelines.exchange.foreign_models import LEVELS, UNET, beta_table, write_compvis

SIZE, SHAPE = 16, (3, 8, 8)
NETWORK = UNET.model_copy(update={"latent_channels": 3})
TOLD = "it has no scaling factor of its latents: 1, as for CompVis' VQ models, unless --scale-fact"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tensors():
    """All tensors of a checkpoint of theirs: no scale_factor, a moving average of the UNet."""
    betas = beta_table()
    state = {f"model.diffusion_model.{n}": t for n, t in checkpoint(NETWORK).items()}
    averages = checkpoint(NETWORK, seed=1).items()
    state |= {f"model_ema.diffusion_model{n.replace('.', '')}": t for n, t in averages}
    first_stage = compvis_vq.checkpoint(**compvis_vq.SIZES).items()
    state |= {f"first_stage_model.{n}": t for n, t in first_stage}
    alpha_bars = (1 - betas).cumprod(0).float()
    return state | {"betas": betas.float(), "alphas_cumprod": alpha_bars}


def write(path, state=None):
    return write_compvis(Path(path), tensors() if state is None else state)


def imported(source, **options):
    _, notes = import_diffusion(str(source), Path("out.pt"), **options)
    return LatentDiffusionPipeline.from_pretrained("out.pt", "cpu", "fp32"), notes


def at_whole_time_steps(monkeypatch, alpha_bars):
    """Let sampling visit the noise levels of the network's own time steps, from the last."""
    sigmas = ((1 - alpha_bars.double()) / alpha_bars.double()).sqrt().flip(0)

    def levels(_steps, sigma_min, sigma_max):
        return torch.cat([sigmas.clamp(sigma_min, sigma_max), sigmas.new_zeros(1)])

    monkeypatch.setitem(SCHEDULES, "karras", levels)


@pytest.mark.parametrize("source", ["model.ckpt", "model.safetensors"])
@torch.no_grad()
def test_a_checkpoint_gives_the_images_of_ddim_over_its_own_tensors(monkeypatch, source):
    """Song et al. 2021 (arXiv 2010.02502), Equation 12 with σ_t = 0, in float64; latents are not
    scaled, and the last ones are quantised before they are decoded."""
    pipe, notes = imported(write(source), resolution=SIZE)
    assert any(TOLD in line for line in notes)
    assert any("latents 3 × 8 × 8, times 1; images 16×16" in line for line in notes)
    alpha_bars, network = tensors()["alphas_cumprod"].double(), checkpoint(NETWORK, seed=1)
    x = normal(5, "sample", [0, 1], SHAPE).double() * (1 - alpha_bars[-1]).sqrt()
    for t in reversed(range(LEVELS.timesteps)):
        epsilon = answer(network, NETWORK, x, torch.full((2,), t))
        x0 = (x - (1 - alpha_bars[t]).sqrt() * epsilon) / alpha_bars[t].sqrt()
        before = alpha_bars[t - 1] if t else torch.tensor(1.0).double()
        x = before.sqrt() * x0 + (1 - before).sqrt() * epsilon
    theirs = compvis_vq.Forward(compvis_vq.checkpoint(**compvis_vq.SIZES))
    expected = theirs.decode(x).clamp(-1, 1).float()
    assert expected.std() > 0.05

    at_whole_time_steps(monkeypatch, alpha_bars)
    images = pipe(n=2, seed=5, steps=LEVELS.timesteps, sampler="euler")
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-3)
    # encoding gives the latents that diffusion runs on, before the codes
    latents = theirs.encode(images).float()
    torch.testing.assert_close(pipe.encode(images), latents, rtol=0, atol=1e-4)


def test_its_file_holds_the_quantizer_and_samples_into_files():
    _, notes = imported(write("model.ckpt"), resolution=SIZE, scale_factor=0.5)
    assert load_model("out.pt", "diffusion").statistics["std"] == [2.0] * 3
    assert any("times 0.5" in line for line in notes)
    inner = load_model("out.pt", "diffusion").autoencoder
    assert inner.config["codes"] == 40 and "quantizer.codes" in inner.weights
    sample_images(Path("out.pt"), 2, Path("images"), device="cpu", steps=2)
    assert len(list(Path("images").rglob("*.png"))) == 3  # and the grid


def test_a_scale_in_the_file_is_taken():
    state = tensors() | {"scale_factor": torch.tensor(0.25)}
    found = read_checkpoint(write("model.ckpt", state), heads=4)
    assert found.settings == {"scaling_factor": 0.25} and found.notes == ()


# --------------------------------------------------------------------------------- diffusers
def pipeline(**settings):
    """A folder in the format of `CompVis/ldm-celebahq-256`, small and of random weights."""
    levels = {
        "num_train_timesteps": LEVELS.timesteps, "beta_start": LEVELS.beta_start,
        "beta_end": LEVELS.beta_end, "beta_schedule": LEVELS.schedule, "clip_sample": False,
        "timestep_spacing": "trailing",
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, block_out_channels=(64, 128),
            layers_per_block=1, attention_head_dim=32,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        vqvae = VQModel(
            block_out_channels=(32, 64), latent_channels=3, num_vq_embeddings=40,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            **settings,
        )  # fmt: skip
        torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    parts = {"vqvae": vqvae.eval(), "unet": unet.eval()}
    return LDMPipeline(**parts, scheduler=DDIMScheduler(**levels))


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_folder_gives_the_images_of_their_pipeline(monkeypatch, scale, pickled):
    theirs = pipeline(scaling_factor=scale)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained("pipeline", safe_serialization=not pickled)
    pipe, notes = imported("pipeline")
    assert not any(TOLD in line for line in notes)
    assert to_diffusers(pipe.codec.autoencoder).config.scaling_factor == scale
    generator = torch.Generator().manual_seed(3)
    expected = theirs(
        2, generator, num_inference_steps=LEVELS.timesteps, output_type="np", return_dict=False
    )[0]
    expected = torch.from_numpy(expected).permute(0, 3, 1, 2) * 2 - 1
    assert expected.std() > 0.05

    alpha_bars = theirs.scheduler.alphas_cumprod.double()
    at_whole_time_steps(monkeypatch, alpha_bars)
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    # they begin with noise alone, we with noise · σ: x_T = noise is √(1 − ᾱ) of it
    noise = noise / (1 - alpha_bars[-1]).sqrt().float()
    how = Sampling(steps=LEVELS.timesteps, sampler="euler")
    images = pipe.sample(range(2), 0, how, noise=noise)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-3)


def test_a_folder_without_a_scale_has_that_of_compvis():
    """As published: the config dates from before diffusers' `scaling_factor`, whose default,
    0.18215, is wrong for it."""
    pipeline().save_pretrained("pipeline")
    path = Path("pipeline/vqvae/config.json")
    described = json.loads(path.read_text("utf-8"))
    del described["scaling_factor"]
    path.write_text(json.dumps(described))
    pipe, notes = imported("pipeline")
    assert any(TOLD in line for line in notes)
    assert pipe.codec.std.flatten().tolist() == [1.0] * 3
