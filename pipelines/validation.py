"""Held-out measurements: reconstructions, their scores and a sheet of them; loss by noise level.

Training shows these numbers and pictures while it runs; evaluation measures with the same loop.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoencoders import Autoencoder
from autoencoders.losses import LPIPS, find_lpips, load_lpips
from autoencoders.losses.perceptual import SMALLEST
from ldm.config import Resolution, shorter_side
from ldm.data import Batch, Source, evaluation_batches, sheet_images
from ldm.device import frozen, full_float32, memory_format
from ldm.errors import LdmError
from ldm.images import as_float, as_rgb, latents_as_rgb
from ldm.metrics import psnr, ssim
from pipelines.recipes import AutoencoderRecipe

# An exact reconstruction has an infinite PSNR, and would make the mean infinite. At 256² a single
# value off by one level is below 102 dB.
PSNR_CEILING = 100.0

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""(recon, images), (B, C, H, W) each in [−1, 1] → the distance of each pair (B,)."""


class Pair(NamedTuple):
    """Images and their reconstructions (b, C, R, R), uint8 or floats in [−1, 1], on the device."""

    images: Tensor
    recon: Tensor
    k: Tensor
    """int64 (b,), on the CPU: their indices in the source."""


@torch.no_grad()
def reconstruct(
    ae: Autoencoder, stream: Iterable[Batch], device: torch.device
) -> Generator[Pair, None, None]:
    """Yield images and their reconstructions from the posterior's mode, rounded as files would.

    Args:
        ae: on `device`; in eval mode and frozen while this runs.
    """
    with frozen(ae):
        for batch in stream:
            pixels = batch.images.to(device).contiguous(memory_format=memory_format(device))
            recon = ae.decode(ae.encode(as_float(pixels)).mode(), pixels.shape[-2:])
            # rounded, a NaN would pass for black
            if not recon.isfinite().all():
                raise LdmError("reconstructions are not finite: use an earlier checkpoint")
            yield Pair(pixels, ae.config.pixels.round(recon), batch.k)


class Scores:
    """PSNR, SSIM and LPIPS of every image; memory grows by a few numbers per image."""

    def __init__(self) -> None:
        self._ks: list[Tensor] = []
        self._of: dict[str, list[Tensor]] = {}

    @property
    def count(self) -> int:
        """Number of images."""
        return sum(map(len, self._ks))

    def add(self, pair: Pair, perceptual: Perceptual | None) -> None:
        """Score a batch; `lpips` is scored only if `perceptual` is given."""
        images, recon = as_float(pair.images), as_float(pair.recon)
        scores = {"psnr": psnr(images, recon).clamp(max=PSNR_CEILING), "ssim": ssim(images, recon)}
        if perceptual is not None:
            scores["lpips"] = perceptual(recon, images)
            if scores["lpips"].shape != (len(images),):
                raise ValueError("perceptual must give the distance of each pair, (B,)")
        for name, values in scores.items():
            self._of.setdefault(name, []).append(values.cpu().float())
        self._ks.append(pair.k)

    def merge(self, other: "Scores") -> None:
        """Add another process's scores."""
        self._ks += other._ks
        for name, values in other._of.items():
            self._of.setdefault(name, []).extend(values)

    def means(self) -> dict[str, float]:
        """Mean of each score over images, summed in float64; an LdmError if there is no image."""
        if not self.count:
            raise LdmError("no image to evaluate: the data is empty, or every image is corrupt")
        return {name: torch.cat(each).double().mean().item() for name, each in self._of.items()}

    def in_order(self) -> dict[str, NDArray]:
        """Every image's index `k`, int64 (n,), ascending, and its scores by name, float32 (n,)."""
        ks, order = torch.cat(self._ks).sort()
        scores = {name: torch.cat(each)[order].numpy() for name, each in self._of.items()}
        return {"k": ks.numpy(), **scores}


@full_float32()
@torch.no_grad()
def evaluate_autoencoder(
    ae: Autoencoder,
    source: Source,
    resolution: Resolution,
    batch_size: int,
    device: torch.device,
    limit: int | None = None,
    perceptual: Perceptual | None = None,
) -> dict[str, float]:
    """Reconstruct every image of a source once in float32, and average its scores.

    Reconstructions are rounded first, to 8 bits like a saved PNG, or to the data's own depth. An
    exact one counts 100 dB.

    Args:
        ae: on `device`; in eval mode and frozen while this runs.
        resolution: size of the images, pixels.
        limit: only the first `limit` images.
        perceptual: distance of each pair, such as `load_lpips().each`.

    Returns:
        Means over images: `psnr` (dB), `ssim`, and `lpips` if `perceptual` is given; and `count`.
    """
    scores = Scores()
    stream = evaluation_batches(source, resolution, batch_size, limit)
    with closing(reconstruct(ae, stream, device)) as pairs:
        for pair in pairs:
            scores.add(pair, perceptual)
    return scores.means() | {"count": scores.count}


@full_float32()
@torch.no_grad()
def compare_with_teacher(
    student: Autoencoder,
    teacher: Autoencoder,
    source: Source,
    resolution: Resolution,
    batch_size: int,
    device: torch.device,
    limit: int | None = None,
) -> dict[str, float]:
    """Compare the latents that a student and its teacher give for the images of a source, and the
    reconstructions that the student's decoder, which is the teacher's, makes of both.

    Args:
        student, teacher: on `device`; in eval mode and frozen while this runs.

    Returns:
        `teacher_psnr`: of the teacher's reconstructions (dB); `psnr_to_teacher`: of the student's
        reconstructions to the teacher's; `latent_error_<c>`: root mean square of the difference in
        channel c, in standard deviations of the teacher's; `latent_correlation_<c>`: Pearson's; and
        `latent_error`, their mean, and `latent_correlation`, the least of them.
    """
    scores: dict[str, list[Tensor]] = {"teacher_psnr": [], "psnr_to_teacher": []}
    sums: Tensor | float = 0.0
    with frozen(student), frozen(teacher):
        for batch in evaluation_batches(source, resolution, batch_size, limit):
            images = as_float(batch.images.to(device))
            s, t = (ae.encode(images).mode() for ae in (student, teacher))  # (b, n_z, h, w)
            recon, theirs = (
                as_float(student.config.pixels.round(student.decode(z, images.shape[-2:])))
                for z in (s, t)
            )
            for name, pair in (("teacher_psnr", images), ("psnr_to_teacher", recon)):
                scores[name].append(psnr(pair, theirs).clamp(max=PSNR_CEILING).cpu())
            s, t = s.double(), t.double()
            moments = torch.stack([s, t, s * s, t * t, s * t, torch.ones_like(s)])
            sums = sums + moments.sum((1, 3, 4))  # (6, n_z)
    mean_s, mean_t, ss, tt, st, _ = torch.as_tensor(sums) / torch.as_tensor(sums)[-1]
    var_s, var_t, covariance = ss - mean_s**2, tt - mean_t**2, st - mean_s * mean_t
    # a channel that does not vary has no correlation
    error = ((ss - 2 * st + tt).clamp_min(0) / var_t.clamp_min(1e-12)).sqrt()
    correlation = covariance / (var_s * var_t).clamp_min(1e-24).sqrt()
    return {
        **{name: torch.cat(each).double().mean().item() for name, each in scores.items()},
        "latent_error": error.mean().item(),
        "latent_correlation": correlation.min().item(),
        **{f"latent_error_{c}": value for c, value in enumerate(error.tolist())},
        **{f"latent_correlation_{c}": value for c, value in enumerate(correlation.tolist())},
    }


EDGES = (0.0, 0.1, 0.3, 1.0, 3.0, inf)
"""Edges of the bands of σ: 18, 32, 34, 13 and 3 % of EDM's default training noise levels; 1, 10,
39, 36 and 14 % of a flow's; 9, 14, 27, 25 and 25 % of a flow's whose times are uniform."""


def band_names() -> dict[tuple[float, float], str]:
    """The bands (low, high) of σ, and their names in the metrics."""
    return {
        (low, high): f"loss_sigma_{low:g}_to_{high:g}" if high < inf else f"loss_sigma_over_{low:g}"
        for low, high in pairwise(EDGES)
    }


def band_losses(loss: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """Mean loss of each band of σ in a batch, NaN for a band without an image.

    Args:
        loss, sigma: loss and noise level of each image, (b,).
    """
    means = {}
    for (low, high), name in band_names().items():
        inside = (low <= sigma) & (sigma < high)
        # no indexing, which would make the host wait for the device
        means[name] = torch.where(inside, loss, 0).sum() / inside.sum()
    return means


def draw_bands(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Draw each band's loss over images seen, from the rows of a metrics.jsonl, as a PNG."""
    from ldm.charts import colour, drawing

    under = "Mean of λ(σ) ‖D(x; σ) − z‖² over the training images of each band of noise levels σ."
    with drawing(path, "Training loss by noise level", under, 3.4) as figure:
        axes = figure.subplots()
        for index, ((low, high), name) in enumerate(band_names().items()):
            points = [(row["images_seen"], row[name]) for row in rows if name in row]
            if points:
                label = f"σ ≥ {low:g}" if high == inf else f"{low:g} ≤ σ < {high:g}"
                axes.plot(*zip(*points, strict=True), label=label, color=colour(index))
        axes.set(xlabel="images seen", ylabel="loss", yscale="log")
        axes.grid(which="both")
        if axes.lines:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


@full_float32()
@torch.no_grad()
def reconstruction_sheet(
    autoencoder: Autoencoder, source: Source, resolution: Resolution, columns: int
) -> tuple[Tensor, int]:
    """Rows of originals, reconstructions and latents as RGB (Figures 2, 4) of the first images.

    Returns:
        The pictures (3·n, 3, H, W) in [−1, 1], on the CPU, and the number of columns n.
    """
    images = as_float(sheet_images(source, resolution, columns))
    images = images.to(next(autoencoder.parameters()).device)
    latents = autoencoder.encode(images).mode()
    recon = autoencoder.decode(latents).clamp(-1, 1)
    shown = nn.functional.interpolate(latents_as_rgb(latents), images.shape[-2:])
    return torch.cat([as_rgb(images), as_rgb(recon), shown]).cpu(), len(images)


def validation_lpips(recipe: AutoencoderRecipe, perceptual: Mapping[str, Any]) -> LPIPS | None:
    """LPIPS as papers report it (VGG-16): required if best.pt depends on it, else optional."""
    if "lpips" in perceptual and recipe.loss.lpips_network == "vgg":
        return perceptual["lpips"]
    if recipe.best_by == "lpips":
        return load_lpips(instead="choose best_by=psnr")
    return find_lpips() if shorter_side(recipe.phases[-1].resolution) >= SMALLEST["vgg"] else None
