"""Reconstruction quality over resolutions (Sadat et al. 2024, Figures 5 and 8).

scale.png   rFID, PSNR, SSIM and LPIPS over the image size, a line per model
scale.csv   a row per model and resolution
scale.json  the same, with all settings of the evaluation

Images of a folder or archive are resized as a whole, as in the paper. The built-in photographs are
cropped instead: a larger size shows more of a photograph, not more detail.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from autoencoders.autoencoder import assemble
from autoencoders.pretrained import read_autoencoder
from ldm.charts import drawing, line_style
from ldm.config import read_resolution, short_size, shorter_side
from ldm.data import DataConfig, open_source
from ldm.data.dataset import PHOTOS
from ldm.data.loader import crop_heights, read_preparation
from ldm.data.sources import Split
from ldm.distributed import from_main, join_processes
from ldm.errors import LdmError
from ldm.files import lock
from pipelines.analysis.subjects import (
    Analysis,
    agree_on_data,
    analysis_folder,
    check_alike,
    parse_models,
    write_csv,
)
from pipelines.evaluate import evaluate_checkpoints
from pipelines.measuring.evaluation import Evaluation
from pipelines.measuring.statistics import MeasureOptions

RESOLUTIONS = (32, 64, 128, 256, 512)  # Sadat et al. 2024, Figures 5 and 8: 2⁵ … 2⁹
PANELS = {
    "rfid": ("rFID", "lower is better"),
    "psnr": ("PSNR, dB", "higher is better"),
    "ssim": ("SSIM", "higher is better"),
    "lpips": ("LPIPS", "lower is better"),
}


def analyze_scale(
    models: Sequence[str | Path] = (),
    data: str | None = None,
    resolutions: Sequence[int] | None = None,
    split: Split = "val",
    out: Path | None = None,
    **options: Any,
) -> Analysis | None:
    """Evaluate one or several models over resolutions, as in Figures 5 and 8.

    By default, `resolutions` are those of `RESOLUTIONS` that no image is smaller than. The other
    options are those of `evaluate_checkpoints`.
    """
    how = MeasureOptions(**options)
    ranks, _ = join_processes(str(how.device))
    paths = parse_models(models)
    recipes, configs = {}, {}
    for name, path in paths.items():
        found = read_autoencoder(path)
        recipes[name] = found.provenance.get("recipe") or {}
        configs[name] = assemble(found, path).config
    check_alike(configs)
    config = agree_on_data(recipes, data).of(next(iter(configs.values())))
    if resolutions is None:
        resolutions = from_main(ranks, lambda: _fitting(config, split, how.limit))
    sides = sorted(set(resolutions))
    folder = analysis_folder(out, next(iter(paths.values())))
    with ExitStack() as held:
        from_main(ranks, lambda: held.enter_context(lock(folder)))
        file = folder / "scale.json"
        each = evaluate_checkpoints([*paths.values()], config, split, sides, out=file, **options)
        if not ranks.is_main_process:
            return None
        return _summarise(paths, each, config, split, sides, file)


def _summarise(
    paths: Mapping[str, Path],
    found: Sequence[Evaluation],
    config: DataConfig,
    split: Split,
    sides: Sequence[int],
    file: Path,
) -> Analysis:
    # by path: a file with two names is measured once
    by_path = {(each.model, each.resolution): each for each in found}
    named = [(name, by_path[path, side]) for name, path in paths.items() for side in sides]
    measured = [n for n in PANELS if any(each.numbers[n] is not None for each in found)]
    header = ("model", "resolution", "images", *PANELS, "data")
    rows = [
        (name, e.resolution, e.count, *map(e.numbers.get, PANELS), f"{config.source}, {split}")
        for name, e in named
    ]
    table, picture = file.with_suffix(".csv"), file.with_suffix(".png")
    write_csv(table, header, rows)
    low, high = (pick(each.count for each in found) for pick in (min, max))
    many = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    what = f"{many} images of the {split} split of {config.source}"
    _draw(picture, named, measured, what)
    cells = []
    for name, each in named:
        values = [each.numbers[number] for number in measured]
        shown = ("–" if value is None else f"{value:.4g}" for value in values)
        cells.append((name, short_size(each.resolution), *shown))
    return Analysis(
        f"reconstructions over resolutions, {what}",
        ("model", "side", *(PANELS[number][0] for number in measured)),
        cells,
        (picture, table, file),
        tuple(_notes(found, config)),
    )


def _fitting(config: DataConfig, split: Split, limit: int | None) -> list[int]:
    """Return the `RESOLUTIONS` that no image is smaller than."""
    if config.source == PHOTOS:  # whose crops are enlarged where they are too small
        return list(RESOLUTIONS)
    prepared = read_preparation(config)
    if prepared is None:
        source = open_source(config, split, 1)
        count = min(len(source), limit or len(source))
        smallest = RESOLUTIONS[-1]
        for _, side in crop_heights(source, range(count), 1, count):  # the shorter sides
            smallest = min(smallest, side)
            if smallest < RESOLUTIONS[0]:
                break
    else:
        smallest = shorter_side(read_resolution(prepared["size"]))
    fitting = [side for side in RESOLUTIONS if side <= smallest]
    if not fitting:
        raise LdmError(
            f"{config.source}: an image has {smallest} pixels, below {RESOLUTIONS[0]}: "
            "use --resolutions"
        )
    return fitting


# ---------------------------------------------------------------------------------- showing
def _notes(found: Sequence[Evaluation], config: DataConfig) -> list[str]:
    notes = []
    if config.source == PHOTOS:
        notes.append(
            "the built-in photographs are cropped, not resized (crops that are too small are "
            "enlarged): use --data with a folder of large images for the paper's comparison"
        )
    for each in found:
        notes += [why for name, why in each.about["doubtful"].items() if name in PANELS]
        notes += each.about["notes"]
    return list(dict.fromkeys(notes))


def _draw(
    path: Path, named: Sequence[tuple[str, Evaluation]], measured: Sequence[str], what: str
) -> None:
    """Draw a panel per metric, two in a row."""
    under = f"{what}, reconstructed from the posteriors' modes."
    columns, rows = min(len(measured), 2), math.ceil(len(measured) / 2)
    sides = sorted({each.resolution for _, each in named})
    height = 3.0 * rows + 0.3
    with drawing(path, "Reconstruction quality over resolutions", under, height) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in panels[len(measured) :]:
            axes.set_visible(False)
        for axes, number in zip(panels, measured, strict=False):
            name, better = PANELS[number]
            for i, model in enumerate(dict.fromkeys(model for model, _ in named)):
                points = [
                    (each.resolution, each.numbers[number])
                    for label, each in named
                    if label == model and each.numbers[number] is not None
                ]
                axes.plot(*zip(*points, strict=True), label=model, **line_style(i))
            axes.set_xscale("log", base=2)
            axes.set_xticks(sides, [str(side) for side in sides])
            axes.minorticks_off()
            axes.set(title=f"{name} ({better})", xlabel="image size, pixels", ylabel=name)
            axes.grid()
        panels[0].legend()
