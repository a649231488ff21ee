"""What is to be measured: models that are autoencoders, data that is there, sizes that fit.

All that can be refused is refused here, before anything is measured.

What came of measuring one autoencoder at one resolution, and where that is kept.

<run>/eval/<data>-<split>-<resolution>.json   the numbers, and all they depend on

Evaluations as a table: to read, or to paste into a paper.

Every layout says with its numbers what they were measured on. A star marks what may not mean what
it seems to, a dash what is missing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from accelerate import PartialState
from numpy.typing import NDArray

from autoencoders import AutoencoderConfig
from autoencoders.autoencoder import assemble
from autoencoders.loading import read_autoencoder
from autoencoders.wavelet import check_size
from ldm.checkpoint import fingerprint
from ldm.config import to_tree, validate
from ldm.data import DataConfig, Source, open_source
from ldm.data.dataset import PHOTOS
from ldm.data.split import Split
from ldm.distributed import fail_together
from ldm.errors import LdmError, UsageError
from ldm.files import to_json, write_json
from ldm.metrics.inception import Extractor
from ldm.run_folder import installed_version, provenance
from pipelines.measuring.checks import Overlap, find_overlap, place
from pipelines.measuring.metrics import FEATURES, Instruments, describe_extractor
from pipelines.measuring.options import join_words, name_data
from pipelines.measuring.preparation import preparation

Compared = dict[tuple[DataConfig, DataConfig, int], Overlap | LdmError]
"""Data measured, data trained on, and the resolution that both are cut to, for it decides whether
two images are the same → what they share, or why that is not known."""

SMALLEST = 16  # pixels: LPIPS halves images four times, and SSIM's window has 11


@dataclass(frozen=True)
class Job:
    """One autoencoder, to be measured at one resolution."""

    model: Path
    said: dict[str, Any]
    """Which model it is, and what its file says of itself."""
    data: DataConfig
    split: Split
    resolution: int
    source: Source
    seen: dict[str, Any]
    """Whether the model may have been trained on these images; see `_compare`."""


class _Model(NamedTuple):
    """A model file, read once and put away again."""

    path: Path
    config: AutoencoderConfig
    said: dict[str, Any]
    data: DataConfig | None
    """What it was trained on, and at which resolution last, as far as it says."""
    resolution: int | None


def plan_jobs(
    models: Sequence[Path],
    data: str | DataConfig | None,
    split: Split,
    resolutions: Sequence[int] | None,
    limit: int | None,
    ranks: PartialState,
    force: bool,
) -> list[Job]:
    """Every model at every resolution, in this order; what is left out, as each file says.

    Data that a model was trained on is split as its training split it.

    Raises:
        UsageError: data or resolution left out, and a file does not say.
        LdmError: a file is no autoencoder, the data cannot be read, an autoencoder cannot take a
            resolution, or (without `force`) images to be measured as held out were trained on.
    """
    with fail_together(ranks):
        jobs = _open(models, data, split, resolutions)
    compared: Compared = {}
    for i, job in enumerate(jobs):
        seen = _compare(job, _trained_on(job.said), limit, ranks, force, compared)
        jobs[i] = replace(job, seen=seen)
    return jobs


def _open(
    models: Sequence[Path],
    data: str | DataConfig | None,
    split: Split,
    resolutions: Sequence[int] | None,
) -> list[Job]:
    """The jobs of `plan_jobs`, before it is known what was seen."""
    jobs: list[Job] = []
    opened: dict[tuple[DataConfig, int], Source] = {}
    for model in [_read(path) for path in models]:
        config = _choose_data(model, data)
        for resolution in dict.fromkeys(resolutions or [model.resolution]):
            if config is None or resolution is None:
                lacking = "--data" if config is None else "--resolution"
                raise UsageError(
                    f"{model.path} does not say what it was trained on: give {lacking}"
                )
            _check_takes(model, resolution)
            if (config, resolution) not in opened:
                opened[config, resolution] = open_source(config, split, resolution)
            source = opened[config, resolution]
            jobs.append(Job(model.path, model.said, config, split, resolution, source, {}))
    return jobs


# -------------------------------------------------------------------------------------- models
def _read(path: Path) -> _Model:
    file = read_autoencoder(path)
    config = assemble(file, path).config
    phases = (file.provenance.get("recipe") or {}).get("phases")
    said = {"path": str(path), "sha256": fingerprint(file.weights), "format": file.format}
    told = ("images_seen", "recipe", "imported")
    said["trained"] = {name: file.provenance[name] for name in told if name in file.provenance}
    return _Model(
        path, config, said, _trained_on(said), phases[-1]["resolution"] if phases else None
    )


def _trained_on(said: Mapping[str, Any]) -> DataConfig | None:
    recipe = said["trained"].get("recipe") or {}
    return validate(DataConfig, recipe["data"]) if "data" in recipe else None


def _check_takes(model: _Model, resolution: int) -> None:
    """Refuse images that the autoencoder, or a metric, cannot take."""
    encoder = model.config.encoder
    least = max(SMALLEST, encoder.downsampling)
    if resolution < least:
        raise LdmError(
            f"--resolution {resolution}: {least} is the least at which {model.path} can be measured"
        )
    if encoder.type != "sdvae":
        padded = resolution + -resolution % encoder.downsampling
        try:
            check_size((padded, padded), encoder.depth, encoder.wavelet)
        except LdmError as error:
            raise LdmError(
                f"--resolution {resolution}: {model.path} cannot take it: {error}"
            ) from error


# ---------------------------------------------------------------------------------------- data
def _choose_data(model: _Model, data: str | DataConfig | None) -> DataConfig | None:
    if data is None or isinstance(data, DataConfig):
        return data or model.data
    same = model.data is not None and place(model.data.source) == place(data)
    # with the split of the training, for another one would take in what was trained on
    return model.data if same else DataConfig(source=data)


def _compare(
    job: Job,
    trained_on: DataConfig | None,
    limit: int | None,
    ranks: PartialState,
    force: bool,
    compared: Compared,
) -> dict[str, Any]:
    """Whether a job's images were trained on, as far as it can be known.

    They are compared where they are meant to be held out, which are those of "val", and all images
    of other data than the model's own. A model that does not say what it was trained on is taken
    to have been trained on the training split of the same data.

    Args:
        compared: what was found before, of models of the same data at the same
            resolution; it is added to.

    Returns:
        `held_out` (None where it is not known), a `note` where there is something to say, and
        the `overlap` where both sides were compared.

    Raises:
        LdmError: images meant to be held out were trained on, and not `force`.
    """
    own = trained_on is not None and place(trained_on.source) == place(job.data.source)
    if job.split == "train" or (job.split == "all" and own):
        note = f"{job.model} was trained on these images, or some of them" if own else None
        return {"held_out": False if own else None, "note": note, "overlap": None}
    against = trained_on or (job.data if job.split == "val" else None)
    if against is None:
        return {"held_out": None, "note": None, "overlap": None}
    if PHOTOS in (against.source, job.data.source):
        # no file is one of the photographs, and their right thirds are never trained on
        return {"held_out": True, "note": None, "overlap": None}
    key = (job.data, against, job.resolution)
    if key not in compared:
        compared[key] = _overlap(job, against, limit, ranks)
    overlap = compared[key]
    if isinstance(overlap, LdmError):
        note = f"not known whether {job.model} was trained on these images: {overlap}"
        return {"held_out": None, "note": note, "overlap": None}
    note = None
    if overlap.shared:
        note = (
            f"{overlap.shared:,} of {overlap.held_out:,} images of {job.data.source}, {job.split}, "
            f"are also training images of {against.source}, such as {overlap.example}"
        )
        if not force:
            raise LdmError(f"{note}: measure other images, or give --force")
    found = overlap.to_tree() | {"against": against.source}
    return {"held_out": not overlap.shared, "note": note, "overlap": found}


def _overlap(
    job: Job, against: DataConfig, limit: int | None, ranks: PartialState
) -> Overlap | LdmError:
    """What a job's images and training images share, or why that cannot be known."""
    try:
        with fail_together(ranks):
            train = open_source(against, "train", job.resolution)
        return find_overlap(job.source, train, job.resolution, ranks, limit, job.data.workers)
    except LdmError as error:
        return error


FORMAT = 1
NUMBERS = {
    "rfid": "rFID", "lpips": "LPIPS", "psnr": "PSNR", "ssim": "SSIM", "kid": "KID",
    "precision": "precision", "recall": "recall", "swd": "SWD",
}  # fmt: skip
"""What is measured, and how it is written: in the paper's order, then what it does not report."""
PACKAGES = ("clean-fid", "lpips", "pillow", "torchvision")
"""Those that numbers depend on, besides what all provenance names."""


@dataclass(frozen=True)
class Evaluation:
    """One autoencoder's reconstructions, measured over one split at one resolution.

    Attributes:
        model: the file or folder it was read from.
        resolution: side of the images, pixels.
        count: how many images.
        numbers: each of `NUMBERS`; None where it could not be measured. PSNR is in dB; SWD is
            ×10³, as in its paper, and KID is not.
        about: all that the numbers depend on. `missing` and `doubtful` say, by a number's name,
            why it is not there, and why it may not mean what it seems to; `notes` are lines on
            all of them.
        path: the JSON that it is written to.
        each: the numbers of every image by itself, as `Scores.in_order` has them; not in the JSON.
    """

    model: Path
    resolution: int
    count: int
    numbers: dict[str, float | None]
    about: dict[str, Any]
    path: Path
    each: dict[str, NDArray] = field(default_factory=dict)

    def to_tree(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "format": FORMAT,
            "resolution": self.resolution,
            "count": self.count,
            "numbers": self.numbers,
            **self.about,
        }


def conclude(
    job: Job,
    path: Path,
    means: dict[str, float],
    each: dict[str, NDArray],
    compared: dict[str, Any],
    extractor: Extractor | None,
    instruments: Instruments,
    force: bool,
    how: dict[str, Any],
) -> Evaluation:
    """What was measured, without what it cannot say, and with all that it depends on.

    Args:
        path: where it is to be kept.
        means: over the images, by the names of `NUMBERS`.
        each: of every image, as `Scores.in_order` has it.
        compared: as `compare_surveys` has it.
        extractor: what made the features; None where the images that could be read were too few
            for any.
        instruments: what there was to measure with.
        force: keep an rFID over fewer images than features, marked as doubtful.
        how: further things to be told.
    """
    numbers: dict[str, float | None] = dict.fromkeys(NUMBERS) | means
    numbers |= {name: compared[name] for name in ("kid", "precision", "recall")}
    numbers |= {"rfid": compared["fid"], "swd": compared["swd"]["mean"]}
    missing, doubtful = dict(instruments.missing), {}
    notes = [job.seen["note"]] if job.seen["note"] else []
    count = len(each["k"])
    if extractor is None and instruments.extractor is not None:
        numbers |= dict.fromkeys(FEATURES)
        missing |= dict.fromkeys(FEATURES, f"{count} image(s) have too few neighbours")
    elif extractor is not None:
        if count < extractor.dim:
            few = f"{count:,} images are fewer than the {extractor.dim:,} features of each"
            if force:
                doubtful["rfid"] = f"{few}: compare it only with rFIDs over as many"
            else:
                numbers["rfid"] = None
                missing["rfid"] = f"{few}; --force gives it all the same"
        if not extractor.is_published:
            notes.append(
                f"{extractor.name} is not the published Inception: compare rFID, KID, precision "
                "and recall only with those of the same network"
            )
    about = {
        "model": job.said,
        "data": to_tree(job.data),
        "prepared": preparation(job.data),
        "split": job.split,
        "seen": job.seen,
        "recon": "posterior's mode, float32, rounded to 8 bits",
        "lpips": instruments.lpips and "VGG-16",
        "extractor": describe_extractor(extractor),
        "missing": missing,
        "doubtful": doubtful,
        "notes": notes,
        "details": {name: compared[name] for name in ("kid_std", "swd", "swd_images")},
        **how,
        **provenance(),
    }
    about["versions"] |= {name: installed_version(name) for name in PACKAGES}
    return Evaluation(job.model, job.resolution, count, numbers, about, path, each)


# ------------------------------------------------------------------------------------- on disk
def default_paths(jobs: Sequence[Job], *settings: str) -> list[Path]:
    """Where the evaluations of one call are kept, each as `default_path` has it.

    Raises:
        UsageError: two of them would be kept in one place.
    """
    paths = [default_path(j.model, j.data, j.split, j.resolution, *settings) for j in jobs]
    taken: dict[Path, Job] = {}
    for job, path in zip(jobs, paths, strict=True):
        other = taken.setdefault(path.resolve(), job)
        if other is not job:
            raise UsageError(
                f"{other.model} and {job.model} would both be written to {path}: leave one of "
                "them out, or give --out one file for all"
            )
    return paths


def default_path(
    model: Path, data: DataConfig, split: str, resolution: int, *settings: str
) -> Path:
    """Where an evaluation is kept beside its model: `eval/photos-val-64.json`, and for other data
    two folders of its path with a few digits of the whole: `eval/imagenet-val-1f0c52-val-64.json`.

    Args:
        settings: further words that tell it from others of this model.
    """
    words = [name_data(data.source), split, str(resolution), *settings]
    # best.pt lies beside ckpt.pt, and one of another format may beside either
    which = model.stem if model.suffix == ".pt" else model.name
    if model.is_file() and which != "ckpt":
        words.insert(0, which)
    folder = model if model.is_dir() else model.parent
    return folder / "eval" / f"{join_words(*words)}.json"


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written, before hours of work that it is to hold.

    Raises:
        LdmError: it is a folder, or its own folder cannot be made or written.
    """
    elsewhere = "give --out another file"
    if path.is_dir():
        raise LdmError(f"{path} is a folder: {elsewhere}, such as {path / 'eval.json'}")
    beside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch()
        beside.unlink()
    except OSError as error:
        raise LdmError(f"could not write {path} ({error.strerror}): {elsewhere}") from error


def write_last(evaluations: Sequence[Evaluation], together: bool) -> None:
    """Write the last evaluation to its file; or all of them, `together` in one file.

    Raises:
        LdmError: the disk is full or the folder cannot be written; what stood there stays.
    """
    trees = [each.to_tree() for each in evaluations]
    tree = {"format": FORMAT, "evaluations": trees} if together else trees[-1]
    write_json(evaluations[-1].path, tree)


Layout = Literal["table", "markdown", "latex", "json"]

LATEX = {
    "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "↓": r"$\downarrow$", "↑": r"$\uparrow$", "×10³": r"$\times 10^3$", "×": r"$\times$",
    "–": "--", "²": "$^2$",
}  # fmt: skip
STAR = r"\\*"
SIGNS = re.compile("|".join(map(re.escape, LATEX)))  # the first that fits, so ×10³ before ×


class Column(NamedTuple):
    """How a number is shown."""

    arrow: str
    """Which way is better."""
    digits: int
    scale: float = 1.0


COLUMNS = {
    "rfid": Column("↓", 2),
    "lpips": Column("↓", 3),
    "psnr": Column("↑", 2),
    "ssim": Column("↑", 3),
    "kid": Column("×10³ ↓", 2, 1e3),
    "precision": Column("↑", 3),
    "recall": Column("↑", 3),
    "swd": Column("×10³ ↓", 2),
}


def format_evaluations(evaluations: Sequence[Evaluation], layout: Layout = "table") -> str:
    """The table of some evaluations: a row for each, those at one resolution together.

    Numbers that no row has are left out.

    Args:
        layout: "table" for a terminal, "markdown", "latex" (with the package booktabs), or "json",
            which holds all that is known of each.

    Raises:
        UsageError: there is no such layout.
    """
    if layout not in get_args(Layout):
        raise UsageError(f"--format {layout}: it must be one of {', '.join(get_args(Layout))}")
    resolutions = list(dict.fromkeys(each.resolution for each in evaluations))
    rows = sorted(evaluations, key=lambda each: resolutions.index(each.resolution))
    if layout == "json":
        return to_json([each.to_tree() for each in rows]).decode().rstrip()
    header, body = _cells(rows)
    write = {"table": _as_text, "markdown": _as_markdown, "latex": _as_latex}[layout]
    return "\n".join(write(header, body, _captions(rows)))


# ------------------------------------------------------------------------------------- content
def _cells(rows: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """The titles, and the cells of each row."""
    shown = [name for name in COLUMNS if any(row.numbers[name] is not None for row in rows)]
    data = [_data(row) for row in rows]
    several = len(set(data)) > 1  # else the caption says it
    header = ["model", *(["data"] if several else []), "resolution", "images"]
    names = name_models([row.model for row in rows])
    body = [
        [
            name,
            *([which] if several else []),
            f"{row.resolution}²",
            str(row.count),
            *(_shown(row, number) for number in shown),
        ]
        for name, which, row in zip(names, data, rows, strict=True)
    ]
    return [*header, *(f"{NUMBERS[name]} {COLUMNS[name].arrow}" for name in shown)], body


def _shown(row: Evaluation, name: str) -> str:
    value = row.numbers[name]
    if value is None:
        return "–"
    column = COLUMNS[name]
    star = "*" if name in row.about["doubtful"] else ""
    return f"{value * column.scale:.{column.digits}f}{star}"


def _data(row: Evaluation) -> str:
    return f"{row.about['data']['source']}, {row.about['split']}"


def _captions(rows: Sequence[Evaluation]) -> list[str]:
    """What all of the table was measured on, and what its stars mean."""
    lines = list(dict.fromkeys(f"measured on {_data(row)}: {_how(row.about)}" for row in rows))
    doubts = [f"* {why}" for row in rows for why in row.about["doubtful"].values()]
    notes = [note for row in rows for note in row.about["notes"]]
    return lines + list(dict.fromkeys(doubts + notes))


def _how(about: dict[str, Any]) -> str:
    extractor = about["extractor"]
    features = f"features of {extractor['name']}; " if extractor else ""
    return f"{about['recon']}; {features}ldm {about['versions']['ldm']}"


def name_models(models: Sequence[Path]) -> list[str]:
    """A short name for each model: its run's, or its file's; the whole path where two are alike."""
    names = {model: _name(model) for model in models}
    known = list(names.values())
    return [names[m] if known.count(names[m]) == 1 else str(m) for m in models]


def _name(model: Path) -> str:
    folder = model.resolve() if model.is_dir() else model.resolve().parent
    if model.is_dir() or model.name == "ckpt.pt":
        return folder.name
    # a run's other weights say by themselves neither whose they are nor of what kind
    return f"{folder.name}/{model.name}" if (folder / "run.json").is_file() else model.name


# ------------------------------------------------------------------------------------- layouts
def _as_text(header: list[str], body: list[list[str]], captions: list[str]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    left = _words(header)
    lines = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *body)
    ]
    return [*lines, *captions]


def _as_markdown(header: list[str], body: list[list[str]], captions: list[str]) -> list[str]:
    left = _words(header)
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    lines = [
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |"
        for row in (header, rule, *body)
    ]
    # two spaces end a line; a star at its beginning would make a list
    return [*lines, "", *(f"{re.sub(r'^[*]', STAR, line)}  " for line in captions)]


def _as_latex(header: list[str], body: list[list[str]], captions: list[str]) -> list[str]:
    left = _words(header)
    lines = [f"{' & '.join(map(_escape, row))} \\\\" for row in (header, *body)]
    return [
        *(f"% {line}" for line in captions),
        f"\\begin{{tabular}}{{{'l' * left}{'r' * (len(header) - left)}}}",
        "\\toprule",
        lines[0],
        "\\midrule",
        *lines[1:],
        "\\bottomrule",
        "\\end{tabular}",
    ]


def _words(header: Sequence[str]) -> int:
    """How many of the first columns hold words; the others hold numbers."""
    return header.index("resolution")


def _escape(cell: str) -> str:
    return SIGNS.sub(lambda found: LATEX[found.group()], cell)
