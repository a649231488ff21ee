"""Runs and their measurements, read from run folders, and the table of all measurements.

Missing files become notes, not errors.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.charts import colour
from ldm.config import Resolution, Tree, flatten, read_resolution, short_size
from ldm.errors import LdmError, UsageError, try_call
from ldm.logbook import read_rows
from ldm.records import (
    NUMBERS,
    SAMPLES,
    Count,
    known_numbers,
    read_each,
    read_numbers,
    read_tree,
    schema,
    section,
    show_number,
)
from ldm.run_folder import is_finished, read_config, read_run
from pipelines.analysis.subjects import distinct_names, split_name
from pipelines.report import page

STAGES = {"autoencoder": "stage one", "diffusion": "stage two"}
# measurements see each image's centre, once
IRRELEVANT = (
    "crop", "flip", "labels", "label_file", "label_column", "streams", "window", "cache_gb",
    "workers", "changed",
)  # fmt: skip
LATER = {"small": "error", "image_column": "", "channels": None, "range": "type"}
"""Defaults of keys that earlier results do not have."""


RESULT = schema(images_seen=(Count | None, None), best=(dict[str, Any] | None, None))
MEASURED = schema(evaluations=(list[dict[str, Any]], []))
"""A `fid.json`, or a file of `ldm eval-ae`. Its other entries are shown where they have the type
that they should have."""


@dataclass
class Record:
    """A training run: its label, which no other run has, and the contents of its files.

    Attributes:
        described: run.json: kind, preset, command, versions.
        config: config.yaml; {} if it cannot be read.
        result: result.json; None for an unfinished run.
        notes: sentences for the page about missing and damaged files.
        sha256: hash of its model's weights, once the model has been read.
        origin: of the weights that its training was given, likewise; {} if it had none.
    """

    folder: Path
    label: str
    described: Tree
    config: Tree
    rows: list[dict[str, float]]
    result: Tree | None
    colour: str = colour(0)
    notes: list[str] = field(default_factory=list)
    sha256: str | None = None
    origin: Tree = field(default_factory=dict)

    @property
    def title(self) -> page.Markup:
        """The label with a patch of its colour."""
        return page.chip(self.colour, self.label)

    @property
    def images_seen(self) -> int:
        """Images seen, according to the metrics and the result."""
        last = [row["images_seen"] for row in self.rows[-1:]]
        return int(max([*last, (self.result or {}).get("images_seen") or 0]))

    @property
    def resolution(self) -> Resolution:
        """Image size at the end of the training, in pixels; 0 if unknown."""
        phases = self.config.get("phases")  # stage two has none
        last = phases[-1] if isinstance(phases, list) and phases else self.config
        side = last.get("resolution") if isinstance(last, dict) else None
        if side is None and self.result is not None:  # an unfinished run may still grow
            side = next((r["resolution"] for r in self.rows[::-1] if "resolution" in r), None)
        return _read_size(side) or 0


@dataclass
class Measurement:
    """A measurement of a run, or several of the same images that agree.

    Attributes:
        what: the model and the images, with the file if two would be described alike.
        numbers, spread: values by their names in `NUMBERS`, and standard deviations of some: FID's
            over the bootstrap, KID's over subsets.
        subject: the weights or samples and the images; None if the file does not identify them.
        doubts: caveats, each a sentence.
        network: the feature extractor, if one was used.
    """

    record: Record
    what: str
    numbers: dict[str, float]
    subject: Tree | None = None
    spread: dict[str, float] = field(default_factory=dict)
    doubts: dict[str, None] = field(default_factory=dict)
    sources: list[tuple[Path, Tree]] = field(default_factory=list)
    network: Tree | None = None


# -------------------------------------------------------------------------------------- runs
def read_records(words: Sequence[str | Path]) -> list[Record]:
    """Read runs, each once, from PATH or NAME=PATH arguments: run folders, or folders of runs."""
    folders: dict[Path, tuple[str, Path]] = {}  # by resolved path: the given name and path
    for word in words:
        name, path = split_name(word)
        for folder in _runs_in(path):
            label = f"{name}/{folder.name}" if name and folder != path else name
            first, _ = folders.setdefault(folder.resolve(), (label, folder))
            if first != label:
                raise UsageError(f"{folder} is given as '{first}' and as '{label}': give it once")
    given = list(folders.values())
    labels = distinct_names(given)
    return [_read_record(given[i][1], label, colour(i)) for i, label in enumerate(labels)]


def _runs_in(path: Path) -> list[Path]:
    if path.is_file():
        raise LdmError(f"{path} is a file: pass the run folder, such as {path.parent}")
    if not path.is_dir():
        raise LdmError(f"no folder at {path}: pass a run folder, such as runs/<time>-<preset>")
    folders = [path, *sorted(mark.parent for mark in path.glob("*/run.json"))]
    described = read_each(folders, read_run)
    found = [folder for folder, run in described.items() if run.get("kind") in STAGES]
    if not found:
        raise LdmError(
            f"{path} contains no run (no readable run.json in it or one level below): pass a "
            "folder written by `ldm train-ae` or `ldm train-diffusion`"
        )
    return found[:1] if found[0] == path else found


def _read_record(folder: Path, label: str, shade: str) -> Record:
    notes: list[str] = []

    def read(name: str, lost: str, empty: Any, call: Callable[..., Any], *args: Any) -> Any:
        """Read a file; of a damaged, missing or empty one, note what is lost."""
        found = try_call(call, *args)
        if isinstance(found, LdmError) or not found:
            why = found if isinstance(found, LdmError) else f"{name} is missing or empty"
            notes.append(f"{why}: {lost}.")
            return empty
        return found

    config = read("config.yaml", "the settings are not shown", {}, read_config, folder)
    log, final = folder / "metrics.jsonl", folder / "result.json"
    rows = read(log.name, "there are no curves", [], read_rows, log)
    result = None
    if is_finished(folder):
        lost = "the final numbers are not shown"
        result = read(final.name, lost, None, read_tree, final, RESULT)
    return Record(folder, label, read_run(folder), config, rows, result, shade, notes)


# ------------------------------------------------------------------------------ measurements
def measurements(record: Record) -> list[Measurement]:
    """Read all measurements in a run folder, and join those of the same subject that agree."""
    found: list[Measurement] = []
    for each in _read_measurements(record):
        same = next((other for other in found if _agree(other, each)), None)
        if same is None:
            found.append(each)
            continue
        same.numbers |= each.numbers
        same.spread |= each.spread
        same.doubts |= each.doubts
        same.sources += each.sources
        same.network = same.network or each.network
    for each in found:
        if each.network is not None and each.network.get("is_published") is False:
            each.what += f", features of {each.network.get('name')}"
    alike = Counter(each.what for each in found)
    for each in found:
        if alike[each.what] > 1 and each.sources:
            each.what += f" ({each.sources[0][0].relative_to(record.folder)})"
    return found


def _agree(one: Measurement, other: Measurement) -> bool:
    """Check that both measure the same subject with the same network, without a contradiction."""
    if one.subject is None or one.subject != other.subject:
        return False
    if one.network and other.network and one.network != other.network:
        return False
    pairs = ((one.numbers, other.numbers), (one.spread, other.spread))
    return all(a[name] == b[name] for a, b in pairs for name in a.keys() & b.keys())


def _read_measurements(record: Record) -> Iterator[Measurement]:
    if record.result is not None:
        yield from _of_training(record, record.result)
    for globs, describe in ((("eval/*.json",), _describe_evaluation), (SAMPLES, _describe_samples)):
        paths = {path for glob in globs for path in record.folder.glob(glob)}
        # the measurement with default settings has the shortest name
        for path in sorted(paths, key=lambda path: (path.parent, path.stem)):
            found = try_call(read_tree, path, MEASURED)
            if isinstance(found, LdmError):
                record.notes.append(f"{found}: its numbers are not shown.")
            elif found is not None:
                for each in found.get("evaluations") or [found]:
                    yield _measured(record, path, each, *describe(record, path, each))


def _of_training(record: Record, result: Tree) -> Iterator[Measurement]:
    """Read the numbers of a run's end, and of its best weights."""
    ends = {"at the end": {**result, "images_seen": record.images_seen}}
    best = section(result, "best")
    if known_numbers(best) and best.get("images_seen") != result.get("images_seen"):
        ends["best.pt"] = best
    for name, numbers in ends.items():
        seen = _images(numbers.get("images_seen"), "images seen")
        images = _images(numbers.get("count"), "held-out images", record.resolution)
        yield Measurement(record, _join(name, seen, images), known_numbers(numbers))


def _describe_evaluation(record: Record, path: Path, tree: Tree) -> tuple[str, Tree | None]:
    """Describe and identify the model and the images of a result of `ldm eval-ae`."""
    model, data = section(tree, "model"), section(tree, "data")
    images = _images(tree.get("count"), "images", tree.get("resolution"))
    if not model or "source" not in data:
        return _join(path.stem, images), None
    # a model other than the run's ckpt.pt: another of its files, or of another run
    file = Path(str(model.get("path", "")))
    is_file = file.suffix in (".pt", ".safetensors")
    which = file.name if is_file and file.name != "ckpt.pt" else ""
    if (file.parent if is_file else file).name not in ("", record.folder.name):
        which = str(file)
    what = _join(which, str(data["source"]), str(tree.get("split", "")), images)
    if "sha256" not in model:
        return what, None
    kept = ("prepared", "split", "resolution", "count", "recon", "corrupt")
    subject = {key: tree.get(key) for key in kept}
    return what, subject | {"model": model["sha256"], "data": _relevant(data)}


def _describe_samples(record: Record, path: Path, tree: Tree) -> tuple[str, Tree | None]:
    """Describe and identify the samples and the reference of a result of `ldm fid`."""
    samples, reference = section(tree, "samples"), section(tree, "reference")
    names = {"fid": path.stem, "samples": path.name.rpartition(".fid")[0]}  # by folder
    name = names.get(path.parent.name, path.parent.name)
    images = _images(samples.get("count"), "images", tree.get("resolution"))
    against = f" against {reference['what']}" if "what" in reference else ""
    what = _join(f"samples {name}", images) + against
    if "fingerprint" not in samples or not reference:
        return what, None
    kept = ("what", "split", "count", "prepared", "filter")
    return what, {
        # the same images in a folder and in its archive are two rows
        "folder": "" if path.parent.name == "fid" else name,
        **{key: samples.get(key) for key in ("fingerprint", "filter")},
        "reference": {key: reference.get(key) for key in kept},
        "data": _relevant(section(reference, "data")),
    }


def _measured(
    record: Record, path: Path, tree: Tree, what: str, subject: Tree | None
) -> Measurement:
    """Read everything from a result file but the description of its subject."""
    numbers, spread = read_numbers(tree)
    lists = tree.get("warnings"), tree.get("notes"), [*section(tree, "doubtful").values()]
    texts = [text for texts in lists if isinstance(texts, list) for text in texts]
    # the table names the model already, and one sentence may hold for several models
    model = re.escape(f"{section(tree, 'model').get('path', '')} ")
    doubts = (re.sub(f"^{model}", "the model ", text) for text in texts if isinstance(text, str))
    network = section(tree, "extractor")
    return Measurement(
        record, what, numbers, subject, spread, dict.fromkeys(doubts),
        [(path, tree)], network | {"mode": tree.get("mode")} if network else None,
    )  # fmt: skip


def _relevant(data: Tree) -> Tree:
    return {k: v for k, v in (LATER | data).items() if k not in IRRELEVANT}


def _images(count: Any, what: str, side: Any = None) -> str:
    """Return such as "38 images at 64²", if known."""
    many = f"{count:,} {what}" if isinstance(count, int) else ""
    size = _read_size(side)
    at = f"at {short_size(size)}" if size else ""
    return " ".join(filter(None, (many, at)))


def _read_size(given: Any) -> Resolution | None:
    """A resolution in a file that may be damaged, if it is one."""
    with suppress(ValueError):
        return read_resolution(given)
    return None


def _join(*words: str) -> str:
    return ", ".join(filter(None, words))


# ----------------------------------------------------------------------------------- numbers
def numbers_section(records: Sequence[Record], suffix: str = "") -> str:
    """Return a table of every measurement, caveats, and the folded contents of the files."""
    found = [measured for record in records for measured in measurements(record)]
    names = [name for name in NUMBERS if any(name in each.numbers for each in found)]
    header = ["measurement", *(NUMBERS[name][0] for name in names)]
    rows = [
        [
            page.under(each.record.title, each.what),
            *(show_number(name, each.numbers, each.spread) for name in names),
        ]
        for each in found
    ]
    table = page.table(rows, header) if rows else page.note("Nothing has been measured yet.")
    text = (
        "All measurements of the runs. Compare two rows only if they use the same images, "
        "resolution and feature extractor; the sources below record all of these."
    )
    sources = [page.folded(f"{r.label}: training run", _origin(r)) for r in records]
    sources += [
        page.folded(f"{each.record.label}: {each.what}", *map(_contents, each.sources))
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
    notes = []
    for text, concerned in rows.items():
        named = (f"{', '.join(runs)}: {what}" for what, runs in concerned.items())
        notes.append(page.note(page.under(text, "; ".join(named))))
    return notes


def _contents(source: tuple[Path, Tree]) -> str:
    """Return the contents of a result file, without the recipe, which is among the settings."""
    path, tree = source
    shown: dict[str, Any] = {"file": path}
    keys: dict[str, str] = {}
    for key, value in flatten(tree).items():
        if ".recipe." in key or value in (None, [], {}, ""):
            continue
        first = keys.setdefault(_text(value), key)
        # a long sentence is shown once, even if several numbers share it
        shown[key] = f"same as {first}" if first != key and len(_text(value)) > 80 else value
    return _pairs(shown)


def _origin(record: Record) -> str:
    origin = {"folder": record.folder, **flatten(record.described)}
    if record.sha256:
        origin["SHA-256 of the weights in ckpt.pt"] = record.sha256
    if record.origin:
        origin |= flatten({"given weights": record.origin})
    return _pairs(origin)


def _pairs(tree: Tree) -> str:
    return page.table([(page.breakable(key), _text(value)) for key, value in tree.items()])


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
