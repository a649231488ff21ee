"""Write the report: pictures made by the runs' models, then their numbers, settings and curves."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoders.autoencoder import assemble
from autoencoders.loading import AutoencoderFile, read_autoencoder
from ldm.checkpoint import fingerprint
from ldm.data import DataConfig, open_source, sheet_images
from ldm.device import resolve_device
from ldm.errors import LdmError, UsageError, check_at_least
from ldm.images import latents_as_rgb, to_float, to_uint8
from ldm.logbook import console
from ldm.metrics import psnr
from ldm.run_folder import provenance
from pipelines.analysis.subjects import choose_data
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.report import page
from pipelines.report.records import STAGES, Record, read_records
from pipelines.report.sections import curves_section, numbers_section, settings_section

MODELS = {"autoencoder": "autoencoder", "diffusion": "diffusion model"}


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

    The page reports missing files, models and data instead of failing.

    Args:
        runs: PATH or NAME=PATH of run folders of either stage, or of folders of runs.
        images: number of held-out images to reconstruct, and of samples.
        seed, steps: seed and sampler steps of the samples.
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
    where = resolve_device(device)
    sections, counts = [], []
    for kind, stage in STAGES.items():
        own = [record for record in records if record.kind == kind]
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
        STAGES[record.kind],
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
    resolution: int | None,
    device: torch.device,
    suffix: str,
) -> str:
    """Return held-out images and their reconstructions, a group for each data set."""
    groups: dict[str, list[Record]] = defaultdict(list)
    configs: dict[str, DataConfig | None] = {}
    own = True
    for record in records:
        config = _choose_data(record, data)
        own = own and config == _choose_data(record, None)
        key = config.model_dump_json(exclude={"crop", "flip", "workers"}) if config else ""
        groups[key].append(record)
        configs.setdefault(key, config)
    text = (
        f"The first held-out images{', which training never saw,' if own else ''} and their "
        "reconstructions: the mean of each posterior, decoded. Scroll sideways for more images."
    )
    if not own:
        text += (
            " Some runs were trained on other data, which may include these images: `ldm eval-ae` "
            "checks this, this page does not."
        )
    parts = []
    for key, group in groups.items():
        side = resolution or max(record.resolution for record in group)
        try:
            row = _held_out(configs[key], side, count)
        except LdmError as error:
            why = f"The held-out images could not be read ({error})"
            for record in group:
                with suppress(LdmError):
                    _read(record)  # for the hash of the model
                parts.append(_training_picture(record, "recon", why))
            continue
        parts.append(_reconstructions(group, row, device))
    return page.section(f"Reconstructions{suffix}", text, *parts)


def _reconstructions(
    records: Sequence[Record], row: tuple[str, Tensor], device: torch.device
) -> str:
    originals, rows = row[1], [row]
    latents: list[tuple[str, Tensor]] = []
    missing: list[str] = []
    for record in records:
        with _falling_back(record, "recon", missing):
            recon, shown = _reconstruct(record, originals, device)
            each = psnr(originals, recon)
            caption = f"{record.title}: PSNR {each.mean().item():.2f} dB"
            caption += f" ({' · '.join(f'{value:.1f}' for value in each.tolist())})"
            if record.resolution != originals.shape[-1]:
                caption += f"; trained at up to {record.resolution}²"
            rows.append((page.Markup(caption), recon))
            latents.append((record.title, shown))
    if not latents:
        return "".join(missing)
    folded = page.folded("Latents: the first three channels as RGB", page.strips(latents))
    return "".join([page.strips(rows), folded, *missing])


def _choose_data(record: Record, requested: str | None) -> DataConfig | None:
    """Return the requested data, split as in the run's training, or by default its own data."""
    recipe = record.config if isinstance(record.config.get("data"), dict) else {}
    try:
        return choose_data({record.label: recipe}, requested)
    except LdmError:  # the settings are missing, or of another version
        return None if requested is None else DataConfig(source=requested)


def _held_out(config: DataConfig | None, resolution: int, count: int) -> tuple[str, Tensor]:
    """Return the first held-out images (n, 3, R, R) in [−1, 1], after their caption."""
    if config is None or not resolution:
        lacking = "data" if config is None else "resolution"
        raise LdmError(f"config.yaml does not record the {lacking}: use --{lacking}")
    source = open_source(config, "val", resolution)
    images = to_float(sheet_images(source, resolution, count))
    caption = f"Originals: {config.source}, {len(images)} held-out images at {resolution}²"
    return caption, images


@torch.no_grad()
def _reconstruct(record: Record, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return 8-bit reconstructions of images in [−1, 1], and latents as RGB of the same size."""
    autoencoder = assemble(_read(record), record.folder).to(device).eval()
    latents = autoencoder.encode(images.to(device)).mode()
    recon = autoencoder.decode(latents, images.shape[-2:])
    shown = F.interpolate(latents_as_rgb(latents), images.shape[-2:])
    return to_float(to_uint8(recon)).cpu(), shown.cpu()


def _read(record: Record) -> AutoencoderFile:
    """Read a run's ckpt.pt, and set the record's hash."""
    file = read_autoencoder(_checkpoint(record))
    record.sha256 = fingerprint(file.weights)
    return file


# ----------------------------------------------------------------------------------- samples
def _samples_section(
    records: Sequence[Record], count: int, seed: int, steps: int, device: torch.device, suffix: str
) -> str:
    """Return samples of the same seed from every diffusion model."""
    rows: list[tuple[str, Tensor]] = []
    missing: list[str] = []
    for record in records:
        with _falling_back(record, "samples", missing):
            folder = _checkpoint(record).parent
            pipe = LatentDiffusionPipeline.from_pretrained(folder, device, "fp32")
            record.sha256 = pipe.sha256
            console.print(f"sampling {count} images of {record.label}", markup=False)
            images = pipe(n=count, seed=seed, steps=steps)
            assert isinstance(images, Tensor)  # no other output was requested
            caption = f"{record.title}: {record.images_seen:,} images seen"
            rows.append((page.Markup(caption), images))
    text = (
        f"Images 0 to {count - 1} of seed {seed}, {steps} steps, in float32. Models with latents "
        "of one shape start from the same noise. Scroll sideways for more images."
    )
    return page.section(f"Samples{suffix}", text, page.strips(rows) if rows else "", *missing)


# ---------------------------------------------------------------------------- missing models
def _checkpoint(record: Record) -> Path:
    path = record.folder / "ckpt.pt"
    if not path.is_file():
        raise LdmError("there is no ckpt.pt")
    return path


@contextmanager
def _falling_back(record: Record, prefix: str, missing: list[str]) -> Iterator[None]:
    """Add a picture from training to `missing` if the model cannot be used."""
    try:
        yield
    except LdmError as error:
        why = f"The model could not be used ({error})"
        missing.append(_training_picture(record, prefix, why))


def _training_picture(record: Record, prefix: str, why: str) -> str:
    """Return the newest picture from training, and print and show why there is no better one."""
    console.print(f"note: {record.label}: {why}", markup=False)
    head = f"<p><b>{record.title}</b></p>"
    path = record.newest_picture(prefix)
    if path is None:
        return head + page.note(f"{why}, and there is no picture from training.")
    try:
        drawn = page.png(path, path.name)
    except OSError:
        return head + page.note(f"{why}, and the newest picture from training cannot be read.")
    seen = path.stem.rpartition("-")[2]
    at = f", at {int(seen):,} images seen" if seen.isdigit() else ""
    return head + page.note(f"{why}. This is the newest picture from training{at}.") + drawn
