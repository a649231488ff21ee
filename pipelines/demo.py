"""`ldm demo`: train both stages on built-in photographs, or a folder, and show it on a page."""

import json
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoders import load_autoencoder
from diffusion.samplers import Denoise
from ldm.config import load_preset, resolve, short_size
from ldm.data import batches, holds_out, open_source
from ldm.data.dataset import PHOTOS
from ldm.errors import UsageError
from ldm.files import check_writable, lock, write_json
from ldm.images import save_grid, to_uint8
from ldm.logbook import console, read_rows
from ldm.metrics import sliced_wasserstein
from ldm.run_folder import preset_of, provenance
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe
from pipelines.report import page
from pipelines.train_autoencoder import train_autoencoder
from pipelines.train_diffusion import train_diffusion
from pipelines.validation import evaluate_autoencoder, reconstruction_sheet

SAMPLES = 16
SWD_IMAGES = 256
FROM_NOISE, EVERY = 2, 2  # samples shown emerging from noise, and steps between their pictures
NEXT = (
    "ldm data prepare my-images data/mine --size 256",
    "ldm train-ae litevae-b data.source=data/mine",
)


def run_demo(
    out: Path,
    fresh: bool = False,
    data: str = PHOTOS,
    stage_one: Sequence[str] = (),
    stage_two: Sequence[str] = (),
) -> Path:
    """Train the presets `demo` in `out`, sample, measure, and write `out/report.html`.

    The same call resumes an interrupted demo; finished stages are not trained again.

    Args:
        fresh: remove an earlier demo from `out` first.
        data: folder of images, zip or shards in place of the photographs.
        stage_one, stage_two: `key=value` settings over the two presets.
    """
    check_writable(out / "report.html", advice="give --out another folder")
    with lock(out):
        if fresh:
            for name in ("autoencoder", "diffusion"):
                shutil.rmtree(out / name, ignore_errors=True)
        began = time.monotonic()
        if preset_of(out / "autoencoder") not in (None, "demo"):
            raise UsageError(f"{out} holds a demo of an earlier version: replace it by --fresh")
        source = [] if data == PHOTOS else [f"data.source={json.dumps(data)}"]
        first = resolve(AutoencoderRecipe, load_preset("ae", "demo"), [*source, *stage_one])
        if not holds_out(first.data):
            raise UsageError(f"{data} holds out no images: prepare it again without --held-out 0")
        with _timed("1/3 autoencoder"):
            ae_folder = train_autoencoder(first, "demo", out / "autoencoder")
        trained = f"autoencoder={json.dumps(str(ae_folder / 'ckpt.pt'))}"
        settings = [*source, *stage_two, trained]
        second = resolve(DiffusionRecipe, load_preset("diffusion", "demo"), settings)
        with _timed("2/3 diffusion model"):
            ldm_folder = train_diffusion(second, "demo", out / "diffusion")
        with _timed("3/3 samples and numbers"):
            path = _report(out, ae_folder, ldm_folder, second)
    minutes = (time.monotonic() - began) / 60
    console.print(f"the demo took {minutes:.1f} minutes")
    console.print(f"next, on your own images: {' && '.join(NEXT)}")
    return path


@contextmanager
def _timed(name: str) -> Iterator[None]:
    console.print(f"[bold]{name}[/bold]")
    began = time.monotonic()
    yield
    console.print(f"{name}: {time.monotonic() - began:.0f} s\n")


@torch.no_grad()
def _report(out: Path, ae_folder: Path, ldm_folder: Path, recipe: DiffusionRecipe) -> Path:
    resolution = recipe.resolution
    autoencoder = load_autoencoder(ae_folder / "ckpt.pt")
    held_out = open_source(recipe.data, "val", resolution)
    quality = evaluate_autoencoder(autoencoder, held_out, resolution, 16, torch.device("cpu"))

    pipe = LatentDiffusionPipeline.from_pretrained(ldm_folder, "cpu")
    drawn = pipe(n=SWD_IMAGES, seed=0)
    assert isinstance(drawn, Tensor)
    sheet, columns = reconstruction_sheet(autoencoder, held_out, resolution, 8)
    save_grid(sheet, out / "reconstructions.png", columns)
    save_grid(drawn[:SAMPLES], out / "samples.png", 8)
    strip = from_noise(pipe)
    save_grid(strip, out / "from-noise.png", len(strip) // FROM_NOISE)
    train = open_source(recipe.data, "train", resolution)
    # two sets of other crops of the training images: the reference, and one to show its floor
    streams = (
        batches(train, recipe.data, resolution, seed, 0, SWD_IMAGES, 32) for seed in (1001, 1002)
    )
    crops, others = (torch.cat([batch.images for batch in stream]) for stream in streams)
    swd = sliced_wasserstein(to_uint8(drawn), crops)["mean"]
    floor = sliced_wasserstein(others, crops)["mean"]

    numbers = {
        "psnr": quality["psnr"], "ssim": quality["ssim"], "held_out_images": quality["count"],
        "swd": swd, "swd_floor": floor, "swd_images": SWD_IMAGES, "resolution": resolution,
    }  # fmt: skip
    write_json(out / "numbers.json", numbers | provenance())

    return page.write_page(
        out / "report.html",
        "From photographs to samples",
        "A LiteVAE and a latent diffusion model, trained on this machine on "
        f"{_name(recipe.data.source)}, at {short_size(resolution)} pixels.",
        _sections(
            numbers,
            recipe.data.source,
            page.picture(sheet, columns, "original · reconstruction · latent"),
            page.picture(drawn[:SAMPLES], 8, f"images 0 to {SAMPLES - 1} of seed 0")
            + page.picture(strip, len(strip) // FROM_NOISE, "from noise to a sample"),
            _curves(*(read_rows(f / "metrics.jsonl") for f in (ae_folder, ldm_folder))),
        ),
    )


@torch.no_grad()
def from_noise(pipe: LatentDiffusionPipeline) -> Tensor:
    """Decode the latents of FROM_NOISE samples at n steps each: (FROM_NOISE · n, 3, H, W)."""
    states: list[Tensor] = []

    def record(denoise: Denoise) -> Denoise:
        def recording(x: Tensor, sigma: Tensor) -> Tensor:
            # at every noise level as large as latents without noise are
            scale = pipe.codec.sigma_data / (sigma**2 + pipe.codec.sigma_data**2) ** 0.5
            states.append(pipe.codec.decode(x * scale).cpu())
            return denoise(x, sigma)

        return recording

    samples = pipe.sample(range(FROM_NOISE), 0, wrap=record)
    # Heun's sampler calls the denoiser twice a step
    return torch.stack([*states[:: 2 * EVERY], samples], dim=1).flatten(0, 1)


def _name(source: str) -> str:
    return "the photographs inside scikit-image" if source == PHOTOS else source


def _sections(
    numbers: dict[str, Any],
    source: str,
    reconstructions: str,
    samples: str,
    curves: str,
) -> list[str]:
    held_out, own_data = "Images that training never saw.", f" data.source={shlex.quote(source)}"
    if source == PHOTOS:
        own_data = ""
        held_out = "Crops of the right third of each photograph, which training never saw."
    return [
        page.tiles({
            "PSNR, held out": f"{numbers['psnr']:.2f} dB",
            "SSIM, held out": f"{numbers['ssim']:.3f}",
            "SWD ×10³, samples": f"{numbers['swd']:.1f}",
            "SWD ×10³, real crops": f"{numbers['swd_floor']:.1f}",
        }),
        page.section(
            "Reconstructions",
            f"{held_out} Rows: the original, its reconstruction, and the latent's first three "
            "channels as colours.",
            reconstructions,
        ),
        page.section(
            "Samples",
            "The diffusion model turns noise into latents in 18 steps, and the decoder turns "
            "these into images. A few minutes of training give colours and textures; objects "
            "take a GPU and a real data set. Below, two samples emerge from noise: their latents "
            "at every second of the 18 steps, decoded.",
            samples,
        ),
        page.section(
            "Training",
            "Over images seen. The discriminator starts after a fifth of the training; PSNR is "
            "that of the averaged weights.",
            curves,
        ),
        page.section("Numbers", "The measurements and their conditions.", page.table([
            ("PSNR, SSIM", f"{numbers['psnr']:.3f} dB, {numbers['ssim']:.4f}: mean over "
             f"{numbers['held_out_images']} held-out images, averaged weights, posterior mean, "
             "8 bit"),
            ("Sliced Wasserstein distance", f"{numbers['swd']:.2f} ×10³: {numbers['swd_images']} "
             "samples (seed 0, 18 Heun steps) against as many random crops"),
            ("The same for real crops", f"{numbers['swd_floor']:.2f} ×10³: a floor: "
             "other crops of the same images"),
        ])),
        page.section(
            "Commands",
            "The same, step by step; every setting is key=value (`ldm show ae/demo`).",
            page.commands([
                f"ldm train-ae demo{own_data}",
                f"ldm train-diffusion demo{own_data}",
                f"ldm sample --n {SAMPLES}",
                "ldm eval-ae",
                "ldm fid --force",
            ]),
        ),
        page.section("Next", "On your own images, with a GPU:", page.commands(NEXT)),
    ]  # fmt: skip


def _curves(one: list[dict[str, float]], two: list[dict[str, float]]) -> str:
    """Charts of both stages' rows of metrics."""

    def chart(title: str, rows: list[dict[str, float]], log: bool = False, **names: str) -> str:
        lines = {
            label: [(row["images_seen"], row[name]) for row in rows if name in row]
            for label, name in names.items()
        }
        return page.chart(title, lines, "images seen", log)

    terms = {name: name for name in ("l1", "gaussian", "wavelet")}
    return page.charts(
        chart("held-out PSNR, dB", one, psnr="val_psnr"),
        chart("reconstruction terms", one, log=True, **terms),
        chart("discriminator's logits", one, real="logit_real", fake="logit_fake"),
        chart("diffusion loss", two, loss="loss"),
    )
