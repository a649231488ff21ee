"""The settings of runs side by side: those that differ, and all.

The metrics of runs, overlaid: a chart for each.

What has been measured of runs, and all that each number depends on.

What the models of runs make of the same held-out images, and of the same seeds.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from autoencoders.autoencoder import assemble
from autoencoders.loading import AutoencoderFile, read_autoencoder
from ldm.checkpoint import fingerprint
from ldm.config import Tree, flatten
from ldm.data import DataConfig, open_source, sheet_images
from ldm.errors import LdmError
from ldm.images import latents_as_rgb, to_float, to_uint8
from ldm.logbook import console
from ldm.metrics import psnr
from ldm.run_folder import IGNORED
from pipelines.analysis.subjects import choose_data
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.report import page
from pipelines.report.records import NAMES, Measurement, Record, measurements
from pipelines.validation import band_names

ABSENT = "–"


def settings_section(records: Sequence[Record], titles: Sequence[page.Markup], of: str) -> str:
    """A table of the settings that differ between runs of one stage, and, folded, of all."""
    flat = [flatten(record.config) for record in records]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    if not keys:
        return ""
    header = ["setting", *titles]

    def rows(chosen: Sequence[str]) -> list[list[str]]:
        return [
            [page.breakable(key), *(_setting(settings, key) for settings in flat)] for key in chosen
        ]

    differing = [key for key in keys if _differs(key, flat)]
    if len(records) == 1:
        text, table = "What it was trained with.", ""
    elif differing:
        text = "Those in which the runs differ. How they were watched and saved does not count."
        table = page.columns(header, rows(differing))
    else:
        text, table = "The runs have the same settings.", ""
    everything = page.folded(f"all {len(keys)} settings", page.columns(header, rows(keys)))
    return page.section(f"Settings{of}", text, table, everything)


def _differs(key: str, flat: Sequence[Tree]) -> bool:
    if key.rpartition(".")[2] in IGNORED:
        return False
    return any(_setting(settings, key) != _setting(flat[0], key) for settings in flat)


def _setting(settings: Tree, key: str) -> str:
    """A value as YAML has it on one line."""
    if key not in settings:
        return ABSENT
    value = settings[key]
    if isinstance(value, str):
        return value or "''"
    flow = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return flow.removesuffix("\n").removesuffix("...").strip()


POINTS = 300
"""Of a line at most: more would not be seen, and make the page heavy."""

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
    title = CURVE_NAMES.get(name, name.replace("_", " "))
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


class ReportColumn(NamedTuple):
    """How a number is shown."""

    title: str
    digits: int
    scale: float = 1.0


COLUMNS = {
    "rfid": ReportColumn("rFID", 3),
    "fid": ReportColumn("FID", 3),
    "kid": ReportColumn("KID ×10³", 3, 1e3),
    "lpips": ReportColumn("LPIPS", 4),
    "psnr": ReportColumn("PSNR, dB", 2),
    "ssim": ReportColumn("SSIM", 4),
    "precision": ReportColumn("precision", 3),
    "recall": ReportColumn("recall", 3),
    "swd": ReportColumn("SWD ×10³", 2),  # as it is in our files
    "loss": ReportColumn("loss", 4),
}
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def numbers_section(records: Sequence[Record], titles: Mapping[str, page.Markup], of: str) -> str:
    """A table of every measurement, what to mind, and folded, where each comes from."""
    found = [measured for record in records for measured in measurements(record)]
    names = [name for name in NAMES if any(name in each.numbers for each in found)]
    header = ["measured", *(COLUMNS[name].title for name in names)]
    rows = [
        [page.under(titles[each.record.label], each.what)] + [_cell(each, name) for name in names]
        for each in found
    ]
    table = page.columns(header, rows) if rows else page.note("Nothing has been measured yet.")
    text = (
        "What was measured, and when. Two rows may be compared where they are over the same "
        "images at the same resolution, by the same network: unfold where they come from."
    )
    origins = [page.folded(f"{r.label}: the run itself", page.table(_origin(r))) for r in records]
    origins += [
        page.folded(
            f"{each.record.label}: {each.what}",
            *(page.table(_about(path, tree)) for path, tree in each.sources),
        )
        for each in found
        if each.sources
    ]
    folded = page.folded("where they come from", *origins)
    return page.section(f"Numbers{of}", text, table, *_doubts(found), folded)


def _doubts(found: Sequence[Measurement]) -> list[str]:
    """What to mind, each sentence once, with the rows that it is said of."""
    concerned: dict[str, dict[str, list[str]]] = {}
    for each in found:
        for said in each.doubts:
            rows = concerned.setdefault(said, {})
            rows.setdefault(each.what, []).append(each.record.label)
    return [
        page.note(said, "; ".join(f"{', '.join(runs)}: {what}" for what, runs in rows.items()))
        for said, rows in concerned.items()
    ]


def _about(path: Path, tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All that a file says; how the model was trained is among the settings already."""
    rows, said = [("file", str(path))], {}
    for key, value in flatten(tree).items():
        if ".recipe." in key or value in (None, [], {}, ""):
            continue
        text = _text(value)
        first = said.setdefault(text, key)
        # a long sentence once, though it is said of several numbers
        rows.append((key, f"as {first}" if first != key and len(text) > 80 else text))
    return rows


def _origin(record: Record) -> list[tuple[str, str]]:
    """The command, the versions and the machine that made a run, and the model's hash."""
    rows = [("folder", str(record.folder))]
    rows += [(key, _text(value)) for key, value in flatten(record.described).items()]
    if record.sha256:
        rows.append(("ckpt.pt, SHA-256 of its weights", record.sha256))
    return rows


def _cell(measured: Measurement, name: str) -> str:
    if name not in measured.numbers:
        return ""
    digits, scale = COLUMNS[name].digits, COLUMNS[name].scale
    text = _number(scale * measured.numbers[name], digits)
    if name in measured.spread:
        text += (
            f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{_number(scale * measured.spread[name], digits)}"
        )
    return text


def _number(value: float, digits: int) -> str:
    """So many digits after the point; of more than seven before it, the power of ten."""
    plain = f"{value:.{digits}f}"
    if not math.isfinite(value) or len(plain.partition(".")[0].lstrip("-")) <= 7:
        return plain
    mantissa, _, power = f"{value:.2e}".partition("e+")
    return f"{mantissa}×10{str(int(power)).translate(SUPERSCRIPTS)}"


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


T = TypeVar("T")
UNUSABLE = "Its model could not be used"


@dataclass(frozen=True)
class Looks:
    """What a report shows of models.

    Attributes:
        images: how many held-out images, and how many samples.
        seed, steps: of the samples.
        data: in place of what each run was trained on.
        resolution: of reconstructions, in pixels, in place of the highest that runs ended at.
        device: where the models compute.
    """

    images: int
    seed: int
    steps: int
    data: str | None
    resolution: int | None
    device: torch.device


# -------------------------------------------------------------------------------- stage one
def reconstructions_section(
    records: Sequence[Record], titles: Mapping[str, page.Markup], looks: Looks, of: str
) -> str:
    """Held-out images and what each autoencoder makes of them; those of one data set together."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        data = _data(record, looks.data)
        key = "" if data is None else data.model_dump_json(exclude={"crop", "flip", "workers"})
        groups[key].append(record)
    parts = [_reconstructions(group, titles, looks) for group in groups.values()]
    # of other data, nobody has looked whether it is in the training's
    own = all(_data(record, looks.data) == _data(record, None) for record in records)
    text = (
        f"The first held-out images{', which training never saw,' if own else ''} and what each "
        "model makes of them: the decoder's answer to the posterior's mean. Scroll sideways for "
        "more; images keep their pixels."
    )
    if not own:
        text += (
            " Not all runs were trained on the rest of this data: whether one has seen these "
            "images elsewhere is not known here, `ldm eval-ae` looks."
        )
    return page.section(f"Reconstructions{of}", text, *parts)


def _reconstructions(
    records: Sequence[Record], titles: Mapping[str, page.Markup], looks: Looks
) -> str:
    config = _data(records[0], looks.data)
    resolution = looks.resolution or max(record.resolution for record in records)
    originals, why = _attempt(lambda: _held_out(config, resolution, looks.images))
    if originals is None:
        why = f"Its held-out images could not be read ({why})"
        for record in records:
            _attempt(lambda record=record: _read(record))  # for the model's hash
        return "".join(_own_picture(r, titles, "recon", why) for r in records)
    what = f"{config.source}, {len(originals)} held-out images at {resolution}²"
    rows: list[tuple[str, Tensor]] = [(f"originals: {what}", originals)]
    latents: list[tuple[str, Tensor]] = []
    missing = []
    for record in records:
        made, why = _attempt(lambda record=record: _reconstruct(record, originals, looks.device))
        if made is None:
            missing.append(_own_picture(record, titles, "recon", f"{UNUSABLE} ({why})"))
            continue
        recon, shown = made
        each = psnr(originals, recon)
        listed = " · ".join(f"{value:.1f}" for value in each.tolist())
        told = f"PSNR {each.mean().item():.2f} dB ({listed})"
        if record.resolution != resolution:
            told += f"; it was trained up to {record.resolution}²"
        title = titles[record.label]
        rows.append((page.Markup(f"{title}: {told}"), recon))
        latents.append((title, shown))
    if not latents:
        return "".join(missing)
    folded = page.folded("their latents: the first three channels as colours", page.strips(latents))
    return "".join([page.strips(rows), folded, *missing])


def _held_out(config: DataConfig | None, resolution: int, count: int) -> Tensor:
    """The first held-out images, (n, 3, R, R) in [−1, 1].

    Raises:
        LdmError: it is not known of which data or size, or they cannot be read.
    """
    if config is None or not resolution:
        lacking = "--data" if config is None else "--resolution"
        raise LdmError(f"its config.yaml does not say which they are: give {lacking}")
    return to_float(sheet_images(open_source(config, "val", resolution), resolution, count))


@torch.no_grad()
def _reconstruct(record: Record, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """8-bit reconstructions of images in [−1, 1], and their latents as RGB at the images' size."""
    autoencoder = assemble(_read(record), record.folder).to(device).eval()
    latents = autoencoder.encode(images.to(device)).mode()
    recon = autoencoder.decode(latents, images.shape[-2:])
    shown = F.interpolate(latents_as_rgb(latents), images.shape[-2:])
    return to_float(to_uint8(recon)).cpu(), shown.cpu()


def _read(record: Record) -> AutoencoderFile:
    """A run's ckpt.pt; the record is told which weights they are."""
    path = record.folder / "ckpt.pt"
    if not path.is_file():
        raise LdmError("there is no ckpt.pt")
    file = read_autoencoder(path)
    record.sha256 = fingerprint(file.weights)
    return file


# -------------------------------------------------------------------------------- stage two
def samples_section(
    records: Sequence[Record], titles: Mapping[str, page.Markup], looks: Looks, of: str
) -> str:
    """Samples of the same seed of every model of stage two."""
    rows: list[tuple[str, Tensor]] = []
    missing = []
    for record in records:
        made, why = _attempt(lambda record=record: _sample(record, looks))
        if made is None:
            missing.append(_own_picture(record, titles, "samples", f"{UNUSABLE} ({why})"))
        else:
            told = f"{record.images_seen:,} images seen"
            rows.append((page.Markup(f"{titles[record.label]}: {told}"), made))
    text = (
        f"Images 0 to {looks.images - 1} of seed {looks.seed}, {looks.steps} steps, in float32: "
        "models of the same latents begin with the same noise. Scroll sideways for more."
    )
    return page.section(
        f"Samples{of}", text, page.strips(rows) if rows else "", *missing
    )  # fmt: skip


def _sample(record: Record, looks: Looks) -> Tensor:
    if not (record.folder / "ckpt.pt").is_file():
        raise LdmError("there is no ckpt.pt")
    pipe = LatentDiffusionPipeline.from_pretrained(record.folder, looks.device, "fp32")
    record.sha256 = pipe.sha256
    console.print(f"sampling {looks.images} images of {record.label}", markup=False)
    return pipe(n=looks.images, seed=looks.seed, steps=looks.steps)


# ------------------------------------------------------------------------- what is not there
def _data(record: Record, asked: str | None) -> DataConfig | None:
    """What a run's held-out images are of, its own data as its training split it; None where
    nothing is asked for and its settings do not say."""
    told = record.config if isinstance(record.config.get("data"), dict) else {}
    try:
        return choose_data({record.label: told}, asked)
    except LdmError:  # they do not, or are of another version
        return None if asked is None else DataConfig(source=asked)


def _attempt(make: Callable[[], T]) -> tuple[T | None, str]:
    """What could be made; or None, and the line that says why not."""
    try:
        return make(), ""
    except LdmError as error:
        return None, str(error)


def _own_picture(record: Record, titles: Mapping[str, page.Markup], prefix: str, why: str) -> str:
    """What a run has drawn of itself, where its model cannot be asked, and why it cannot, which a
    person is told at once, too."""
    console.print(f"note: {record.label}: {why}", markup=False)
    path = record.newest_picture(prefix)
    head = f"<p><b>{titles[record.label]}</b></p>"
    if path is None:
        return head + page.note(f"{why}, and it has drawn no picture yet.")
    drawn = _embed(path)
    if drawn is None:
        return head + page.note(f"{why}, and its newest picture cannot be read.")
    seen = path.stem.rpartition("-")[2]
    told = f"{why}; this is the newest picture that the run drew itself"
    told += f", at {int(seen):,} images seen." if seen.isdigit() else "."
    return head + page.note(told) + drawn


def _embed(path: Path) -> str | None:
    try:
        return page.png(path, path.name)
    except OSError:
        return None
