"""Distil a light LiteVAE encoder from a VAE, and edit images with it in the VAE's place.

    python examples/distil_encoder.py                                # a small VAE, photographs
    python examples/distil_encoder.py --pipeline my-sd --data my-images

The student learns the posterior that the teacher's encoder gives; its decoder is the teacher's. So
whatever was trained on the teacher's latents takes the student's, here image-to-image: the Stable
Diffusion of --pipeline, a diffusers folder, or else a small latent diffusion model, which the
script trains on the teacher's latents first. `edits.png` has a row of images, a row of their edits
with the teacher's encoder, and one with the student's. (The small VAE's own encoder costs nothing
to speak of; beside Stable Diffusion's, LiteVAE-S encodes 23 times as fast on a CPU.)

It needs diffusers. Without --pipeline it needs no downloads: it trains a small VAE first, and takes
about ten minutes on two CPU cores. With it, it follows the recipe `distil-s` (`ldm show distil-s`):
150,000 steps, up to 256², a GPU's work. Settings change it: `batch_size=8`,
`encoder.extractor.channels=32`.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from autoencoders import Autoencoder, load_autoencoder, to_diffusers
from autoencoders.losses.perceptual import find_lpips
from autoencoders.pretrained import find_pretrained
from ldm.data import open_source, sheet_images
from ldm.images import save_grid, to_float, to_pil
from pipelines import LatentDiffusionPipeline
from pipelines.recipes import load_recipe
from pipelines.train_autoencoder import train_autoencoder
from pipelines.train_diffusion import train_diffusion
from pipelines.validation import compare_with_teacher
from small_vae import small_vae

CPU = torch.device("cpu")
SMALL = [
    "encoder.depth=2",  # f = 4, as the small VAE has
    "phases=[{resolution: 64, steps: 300}]", "batch_size=4", "lr=2e-3", "warmup_images=100",
    "ema_half_life_images=80", "discriminator.channels=8", "validate_images=64",
    "teacher.statistics_images=64",
    "run={log_every_steps: 50, validate_every_steps: 150, save_every_steps: 150}",
]  # fmt: skip
"""Settings for the latents of the small VAE."""
SMALL_DIFFUSION = [
    "network.channels=32", "batch_size=16", "warmup_images=800",
    "ema_half_life_images=800", "statistics_images=64",
    "run={log_every_steps: 50, validate_every_steps: 150, save_every_steps: 150}",
]  # fmt: skip


def main() -> None:
    args = parse()
    given = args.vae or (args.pipeline and str(args.pipeline / "vae"))
    vae = given or str(small_vae(args.out))
    settings = [f"teacher.source={vae}", f"data.source={args.data}"]
    if not given:
        settings += SMALL
    if find_lpips() is None:
        print("VGG-16's weights are not on this machine: training without LPIPS")
        settings.append("loss.lpips=0")

    recipe = load_recipe("recipes", "distil-s", [*settings, *args.settings])
    run = train_autoencoder(recipe, folder=args.out / "distil-encoder")
    teacher, student = Autoencoder.from_pretrained(vae), load_autoencoder(run)

    resolution = recipe.phases[-1].resolution
    held_out = open_source(recipe.data, "val", resolution)
    found = compare_with_teacher(student, teacher, held_out, resolution, 16, CPU, limit=64)
    print(f"least correlation of a channel of latents: {found['latent_correlation']:.3f}")
    print(f"PSNR of the student's to the teacher's images: {found['psnr_to_teacher']:.2f} dB")

    images = to_float(sheet_images(held_out, resolution, 4))  # (4, 3, H, W) in [−1, 1]
    to_diffusers(student).save_pretrained(args.out / "distilled-vae")
    edit: Callable[[Autoencoder, Tensor], Tensor]
    if args.pipeline:
        edit = partial(edit_in_diffusers, args)
    else:
        edit = partial(edit_here, args, train_on_latents(vae, args, resolution))
    edits = [edit(ae, images) for ae in (teacher, student)]
    save_grid(torch.cat([images, *edits]), args.out / "edits.png", columns=len(images))
    print(f"wrote {args.out / 'edits.png'}, and the VAE {args.out / 'distilled-vae'}")


def edit_in_diffusers(args: argparse.Namespace, ae: Autoencoder, images: Tensor) -> Tensor:
    """Edit images with a Stable Diffusion whose VAE is replaced."""
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(args.pipeline, vae=to_diffusers(ae))
    edited = pipe(
        prompt=[args.prompt] * len(images), image=[to_pil(image) for image in images],
        strength=args.strength, generator=torch.Generator().manual_seed(0), output_type="pt",
    ).images  # fmt: skip
    return edited.cpu().float() * 2 - 1


def train_on_latents(vae: str, args: argparse.Namespace, resolution: int) -> Path:
    """Train a small diffusion model on the latents of a VAE."""
    settings = [
        f"autoencoder={find_pretrained(vae)}", f"data.source={args.data}",
        f"resolution={resolution}", f"steps={args.diffusion_steps}", *SMALL_DIFFUSION,
    ]  # fmt: skip
    recipe = load_recipe("diffusion", "tiny", settings)
    return train_diffusion(recipe, folder=args.out / "edit")


def edit_here(args: argparse.Namespace, run: Path, ae: Autoencoder, images: Tensor) -> Tensor:
    """Edit images with that model, and an autoencoder in the place of the VAE."""
    pipe = LatentDiffusionPipeline.from_pretrained(run, "cpu")
    pipe.codec.autoencoder = ae
    return pipe.edit(images, strength=args.strength, seed=0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vae", help="teacher, if not the VAE of --pipeline")
    parser.add_argument("--pipeline", type=Path, help="diffusers folder of a Stable Diffusion")
    parser.add_argument("--prompt", default="", help="what --pipeline draws")
    parser.add_argument("--diffusion-steps", type=int, default=300, help="without --pipeline")
    parser.add_argument("--strength", type=float, default=0.4, help="of the edits, 0 to 1")
    parser.add_argument("--data", default="photos", help="folder of images, zip or shards")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="output folder")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the recipe")
    return parser.parse_args()


if __name__ == "__main__":
    main()
