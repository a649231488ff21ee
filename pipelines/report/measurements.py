"""What has been measured of a run: read from its folder, what is said twice once."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.config import Tree
from pipelines.report.records import Record, read_tree

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
    for each in _read(record):
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
def _read(record: Record) -> Iterator[Measurement]:
    if record.result is not None:
        yield from _of_training(record, record.result)
    for path in sorted(record.folder.glob("eval/*.json"), key=_place):
        tree = read_tree(path)
        trees = tree.get("evaluations", [tree]) if isinstance(tree, dict) else []
        for each in trees:
            if isinstance(each, dict):
                yield _of_evaluation(record, path, each)
        if not trees:
            record.notes.append(f"{path} is damaged: its numbers are not shown.")
    for path in sorted({p for glob in SAMPLES for p in record.folder.glob(glob)}, key=_place):
        tree = read_tree(path)
        if isinstance(tree, dict):
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
