"""Balance of a decoder's feature maps (Sadat et al. 2024, Figure 3).

features.png   magnitude of each level's features over positions, a row per model and image
features.csv   per model, image and level: how far the strongest positions stand out

The paper shows maps of "the final block" without saying how their many channels are drawn. We show
their magnitude, the root mean square over channels, divided by its mean over the map: a balanced
map is 1 everywhere.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import LogNorm
from torch import Tensor, nn

from autoencoders import Autoencoder
from autoencoders.sdvae import SDVAEDecoder
from ldm.charts import WIDTH, drawing, picture_rows, show_image
from ldm.data import sheet_images
from ldm.device import full_float32, memory_format
from ldm.errors import LdmError, check_at_least
from ldm.files import lock
from ldm.images import as_float
from pipelines.analysis.subjects import Analysis, SharedImages, Subject, analysis_folder, write_csv

NORMS = {"group": "GroupNorm", "smc": "SMC"}
TOP = 0.01  # fraction of the positions that count as the strongest
RANGE = (0.25, 8.0)  # range of the colour scale, in means of the map


@full_float32()
def analyze_features(
    subjects: Sequence[Subject], images: SharedImages, count: int = 2, out: Path | None = None
) -> Analysis | None:
    """Decode the posteriors' modes of the first `count` images, and measure the feature maps."""
    check_at_least(1, images=count)
    if not images.ranks.is_main_process:
        return None
    folder = analysis_folder(out, subjects[0].path)
    pixels = sheet_images(images.source, images.resolution, count).to(images.device)
    shown = as_float(pixels.contiguous(memory_format=memory_format(images.device)))
    what = f"the first {'image' if len(shown) == 1 else f'{len(shown)} images'} of {images.what}"
    maps, norms = {}, {}
    rows: list[tuple[Any, ...]] = []
    cells: list[tuple[str, ...]] = []
    for name, path, autoencoder in subjects:
        if not isinstance(autoencoder.decoder, SDVAEDecoder):
            raise LdmError(f"{path}: its decoder is one of diffusers, whose levels are unknown")
        norm = norms[name] = autoencoder.config.decoder.norm
        maps[name] = decoder_magnitudes(autoencoder, shown)
        for number, level in enumerate(maps[name], 1):
            if not level.isfinite().all():
                raise LdmError(f"{path}: features of the decoder are not finite: use another model")
            height, width = level.shape[1:]
            uneven = [imbalance(m) for m in level]
            for image, (m, measured) in enumerate(zip(level, uneven, strict=True)):
                rms = m.square().mean().sqrt().item()
                rows.append((name, norm, image, number, height, width, *measured, rms))
            peak, energy = (sum(values) / len(level) for values in zip(*uneven, strict=True))
            shape = f"{height}×{width}"
            cells.append((name, NORMS[norm], str(number), shape, f"{peak:.2f}", f"{energy:.2%}"))
    header = ("model", "norm", "image", "level", "height", "width", "peak_over_mean",
              "top_1_percent_energy", "rms")  # fmt: skip
    with lock(folder, wait=True):
        files = (folder / "features.png", write_csv(folder / "features.csv", header, rows))
        _draw(files[0], shown, maps, norms, what)
    return Analysis(
        f"feature maps of the decoder, mean over {what}",
        ("model", "norm", "level", "map", "peak / mean", "energy in top 1 %"),
        cells,
        files,
    )


# --------------------------------------------------------------------------------- measuring
@torch.no_grad()
def decoder_magnitudes(autoencoder: Autoencoder, images: Tensor) -> list[Tensor]:
    """Return root mean squares over channels of the features after each level, the coarsest first.

    Images (B, 3, H, W) in [−1, 1] give float32 (B, h, w) on the CPU.
    """
    magnitudes: list[list[Tensor]] = [[] for _ in autoencoder.decoder.levels]

    def record(index: int, _level: nn.Module, _inputs: tuple[Tensor, ...], out: Tensor) -> None:
        # at once: the features are large, and later operations may overwrite them
        magnitudes[index].append(out.float().square().mean(1).sqrt().cpu())

    with ExitStack() as hooks:
        for index, level in enumerate(autoencoder.decoder.levels):
            hooks.enter_context(level.register_forward_hook(partial(record, index)))
        autoencoder.decode(autoencoder.encode(images).mode())
    return [torch.cat(batches) for batches in magnitudes]


def imbalance(magnitudes: Tensor) -> tuple[float, float]:
    """Return the largest of the magnitudes (h, w) over their mean, and the energy of the strongest.

    The energy is the fraction of the squared magnitudes in the strongest 1 % of the positions (at
    least one). A flat map has 1 and 1 %.
    """
    energy = magnitudes.double().square().flatten()
    top = energy.topk(max(1, round(TOP * len(energy)))).values
    mean, total = magnitudes.double().mean().item(), energy.sum().item()
    tiny = torch.finfo(torch.float64).tiny  # a map of zeros has no peak
    return magnitudes.max().item() / max(mean, tiny), top.sum().item() / max(total, tiny)


# ---------------------------------------------------------------------------------- showing
def _draw(
    path: Path, images: Tensor, maps: dict[str, list[Tensor]], norms: dict[str, str], what: str
) -> None:
    """Draw a row per image and model: the image, then the magnitudes of each level."""
    depths = {len(levels) for levels in maps.values()}
    # models with different downsampling have different sizes at the same level
    sizes = [
        {f"{m[i].shape[-2]}×{m[i].shape[-1]}" for m in maps.values() if i < len(m)}
        for i in range(max(depths))
    ]
    titles = ["image"]
    for number, size in enumerate(sizes, 1):
        last = ", the last" if depths == {number} else ""
        titles.append(f"level {number}{last}" + (f"\n{min(size)}" if len(size) == 1 else ""))
    labels = [
        name if NORMS[norm].lower() in name.lower() else f"{name}\n{NORMS[norm]}"
        for name, norm in norms.items()
    ]
    under = (
        f"{what}. Magnitude of the features after each level: root mean square over channels, "
        "divided by its mean; a balanced map has one colour. Below each map: its peak over its "
        "mean, and the energy in its strongest 1 % of positions."
    )
    cell = (WIDTH - 1.5) / len(titles) - 0.12
    space = 0.47 if all(len(size) == 1 for size in sizes) else 0.61
    height = len(images) * len(maps) * (cell + space) + 0.45
    norm = LogNorm(*RANGE)
    with drawing(path, "Magnitudes of the decoder's feature maps", under, height) as figure:
        grid = picture_rows(figure, labels, len(images), titles, cell)
        for image, of_models in enumerate(grid):
            for row, levels in zip(of_models, maps.values(), strict=True):
                show_image(row[0], images[image])
                for axes, level, size in zip(row[1:], levels, sizes, strict=False):
                    m = level[image]
                    shown = axes.imshow(
                        (m / m.mean()).numpy(), cmap="magma", norm=norm, interpolation="nearest"
                    )
                    peak, energy = imbalance(m)
                    own = f"{m.shape[0]}×{m.shape[1]}\n" if len(size) > 1 else ""
                    below = f"{own}peak {peak:.1f}×\ntop 1 %: {100 * energy:.1f} %"
                    axes.set_xlabel(below, fontsize=8.5)
        bar = figure.colorbar(shown, ax=grid, shrink=min(1, 3 / height), aspect=18, extend="both")
        bar.set_label("÷ mean of the map")
        bar.set_ticks([0.25, 0.5, 1, 2, 4, 8], labels=["¼", "½", "1", "2", "4", "8"])
        bar.ax.minorticks_off()
