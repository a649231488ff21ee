"""Train a latent diffusion model on the latents of a VAE that others trained, and sample from it.

    python examples/diffusion_on_imported_vae.py                     # a small VAE, photographs
    python examples/diffusion_on_imported_vae.py --vae stabilityai/sd-vae-ft-mse --data my-images

The VAE is imported once as a model file, which records where it comes from. Its latents are
standardised per channel, whatever their scale, and the checkpoint of the diffusion model carries
the VAE: `samples.png` is drawn from that one file.

Without --vae it needs no downloads: it trains a small VAE first, and takes about five minutes on
two CPU cores. The preset `tiny` is for 64² pictures on a CPU; a real one, such as
`--preset ffhq256`, is a GPU's work. Settings change it: `steps=5000`, `network.channels=96`.
"""

import argparse
from pathlib import Path

from ldm.images import save_grid
from pipelines import LatentDiffusionPipeline
from pipelines.exchange import import_autoencoder
from pipelines.recipes import load_recipe
from pipelines.train_diffusion import train_diffusion
from small_vae import small_vae

SMALL = [
    "network.channels=32", "batch_size=16", "steps=200", "warmup_images=400",
    "ema_half_life_images=500", "statistics_images=128",
    "run={log_every_steps: 50, validate_every_steps: 100, save_every_steps: 100}",
]  # fmt: skip
"""Settings for the latents of the small VAE, which has four times as many at 64² as a usual one."""


def main() -> None:
    args = parse()
    vae = args.vae or str(small_vae(args.out))
    file, _ = import_autoencoder(vae, args.out / "imported-vae.pt", args.subfolder, force=True)

    settings = [f"autoencoder={file}", f"data.source={args.data}"]
    if args.vae is None:
        settings += SMALL
    recipe = load_recipe("diffusion", args.preset, [*settings, *args.settings])
    run = train_diffusion(recipe, folder=args.out / "diffusion")

    pipe = LatentDiffusionPipeline.from_pretrained(run)
    samples = pipe(n=16, seed=0, steps=18)  # (16, 3, H, W) in [−1, 1]
    save_grid(samples, args.out / "samples.png", columns=8)
    print(f"wrote {args.out / 'samples.png'}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vae", help="diffusers folder, run, checkpoint, or owner/name on the Hub")
    parser.add_argument("--subfolder", help="folder of the VAE in it, such as vae")
    parser.add_argument("--preset", default="tiny", help="of the diffusion model")
    parser.add_argument("--data", default="photos", help="folder of images, zip or shards")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="output folder")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the recipe")
    return parser.parse_args()


if __name__ == "__main__":
    main()
