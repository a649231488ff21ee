"""Write the report: pictures made by the runs' models, then their numbers, settings and curves."""

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoders import AutoencoderConfig
from autoencoders.autoencoder import assemble
from autoencoders.pretrained import read_autoencoder
from ldm.checkpoint import fingerprint
from ldm.config import (
    Resolution,
    Tree,
    flatten,
    pixel_count,
    read_resolution,
    short_size,
    to_flow,
    validate,
)
from ldm.data import DataConfig, open_source, sheet_images
from ldm.data.loader import choose_data
from ldm.device import resolve_device
from ldm.errors import LdmError, UsageError, check_at_least, try_call
from ldm.files import check_writable
from ldm.images import as_float, latents_as_rgb
from ldm.logbook import console
from ldm.metrics import psnr
from ldm.run_folder import IGNORED, provenance
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.report import page
from pipelines.report.records import STAGES, Record, numbers_section, read_records
from pipelines.validation import band_names

MODELS = {"autoencoder": "autoencoder", "diffusion": "diffusion model"}
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
    "data_wait": "share of the time spent waiting for data",
    "mfu": "model FLOPs utilisation",
} | {
    name: f"loss where σ ≥ {low:g}" if math.isinf(high) else f"loss where {low:g} ≤ σ < {high:g}"
    for (low, high), name in band_names().items()
}
GRADIENT_RATIO = (
    "Norm of the reconstruction loss's gradient over that of the unweighted adversarial loss, at "
    "the decoder's last layer: Equation 2 of the paper without its ½. `ldm analyze gradients` "
    "draws the inverse."
)
PROGRESS = (
    "lr", "images_per_second", "data_wait", "mfu", "resolution", "height", "width", "skipped",
)  # fmt: skip
"""Metrics of the run itself, not of the model."""
LINEAR = ("val_psnr", "val_ssim", *PROGRESS)


def write_report(
    runs: Sequence[str | Path],
    out: Path,
    images: int = 8,
    seed: int = 0,
    steps: int = 18,
    data: str | None = None,
    resolution: Resolution | None = None,
    device: str = "auto",
) -> Path:
    """Write one self-contained HTML page about training runs, which are only read.

    The page reports missing files, models and data instead of failing. By default it shows
    each run's own held-out images, at the highest resolution of the runs.
    """
    check_at_least(1, images=images, steps=steps, resolution=resolution)
    if not runs:
        raise UsageError("no run to report on: pass one or several run folders")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}: must be an .html file, such as {out.with_suffix('.html')}")
    check_writable(out)
    records = read_records(runs)
    where = resolve_device(device)
    sections, counts = [], []
    for kind, stage in STAGES.items():
        own = [record for record in records if record.described["kind"] == kind]
        if not own:
            continue
        counts.append(f"{len(own)} {MODELS[kind]}{'s' * (len(own) > 1)} ({stage})")
        suffix = f", {stage}" if len(own) < len(records) else ""
        if kind == "autoencoder":
            sections.append(_reconstructions_section(own, images, data, resolution, where, suffix))
        else:
            sections.append(_samples_section(own, images, seed, steps, where, suffix))
        # the curves take most room
        sections += [f(own, suffix) for f in (numbers_section, settings_section, curves_section)]
    cards = "".join(map(_card, records))  # after the sections, which read the models and add notes
    made = provenance()
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    imprint = page.section(
        "This page", f"Written {made['created']} by {versions}, {made['platform']}.",
        page.commands([made["command"]]),
    )  # fmt: skip
    title = records[0].label if len(records) == 1 else f"{len(records)} runs side by side"
    return page.write_page(out, title, f"{', '.join(counts)}.", [cards, *sections, imprint])


def _card(record: Record) -> str:
    """Return the card of a run: its state, its command, and its notes."""
    described = record.described
    state = "finished" if record.result is not None else "not finished"
    facts = [
        STAGES[described["kind"]],
        f"preset {described.get('preset', 'unknown')}",
        f"{state}, {record.images_seen:,} images seen",
        f"started {str(described.get('created', 'unknown'))[:16].replace('T', ' ')}",
    ]
    if record.sha256:
        facts.append(f"weights {record.sha256[:12]}")
    command = escape(str(described.get("command", "")))
    return (
        f'<div class="card"><b>{record.title}</b><p class="dim">{escape(" · ".join(facts))}</p>'
        f"<p><code>{command}</code></p>{''.join(map(page.note, record.notes))}</div>"
    )


# --------------------------------------------------------------------------- reconstructions
def _reconstructions_section(
    records: Sequence[Record],
    count: int,
    data: str | None,
    resolution: Resolution | None,
    device: torch.device,
    suffix: str,
) -> str:
    """Return held-out images and their reconstructions, a group for each data set."""
    groups: dict[str, tuple[DataConfig | None, list[Record]]] = {}
    own = True
    for record in records:
        trained_on = _training_data(record)
        config = choose_data(data, trained_on)
        own = own and config == trained_on
        key = (
            config.model_dump_json(exclude={"crop", "flip", "workers", "cache_gb"})
            if config
            else ""
        )
        groups.setdefault(key, (config, []))[1].append(record)
    text = (
        f"The first held-out images{', which training never saw,' if own else ''} and their "
        "reconstructions: the mean of each posterior, decoded. Scroll sideways for more images."
    )
    if not own:
        text += (
            " Some runs were trained on other data, which may include these images: `ldm eval-ae` "
            "checks this, this page does not."
        )
    parts = (_reconstructions(*group, resolution, count, device) for group in groups.values())
    return page.section(f"Reconstructions{suffix}", text, *parts)


def _training_data(record: Record) -> DataConfig | None:
    data = record.config.get("data")
    config = try_call(validate, DataConfig, data) if isinstance(data, dict) else None
    return config if isinstance(config, DataConfig) else None  # of another version


def _reconstructions(
    config: DataConfig | None,
    records: Sequence[Record],
    resolution: Resolution | None,
    count: int,
    device: torch.device,
) -> str:
    """Return the first held-out images of a data set, their reconstructions, and their latents."""
    size = resolution or max((r.resolution for r in records), key=pixel_count)
    latents: list[tuple[str, Tensor]] = []
    opened: list[DataConfig] = []

    def load() -> tuple[str, Tensor]:
        if config is None or not size:
            lacking = "data" if config is None else "resolution"
            raise LdmError(f"config.yaml does not record the {lacking}: use --{lacking}")
        files = (try_call(read_autoencoder, record.folder) for record in records)
        first = next((file for file in files if not isinstance(file, LdmError)), None)
        data = config.of(validate(AutoencoderConfig, first.tree)) if first else config
        opened.append(data)
        images = as_float(sheet_images(open_source(data, "val", size), size, count))
        what = f"{len(images)} held-out images at {short_size(size)}"
        return f"Originals: {config.source}, {what}", images

    row = try_call(load)  # once for all runs, a failure too

    @torch.no_grad()
    def reconstruct(record: Record) -> tuple[str, Tensor]:
        file = read_autoencoder(record.folder)
        record.sha256 = fingerprint(file.weights)
        origin = file.provenance.get("imported")
        record.origin = origin if isinstance(origin, dict) else {}
        if isinstance(row, LdmError):
            raise LdmError(f"the held-out images could not be read: {row}")
        _, originals = row
        autoencoder = assemble(file, record.folder).to(device).eval()
        if config is not None and config.of(autoencoder.config) not in opened:
            raise LdmError(
                "its images have other channels, or another range of pixels, than the originals of "
                "the runs beside it: report it by itself"
            )
        z = autoencoder.encode(originals.to(device)).mode()
        recon = autoencoder.decode(z, originals.shape[-2:])
        recon = as_float(autoencoder.config.pixels.round(recon)).cpu()
        shown = F.interpolate(latents_as_rgb(z), originals.shape[-2:])
        latents.append((record.title, shown.cpu()))
        each = psnr(originals, recon)
        caption = f"PSNR {each.mean().item():.2f} dB"
        caption += f" ({' · '.join(f'{value:.1f}' for value in each.tolist())})"
        if record.resolution != read_resolution(originals.shape[-2:]):
            caption += f"; trained at up to {short_size(record.resolution)}"
        return caption, recon

    rows, missing = _pictures(records, "recon", reconstruct)
    if not rows or isinstance(row, LdmError):
        return "".join(missing)
    folded = page.folded("Latents: the first three channels as RGB", page.strips(latents))
    return "".join([page.strips([row, *rows]), folded, *missing])


# ----------------------------------------------------------------------------------- samples
def _samples_section(
    records: Sequence[Record], count: int, seed: int, steps: int, device: torch.device, suffix: str
) -> str:
    """Return samples of the same seed from every diffusion model."""

    def sample(record: Record) -> tuple[str, Tensor]:
        pipe = LatentDiffusionPipeline.from_pretrained(record.folder, device, "fp32")
        record.sha256 = pipe.sha256
        console.print(f"sampling {count} images of {record.label}", markup=False)
        images = pipe(n=count, seed=seed, steps=steps)
        assert isinstance(images, Tensor)  # no other output was requested
        return f"{record.images_seen:,} images seen", images

    rows, missing = _pictures(records, "samples", sample)
    text = (
        f"Images 0 to {count - 1} of seed {seed}, {steps} steps, in float32. Models with latents "
        "of one shape start from the same noise. Scroll sideways for more images."
    )
    return page.section(f"Samples{suffix}", text, page.strips(rows) if rows else "", *missing)


# ---------------------------------------------------------------------------- missing models
def _pictures(
    records: Sequence[Record], prefix: str, draw: Callable[[Record], tuple[str, Tensor]]
) -> tuple[list[tuple[str, Tensor]], list[str]]:
    """Return captions and images of each run's model, or pictures from training."""
    rows: list[tuple[str, Tensor]] = []
    missing = []
    for record in records:
        try:
            caption, images = draw(record)
        except LdmError as error:
            missing.append(_training_picture(record, prefix, error))
        else:
            rows.append((page.Markup(f"{record.title}: {caption}"), images))
    return rows, missing


def _training_picture(record: Record, prefix: str, error: LdmError) -> str:
    """Return the newest picture from training, and why there is no better one."""
    why = f"Could not draw the model's pictures ({error})"
    console.print(f"note: {record.label}: {why}", markup=False)
    head = f"<p><b>{record.title}</b></p>"
    found = sorted((record.folder / "pictures").glob(f"{prefix}-*.png"))  # by images seen
    if not found:
        return head + page.note(f"{why}, and there is no picture from training.")
    try:
        drawn = page.png(found[-1])
    except OSError:
        return head + page.note(f"{why}, and the newest picture from training cannot be read.")
    seen = found[-1].stem.rpartition("-")[2]
    at = f", at {int(seen):,} images seen" if seen.isdigit() else ""
    return head + page.note(f"{why}. This is the newest picture from training{at}.") + drawn


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
        return page.table([[page.breakable(key), *rows[key]] for key in chosen], header)

    differing = [
        key
        for key in keys
        if len(set(rows[key])) > 1 and IGNORED.isdisjoint([key, key.rpartition(".")[2]])
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
    value = settings.get(key, "–")
    return to_flow(value) if not isinstance(value, str) else value or "''"


# ------------------------------------------------------------------------------------ curves
def curves_section(records: Sequence[Record], suffix: str = "") -> str:
    """Return a chart over images seen for every metric, held-out metrics first."""
    found = dict.fromkeys(name for r in records for row in r.rows for name in row)
    names = [name for name in found if name not in ("images_seen", "val_count", *PROGRESS)]
    names.sort(key=lambda name: not name.startswith("val"))
    drawn = [_chart(name, records) for name in names]
    if not any(drawn):
        return ""
    progress = page.charts(*(_chart(name, records) for name in PROGRESS))
    text = "Metrics over images seen, from metrics.jsonl. Legends show the last values."
    if any(len(record.rows) > POINTS for record in records):
        text += f" Longer curves are averaged to {POINTS} points."
    folded = page.folded("Speed, learning rate, skipped steps", progress)
    return page.section(f"Curves{suffix}", text, page.charts(*drawn), folded if progress else "")


def _chart(name: str, records: Sequence[Record]) -> str:
    series = {
        r.label: _thin([(row["images_seen"], row[name]) for row in r.rows if name in row])
        for r in records
    }
    colours = {record.label: record.colour for record in records}
    values = [y for line in series.values() for _, y in line]
    # logarithmic if all values are positive and span at least a decade
    log = name not in LINEAR and min(values, default=0) > 0 and max(values) >= 10 * min(values)
    note = GRADIENT_RATIO if name == "gradient_ratio" else ""
    if name.startswith("val"):
        note = _resolutions([record for record in records if series[record.label]])
    title = CURVE_NAMES.get(name, name.replace("_", " "))
    return page.chart(title, series, "images seen", log, colours, note)


def _resolutions(records: Sequence[Record]) -> str:
    """Return a note on the resolutions at which runs were validated, if they differ."""
    sizes: dict[Resolution, list[str]] = {}
    for record in records:
        sizes.setdefault(record.resolution, []).append(record.label)
    if len(sizes) < 2:
        return ""

    def largest(of: tuple[Resolution, list[str]]) -> tuple[int, list[str]]:
        return pixel_count(of[0]), of[1]

    each = [
        f"{f'at {short_size(s)}' if s else 'at an unknown resolution'}: {', '.join(labels)}"
        for s, labels in sorted(sizes.items(), key=largest, reverse=True)
    ]
    return f"Not comparable between resolutions. Validated {'; '.join(each)}."


def _thin(points: page.Points) -> page.Points:
    """Average neighbours until at most `POINTS` are left; the last x is kept."""
    share = max(1, -(-len(points) // POINTS))
    parts = [points[i : i + share] for i in range(0, len(points), share)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]
