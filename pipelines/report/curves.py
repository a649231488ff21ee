"""The metrics of runs, overlaid: a chart for each."""

from collections.abc import Mapping, Sequence
from math import inf

from pipelines.report import page
from pipelines.report.records import Record
from pipelines.training.noise_bands import band_names

POINTS = 300
"""Of a line at most: more would not be seen, and make the page heavy."""

NAMES = {
    "val_psnr": "PSNR, held-out, dB",
    "val_ssim": "SSIM, held-out",
    "val_lpips": "LPIPS, held-out",
    "l1": "ℓ1",
    "l2": "ℓ2",
    "lpips": "LPIPS",
    "kl": "KL",
    "gradient_ratio": "gradient ratio, ‖∇rec‖ ÷ ‖∇adv‖",
    "lr": "learning rate",
    "skipped": "steps skipped, not finite",
} | {
    name: f"loss where σ ≥ {low:g}" if high == inf else f"loss where {low:g} ≤ σ < {high:g}"
    for (low, high), name in band_names().items()
}
NOTES = {
    "gradient_ratio": (
        "The reconstruction loss's gradient over the adversarial loss's, which bears no weight, at "
        "the decoder's last layer: Equation 2 of the paper without its ½. `ldm analyze gradients` "
        "draws the inverse."
    )
}
WATCHED = ("lr", "images_per_second", "resolution", "skipped")
"""How a run went, not what it learnt."""
NO_CURVE = ("images_seen", "val_count")
LINEAR = ("val_psnr", "val_ssim", *WATCHED)


def curves_section(records: Sequence[Record], colours: Mapping[str, str], of: str) -> str:
    """Charts over images seen of every metric that a run of one stage has, held-out ones first."""
    names = list(dict.fromkeys(name for r in records for row in r.rows for name in row))
    names = [name for name in names if name not in NO_CURVE]
    learnt = sorted(
        (name for name in names if name not in WATCHED), key=lambda name: not name.startswith("val")
    )
    drawn = [_chart(name, records, colours) for name in learnt]
    if not any(drawn):
        return ""
    watched = [_chart(name, records, colours) for name in WATCHED if name in names]
    text = "Over images seen, from each run's metrics.jsonl; a legend gives each line's last value."
    if any(len(record.rows) > POINTS for record in records):
        text += f" Long ones are averaged to {POINTS} points."
    folded = page.folded("speed, learning rate, steps skipped", page.charts(*watched))
    return page.section(f"Curves{of}", text, page.charts(*drawn), folded if any(watched) else "")


def _chart(name: str, records: Sequence[Record], colours: Mapping[str, str]) -> str:
    series = {}
    for record in records:
        points = [(row["images_seen"], row[name]) for row in record.rows if name in row]
        if points:
            series[record.label] = _thin(points)
    title = NAMES.get(name, name.replace("_", " "))
    log = name not in LINEAR and _spans_decades([y for line in series.values() for _, y in line])
    note = NOTES.get(name, "")
    if name.startswith("val"):
        note = _several_resolutions([record for record in records if record.label in series])
    return page.chart(title, series, "images seen", log, colours, note)


def _several_resolutions(records: Sequence[Record]) -> str:
    """At which resolution each run is validated, where it is not the same; "" where it is."""
    sides: dict[int, list[str]] = {}
    for record in records:
        sides.setdefault(record.resolution, []).append(record.label)
    if len(sides) < 2:
        return ""
    told = [
        f"{f'at {side}²' if side else 'at a resolution not known'}: {', '.join(labels)}"
        for side, labels in sorted(sides.items(), reverse=True)
    ]
    return f"Not to be compared between resolutions. Validated {'; '.join(told)}."


def _thin(points: page.Points) -> page.Points:
    """Means of neighbours, so that no more than `POINTS` are left; the last x is kept."""
    share = -(-len(points) // POINTS)
    parts = [points[i : i + share] for i in range(0, len(points), share)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _spans_decades(values: Sequence[float]) -> bool:
    """Whether they are all above 0, and so far apart that a logarithm shows more of them."""
    return bool(values) and min(values) > 0 and max(values) >= 10 * min(values)
