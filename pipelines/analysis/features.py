"""Balance of a decoder's feature maps (Sadat et al. 2024, Figure 3).

features.png   magnitude of each level's features over positions, a row per model and image
features.csv   per model, image and level: how far the strongest positions stand out

The paper shows maps of "the final block" without saying how their many channels are drawn. We show
their magnitude, the root mean square over channels, divided by its mean over the map: a balanced
map is 1 everywhere.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.colors import LogNorm
from torch import Tensor

from autoencoders import Autoencoder
from ldm.charts import WIDTH, bare, drawing, name_rows, show_image
from ldm.data import sheet_images
from ldm.device import memory_format
from ldm.errors import LdmError, check_at_least
from ldm.images import to_float
from pipelines.analysis.subjects import (
    Analysis,
    Cell,
    SharedImages,
    Subject,
    analysis_folder,
    write_csv,
)

NORMS = {"group": "GroupNorm", "smc": "SMC"}
TOP = 0.01  # fraction of the positions that count as the strongest
RANGE = (0.25, 8.0)  # range of the colour scale, in means of the map


class Imbalance(NamedTuple):
    """Unevenness of a map of magnitudes; a flat map has 1 and 1 %."""

    peak: float
    """Largest magnitude over the mean."""
    top_energy: float
    """Fraction of the squared magnitudes in the strongest 1 % of the positions (at least one)."""


def analyze_features(
    subjects: Sequence[Subject], images: SharedImages, count: int = 2, out: Path | None = None
) -> Analysis | None:
    """Decode the posteriors' modes of the first `count` images, and measure the feature maps."""
    check_at_least(1, images=count)
    if not images.ranks.is_main_process:
        return None
    pixels = sheet_images(images.source, images.resolution, count).to(images.device)
    shown = to_float(pixels.contiguous(memory_format=memory_format(images.device)))
    maps = {}
    for s in subjects:
        maps[s.name] = decoder_magnitudes(s.autoencoder, shown)
        if not all(level.isfinite().all() for level in maps[s.name]):
            raise LdmError(f"{s.path}: features of the decoder are not finite: use another model")
    norms = {s.name: s.autoencoder.config.decoder.norm for s in subjects}
    what = f"the first {'image' if len(shown) == 1 else f'{len(shown)} images'} of {images.what}"

    rows: list[tuple[Cell, ...]] = []
    cells: list[tuple[str, ...]] = []
    for name, levels in maps.items():
        for number, level in enumerate(levels, 1):
            size, uneven = level.shape[1:], [imbalance(m) for m in level]
            for image, (m, measured) in enumerate(zip(level, uneven, strict=True)):
                rms = m.square().mean().sqrt().item()
                rows.append((name, norms[name], image, number, *size, *measured, rms))
            peak, energy = (sum(values) / len(level) for values in zip(*uneven, strict=True))
            shape = f"{size[0]}×{size[1]}"
            row = (name, NORMS[norms[name]], str(number), shape, f"{peak:.2f}", f"{energy:.2%}")
            cells.append(row)
    header = ("model", "norm", "image", "level", "height", "width", "peak_over_mean",
              "top_1_percent_energy", "rms")  # fmt: skip
    folder = analysis_folder(out, subjects[0].path)
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
    """Return the magnitudes of the features after each level: root mean squares over channels.

    Args:
        images: (B, 3, H, W) in [−1, 1], on the autoencoder's device.

    Returns:
        One tensor (B, h, w) per level, the coarsest first; float32 on the CPU.
    """
    magnitudes: dict[int, list[Tensor]] = defaultdict(list)

    def record(index: int, features: Tensor) -> None:
        # at once: the features are large, and later operations may overwrite them
        magnitudes[index].append(features.float().square().mean(1).sqrt().cpu())

    handles = [
        level.register_forward_hook(lambda _module, _in, out, i=i: record(i, out))
        for i, level in enumerate(autoencoder.decoder.levels)
    ]
    try:
        autoencoder.decode(autoencoder.encode(images).mode())
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for _, parts in sorted(magnitudes.items())]


def imbalance(magnitudes: Tensor) -> Imbalance:
    """Measure the unevenness of a map of magnitudes (h, w)."""
    energy = magnitudes.double().square().flatten()
    top = energy.topk(max(1, round(TOP * len(energy)))).values
    mean, total = magnitudes.double().mean().item(), energy.sum().item()
    tiny = torch.finfo(torch.float64).tiny  # a map of zeros has no peak
    return Imbalance(magnitudes.max().item() / max(mean, tiny), top.sum().item() / max(total, tiny))


# ---------------------------------------------------------------------------------- showing
def _draw(
    path: Path, images: Tensor, maps: dict[str, list[Tensor]], norms: dict[str, str], what: str
) -> None:
    """Draw a row per image and model: the image, then the magnitudes of each level."""
    depths = {len(levels) for levels in maps.values()}
    columns, rows = 1 + max(depths), len(images) * len(maps)
    # models with different downsampling have different sizes at the same level
    sizes = [
        {f"{m[i].shape[-2]}×{m[i].shape[-1]}" for m in maps.values() if i < len(m)}
        for i in range(max(depths))
    ]
    under = (
        f"{what}. Magnitude of the features after each level: root mean square over channels, "
        "divided by its mean; a balanced map has one colour. Below each map: its peak over its "
        "mean, and the energy in its strongest 1 % of positions."
    )
    cell = (WIDTH - 1.5) / columns - 0.12
    below = 0.47 if all(len(size) == 1 for size in sizes) else 0.61
    height = rows * (cell + below) + 0.45
    norm = LogNorm(*RANGE)
    with drawing(path, "Magnitudes of the decoder's feature maps", under, height) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for row, (image, name) in enumerate((i, n) for i in range(len(images)) for n in maps):
            show_image(grid[row, 0], images[image])
            for axes in grid[row, 1:]:
                bare(axes)
            for level, of_images in enumerate(maps[name]):
                m = of_images[image]
                uneven = imbalance(m)
                shown = grid[row, 1 + level].imshow(
                    (m / m.mean()).numpy(), cmap="magma", norm=norm, interpolation="nearest"
                )
                size = f"{m.shape[0]}×{m.shape[1]}\n" if len(sizes[level]) > 1 else ""
                grid[row, 1 + level].set_xlabel(
                    f"{size}peak {uneven.peak:.1f}×\ntop 1 %: {100 * uneven.top_energy:.1f} %",
                    fontsize=8.5,
                )
        grid[0, 0].set_title("image")
        for level, common_sizes in enumerate(sizes, 1):
            last = ", the last" if depths == {level} else ""
            common = f"\n{min(common_sizes)}" if len(common_sizes) == 1 else ""
            grid[0, level].set_title(f"level {level}{last}{common}")
        labels = [
            name if NORMS[norm].lower() in name.lower() else f"{name}\n{NORMS[norm]}"
            for name, norm in norms.items()
        ]
        name_rows(grid[:, 0], labels * len(images), cell)
        bar = figure.colorbar(shown, ax=grid, shrink=min(1, 3 / height), aspect=18, extend="both")
        bar.set_label("÷ mean of the map")
        bar.set_ticks([0.25, 0.5, 1, 2, 4, 8], labels=["¼", "½", "1", "2", "4", "8"])
        bar.ax.minorticks_off()
