"""Images through an autoencoder and back: the one loop that every measurement of stage one is.

The loss by noise level: a mean over all σ hides which of them is still being learnt.

What a training run shows of itself: numbers and pictures of held-out images, and samples.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoencoders import Autoencoder
from autoencoders.losses import LPIPS
from diffusion import karras_sigmas, sample_heun
from ldm.data import Batch, Source, evaluation_batches, sheet_images
from ldm.device import memory_format
from ldm.errors import LdmError
from ldm.files import write_atomically
from ldm.images import grid, latents_as_rgb, save_grid, to_float, to_uint8
from ldm.logbook import Logbook, read_rows
from ldm.metrics import psnr, ssim
from ldm.run import Run
from ldm.seeds import normal
from pipelines.codec import Codec

# An image that comes back bit for bit has an infinite PSNR; one would make the mean infinite. At
# 256² even a single value off by one level is below 102 dB.
PSNR_CEILING = 100.0

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""(recon, images) in [−1, 1], (B, 3, H, W) → the distance of each pair, (B,)."""


class Pair(NamedTuple):
    """Images and what became of them, both uint8 (b, 3, R, R) on the device."""

    images: Tensor
    recon: Tensor
    k: Tensor
    """int64 (b,), on the CPU: their numbers in the source."""


@torch.no_grad()
def reconstruct(ae: Autoencoder, stream: Iterable[Batch], device: torch.device) -> Iterator[Pair]:
    """Images and the posterior's mode decoded, rounded to 8 bits.

    Args:
        ae: on `device`; it is put in eval mode, and back.

    Raises:
        LdmError: a reconstruction is not finite; or an image is smaller than the autoencoder takes.
    """
    was_training = ae.training
    ae.eval()
    try:
        for batch in stream:
            pixels = batch.images.to(device).contiguous(memory_format=memory_format(device))
            recon = ae.decode(ae.encode(to_float(pixels)).mode(), pixels.shape[-2:])
            # rounded, a NaN would pass for black
            if not recon.isfinite().all():
                raise LdmError(
                    "reconstructions hold a NaN or an infinity: the autoencoder's weights are "
                    "broken; take an earlier checkpoint"
                )
            yield Pair(pixels, to_uint8(recon), batch.k)
    finally:
        ae.train(was_training)


class Scores:
    """What each pair says by itself: PSNR, SSIM, LPIPS, of every image.

    Memory grows with the images, by a few numbers each.
    """

    def __init__(self) -> None:
        self._ks: list[Tensor] = []
        self._of: dict[str, list[Tensor]] = {}

    @property
    def count(self) -> int:
        """Images seen."""
        return sum(map(len, self._ks))

    def add(self, pair: Pair, perceptual: Perceptual | None) -> None:
        """Take in a batch; there is an `lpips` with `perceptual` alone."""
        images, recon = to_float(pair.images), to_float(pair.recon)
        scores = {
            "psnr": psnr(images, recon).clamp(max=PSNR_CEILING),
            "ssim": ssim(images, recon),
        }
        if perceptual is not None:
            scores["lpips"] = perceptual(recon, images)
            if scores["lpips"].shape != (len(images),):
                raise ValueError("perceptual must give the distance of each pair, (B,)")
        for name, values in scores.items():
            self._of.setdefault(name, []).append(values.cpu().float())
        # a loader's own holds a file open for as long as it lives
        self._ks.append(pair.k.clone())

    def merge(self, other: "Scores") -> None:
        """Take in what another process has seen."""
        self._ks += other._ks
        for name, values in other._of.items():
            self._of.setdefault(name, []).extend(values)

    def means(self) -> dict[str, float]:
        """Over images, summed in float64.

        Raises:
            LdmError: there was none.
        """
        if not self.count:
            raise LdmError("no image to evaluate: the data is empty, or all of it is corrupt")
        return {name: torch.cat(each).double().mean().item() for name, each in self._of.items()}

    def in_order(self) -> dict[str, NDArray]:
        """`k`, int64 (n,), rising: the images' numbers; and by its name each score of each image,
        float32 (n,). Two autoencoders' are of the same images where their `k` are equal.
        """
        ks, order = torch.cat(self._ks).sort()
        scores = {name: torch.cat(each)[order].numpy() for name, each in self._of.items()}
        return {"k": ks.numpy(), **scores}


@torch.no_grad()
def evaluate_autoencoder(
    ae: Autoencoder,
    source: Source,
    resolution: int,
    batch_size: int,
    device: torch.device,
    limit: int | None = None,
    perceptual: Perceptual | None = None,
    workers: int = 0,
) -> dict[str, float]:
    """Reconstruct every image of a source once, from its posterior's mode, in float32, and average.

    Reconstructions are rounded to 8 bits first, as a saved PNG is. An image that comes back
    exactly counts 100 dB.

    Args:
        ae: on `device`; it is put in eval mode, and back.
        limit: only the first so many images.
        perceptual: (recon, images) → the distance of each pair (B,), such as `load_lpips().each`.
        workers: loader processes.

    Returns:
        `psnr` (dB), `ssim`, `lpips` (with `perceptual` alone), means over images; and `count`.

    Raises:
        LdmError: there is no image; the resolution is below SSIM's window; or a reconstruction is
            not finite.
    """
    scores = Scores()
    stream = evaluation_batches(source, resolution, batch_size, limit, workers=workers)
    with closing(reconstruct(ae, stream, device)) as pairs:
        for pair in pairs:
            scores.add(pair, perceptual)
    return scores.means() | {"count": scores.count}


EDGES = (0.0, 0.1, 0.3, 1.0, 3.0, inf)
"""Between them lie 18, 32, 34, 13 and 3 % of the training noise levels of EDM's defaults."""


def band_names() -> dict[tuple[float, float], str]:
    """The bands, and their names in the metrics."""
    return {
        (low, high): f"loss_sigma_{low:g}_to_{high:g}" if high < inf else f"loss_sigma_over_{low:g}"
        for low, high in pairwise(EDGES)
    }


def band_losses(loss: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """Mean loss of each band of σ in a batch; NaN where a band has none of its images.

    Args:
        loss, sigma: of each image, (b,).
    """
    means = {}
    for (low, high), name in band_names().items():
        inside = (low <= sigma) & (sigma < high)
        # no indexing, which would make the host wait for the device
        means[name] = torch.where(inside, loss, 0).sum() / inside.sum()
    return means


def draw_bands(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Draw each band's loss over images seen, from the rows of a metrics.jsonl, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = ("#1b6ca8", "#2a9d8f", "#8ab17d", "#e9a13b", "#d1495b")
    for ((low, high), name), colour in zip(band_names().items(), colours, strict=True):
        points = [(row["images_seen"], row[name]) for row in rows if name in row]
        if points:
            label = f"σ ≥ {low:g}" if high == inf else f"{low:g} ≤ σ < {high:g}"
            axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.3)
    axes.set(xlabel="images seen", ylabel="λ(σ) ‖D(x; σ) − z‖²", yscale="log")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))


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
