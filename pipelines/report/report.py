"""The page about runs: settings, curves, pictures and numbers, one stage after the other."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ldm.device import resolve_device
from ldm.errors import UsageError, check_at_least
from ldm.run_folder import provenance
from pipelines.report import page
from pipelines.report.records import STAGES, Record, read_records
from pipelines.report.sections import (
    Looks,
    curves_section,
    numbers_section,
    reconstructions_section,
    samples_section,
    settings_section,
)


def write_report(
    runs: Sequence[str | Path],
    out: Path,
    images: int = 8,
    seed: int = 0,
    steps: int = 18,
    data: str | None = None,
    resolution: int | None = None,
    device: str = "auto",
) -> Path:
    """Write one self-contained HTML page about training runs, which are only read.

    The page reports what a run lacks: a model, metrics, its data.

    Args:
        runs: PATH or NAME=PATH of run folders of either stage, or of folders of runs.
        images: number of held-out images to reconstruct, and of samples.
        seed, steps: of the samples.
        data: `photos`, a folder, a zip or shards to reconstruct, instead of each run's own data.
        resolution: size of the reconstructed images in pixels; None: the highest of the runs.

    Returns:
        `out`.

    Raises:
        UsageError: no run, a number below one, or an `out` that is no .html file.
        LdmError: a path is no run, the device is missing, or `out` cannot be written.
    """
    check_at_least(1, images=images, steps=steps, resolution=resolution)
    if not runs:
        raise UsageError("no run to report on: pass one or several run folders")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}: must be an .html file, such as {out.with_suffix('.html')}")
    records = read_records(runs)
    looks = Looks(images, seed, steps, data, resolution, resolve_device(device))
    colours = {record.label: page.colour(i) for i, record in enumerate(records)}
    titles = {label: page.chip(colour, label) for label, colour in colours.items()}

    sections = []
    mixed = len({record.kind for record in records}) > 1
    for kind, stage in STAGES.items():
        own = [record for record in records if record.kind == kind]
        if not own:
            continue
        of = f", {stage}" if mixed else ""
        look = reconstructions_section if kind == "autoencoder" else samples_section
        sections += [
            look(own, titles, looks, of),
            numbers_section(own, titles, of),
            settings_section(own, [titles[record.label] for record in own], of),
            curves_section(own, colours, of),  # last, for it is long
        ]
    # last, when the models have been read and all notes are there
    overview = "".join(_card(record, titles[record.label]) for record in records)
    title = records[0].label if len(records) == 1 else f"{len(records)} runs side by side"
    return page.write_page(out, title, _lead(records), [overview, *sections, _imprint()])


def _imprint() -> str:
    made = provenance()
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return page.section(
        "This page", f"Written {made['created']} by {versions}, {made['platform']}.",
        page.commands([made["command"]]),
    )  # fmt: skip


def _lead(records: Sequence[Record]) -> str:
    counted = {stage: sum(r.kind == kind for r in records) for kind, stage in STAGES.items()}
    told = [f"{n} of {stage}" for stage, n in counted.items() if n]
    return f"Training runs: {', '.join(told)}." if len(records) > 1 else "A training run."


def _card(record: Record, title: page.Markup) -> str:
    """Return the card of a run: its state, its command, and what it lacks."""
    told = record.described
    state = "finished" if record.result is not None else "not finished"
    facts = [
        STAGES[record.kind],
        f"preset {told.get('preset', 'unknown')}",
        f"{state}, {record.images_seen:,} images seen",
        f"begun {str(told.get('created', 'unknown'))[:16].replace('T', ' ')}",
    ]
    if record.sha256:
        facts.append(f"model {record.sha256[:12]}")
    notes = "".join(page.note(text) for text in record.notes)
    command = escape(str(told.get("command", "")))
    return (
        f'<div class="card"><b>{title}</b><p class="dim">{escape(" · ".join(facts))}</p>'
        f"<p><code>{command}</code></p>{notes}</div>"
    )
