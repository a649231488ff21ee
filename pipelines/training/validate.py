"""What a training run shows of itself: numbers and pictures of held-out images, and samples."""

from functools import partial

import torch
from torch import Tensor, nn

from autoencoders import Autoencoder
from autoencoders.losses import LPIPS
from diffusion import karras_sigmas, sample_heun
from ldm.data import Source, sheet_images
from ldm.images import grid, latents_as_rgb, save_grid, to_float
from ldm.logbook import Logbook, read_rows
from ldm.run import Run
from ldm.seeds import normal
from pipelines.codec import Codec
from pipelines.evaluate import evaluate_autoencoder
from pipelines.training.noise_bands import draw_bands

BATCH = 16
COLUMNS = 8
SAMPLES = 16
SAMPLING_STEPS = 18


def validate_autoencoder(
    run: Run,
    autoencoder: Autoencoder,
    held_out: Source,
    resolution: int,
    limit: int,
    images_seen: int,
    logbook: Logbook,
    lpips: LPIPS | None = None,
) -> dict[str, float]:
    """Measure at most `limit` held-out images' reconstructions, and draw a few of them."""
    if not run.is_main:
        return {}
    numbers = evaluate_autoencoder(
        autoencoder, held_out, resolution, BATCH, run.device, limit, lpips and lpips.each
    )
    logbook.row(images_seen, **{f"val_{name}": value for name, value in numbers.items()})

    sheet, columns = reconstruction_sheet(autoencoder, held_out, resolution, COLUMNS)
    save_grid(sheet, run.folder / "pictures" / f"recon-{images_seen:08d}.png", columns)
    logbook.picture("reconstructions", grid(sheet, columns), images_seen)
    return numbers


@torch.no_grad()
def reconstruction_sheet(
    autoencoder: Autoencoder, source: Source, resolution: int, columns: int
) -> tuple[Tensor, int]:
    """Three rows of float pictures: originals, reconstructions, latents as RGB (Figures 2, 4).

    The images are the first that can be read.

    Returns:
        The pictures (3·columns, 3, H, W), on the CPU, and how many columns there are.
    """
    images = to_float(sheet_images(source, resolution, columns))
    images = images.to(next(autoencoder.parameters()).device)
    latents = autoencoder.encode(images).mode()
    recon = autoencoder.decode(latents).clamp(-1, 1)
    shown = nn.functional.interpolate(latents_as_rgb(latents), images.shape[-2:])
    return torch.cat([images, recon, shown]).cpu(), len(images)


@torch.no_grad()
def draw_samples(
    run: Run,
    denoiser: nn.Module,
    codec: Codec,
    shape: tuple[int, ...],
    images_seen: int,
    logbook: Logbook,
) -> None:
    """A sheet of samples of the averaged model, always from the same noise, the classes in turn."""
    if not run.is_main:
        return
    noise = normal(run.seed, "sample", range(SAMPLES), shape).to(run.device)
    classes = denoiser.network.config.classes
    labels = torch.arange(SAMPLES, device=run.device) % classes if classes else None
    with run.autocast():
        denoise = partial(denoiser, labels=labels)
        z = sample_heun(denoise, noise, karras_sigmas(SAMPLING_STEPS))
        images = codec.decode(z).cpu()
    save_grid(images, run.folder / "pictures" / f"samples-{images_seen:08d}.png", columns=4)
    logbook.picture("samples", grid(images, columns=4), images_seen)


def draw_losses(run: Run) -> None:
    """A picture of the loss at each band of noise levels, over the run so far."""
    if run.is_main:
        rows = read_rows(run.folder / "metrics.jsonl")
        draw_bands(rows, run.folder / "pictures" / "loss-by-sigma.png")
