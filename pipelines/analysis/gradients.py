"""Ratio of adversarial and reconstruction gradients over training (Sadat et al. 2024, Figure 7).

gradients.png   the ratio of their norms, a line per run; next to it, times its weight
gradients.csv   a row per run and logged step

Figure 7 shows the "relative norm of the gradient of the adversarial loss compared to the
reconstruction loss" and does not say whether L_adv includes its weight λ_adv. It cannot: under
Equation 2 that ratio would be ½ at every step. The left panel therefore shows ‖∇L_adv‖ / ‖∇L_recon‖
at the decoder's last layer without the weight, the right panel with it: the force on the decoder.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldm.charts import DIM, colour, drawing
from ldm.errors import LdmError
from ldm.files import lock
from ldm.logbook import read_rows
from ldm.records import Count, checked, schema
from ldm.run_folder import newest_run, read_config
from pipelines.analysis.subjects import Analysis, analysis_folder, parse_models, write_csv

SMOOTH = 31  # rows in the running median, at most
MIXED = "rows of adaptive runs are means over steps, rows of constant runs are single steps"
_CONFIG = schema(adversarial=(schema(weighting=(str, "")), {}), batch_size=(Count | None, None))
RATIO = r"$\|\nabla L_\mathrm{adv}\| \,/\, \|\nabla L_\mathrm{recon}\|$"

Curve = tuple[str, dict[str, NDArray]]
"""The weighting of L_adv, "constant", "adaptive" or "?" if config.yaml does not record it, and the
columns of gradients.csv, with an entry per logged row."""


def analyze_gradients(runs: Sequence[str | Path] = (), out: Path | None = None) -> Analysis:
    """Read the ratios from the logs of stage-one runs, and draw them in one figure.

    A row of the log holds the mean of ‖∇L_recon‖ / ‖∇L_adv‖ over its steps (one step per row with a
    constant weight, all steps with an adaptive one); its inverse is shown.
    """
    paths = parse_models(runs or [newest_run("autoencoder", needs="metrics.jsonl")])
    paths = {name: p.parent if p.is_file() else p for name, p in paths.items()}
    curves = {name: read_curve(path) for name, path in paths.items()}
    rows, cells = [], []
    for name, (weighting, columns) in curves.items():
        values = (column.tolist() for column in columns.values())
        rows += [(name, weighting, *row) for row in zip(*values, strict=True)]
        ratio, weighted = columns["ratio"], columns["weighted_ratio"]
        percentiles = (f"{p:.3g}" for p in np.percentile(ratio, (5, 50, 95)))
        low, high = np.percentile(np.log10(ratio), (5, 95))
        last = (f"{high - low:.2f}", f"{np.median(weighted):.3g}")
        cells.append((name, weighting, str(len(ratio)), *percentiles, *last))
    header = ("run", "weighting", "images_seen", "step", "ratio", "weight", "weighted_ratio")
    folder = analysis_folder(out, next(iter(paths.values())))
    notes = ["decades: log₁₀ of the 95 % point over the 5 % point, a measure of instability"]
    mixed = {"constant", "adaptive"} <= {weighting for weighting, _ in curves.values()}
    if mixed:
        # means vary less than single steps, and would hide the instability
        notes.append(f"{MIXED}: compare decades of runs trained with run.log_every_steps=1")
    with lock(folder, wait=True):
        files = (folder / "gradients.png", write_csv(folder / "gradients.csv", header, rows))
        _draw(files[0], curves, mixed)
    return Analysis(
        "‖∇L_adv‖ / ‖∇L_recon‖ at the decoder's last layer",
        ("run", "weight", "rows", "5 %", "median", "95 %", "decades", "median × λ_adv"),
        cells,
        files,
        tuple(notes),
    )


def read_curve(folder: Path) -> Curve:
    """Read the ratios from a run's metrics.jsonl; without a batch size, steps are None."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise LdmError(f"{path} does not exist: pass the folder of a stage-one run")
    rows = [row for row in read_rows(path) if row.get("gradient_ratio", 0) > 0]
    if not rows:
        raise LdmError(
            f"{path} has no adversarial gradients: the run has no discriminator, or it has not "
            "started yet (adversarial.start)"
        )
    config = read_config(folder) or {}
    checked(_CONFIG, config, folder / "config.yaml")
    weighting = config.get("adversarial", {}).get("weighting", "?")
    images = np.array([row["images_seen"] for row in rows])
    batch_size = config.get("batch_size")
    steps = images // batch_size if batch_size else np.full(len(rows), None)
    ratio = 1 / np.array([row["gradient_ratio"] for row in rows])
    weight = np.array([row.get("adversarial_weight", np.nan) for row in rows])
    columns = {"images_seen": images, "step": steps, "ratio": ratio, "weight": weight}
    return weighting, columns | {"weighted_ratio": weight * ratio}


def running_median(values: np.ndarray, width: int) -> np.ndarray:
    """Return the median of the `width` (odd) values around each, fewer at the ends: (n,) → (n,)."""
    half = width // 2
    return np.array(
        [np.median(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]
    )


# ---------------------------------------------------------------------------------- showing
def _draw(path: Path, curves: dict[str, Curve], mixed: bool) -> None:
    by_steps = all(columns["step"][0] is not None for _, columns in curves.values())
    under = (
        "Norms of the gradients at the decoder's last layer. Thin: as logged; thick: running "
        "median. Above 1, the adversarial loss dominates the reconstruction loss."
    ) + (f" Note: {MIXED}." if mixed else "")
    title = "Adversarial against reconstruction gradients"
    names = [n if kind in n else f"{n} ({kind} weight)" for n, (kind, _) in curves.items()]
    with drawing(path, title, under, 4.1 + 0.1 * len(names)) as figure:
        panels = figure.subplots(1, 2, sharex=True)
        titles = ("without its weight (Figure 7)", r"with its weight $\lambda_\mathrm{adv}$")
        shown = ("ratio", "weighted_ratio")
        for axes, title, column in zip(panels, titles, shown, strict=True):
            for i, (_, columns) in enumerate(curves.values()):
                x, y = columns["step" if by_steps else "images_seen"], columns[column]
                dot = "o" if len(y) == 1 else None  # no line goes through one point
                smooth = running_median(y, min(SMOOTH, len(y) // 8 * 2 + 1))
                axes.plot(x, y, color=colour(i), linewidth=0.7, alpha=0.4)
                axes.plot(x, smooth, color=colour(i), linewidth=2, label=names[i], marker=dot)
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
