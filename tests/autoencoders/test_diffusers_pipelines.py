"""`to_diffusers` inside diffusers' own pipelines, tiny and of random weights.

With an SD-VAE inside, images equal those with diffusers' AutoencoderKL of the same weights.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

from autoencoders import build_autoencoder, load_autoencoder, to_diffusers
from autoencoders.diffusers_vae import DiffusersVAE

pytest.importorskip("transformers", reason="pipelines with a prompt need transformers")

from diffusers import (
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

SIDE, WIDTH = 32, 8  # of images, pixels; of prompts' embeddings
PIPELINES = {
    "sd": {
        "text": StableDiffusionPipeline,
        "image": StableDiffusionImg2ImgPipeline,
        "inpaint": StableDiffusionInpaintPipeline,
        "inpaint, 9 channels": StableDiffusionInpaintPipeline,
    },
    "sd3": {
        "text": StableDiffusion3Pipeline,
        "image": StableDiffusion3Img2ImgPipeline,
        "inpaint": StableDiffusion3InpaintPipeline,
    },
}
CASES = [(kind, job) for kind, jobs in PIPELINES.items() for job in jobs]


def write_vae(folder: Path, kind: str) -> Path:
    """Diffusers' own VAE as the two kinds have it: of 4 channels with quant convolutions and a
    scale, or of 16 without them and with a shift."""
    torch.manual_seed(0)
    of_kind = {
        "sd": {"latent_channels": 4, "scaling_factor": 0.3},
        "sd3": {
            "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609,
            "use_quant_conv": False, "use_post_quant_conv": False,
        },
    }[kind]  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 32), norm_num_groups=32, sample_size=SIDE, **of_kind,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return folder


def make_pipeline(kind: str, job: str, vae):
    torch.manual_seed(1)
    if kind == "sd":
        rest = {
            "unet": UNet2DConditionModel(
                sample_size=SIDE // 2, in_channels=9 if "9" in job else 4, out_channels=4,
                block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=WIDTH, attention_head_dim=2,
            ).eval(),
            "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
            "text_encoder": None, "tokenizer": None,
            "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
        }  # fmt: skip
    else:
        nothing = ("text_encoder", "text_encoder_2", "text_encoder_3",
                   "tokenizer", "tokenizer_2", "tokenizer_3")  # fmt: skip
        rest = {
            "transformer": SD3Transformer2DModel(
                sample_size=SIDE // 2, patch_size=2, in_channels=16, out_channels=16, num_layers=1,
                attention_head_dim=4, num_attention_heads=2, joint_attention_dim=WIDTH,
                caption_projection_dim=WIDTH, pooled_projection_dim=WIDTH, pos_embed_max_size=16,
            ).eval(),
            "scheduler": FlowMatchEulerDiscreteScheduler(),
            **dict.fromkeys(nothing),
        }  # fmt: skip
    pipe = PIPELINES[kind][job](vae=vae, **rest)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, kind: str, job: str) -> np.ndarray:
    """Two images (2, SIDE, SIDE, 3) in [0, 1], of given embeddings in a prompt's place."""
    source = torch.Generator().manual_seed(2)
    given = {
        "prompt_embeds": torch.randn(2, 5, WIDTH, generator=source),
        "height": SIDE, "width": SIDE, "num_inference_steps": 4, "guidance_scale": 1.0,
        "generator": torch.Generator().manual_seed(3), "output_type": "np",
    }  # fmt: skip
    picture = torch.rand(2, 3, SIDE, SIDE, generator=source)
    if kind == "sd3":
        given["pooled_prompt_embeds"] = torch.randn(2, WIDTH, generator=source)
    if job != "text":
        given |= {"image": picture, "strength": 0.75}
    if job.startswith("inpaint"):
        mask = torch.zeros(2, 1, SIDE, SIDE)
        mask[..., : SIDE // 2] = 1
        given["mask_image"] = mask
    elif job == "image" and kind == "sd":
        del given["height"], given["width"]  # those of the image
    return pipe(**given).images


@pytest.mark.parametrize(("kind", "job"), CASES)
def test_images_equal_those_with_diffusers_own_vae(tmp_path, kind, job):
    folder = write_vae(tmp_path / "vae", kind)
    ours = to_diffusers(load_autoencoder(folder))
    theirs = AutoencoderKL.from_pretrained(folder)
    mine, expected = (draw(make_pipeline(kind, job, vae), kind, job) for vae in (ours, theirs))
    assert mine.shape == (2, SIDE, SIDE, 3) and expected.std() > 0.01
    np.testing.assert_allclose(mine, expected, atol=2e-5)


@pytest.mark.parametrize(("kind", "job"), CASES)
def test_litevae_serves_every_pipeline(kind, job):
    torch.manual_seed(0)
    ae = build_autoencoder(
        "tiny", latent_channels=4 if kind == "sd" else 16, encoder={"depth": 1},
        decoder={"channels": 8, "multipliers": [1, 1]},
    ).eval()  # fmt: skip
    found = draw(make_pipeline(kind, job, to_diffusers(ae)), kind, job)
    assert found.shape == (2, SIDE, SIDE, 3) and np.isfinite(found).all() and found.std() > 0


def test_a_pipeline_is_saved_and_loaded_with_it(tmp_path):
    folder = write_vae(tmp_path / "vae", "sd")
    pipe = make_pipeline("sd", "text", to_diffusers(load_autoencoder(folder)))
    pipe.enable_vae_slicing() if hasattr(pipe, "enable_vae_slicing") else pipe.vae.enable_slicing()
    before = draw(pipe, "sd", "text")
    pipe.save_pretrained(tmp_path / "pipe")
    again = StableDiffusionPipeline.from_pretrained(
        tmp_path / "pipe", text_encoder=None, tokenizer=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.vae, DiffusersVAE) and again.vae.config.scaling_factor == 0.3
    np.testing.assert_allclose(draw(again, "sd", "text"), before, atol=2e-5)
