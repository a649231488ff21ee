"""Runs and their measurements, read from run folders; missing files become notes, not errors."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ldm.charts import colour
from ldm.config import Tree
from ldm.errors import LdmError, UsageError
from ldm.files import read_json
from ldm.logbook import read_rows
from ldm.run_folder import is_finished, read_config
from pipelines.analysis.subjects import distinct_names, split_name
from pipelines.report import page

Kind = Literal["autoencoder", "diffusion"]
STAGES: dict[Kind, str] = {"autoencoder": "stage one", "diffusion": "stage two"}
NUMBERS = {
    "rfid": ("rFID", 3, 1.0),
    "fid": ("FID", 3, 1.0),
    "kid": ("KID ×10³", 3, 1e3),
    "lpips": ("LPIPS", 4, 1.0),
    "psnr": ("PSNR, dB", 2, 1.0),
    "ssim": ("SSIM", 4, 1.0),
    "precision": ("precision", 3, 1.0),
    "recall": ("recall", 3, 1.0),
    "swd": ("SWD ×10³", 2, 1.0),  # the files hold ×10³ already
    "loss": ("loss", 4, 1.0),
}
"""Names of numbers in result files: title, digits and scale on the page."""
SAMPLES = ("samples/*/fid*.json", "samples/*.fid*.json", "fid/*.json")
"""FIDs of a folder of samples, of an archive of samples, and of a model's own samples."""
IRRELEVANT = ("crop", "flip", "labels", "workers")  # measurements see each image's centre, once


@dataclass
class Record:
    """A training run.

    Attributes:
        label: its name on the page, different for every run.
        described: contents of run.json: preset, command, versions.
        config: the resolved settings; {} if they cannot be read.
        rows: rows of metrics.jsonl.
        result: contents of result.json; None for an unfinished run.
        colour: colour of its lines and of its label, #rrggbb.
        notes: sentences for the page about missing and damaged files.
        sha256: hash of its model's weights, once the model has been read.
    """

    folder: Path
    kind: Kind
    label: str
    described: dict[str, Any]
    config: Tree
    rows: list[dict[str, float]]
    result: dict[str, Any] | None
    colour: str = colour(0)
    notes: list[str] = field(default_factory=list)
    sha256: str | None = None

    @property
    def title(self) -> page.Markup:
        """The label with a patch of its colour."""
        return page.chip(self.colour, self.label)

    @property
    def images_seen(self) -> int:
        """Images seen, according to the metrics and the result."""
        last = [row["images_seen"] for row in self.rows[-1:]]
        final = (self.result or {}).get("images_seen")
        return int(max([*last, final if isinstance(final, int) else 0]))

    @property
    def resolution(self) -> int:
        """Image size at the end of the training, in pixels; 0 if unknown."""
        phases = self.config.get("phases")  # stage two has none
        last = phases[-1] if isinstance(phases, list) and phases else self.config
        side = last.get("resolution") if isinstance(last, dict) else None
        if side is None and self.result is not None:  # an unfinished run may still grow
            side = next((r["resolution"] for r in self.rows[::-1] if "resolution" in r), None)
        return int(side) if isinstance(side, int | float) else 0

    def newest_picture(self, prefix: str) -> Path | None:
        """Return the newest picture whose name starts with `prefix`, if there is one."""
        found = sorted((self.folder / "pictures").glob(f"{prefix}-*.png"))  # by images seen
        return found[-1] if found else None


@dataclass
class Measurement:
    """A measurement of a run, or several of the same images that agree.

    Attributes:
        what: the model and the images, with the file if two would be described alike.
        numbers: values by their names in `NUMBERS`.
        spread: standard deviations of some of them: FID's over the bootstrap, KID's over subsets.
        doubts: caveats, each a sentence.
        sources: the files, with their contents.
        subject: the weights or samples and the images; None if the file does not identify them.
        network: the feature extractor; None if none was used.
    """

    record: Record
    what: str
    numbers: dict[str, float]
    spread: dict[str, float] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    sources: list[tuple[Path, Tree]] = field(default_factory=list)
    subject: Tree | None = None
    network: Tree | None = None


# -------------------------------------------------------------------------------------- runs
def read_records(words: Sequence[str | Path]) -> list[Record]:
    """Read runs, each once, from PATH or NAME=PATH arguments: run folders, or folders of runs.

    Raises:
        UsageError: two runs have the same name.
        LdmError: a path is no folder, or neither a run nor a folder of runs.
    """
    folders: dict[Path, tuple[str, Path]] = {}  # by resolved path: the given name and path
    for word in words:
        name, path = split_name(word)
        for folder in _runs_in(path):
            label = f"{name}/{folder.name}" if name and folder != path else name
            first, _ = folders.setdefault(folder.resolve(), (label, folder))
            if first != label:
                raise UsageError(f"{folder} is given as '{first}' and as '{label}': give it once")
    labels = distinct_names([(label, folder) for folder, (label, _) in folders.items()])
    return [
        _read_record(folder, label, colour(i))
        for i, ((_, folder), label) in enumerate(zip(folders.values(), labels, strict=True))
    ]


def _runs_in(path: Path) -> list[Path]:
    if path.is_file():
        raise LdmError(f"{path} is a file: pass the run folder, such as {path.parent}")
    if not path.is_dir():
        raise LdmError(f"no folder at {path}: pass a run folder, such as runs/<time>-<preset>")
    if _kind(path) is not None:
        return [path]
    found = sorted(mark.parent for mark in path.glob("*/run.json") if _kind(mark.parent))
    if not found:
        raise LdmError(
            f"{path} contains no run (no readable run.json in it or one level below): pass a "
            "folder written by `ldm train-ae` or `ldm train-diffusion`"
        )
    return found


def _kind(folder: Path) -> Kind | None:
    kind = (read_json(folder / "run.json") or {}).get("kind")
    return kind if kind in STAGES else None


def _read_record(folder: Path, label: str, shade: str) -> Record:
    notes = []
    config = read_config(folder)
    if config is None:
        notes.append("config.yaml is missing or damaged: the settings are not shown.")
    rows = read_rows(folder / "metrics.jsonl")
    if not rows:
        notes.append("metrics.jsonl is missing or empty: there are no curves.")
    result = read_json(folder / "result.json")
    if is_finished(folder) and result is None:
        notes.append("result.json is damaged: the final numbers are not shown.")
    described = read_json(folder / "run.json") or {}
    kind = described["kind"]
    return Record(folder, kind, label, described, config or {}, rows, result, shade, notes)


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
        same.doubts = list(dict.fromkeys([*same.doubts, *each.doubts]))
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
    for globs, read in ((("eval/*.json",), _of_evaluation), (SAMPLES, _of_samples)):
        paths = {path for glob in globs for path in record.folder.glob(glob)}
        # the measurement with default settings has the shortest name
        for path in sorted(paths, key=lambda path: (path.parent, path.stem)):
            tree = read_json(path) or {}
            trees = [each for each in tree.get("evaluations", [tree]) if each]
            yield from (read(record, path, each) for each in trees if isinstance(each, dict))
            if not trees:
                record.notes.append(f"{path} is damaged: its numbers are not shown.")


def _of_training(record: Record, result: Mapping[str, Any]) -> Iterator[Measurement]:
    """Read the numbers of a run's end, and of its best weights."""
    ends = {"at the end": {**result, "images_seen": record.images_seen}}
    best = _tree(result.get("best"))
    if _known(best) and best.get("images_seen") != result.get("images_seen"):
        ends["best.pt"] = best
    for name, numbers in ends.items():
        seen = _images(numbers.get("images_seen"), "images seen")
        images = _images(numbers.get("count"), "held-out images", record.resolution)
        yield Measurement(record, _join(name, seen, images), _known(numbers))


def _of_evaluation(record: Record, path: Path, tree: Tree) -> Measurement:
    measured = _measured(record, path, tree)
    model, data = _tree(tree.get("model")), _tree(tree.get("data"))
    images = _images(tree.get("count"), "images", tree.get("resolution"))
    if not model or "source" not in data:
        measured.what = _join(path.stem, images)
        return measured
    # a model other than the run's ckpt.pt: another of its files, or of another run
    file = Path(str(model.get("path", "")))
    is_file = file.suffix in (".pt", ".safetensors")
    which = file.name if is_file and file.name != "ckpt.pt" else ""
    if (file.parent if is_file else file).name not in ("", record.folder.name):
        which = str(file)
    measured.what = _join(which, str(data["source"]), str(tree.get("split", "")), images)
    if "sha256" in model:
        kept = ("prepared", "split", "resolution", "count", "recon", "corrupt")
        measured.subject = {key: tree.get(key) for key in kept}
        measured.subject |= {"model": model["sha256"], "data": _relevant(data)}
    return measured


def _of_samples(record: Record, path: Path, tree: Tree) -> Measurement:
    measured = _measured(record, path, tree)
    samples, reference = _tree(tree.get("samples")), _tree(tree.get("reference"))
    names = {"fid": path.stem, "samples": path.name.rpartition(".fid")[0]}  # by folder
    name = names.get(path.parent.name, path.parent.name)
    images = _images(samples.get("count"), "images", tree.get("resolution"))
    against = f" against {reference['what']}" if "what" in reference else ""
    measured.what = _join(f"samples {name}", images) + against
    if "fingerprint" in samples and reference:
        kept = ("what", "split", "count", "prepared", "filter")
        measured.subject = {
            # the same images in a folder and in its archive are two rows
            "folder": "" if path.parent.name == "fid" else name,
            **{key: samples.get(key) for key in ("fingerprint", "filter")},
            "reference": {key: reference.get(key) for key in kept},
            "data": _relevant(_tree(reference.get("data"))),
        }
    return measured


def _measured(record: Record, path: Path, tree: Tree) -> Measurement:
    """Read everything from a result file but the description of its subject."""
    numbers, details = (_tree(tree.get(key)) or tree for key in ("numbers", "details"))
    spread = {"fid": _tree(tree.get("fid_interval")).get("std"), "kid": details.get("kid_std")}
    lists = tree.get("warnings"), tree.get("notes"), [*_tree(tree.get("doubtful")).values()]
    doubts = [text for texts in lists if isinstance(texts, list) for text in texts]
    doubts = list(dict.fromkeys(text for text in doubts if isinstance(text, str)))
    # the table names the model already, and one sentence may hold for several models
    model = f"{_tree(tree.get('model')).get('path', '')} "
    doubts = [f"the model {text.removeprefix(model)}" if text.startswith(model) else text
              for text in doubts]  # fmt: skip
    measured = Measurement(record, "", _known(numbers), _known(spread), doubts, [(path, tree)])
    if network := _tree(tree.get("extractor")):
        measured.network = network | {"mode": tree.get("mode")}
    return measured


def _known(tree: Mapping[str, Any]) -> dict[str, float]:
    """Return those of a file's values that the page shows."""
    found = {}
    for name in NUMBERS:
        value = tree.get(name)
        value = value.get("mean") if isinstance(value, dict) else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    return found


def _tree(value: Any) -> Tree:
    return value if isinstance(value, dict) else {}


def _relevant(data: Tree) -> Tree:
    return {key: value for key, value in data.items() if key not in IRRELEVANT}


def _images(count: Any, what: str, side: Any = None) -> str:
    """Return such as "38 images at 64²", as far as known."""
    many = f"{count:,} {what}" if isinstance(count, int) else ""
    at = f"at {side}²" if isinstance(side, int) and side > 0 else ""
    return " ".join(filter(None, (many, at)))


def _join(*words: str) -> str:
    return ", ".join(filter(None, words))
