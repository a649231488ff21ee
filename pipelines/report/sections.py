"""The sections of a report about a run's files: settings, curves and numbers.

Each function takes the runs of one stage and a suffix for its heading.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ldm.config import Tree, flatten
from ldm.run_folder import IGNORED
from pipelines.report import page
from pipelines.report.records import NUMBERS, Measurement, Record, measurements
from pipelines.validation import band_names

POINTS = 300
"""Largest number of points of a line: more are not visible, and make the page heavy."""
CURVE_NAMES = {
    "val_psnr": "PSNR, held-out, dB",
    "val_ssim": "SSIM, held-out",
    "val_lpips": "LPIPS, held-out",
    "l1": "ℓ1",
    "l2": "ℓ2",
    "lpips": "LPIPS",
    "kl": "KL",
    "gradient_ratio": "gradient ratio, ‖∇rec‖ ÷ ‖∇adv‖",
    "lr": "learning rate",
    "skipped": "skipped steps (not finite)",
} | {
    name: f"loss where σ ≥ {low:g}" if math.isinf(high) else f"loss where {low:g} ≤ σ < {high:g}"
    for (low, high), name in band_names().items()
}
GRADIENT_RATIO = (
    "Norm of the reconstruction loss's gradient over that of the unweighted adversarial loss, at "
    "the decoder's last layer: Equation 2 of the paper without its ½. `ldm analyze gradients` "
    "draws the inverse."
)
PROGRESS = ("lr", "images_per_second", "resolution", "skipped")
"""Metrics of the run itself, not of the model."""
LINEAR = ("val_psnr", "val_ssim", *PROGRESS)
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


# ---------------------------------------------------------------------------------- settings
def settings_section(records: Sequence[Record], suffix: str = "") -> str:
    """Return a table of the settings that differ, and a folded one of all settings."""
    flat = [flatten(record.config) for record in records]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    if not keys:
        return ""
    header = ["setting", *(record.title for record in records)]
    rows = {key: [_setting(settings, key) for settings in flat] for key in keys}

    def table(chosen: Sequence[str]) -> str:
        return page.columns(header, [[page.breakable(key), *rows[key]] for key in chosen])

    differing = [
        key for key in keys if len(set(rows[key])) > 1 and key.rpartition(".")[2] not in IGNORED
    ]
    if len(records) == 1:
        text = "The resolved settings of the run."
    elif differing:
        text = "Settings that differ between the runs, apart from those for logging and saving."
    else:
        text = "All runs have the same settings."
    everything = page.folded(f"All {len(keys)} settings", table(keys))
    return page.section(
        f"Settings{suffix}", text, table(differing) if differing else "", everything
    )


def _setting(settings: Tree, key: str) -> str:
    """Return a value as YAML on one line."""
    if key not in settings:
        return "–"
    value = settings[key]
    if isinstance(value, str):
        return value or "''"
    flow = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return flow.removesuffix("\n").removesuffix("...").strip()


# ------------------------------------------------------------------------------------ curves
def curves_section(records: Sequence[Record], suffix: str = "") -> str:
    """Return a chart over images seen for every metric, held-out metrics first."""
    found = dict.fromkeys(name for r in records for row in r.rows for name in row)
    names = [name for name in found if name not in ("images_seen", "val_count", *PROGRESS)]
    held_out_first = sorted(names, key=lambda name: not name.startswith("val"))
    drawn = [_chart(name, records) for name in held_out_first]
    if not any(drawn):
        return ""
    progress = page.charts(*(_chart(name, records) for name in PROGRESS))
    text = "Metrics over images seen, from metrics.jsonl. Legends show the last values."
    if any(len(record.rows) > POINTS for record in records):
        text += f" Longer curves are averaged to {POINTS} points."
    folded = page.folded("Speed, learning rate, skipped steps", progress)
    return page.section(f"Curves{suffix}", text, page.charts(*drawn), folded if progress else "")


def _chart(name: str, records: Sequence[Record]) -> str:
    series, colours = {}, {}
    for record in records:
        points = [(row["images_seen"], row[name]) for row in record.rows if name in row]
        if points:
            series[record.label] = _thin(points)
        colours[record.label] = record.colour
    values = [y for line in series.values() for _, y in line]
    # logarithmic if all values are positive and span at least a decade
    log = name not in LINEAR and min(values, default=0) > 0 and max(values) >= 10 * min(values)
    note = GRADIENT_RATIO if name == "gradient_ratio" else ""
    if name.startswith("val"):
        note = _resolutions([record for record in records if record.label in series])
    title = CURVE_NAMES.get(name, name.replace("_", " "))
    return page.chart(title, series, "images seen", log, colours, note)


def _resolutions(records: Sequence[Record]) -> str:
    """Return a note on the resolutions at which runs were validated, if they differ."""
    sides: dict[int, list[str]] = {}
    for record in records:
        sides.setdefault(record.resolution, []).append(record.label)
    if len(sides) < 2:
        return ""
    each = [
        f"{f'at {side}²' if side else 'at an unknown resolution'}: {', '.join(labels)}"
        for side, labels in sorted(sides.items(), reverse=True)
    ]
    return f"Not comparable between resolutions. Validated {'; '.join(each)}."


def _thin(points: page.Points) -> page.Points:
    """Average neighbours until at most `POINTS` are left; the last x is kept."""
    share = -(-len(points) // POINTS)
    parts = [points[i : i + share] for i in range(0, len(points), share)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


# ----------------------------------------------------------------------------------- numbers
def numbers_section(records: Sequence[Record], suffix: str = "") -> str:
    """Return a table of every measurement, caveats, and the folded contents of the files."""
    found = [measured for record in records for measured in measurements(record)]
    names = [name for name in NUMBERS if any(name in each.numbers for each in found)]
    header = ["measurement", *(NUMBERS[name][0] for name in names)]
    rows = [
        [page.under(each.record.title, each.what), *(_cell(each, name) for name in names)]
        for each in found
    ]
    table = page.columns(header, rows) if rows else page.note("Nothing has been measured yet.")
    text = (
        "All measurements of the runs. Compare two rows only if they use the same images, "
        "resolution and feature extractor; the sources below record all of these."
    )
    sources = [page.folded(f"{r.label}: training run", page.table(_origin(r))) for r in records]
    sources += [
        page.folded(
            f"{each.record.label}: {each.what}",
            *(page.table(_contents(path, tree)) for path, tree in each.sources),
        )
        for each in found
        if each.sources
    ]
    return page.section(
        f"Numbers{suffix}", text, table, *_caveats(found), page.folded("Sources", *sources)
    )


def _caveats(found: Sequence[Measurement]) -> list[str]:
    """Return each caveat once, with the rows that it applies to."""
    rows: dict[str, dict[str, list[str]]] = {}
    for each in found:
        for text in each.doubts:
            rows.setdefault(text, {}).setdefault(each.what, []).append(each.record.label)
    return [
        page.note(text, "; ".join(f"{', '.join(runs)}: {what}" for what, runs in concerned.items()))
        for text, concerned in rows.items()
    ]


def _contents(path: Path, tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the contents of a result file, without the recipe, which is among the settings."""
    rows = [("file", str(path))]
    keys: dict[str, str] = {}
    for key, value in flatten(tree).items():
        if ".recipe." in key or value in (None, [], {}, ""):
            continue
        text = _text(value)
        first = keys.setdefault(text, key)
        # a long sentence is shown once, even if several numbers share it
        rows.append((key, f"same as {first}" if first != key and len(text) > 80 else text))
    return rows


def _origin(record: Record) -> list[tuple[str, str]]:
    origin = {"folder": str(record.folder), **flatten(record.described)}
    if record.sha256:
        origin["SHA-256 of the weights in ckpt.pt"] = record.sha256
    return [(key, _text(value)) for key, value in origin.items()]


def _cell(measured: Measurement, name: str) -> str:
    if name not in measured.numbers:
        return ""
    _, digits, scale = NUMBERS[name]
    values = [numbers[name] for numbers in (measured.numbers, measured.spread) if name in numbers]
    return "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}".join(_number(scale * v, digits) for v in values)


def _number(value: float, digits: int) -> str:
    """Format with a fixed number of decimals, or as a power of ten above seven integer digits."""
    plain = f"{value:.{digits}f}"
    if not math.isfinite(value) or len(plain.partition(".")[0].lstrip("-")) <= 7:
        return plain
    mantissa, _, power = f"{value:.2e}".partition("e+")
    return f"{mantissa}×10{str(int(power)).translate(SUPERSCRIPTS)}"


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
