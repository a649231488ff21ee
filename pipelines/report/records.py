"""What runs have left in their folders, read once; what is missing is said, not raised.

What has been measured of a run: read from its folder, what is said twice once.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ldm.config import Tree
from ldm.errors import LdmError, UsageError
from ldm.files import read_json
from ldm.logbook import read_rows
from ldm.run_folder import is_finished, read_config

Kind = Literal["autoencoder", "diffusion"]
STAGES: dict[Kind, str] = {"autoencoder": "stage one", "diffusion": "stage two"}


@dataclass
class Record:
    """One run.

    Attributes:
        label: what tells it from the other runs of a report.
        described: its run.json: preset, command, versions.
        config: the resolved settings; {} where they cannot be read.
        rows: of metrics.jsonl, in order.
        result: what it ended with; None where it has not ended.
        notes: what is missing or damaged, each a sentence for the page.
        sha256: of its model's weights, once the model has been read.
    """

    folder: Path
    kind: Kind
    label: str
    described: dict[str, Any]
    config: Tree
    rows: list[dict[str, float]]
    result: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)
    sha256: str | None = None

    @property
    def images_seen(self) -> int:
        """As far as its metrics or its result tell."""
        last = [row["images_seen"] for row in self.rows[-1:]]
        told = (self.result or {}).get("images_seen")
        return int(max([*last, told if isinstance(told, int) else 0]))

    @property
    def resolution(self) -> int:
        """Side of the images that it ends with and is validated on, pixels; 0 where not known."""
        phases = self.config.get("phases")  # stage two has none
        last = phases[-1] if isinstance(phases, list) and phases else self.config
        side = last.get("resolution") if isinstance(last, dict) else None
        if side is None and self.result is not None:  # before its end, a larger one may follow
            side = next((r["resolution"] for r in self.rows[::-1] if "resolution" in r), None)
        return int(side) if isinstance(side, int | float) else 0

    def newest_picture(self, prefix: str) -> Path | None:
        """The newest of its pictures whose name begins so: they are numbered by images seen."""
        found = sorted((self.folder / "pictures").glob(f"{prefix}-*.png"))
        return found[-1] if found else None


def read_records(words: Sequence[str | Path]) -> list[Record]:
    """The runs in some folders, each once: a run's own, or one that holds runs, as a demo's does.

    Args:
        words: PATH, or NAME=PATH; a name that is not given is the end of the path.

    Raises:
        UsageError: two runs are given one name.
        LdmError: a path is no folder, or neither a run nor a folder of runs.
    """
    folders: dict[Path, tuple[str, Path]] = {}
    for word in words:
        name, equals, rest = str(word).partition("=")
        named = bool(name and equals and rest) and "/" not in name and not Path(word).exists()
        path = Path(rest) if named else Path(word)
        for folder in _runs_in(path):
            label = "" if not named else name if folder == path else f"{name}/{folder.name}"
            first, _ = folders.setdefault(folder.resolve(), (label, folder))
            if first != label:
                raise UsageError(f"{folder} is given as '{first}' and as '{label}': give it once")
    ends = _tell_apart(list(folders))
    labels = [label or end for (label, _), end in zip(folders.values(), ends, strict=True)]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UsageError(f"two runs are called '{twice}': say NAME=PATH, each another name")
    read = zip(folders.values(), labels, strict=True)
    return [_read_records(folder, label) for (_, folder), label in read]


def _runs_in(path: Path) -> list[Path]:
    if path.is_file():
        raise LdmError(f"{path} is a file: give the folder of its run, such as {path.parent}")
    if not path.is_dir():
        raise LdmError(f"no folder at {path}: give that of a run, such as runs/<time>-<preset>")
    if _kind(path) is not None:
        return [path]
    found = sorted(mark.parent for mark in path.glob("*/run.json") if _kind(mark.parent))
    if not found:
        raise LdmError(
            f"{path} holds no run of ours (no run.json that can be read, in it or one below): "
            "give a folder that `ldm train-ae` or `ldm train-diffusion` has made"
        )
    return found


def _tell_apart(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    deepest = max(len(folder.parts) for folder in folders)
    for depth in range(1, deepest + 1):
        labels = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(labels):
            return labels
    return [str(folder) for folder in folders]


def _read_records(folder: Path, label: str) -> Record:
    notes = []
    config = read_config(folder)
    if config is None:
        notes.append("config.yaml is not there or damaged: its settings are not shown.")
    rows = read_rows(folder / "metrics.jsonl")
    if not rows:
        notes.append("metrics.jsonl is not there or empty: it has no curves.")
    result = read_json(folder / "result.json")
    if is_finished(folder) and result is None:
        notes.append("result.json is damaged: its last numbers are not shown.")
    described = read_json(folder / "run.json") or {}
    kind = described["kind"]
    return Record(folder, kind, label, described, config or {}, rows, result, notes)


def _kind(folder: Path) -> Kind | None:
    kind = (read_json(folder / "run.json") or {}).get("kind")
    return kind if kind in STAGES else None


NAMES = (
    "rfid", "fid", "kid", "lpips", "psnr", "ssim", "precision", "recall", "swd", "loss"
)  # fmt: skip
"""Of numbers, in our files."""
SAMPLES = (
    # beside samples, beside an archive of samples, and straight from the model
    "samples/*/fid*.json", "samples/*.fid*.json", "fid/*.json",
)  # fmt: skip
NO_MATTER = ("crop", "flip", "labels", "workers")  # all is measured on centres, each image once


@dataclass
class Measurement:
    """One measuring of one run, or several of the same images that agree.

    Attributes:
        what: of which model, on what, in words; with its file where two would be alike.
        numbers: by their names in `NAMES`.
        spread: of those that have one, the standard deviation (FID's over its bootstrap, KID's over
            its subsets).
        doubts: what to mind when reading the numbers, each a sentence.
        sources: the files it comes from, and all that each says.
        subject: which weights or samples over which images; None where that is not said in full.
        network: what made the features; None where nothing was measured with any.
    """

    record: Record
    what: str
    numbers: dict[str, float]
    spread: dict[str, float] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    sources: list[tuple[Path, Tree]] = field(default_factory=list)
    subject: Tree | None = None
    network: Tree | None = None


def measurements(record: Record) -> list[Measurement]:
    """All that a run's folder holds; a file that is damaged is said in the run's notes."""
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
    """Whether both are of the same, made by the same, and nothing in them differs."""
    if one.subject is None or one.subject != other.subject:
        return False
    if one.network and other.network and one.network != other.network:
        return False
    pairs = ((one.numbers, other.numbers), (one.spread, other.spread))
    return all(a[name] == b[name] for a, b in pairs for name in a.keys() & b.keys())


# ---------------------------------------------------------------------------------- reading
def _read_measurements(record: Record) -> Iterator[Measurement]:
    if record.result is not None:
        yield from _of_training(record, record.result)
    for path in sorted(record.folder.glob("eval/*.json"), key=_place):
        tree = read_json(path)
        trees = [] if tree is None else tree.get("evaluations", [tree])
        for each in trees:
            if isinstance(each, dict):
                yield _of_evaluation(record, path, each)
        if not trees:
            record.notes.append(f"{path} is damaged: its numbers are not shown.")
    for path in sorted({p for glob in SAMPLES for p in record.folder.glob(glob)}, key=_place):
        tree = read_json(path)
        if tree is not None:
            yield _of_samples(record, path, tree)
        else:
            record.notes.append(f"{path} is damaged: its numbers are not shown.")


def _place(path: Path) -> tuple[Path, str]:
    """What was measured as by default comes before what has further words in its name."""
    return path.parent, path.stem


def _of_training(record: Record, result: Mapping[str, Any]) -> Iterator[Measurement]:
    """What a run measured of itself at its end, and of its best weights."""
    seen = _many(record.images_seen, "images seen")
    images = _images(result.get("count"), "held-out images", record.resolution)
    yield Measurement(record, _join("at the end", seen, images), _known(result))
    best = result.get("best")
    if not isinstance(best, dict) or best.get("images_seen") == result.get("images_seen"):
        return
    if numbers := _known(best):
        seen = _many(best.get("images_seen"), "images seen")
        images = _images(best.get("count"), "held-out images", record.resolution)
        yield Measurement(record, _join("best.pt", seen, images), numbers)


def _of_evaluation(record: Record, path: Path, tree: Tree) -> Measurement:
    numbers, model, data = map(tree.get, ("numbers", "model", "data"))
    images = _images(tree.get("count"), "images", tree.get("resolution"))
    measured = _measured(record, numbers if isinstance(numbers, dict) else tree, path, tree)
    if not (isinstance(model, dict) and isinstance(data, dict) and "source" in data):
        measured.what = _join(path.stem, images)
        return measured
    which = _which_model(record, Path(str(model.get("path", ""))))
    measured.what = _join(which, str(data["source"]), str(tree.get("split", "")), images)
    if "sha256" in model:
        kept = ("prepared", "split", "resolution", "count", "recon", "corrupt")
        measured.subject = {key: tree.get(key) for key in kept}
        measured.subject |= {"model": model["sha256"], "data": _without(data, NO_MATTER)}
    return measured


def _of_samples(record: Record, path: Path, tree: Tree) -> Measurement:
    sides = (tree.get("samples"), tree.get("reference"))
    ours, theirs = (side if isinstance(side, dict) else {} for side in sides)
    if path.parent.name == "fid":
        name = path.stem
    elif path.parent.name == "samples":
        name = path.name.rpartition(".fid")[0]
    else:
        name = path.parent.name
    images = _images(ours.get("count"), "images", tree.get("resolution"))
    measured = _measured(record, tree, path, tree)
    measured.what = _join(f"samples {name}", images)
    measured.what += f" against {theirs['what']}" if "what" in theirs else ""
    if "fingerprint" in ours and theirs:
        kept = ("what", "split", "count", "prepared", "filter")
        data = theirs.get("data")
        measured.subject = {
            # the same images in a folder and in its archive are two rows
            "folder": "" if path.parent.name == "fid" else name,
            **{key: ours.get(key) for key in ("fingerprint", "filter")},
            "reference": {key: theirs.get(key) for key in kept},
            "data": _without(data, NO_MATTER) if isinstance(data, dict) else None,
        }
    return measured


def _measured(record: Record, numbers: Mapping[str, Any], path: Path, tree: Tree) -> Measurement:
    """All of a file but what it is of."""
    interval, doubtful, details = map(tree.get, ("fid_interval", "doubtful", "details"))
    spread = {
        "fid": interval.get("std") if isinstance(interval, dict) else None,
        # an evaluation of stage one has it among its details
        "kid": (details if isinstance(details, dict) else tree).get("kid_std"),
    }
    doubts = [*_strings(tree.get("warnings")), *_strings(tree.get("notes"))]
    doubts += _strings(list(doubtful.values()) if isinstance(doubtful, dict) else None)
    model, network = tree.get("model"), tree.get("extractor")
    subject = str(model["path"]) if isinstance(model, dict) and "path" in model else ""
    if subject:
        # the row says which: said of several models it is one sentence
        doubts = [
            f"the model {said.removeprefix(f'{subject} ')}"
            if said.startswith(f"{subject} ")
            else said
            for said in doubts
        ]
    measured = Measurement(record, "", _known(numbers), _known(spread), doubts, [(path, tree)])
    if isinstance(network, dict):
        measured.network = network | {"mode": tree.get("mode")}
    return measured


# ------------------------------------------------------------------------------------ words
def _images(count: Any, what: str, side: Any) -> str:
    """How many, and how large; whichever is known."""
    at = f"at {side}²" if isinstance(side, int) and side > 0 else ""
    return " ".join(filter(None, (_many(count, what), at)))


def _which_model(record: Record, path: Path) -> str:
    """A model that is not a run's newest: another of its files, or another's altogether, for one
    file may hold evaluations of several; else ""."""
    is_file = path.suffix in (".pt", ".safetensors")
    if (path.parent if is_file else path).name not in ("", record.folder.name):
        return str(path)
    return path.name if is_file and path.name != "ckpt.pt" else ""


def _many(count: Any, what: str) -> str:
    return f"{count:,} {what}" if isinstance(count, int) else ""


def _join(*words: str) -> str:
    return ", ".join(filter(None, words))


def _without(tree: Mapping[str, Any], keys: Sequence[str]) -> Tree:
    return {key: value for key, value in tree.items() if key not in keys}


def _strings(told: Any) -> list[str]:
    found = [each for each in told if isinstance(each, str)] if isinstance(told, list) else []
    return list(dict.fromkeys(found))  # one sentence may be said of several numbers


def _known(tree: Mapping[str, Any]) -> dict[str, float]:
    """Those of a file's values that are numbers a reader looks for."""
    found = {}
    for name in NAMES:
        value = tree.get(name)
        value = value.get("mean") if isinstance(value, dict) else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    return found
