"""Evaluations of autoencoders: the jobs, their results on disk, and the table of results.

`plan_jobs` refuses whatever can be refused before anything is measured: models that are no
autoencoder, data that is missing, sizes that do not fit, held-out images that were trained on.

<run>/eval/<data>-<split>-<resolution>.json   the numbers, and all they depend on
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray

from autoencoders import AutoencoderConfig
from autoencoders.autoencoder import assemble
from autoencoders.pretrained import read_autoencoder
from ldm.checkpoint import fingerprint
from ldm.config import (
    Resolution,
    height_width,
    plain_size,
    read_resolution,
    short_size,
    shorter_side,
    size_word,
    validate,
)
from ldm.data import DataConfig, Source, open_source
from ldm.data.dataset import PHOTOS
from ldm.data.loader import choose_data, is_same, name_data
from ldm.data.sources import Part, Split
from ldm.distributed import fail_together, from_main
from ldm.errors import LdmError, UsageError, try_call
from ldm.files import to_json
from ldm.images import Hashes, find_shared
from ldm.seeds import generator
from ldm.tables import latex_table, markdown_table, text_table
from pipelines.measuring import statistics
from pipelines.measuring.statistics import CentreCrops, MeasureOptions, accumulate

# ---------------------------------------------------------------------------------------- jobs
SMALLEST = 16  # pixels: LPIPS halves images four times, and SSIM's window has 11


@dataclass(frozen=True)
class EvaluationJob:
    """One autoencoder, to be measured at one resolution.

    Attributes:
        about_model: the model's entry in the result: path, hash, format, training.
        seen: `held_out` (None: not known whether the model was trained on these images), a `note`
            for the user, and the `overlap` where both sides were compared.
    """

    model: Path
    about_model: dict[str, Any]
    trained_on: DataConfig | None
    data: DataConfig
    split: Split
    resolution: Resolution
    source: Source
    seen: dict[str, Any]


def plan_jobs(
    models: Sequence[Path],
    data: str | DataConfig | None,
    split: Split,
    resolutions: Sequence[Resolution] | None,
    how: MeasureOptions,
    ranks: PartialState,
) -> list[EvaluationJob]:
    """Plan to measure every model at every resolution, in this order.

    Data and resolution default to those of each model's training, and data that a model was trained
    on is split as in training. Images to be measured as held out that were trained on are refused,
    unless forced.
    """
    jobs: list[EvaluationJob] = []
    open_once = cache(open_source)
    with fail_together(ranks):
        for path in models:
            config, about = _read(path)
            recipe = about["trained"].get("recipe") or {}
            own = validate(DataConfig, recipe["data"]) if "data" in recipe else None
            own = own and own.of(config)
            chosen = choose_data(data, own)
            phases = recipe.get("phases")
            sizes = resolutions or ([read_resolution(phases[-1]["resolution"])] if phases else [])
            if chosen is None or not sizes:
                option = "--data" if chosen is None else "--resolution"
                raise UsageError(f"{path} does not name its training data: give {option}")
            chosen = chosen.of(config)
            for size in dict.fromkeys(sizes):
                _check_resolution(path, config, size)
                source = open_once(chosen, split, size)
                jobs.append(EvaluationJob(path, about, own, chosen, split, size, source, {}))
    overlap = cache(partial(try_call, find_overlap, ranks=ranks, limit=how.limit))
    return [replace(job, seen=_compare(job, overlap, how)) for job in jobs]


def _read(path: Path) -> tuple[AutoencoderConfig, dict[str, Any]]:
    """A model's config, and its entry in the result; its weights are not kept in memory."""
    file = read_autoencoder(path)
    names = ("images_seen", "recipe", "imported")
    return assemble(file, path).config, {
        "path": str(path),
        "sha256": fingerprint(file.weights),
        "format": file.format,
        "trained": {name: file.provenance[name] for name in names if name in file.provenance},
    }


def _check_resolution(path: Path, config: AutoencoderConfig, resolution: Resolution) -> None:
    f, given = config.encoder.downsampling, f"--resolution {size_word(resolution)}"
    least = max(SMALLEST, f)
    if shorter_side(resolution) < least:
        raise LdmError(f"{given}: {path} needs {least} or more")
    height, width = height_width(resolution)
    try:
        config.check_size((height + -height % f, width + -width % f))
    except LdmError as error:
        raise LdmError(f"{given}: {path} cannot take it: {error}") from error


def _compare(
    job: EvaluationJob, overlap_of: Callable[..., dict[str, Any] | LdmError], how: MeasureOptions
) -> dict[str, Any]:
    """Find out whether a job's images were trained on.

    The images themselves are compared where they should be held out: those of "val", and all images
    of other data than the model's own. A model that does not name its training data is taken to
    have been trained on the training split of the same data.
    """

    def seen(held_out: bool | None, note: str | None = None, overlap: Any = None) -> dict[str, Any]:
        return {"held_out": held_out, "note": note, "overlap": overlap}

    if is_same(job.trained_on, job.data.source) and job.split in ("train", "all"):
        return seen(False, f"{job.model} was trained on these images, or some of them")
    against = job.trained_on or (job.data if job.split == "val" else None)
    if job.split == "train" or against is None:
        return seen(None)
    if PHOTOS in (against.source, job.data.source):
        # no file is one of the photographs, and their right thirds are never trained on
        return seen(True)
    overlap = overlap_of(job.source, against, job.resolution, workers=job.data.workers)
    if isinstance(overlap, LdmError):
        return seen(None, f"not known whether {job.model} was trained on these images: {overlap}")
    note = None
    if overlap["shared"]:
        note = (
            f"{overlap['shared']:,} of {overlap['held_out']:,} images of {job.data.source}, "
            f"{job.split}, are also training images of {against.source}, such as "
            f"{overlap['example']}"
        )
        how.refuse([f"{note}: measure other images"])
    return seen(not overlap["shared"], note, overlap | {"against": against.source})


# ------------------------------------------------------------------------- held-out images
COMPARED = 10_000
"""Images of either side that are compared at most, drawn at random from more: that takes a minute
or so, and finds some of a split that lies wholly among the training images."""
BATCH = 64


def find_overlap(
    held_out: Source,
    trained_on: DataConfig,
    resolution: Resolution,
    ranks: PartialState,
    limit: int | None = None,
    workers: int = 0,
) -> dict[str, Any]:
    """Count the held-out images, among the first `limit`, that are training images.

    Hashes of their pixels are compared, cropped as for measuring. A copy under another name, or in
    another container or lossless format, is found; one that was compressed again is not. The
    processes share the work, and all return the result.
    """
    with fail_together(ranks):
        train = open_source(trained_on, "train", resolution)
    total = min(len(held_out), limit or len(held_out))
    chosen = _draw(held_out, total)

    def hashes(part: Part, what: str) -> Hashes:
        images = CentreCrops(part, resolution, what, len(part))
        batch_size = BATCH * ranks.num_processes
        found = accumulate(images, ranks, batch_size=batch_size, workers=workers, swd_images=0)
        return found.hashes

    ours, theirs = hashes(chosen, "held out"), hashes(_draw(train, len(train)), "trained on")

    def compare() -> dict[str, Any]:
        found = find_shared(ours, theirs)
        return {
            "shared": len(found),
            "example": chosen.name(found[0]) if found else None,
            "held_out": len(ours),  # images compared
            "held_out_of": total,  # images there are
            "train": len(theirs),
            "train_of": len(train),
        }

    return from_main(ranks, compare)


def _draw(source: Source, total: int) -> Part:
    """At most `COMPARED` of a source's first `total` images."""
    drawn = generator(0, "overlap", total).permutation(total)[:COMPARED]
    return Part(source, np.sort(drawn))


# ------------------------------------------------------------------------------------- results
FORMAT = 1


class EvaluationNumber(NamedTuple):
    """A number's title, and its format in the table; the arrow points to better."""

    title: str
    arrow: str
    digits: int
    scale: float = 1.0


NUMBERS = {
    "rfid": EvaluationNumber("rFID", "↓", 2),
    "lpips": EvaluationNumber("LPIPS", "↓", 3),
    "psnr": EvaluationNumber("PSNR", "↑", 2),
    "ssim": EvaluationNumber("SSIM", "↑", 3),
    "kid": EvaluationNumber("KID", "×10³ ↓", 2, 1e3),
    "precision": EvaluationNumber("precision", "↑", 3),
    "recall": EvaluationNumber("recall", "↑", 3),
    "swd": EvaluationNumber("SWD", "×10³ ↓", 2),
}
"""The numbers by name, those of the paper first, in its order."""


@dataclass(frozen=True)
class Evaluation:
    """One autoencoder's reconstructions, measured over one split at one resolution.

    Attributes:
        numbers: each of `NUMBERS`; None where it could not be measured. PSNR is in dB; SWD is
            ×10³, as in its paper, and KID is not.
        about: all that the numbers depend on. `missing` and `doubtful` give the reason by the
            number's name; `notes` are about all numbers.
        each: the numbers of every image, as `Scores.in_order` returns them; not in the JSON.
    """

    model: Path
    resolution: Resolution
    count: int
    numbers: dict[str, float | None]
    about: dict[str, Any]
    path: Path
    each: dict[str, NDArray] = field(default_factory=dict)

    def to_tree(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "format": FORMAT,
            "resolution": plain_size(self.resolution),
            "count": self.count,
            "numbers": self.numbers,
            **self.about,
        }


def default_paths(jobs: Sequence[EvaluationJob], *settings: str) -> list[Path]:
    """Return the default file of each evaluation of one call; no two may share one."""
    paths = [default_path(job, *settings) for job in jobs]
    taken: dict[Path, EvaluationJob] = {}
    for job, path in zip(jobs, paths, strict=True):
        other = taken.setdefault(path.resolve(), job)
        if other is not job:
            raise UsageError(
                f"{other.model} and {job.model} would both be written to {path}: omit one of "
                "them, or give --out one file for all"
            )
    return paths


def default_path(job: EvaluationJob, *settings: str) -> Path:
    """Return the default file of an evaluation, beside its model: `eval/photos-val-64.json`."""
    model = job.model
    words = [name_data(job.data.source), job.split, size_word(job.resolution), *settings]
    # best.pt lies beside ckpt.pt, and one of another format may beside either
    which = model.stem if model.suffix == ".pt" else model.name
    if model.is_file() and which != "ckpt":
        words.insert(0, which)
    folder = model if model.is_dir() else model.parent
    return folder / "eval" / f"{statistics.join_words(*words)}.json"


# --------------------------------------------------------------------------------------- table
Layout = Literal["table", "markdown", "latex", "json"]


def format_evaluations(evaluations: Sequence[Evaluation], layout: Layout = "table") -> str:
    """Format evaluations as a table, a row for each, those at one resolution together.

    Numbers that no row has are left out. A star marks a doubtful number, a dash a missing one.
    LaTeX needs the package booktabs; JSON holds all that is known of each evaluation.
    """
    if layout not in get_args(Layout):
        raise UsageError(f"--format {layout}: it must be one of {', '.join(get_args(Layout))}")
    resolutions = list(dict.fromkeys(each.resolution for each in evaluations))
    rows = sorted(evaluations, key=lambda each: resolutions.index(each.resolution))
    if layout == "json":
        return to_json([each.to_tree() for each in rows]).decode().rstrip()
    header, body = _cells(rows)
    captions = _captions(rows)
    left = header.index("resolution")
    if layout == "latex":
        lines = [*(f"% {line}" for line in captions), *latex_table(header, body, left)]
    elif layout == "markdown":
        # two spaces end a line; a star at its beginning would make a list
        ended = [line.replace("*", r"\*", 1) if line.startswith("*") else line for line in captions]
        lines = [*markdown_table(header, body, left), "", *(f"{line}  " for line in ended)]
    else:
        lines = [*text_table(header, body, left), *captions]
    return "\n".join(lines)


def _cells(rows: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """The header, and the cells of each row."""
    shown = [name for name in NUMBERS if any(row.numbers[name] is not None for row in rows)]
    data = [_data(row) for row in rows]
    several = len(set(data)) > 1  # else the caption names it
    header = ["model", *(["data"] if several else []), "resolution", "images"]
    header += [f"{NUMBERS[name].title} {NUMBERS[name].arrow}" for name in shown]
    body = []
    for name, of, row in zip(name_models([row.model for row in rows]), data, rows, strict=True):
        first = [name, of] if several else [name]
        numbers = [_cell(row, number) for number in shown]
        body.append([*first, short_size(row.resolution), str(row.count), *numbers])
    return header, body


def _cell(row: Evaluation, name: str) -> str:
    value, number = row.numbers[name], NUMBERS[name]
    if value is None:
        return "–"
    star = "*" if name in row.about["doubtful"] else ""
    return f"{value * number.scale:.{number.digits}f}{star}"


def _data(row: Evaluation) -> str:
    return f"{row.about['data']['source']}, {row.about['split']}"


def _captions(rows: Sequence[Evaluation]) -> list[str]:
    """Data and settings of the whole table, then the reasons for its stars, then notes."""
    lines = []
    for row in rows:
        about = row.about
        extractor = about["extractor"]
        features = f"features of {extractor['name']}; " if extractor else ""
        settings = f"{about['recon']}; {features}ldm {about['versions']['ldm']}"
        lines.append(f"measured on {_data(row)}: {settings}")
    doubts = [f"* {why}" for row in rows for why in row.about["doubtful"].values()]
    notes = [note for row in rows for note in row.about["notes"]]
    return list(dict.fromkeys(lines + doubts + notes))


def name_models(models: Sequence[Path]) -> list[str]:
    """Name each model after its run or its file; by its whole path where two are alike."""
    names = {model: _name(model) for model in models}
    known = list(names.values())
    return [names[m] if known.count(names[m]) == 1 else str(m) for m in models]


def _name(model: Path) -> str:
    folder = model.resolve() if model.is_dir() else model.resolve().parent
    if model.is_dir() or model.name == "ckpt.pt":
        return folder.name
    # the name of a run's other weights tells neither the run nor the kind
    return f"{folder.name}/{model.name}" if (folder / "run.json").is_file() else model.name
