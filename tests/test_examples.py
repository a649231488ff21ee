"""The examples run as they stand, at their smallest."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from autoencoders import load_autoencoder
from autoencoders.diffusers_vae import DiffusersVAE
from ldm.checkpoint import fingerprint, load_model
from tests.autoencoders.test_diffusers_pipelines import make_pipeline, write_vae

EXAMPLES = Path(__file__).parent.parent / "examples"
TRAINING = [
    "phases=[{resolution: 32, steps: 2}]", "batch_size=2", "validate_images=2", "data.workers=0",
    "run={device: cpu, precision: fp32, validate_every_steps: 2, save_every_steps: 2}",
]  # fmt: skip
DIFFUSION = [
    "resolution=32", "steps=2", "batch_size=2", "statistics_images=4",
    "network={channels: 16, multipliers: [1, 2], blocks: 1, head_width: 8}",
    "run={device: cpu, precision: fp32, validate_every_steps: 2, save_every_steps: 2}",
]  # fmt: skip


@pytest.fixture
def run_example(tmp_path, monkeypatch):
    """Run a script as a command does; its small VAE is an untrained one of the same format."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))  # without VGG's weights
    monkeypatch.chdir(tmp_path)

    def run(name: str, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    return run


@pytest.fixture
def small(tmp_path) -> Path:
    """The examples' folder, with an untrained VAE in place of the small one."""
    write_vae(tmp_path / "runs/examples/vae", "sd")
    return tmp_path / "runs/examples"


def test_the_small_vae_is_a_diffusers_folder(run_example, tmp_path):
    from small_vae import small_vae

    vae = small_vae(tmp_path, *TRAINING)
    theirs = AutoencoderKL.from_pretrained(vae).eval()
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        mean = theirs.encode(images).latent_dist.mean
        torch.testing.assert_close(load_autoencoder(vae).encode(images).mean, mean)
    assert mean.shape == (1, 4, 8, 8)
    assert small_vae(tmp_path) == vae  # trained once


def test_a_decoder_is_fine_tuned_and_exported(run_example, small, capfd):
    run_example("finetune_decoder", *TRAINING)
    said = capfd.readouterr().out
    assert "without LPIPS" in said and "latents of 8 images are equal to the bit" in said
    assert said.index("before: ") < said.index("after: ") and said.count("dB PSNR") == 2
    before, after = (AutoencoderKL.from_pretrained(small / n) for n in ("vae", "finetuned-vae"))
    assert before.config.scaling_factor == after.config.scaling_factor == 0.3
    for name, weight in before.state_dict().items():
        learned = name.startswith(("decoder.", "post_quant_conv."))
        assert torch.equal(weight, after.state_dict()[name]) != learned, name


@pytest.mark.slow
def test_an_encoder_is_distilled_and_edits(run_example, small, capfd):
    run_example("distil_encoder", "--diffusion-steps", "2", "encoder.depth=1", *TRAINING)
    assert "least correlation of a channel" in capfd.readouterr().out
    student, teacher = load_autoencoder(small / "distil-encoder"), load_autoencoder(small / "vae")
    assert student.config.encoder.type == "litevae"
    assert fingerprint(student.decoder.state_dict()) == fingerprint(teacher.decoder.state_dict())
    # the diffusion model is the teacher's
    inner = load_model(small / "edit", "diffusion").autoencoder
    assert inner.sha256 == fingerprint(teacher.state_dict())
    assert rows_of(small / "edits.png", 3, 4) == (4 * 32, 3 * 32)


@pytest.mark.slow
def test_a_distilled_encoder_edits_in_stable_diffusion(run_example, tmp_path):
    pytest.importorskip("transformers")
    pipeline = make_stable_diffusion(tmp_path / "my-sd")
    words = ["--pipeline", str(pipeline), "--strength", "0.05", "encoder.depth=1"]
    run_example("distil_encoder", *words, "data.source=photos", "teacher.statistics_images=4",
                *TRAINING)  # fmt: skip
    assert rows_of(tmp_path / "runs/examples/edits.png", 3, 4) == (4 * 32, 3 * 32)
    again = DiffusersVAE.from_pretrained(tmp_path / "runs/examples/distilled-vae")
    assert again.config.scaling_factor == 0.3  # the teacher's


def test_a_diffusion_model_is_trained_on_an_imported_vae(run_example, small, tmp_path):
    run_example("diffusion_on_imported_vae", "--vae", str(small / "vae"), *DIFFUSION)
    imported = load_model(small / "imported-vae.pt", "autoencoder")
    assert imported.provenance["imported"]["source"] == str(small / "vae")
    inner = load_model(small / "diffusion", "diffusion").autoencoder
    assert inner.sha256 == imported.sha256
    assert rows_of(small / "samples.png", 2, 8) == (8 * 32, 2 * 32)


def rows_of(path: Path, rows: int, columns: int) -> tuple[int, int]:
    """The size of a grid of pictures without its gaps of two pixels."""
    width, height = Image.open(path).size
    return width - 2 * (columns - 1), height - 2 * (rows - 1)


def make_stable_diffusion(folder: Path) -> Path:
    """A folder of a tiny Stable Diffusion, with the text encoder and tokenizer that it needs."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    vae = AutoencoderKL.from_pretrained(write_vae(folder / "vae", "sd"))
    pipe = make_pipeline("sd", "image", vae)
    words = folder / "tokenizer"
    words.mkdir()
    (words / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}')
    (words / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = CLIPTextConfig(
        vocab_size=3, num_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes
    )
    pipe.register_modules(
        text_encoder=CLIPTextModel(config).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(words, model_max_length=77),
    )
    pipe.save_pretrained(folder)
    return folder
