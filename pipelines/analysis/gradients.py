"""The adversarial gradient against the reconstruction's (Sadat et al. 2024, Figure 7).

gradients.png   the ratio of their norms over training, a line a run; beside it with its weight
gradients.csv   a row for every run and logged step

Figure 7 shows the "relative norm of the gradient of the adversarial loss compared to the
reconstruction loss" and leaves open whether L_adv bears its weight λ_adv. It cannot: under
Equation 2 that ratio would be ½ at every step. Shown is therefore ‖∇L_adv‖ / ‖∇L_recon‖ at the
decoder's last layer without it, and, to its right, with it: what the decoder was pulled by.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm.charts import DIM, colour, drawing
from ldm.errors import LdmError
from ldm.logbook import read_rows
from ldm.run_folder import newest_run, read_config
from pipelines.analysis.subjects import Analysis, analysis_folder, parse_models, write_csv

SMOOTH = 31  # at most so many rows around one make its running median
PERCENTILES = (5, 50, 95)
MIXED = "a row of an adaptive run is a mean over its steps, of a constant one it is a single step"
RATIO = r"$\|\nabla L_\mathrm{adv}\| \,/\, \|\nabla L_\mathrm{recon}\|$"


class Curve(NamedTuple):
    """A run's ratios; every array has an entry for each logged row."""

    weighting: str
    """"constant" or "adaptive", or "?" where config.yaml does not say."""
    images: np.ndarray
    """Seen by then."""
    steps: np.ndarray | None
    """Of training by then, as many as batches; None where the batch size is not known."""
    ratio: np.ndarray
    """‖∇L_adv‖ / ‖∇L_recon‖, L_adv without its weight."""
    weight: np.ndarray
    """λ_adv, its ramp included."""


def analyze_gradients(runs: Sequence[str | Path] = (), out: Path | None = None) -> Analysis:
    """Read the ratios of runs of stage one from their logs, and draw them over one another.

    A row of the log holds the mean of ‖∇L_recon‖ / ‖∇L_adv‖ over its steps (with a constant weight
    one step in each row is measured, with an adaptive one all); the ratio is one over that.

    Args:
        runs: PATH or NAME=PATH of run folders, each; none: the newest run.
        out: folder of the files; None: `analysis/` in the first run.

    Raises:
        UsageError: two runs are given one name.
        LdmError: a folder has no log, or nothing in it of the adversarial gradient.
    """
    paths = parse_models(runs or [newest_run("autoencoder", needs="metrics.jsonl")])
    paths = {name: p.parent if p.is_file() else p for name, p in paths.items()}
    curves = {name: read_curve(path) for name, path in paths.items()}
    folder = analysis_folder(out, next(iter(paths.values())))
    header = ("run", "weighting", "images_seen", "step", "ratio", "weight", "weighted_ratio")
    rows = [
        (name, c.weighting, int(images), None if c.steps is None else int(c.steps[i]),
         float(c.ratio[i]), float(c.weight[i]), float(c.weight[i] * c.ratio[i]))
        for name, c in curves.items()
        for i, images in enumerate(c.images)
    ]  # fmt: skip
    table = write_csv(folder / "gradients.csv", header, rows)
    picture = folder / "gradients.png"
    _draw(picture, curves)
    return Analysis(
        "‖∇L_adv‖ / ‖∇L_recon‖ at the decoder's last layer",
        ("run", "weight", "rows", "5 %", "median", "95 %", "decades", "median × λ_adv"),
        [
            (name, c.weighting, str(len(c.ratio)),
             *(f"{p:.3g}" for p in np.percentile(c.ratio, PERCENTILES)),
             f"{spread(c.ratio):.2f}", f"{np.median(c.weight * c.ratio):.3g}")
            for name, c in curves.items()
        ],
        (picture, table),
        (
            "decades: log₁₀ of the 95 % over the 5 % point, how unsteady the ratio was",
            # a mean is steadier than what it is of, and would hide what Figure 7 is about
            *([f"{MIXED}: compare decades of runs trained with run.log_every_steps=1"]
              if _mixed(curves) else []),
        ),
    )  # fmt: skip


def read_curve(folder: Path) -> Curve:
    """The ratios in a run's metrics.jsonl.

    Raises:
        LdmError: as `analyze_gradients`.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise LdmError(f"{path} is not there: give the folder of a run of stage one")
    rows = [row for row in read_rows(path) if row.get("gradient_ratio", 0) > 0]
    if not rows:
        raise LdmError(
            f"{path} says nothing of the adversarial gradient: the run has no discriminator, or "
            "has not come to it yet (adversarial.start)"
        )
    config = read_config(folder) or {}
    adversarial = config.get("adversarial") or {}
    images = np.array([row["images_seen"] for row in rows])
    batch = config.get("batch_size")
    recon_over_adversarial = np.array([row["gradient_ratio"] for row in rows])
    return Curve(
        adversarial.get("weighting", "?"),
        images,
        images // batch if batch else None,
        1 / recon_over_adversarial,
        np.array([row.get("adversarial_weight", np.nan) for row in rows]),
    )


def spread(ratio: np.ndarray) -> float:
    """Powers of ten between the 5 % and the 95 % point of positive numbers (n,)."""
    low, high = np.percentile(np.log10(ratio), [5, 95])
    return float(high - low)


def running_median(values: np.ndarray, width: int) -> np.ndarray:
    """The median of the `width` values around each (odd; fewer at the ends): (n,) → (n,)."""
    half = width // 2
    return np.array(
        [np.median(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]
    )


def _mixed(curves: dict[str, Curve]) -> bool:
    """Whether rows that are means stand beside rows that are not."""
    return {"constant", "adaptive"} <= {c.weighting for c in curves.values()}


# ---------------------------------------------------------------------------------- showing
def _draw(path: Path, curves: dict[str, Curve]) -> None:
    by_steps = all(c.steps is not None for c in curves.values())
    under = (
        "Norms of gradients at the decoder's last layer. Thin: as logged; thick: running median. "
        "Above 1 the adversarial loss pulls harder than the reconstruction."
    ) + (f" Not alike: {MIXED}." if _mixed(curves) else "")
    title = "How hard the adversarial loss pulls, against the reconstruction"
    names = [n if c.weighting in n else f"{n} ({c.weighting} weight)" for n, c in curves.items()]
    with drawing(path, title, under, 4.1 + 0.1 * len(names)) as figure:
        panels = figure.subplots(1, 2, sharex=True)
        titles = ("without its weight (Figure 7)", r"with its weight $\lambda_\mathrm{adv}$")
        for axes, title, weighted in zip(panels, titles, (False, True), strict=True):
            for i, c in enumerate(curves.values()):
                x = c.steps if by_steps else c.images
                y = c.ratio * c.weight if weighted else c.ratio
                width = min(SMOOTH, len(y) // 8 * 2 + 1)
                dot = "o" if len(y) == 1 else None  # no line goes through one point
                axes.plot(x, y, color=colour(i), linewidth=0.7, alpha=0.4)
                axes.plot(
                    x, running_median(y, width), color=colour(i), linewidth=2, label=names[i],
                    marker=dot,
                )  # fmt: skip
            axes.axhline(1, color=DIM, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.set(
                yscale="log", title=title, xlabel="training steps" if by_steps else "images seen"
            )
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.locator_params(axis="x", nbins=5)
            axes.grid(which="major")
        panels[0].set_ylabel(RATIO)
        panels[1].set_ylabel(rf"$\lambda_\mathrm{{adv}}$ {RATIO}")
        lines = [line for line in panels[0].lines if line.get_label() in names]
        figure.legend(handles=lines, loc="outside lower center", ncols=2)
