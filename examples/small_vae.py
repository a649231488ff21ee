"""Train a small SD-VAE on the built-in photographs: the VAE of the examples where none is given.

    python examples/small_vae.py

It is written as a diffusers folder, and so takes the place of the pretrained VAE that you have. It
has 0.8 M parameters, four latent channels and f = 4, and trains at 64² for about three minutes on
two CPU cores.
"""

from pathlib import Path

from pipelines.exchange import export_autoencoder
from pipelines.recipes import load_recipe
from pipelines.train_autoencoder import train_autoencoder

SIZES = "{channels: 24, multipliers: [1, 1, 3], blocks: 1}"  # 8 groups of 3 and 9 channels
SETTINGS = [
    "latent_channels=4", f"encoder={SIZES}", f"decoder={SIZES}", "decoder.norm=group",
    "phases=[{resolution: 64, steps: 300}]", "batch_size=4", "lr=2e-3", "warmup_images=100",
    "ema_half_life_images=100", "validate_images=64",
    "run={log_every_steps: 50, validate_every_steps: 150, save_every_steps: 150}",
]  # fmt: skip


def small_vae(folder: Path, *settings: str) -> Path:
    """Train the small VAE in a folder, unless that is done, and return its diffusers folder."""
    vae = folder / "vae"
    if not (vae / "config.json").is_file():
        recipe = load_recipe("ae", "sdvae-quarter", [*SETTINGS, *settings])
        run = train_autoencoder(recipe, folder=folder / "small-vae")
        # 1 ÷ the standard deviation of its latents, about
        export_autoencoder(vae, "diffusers", run, scaling_factor=0.2)
    return vae


if __name__ == "__main__":
    print(small_vae(Path("runs/examples")))
