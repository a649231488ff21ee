"""Fine-tune the decoder of a VAE on your images, and put it back where the VAE came from.

    python examples/finetune_decoder.py                              # a small VAE, photographs
    python examples/finetune_decoder.py --vae my-vae --data my-images

Only the decoder learns, so latents stay as they are, to the bit, and everything that was trained on
them keeps working. The script prints the PSNR of held-out images before and after, compares the
latents, and writes the fine-tuned VAE in diffusers' format.

Without --vae it needs no downloads: it trains a small VAE first, and takes about four minutes on
two CPU cores. With --vae it follows the recipe `finetune` (`ldm show finetune`), 20,000 steps at
256²: hours on a GPU. Settings change it: `batch_size=8`, `phases=[{resolution: 256, steps: 2000}]`.
"""

import argparse
from pathlib import Path

import torch

from autoencoders import Autoencoder, load_autoencoder
from autoencoders.losses.perceptual import find_lpips
from ldm.data import open_source, sheet_images
from ldm.images import to_float
from pipelines.exchange import export_autoencoder
from pipelines.recipes import load_recipe
from pipelines.train_autoencoder import train_autoencoder
from pipelines.validation import evaluate_autoencoder
from small_vae import small_vae

SMALL = [
    "phases=[{resolution: 64, steps: 200}]", "batch_size=4", "lr=1e-3", "warmup_images=80",
    "ema_half_life_images=80", "adversarial.weight=0", "discriminator.channels=8",
    "validate_images=64",
    "run={log_every_steps: 50, validate_every_steps: 100, save_every_steps: 100}",
]  # fmt: skip
"""Settings for the small VAE, which learns fast and has little to lose."""


def main() -> None:
    args = parse()
    vae = args.vae or small_vae(args.out)
    settings = [f"init.source={vae}", f"data.source={args.data}"]
    if args.vae is None:
        settings += SMALL
    if find_lpips() is None:
        print("VGG-16's weights are not on this machine: training without LPIPS")
        settings.append("loss.lpips=0")

    recipe = load_recipe("recipes", "finetune", [*settings, *args.settings])
    run = train_autoencoder(recipe, folder=args.out / "finetune-decoder")
    before, after = Autoencoder.from_pretrained(vae), load_autoencoder(run)

    resolution = recipe.phases[-1].resolution
    held_out = open_source(recipe.data, "val", resolution)
    for name, ae in {"before": before, "after": after}.items():
        scores = evaluate_autoencoder(ae, held_out, resolution, 16, torch.device("cpu"), limit=256)
        print(f"{name}: {scores['psnr']:.2f} dB PSNR, {scores['ssim']:.3f} SSIM")

    images = to_float(sheet_images(held_out, resolution, 8))  # (8, 3, H, W) in [−1, 1]
    with torch.no_grad():
        equal = torch.equal(before.encode(images).mean, after.encode(images).mean)
    print(f"latents of {len(images)} images are {'equal to the bit' if equal else 'NOT equal'}")

    finetuned = args.out / "finetuned-vae"
    export_autoencoder(finetuned, "diffusers", run, force=True)
    print(f'in diffusers: vae = AutoencoderKL.from_pretrained("{finetuned}")')


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vae", help="diffusers folder, run, checkpoint, or owner/name on the Hub")
    parser.add_argument("--data", default="photos", help="folder of images, zip or shards")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="output folder")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the recipe")
    return parser.parse_args()


if __name__ == "__main__":
    main()
