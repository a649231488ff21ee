"""Measure an autoencoder's reconstructions: PSNR, SSIM, and LPIPS where its weights are."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from autoencoders import Autoencoder, load_autoencoder
from autoencoders.loading import read_autoencoder
from autoencoders.losses import load_lpips
from ldm.config import validate
from ldm.data import DataConfig, Source, evaluation_batches, open_source
from ldm.data.split import Split
from ldm.device import memory_format, resolve_device
from ldm.errors import LdmError, UsageError
from ldm.images import to_float, to_uint8
from ldm.logbook import console
from ldm.metrics import psnr, ssim
from ldm.run_folder import newest_run

# An image that comes back bit for bit has an infinite PSNR; one would make the mean infinite. At
# 256² even a single value off by one level is below 102 dB.
PSNR_CEILING = 100.0


def evaluate_checkpoint(
    model: Path | None = None,
    data: str | None = None,
    split: Split = "val",
    resolution: int | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    device: str = "auto",
) -> dict[str, float]:
    """`evaluate_autoencoder` on a file: the newest, its own data, the resolution it ended at.

    Args:
        model: a stage-one file or folder, ours or others', as `load_autoencoder` takes it.
        data: `photos`, a folder, a zip, or shards.
        resolution: side of the images, pixels.

    Raises:
        UsageError: data or resolution left out, and the file does not say; or a number below one.
        LdmError: the model or the data cannot be read.
    """
    for name, value in (("--batch-size", batch_size), ("--resolution", resolution),
                        ("--limit", limit)):  # fmt: skip
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: it must be at least 1")
    where = resolve_device(device)
    path = model or newest_run("autoencoder")
    config, trained_at = (DataConfig(source=data), None) if data else (None, None)
    if config is None or resolution is None:
        own, trained_at = _trained_on(path)
        config, resolution = config or own, resolution or trained_at
    if config is None or resolution is None:
        lacking = "--data" if config is None else "--resolution"
        raise UsageError(f"{path} does not say what it was trained on: give {lacking}")
    autoencoder = load_autoencoder(path, where)
    source = open_source(config, split, resolution)
    try:
        perceptual = load_lpips(where, instead="go without it, as here")
    except LdmError as error:
        console.print(f"without LPIPS: {error}", markup=False)
        perceptual = None
    console.print(
        f"measuring {path} on the {split} split of {config.source} at {resolution}×{resolution}",
        markup=False,
    )
    return evaluate_autoencoder(
        autoencoder, source, resolution, batch_size, where, limit, perceptual, config.workers
    )


@torch.no_grad()
def evaluate_autoencoder(
    ae: Autoencoder,
    source: Source,
    resolution: int,
    batch_size: int,
    device: torch.device,
    limit: int | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    workers: int = 0,
) -> dict[str, float]:
    """Reconstruct every image of a source once, from its posterior's mode, in float32, and average.

    Reconstructions are rounded to 8 bits first, as a saved PNG is. An image that comes back
    exactly counts 100 dB.

    Args:
        ae: on `device`; it is put in eval mode, and back.
        limit: only the first so many images.
        perceptual: (recon, images) → scalar mean over the batch, such as `load_lpips()`.
        workers: loader processes.

    Returns:
        `psnr` (dB), `ssim`, `lpips` (with `perceptual` alone), means over images; and `count`.

    Raises:
        LdmError: there is no image; or the resolution is below SSIM's window.
    """
    sums: Counter[str] = Counter()
    count, was_training = 0, ae.training
    ae.eval()
    try:
        for batch in evaluation_batches(source, resolution, batch_size, limit, workers=workers):
            pixels = batch.images.to(device).contiguous(memory_format=memory_format(device))
            images = to_float(pixels)
            recon = to_float(to_uint8(ae.decode(ae.encode(images).mode())))
            sums["psnr"] += psnr(images, recon).clamp(max=PSNR_CEILING).sum().item()
            sums["ssim"] += ssim(images, recon).sum().item()
            if perceptual is not None:
                sums["lpips"] += perceptual(recon, images).item() * len(images)
            count += len(images)
    finally:
        ae.train(was_training)
    if not count:
        raise LdmError("no image to evaluate: the data is empty, or all of it is corrupt")
    return {name: total / count for name, total in sums.items()} | {"count": count}


def _trained_on(path: Path) -> tuple[DataConfig | None, int | None]:
    """The data a model file was trained on and the resolution it ended at, as far as it says."""
    recipe = read_autoencoder(path).provenance.get("recipe", {})
    data = validate(DataConfig, recipe["data"]) if "data" in recipe else None
    phases = recipe.get("phases")
    return data, phases[-1]["resolution"] if phases else None
