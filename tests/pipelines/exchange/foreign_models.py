"""Latent diffusion models of random weights as others write them: small, whole, by their names."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel
from safetensors.torch import save_file

from diffusion.discrete import DiscreteConfig
from diffusion.unet import UNetConfig
from tests.autoencoders.sdvae.compvis_model import KL
from tests.diffusion.compvis_unet import checkpoint

SIZE = 16
"""Side of the images that such a model is for; their latents are 4 × 8 × 8."""
UNET = UNetConfig(channels=64, multipliers=(1, 2), blocks=1, attention_factors=(2,))
LEVELS = DiscreteConfig(timesteps=20, beta_start=0.01, beta_end=0.5)
SCALE = 0.25


class Callback:
    """A class that weights_only refuses, as their checkpoints hold."""


def first_stage(n_z: int = 4) -> KL:
    """A KL autoencoder with CompVis' names, always of the same weights; it divides by 2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return KL(ch=32, mult=(1, 2), blocks=1, z=n_z).eval()


def beta_table(levels: DiscreteConfig = LEVELS) -> torch.Tensor:
    """β_t of scaled_linear: float64 (T,)."""
    ends = (end**0.5 for end in (levels.beta_start, levels.beta_end))
    return torch.linspace(*ends, levels.timesteps, dtype=torch.float64) ** 2


def compvis_tensors(config: UNetConfig = UNET) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint; what is sampled is seed 1's network, the moving average."""
    betas = beta_table()
    state = {f"model.diffusion_model.{n}": t for n, t in checkpoint(config).items()}
    state |= {
        f"model_ema.diffusion_model{n.replace('.', '')}": t
        for n, t in checkpoint(config, seed=1).items()
    }
    state |= {f"first_stage_model.{n}": t for n, t in first_stage().state_dict().items()}
    return state | {
        "model_ema.decay": torch.tensor(0.9999),
        "betas": betas.float(),
        "alphas_cumprod": (1 - betas).cumprod(0).float(),
        "scale_factor": torch.tensor(SCALE),
    }


def write_compvis(path: Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    """A checkpoint: by its ending a `.safetensors`, or a pickle with more than tensors."""
    state = compvis_tensors() if state is None else state
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "callbacks": {Callback: Callback()}}, path)
    return path


def diffusers_pipeline(classes: int | None = None, **scheduler) -> LDMPipeline:
    """Their pipeline, with an AutoencoderKL in the place of its vector-quantised one."""
    levels = {
        "num_train_timesteps": LEVELS.timesteps, "beta_start": LEVELS.beta_start,
        "beta_end": LEVELS.beta_end, "beta_schedule": LEVELS.schedule, "clip_sample": False,
        "timestep_spacing": "trailing",
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=SIZE // 2, in_channels=4, out_channels=4, block_out_channels=(64, 128),
            layers_per_block=1, attention_head_dim=16, num_class_embeds=classes,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(32, 64), latent_channels=4, scaling_factor=SCALE,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
    return LDMPipeline(
        vqvae=vae.eval(), unet=unet.eval(), scheduler=DDIMScheduler(**levels | scheduler)
    )


def write_diffusers(folder: Path, **options) -> Path:
    """That pipeline's folder, its autoencoder in `vae/`."""
    diffusers_pipeline(**options).save_pretrained(folder)
    (folder / "vqvae").rename(folder / "vae")
    return folder
