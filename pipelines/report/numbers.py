"""What has been measured of runs, and all that each number depends on."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.report import page
from pipelines.report.records import Record, read_tree
from pipelines.report.settings import flatten

NUMBERS = {
    "rfid": ("rFID", ".3f"),
    "fid": ("FID", ".3f"),
    "kid": ("KID", ".5f"),
    "lpips": ("LPIPS", ".4f"),
    "psnr": ("PSNR, dB", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "swd": ("SWD ×10³", ".2f"),
    "loss": ("loss", ".4f"),
}
"""By the names they have in our files: what a reader calls them, and their digits."""


class Measurement(NamedTuple):
    """One measuring of one run.

    Attributes:
        what: of which model, on what, in words.
        numbers: by their names in `NUMBERS`.
        spread: of those that have one, the standard deviation (FID's over its bootstrap, KID's over
            its subsets).
        doubts: what to mind when reading the numbers, each a sentence.
        about: what else the file says, (dotted key, value).
    """

    record: Record
    what: str
    numbers: dict[str, float]
    spread: dict[str, float]
    doubts: list[str]
    about: list[tuple[str, str]]


def numbers_section(records: Sequence[Record], titles: Mapping[str, page.Markup], of: str) -> str:
    """A table of every measurement, and folded, where each comes from."""
    found = [measured for record in records for measured in _measurements(record)]
    names = [name for name in NUMBERS if any(name in each.numbers for each in found)]
    header = ["measured", *(NUMBERS[name][0] for name in names)]
    rows = [
        [page.under(titles[each.record.label], each.what)] + [_shown(each, name) for name in names]
        for each in found
    ]
    table = page.columns(header, rows) if rows else page.note("Nothing has been measured yet.")
    doubts = [page.note(f"{e.record.label}, {e.what}: {said}") for e in found for said in e.doubts]
    folded = [
        page.folded(f"{each.record.label}: {each.what}", page.table(each.about))
        for each in found
        if each.about
    ]
    text = (
        "What was measured, and when. Two rows may be compared where they are over the same "
        "images at the same resolution, by the same network: unfold where they come from."
    )
    origins = [page.folded(f"{r.label}: the run itself", page.table(_origin(r))) for r in records]
    return page.section(f"Numbers{of}", text, table, *doubts, *origins, *folded)


def _measurements(record: Record) -> Iterator[Measurement]:
    if record.result is not None:
        yield from _of_training(record, record.result)
    for path in sorted(record.folder.glob("eval/*.json")):
        tree = read_tree(path)
        trees = tree.get("evaluations", [tree]) if isinstance(tree, dict) else []
        for each in trees:
            if isinstance(each, dict):
                yield _of_evaluation(record, path, each)
        if not trees:
            record.notes.append(f"{path} is damaged: its numbers are not shown.")
    samples = (f for glob in ("samples/*/fid.json", "fid/*.json") for f in record.folder.glob(glob))
    for path in sorted(samples):
        tree = read_tree(path)
        if isinstance(tree, dict):
            yield _of_samples(record, path, tree)
        else:
            record.notes.append(f"{path} is damaged: its numbers are not shown.")


def _of_training(record: Record, result: Mapping[str, Any]) -> Iterator[Measurement]:
    """What a run measured of itself at its end, and of its best weights."""
    words = ["at the end", _many(record.images_seen, "images seen")]
    what = _join(*words, _many(result.get("count"), "held-out images"))
    yield Measurement(record, what, _known(result), {}, [], [])
    best = result.get("best")
    if not isinstance(best, dict) or best.get("images_seen") == result.get("images_seen"):
        return
    if numbers := _known(best):
        what = _join("best.pt", _many(best.get("images_seen"), "images seen"))
        yield Measurement(record, what, numbers, {}, [], [])


def _of_evaluation(record: Record, path: Path, tree: Mapping[str, Any]) -> Measurement:
    numbers = tree.get("numbers")
    side = f"at {tree['resolution']}²" if "resolution" in tree else ""
    what = _join(path.stem, side, _many(tree.get("count"), "images"))
    return _measured(record, what, numbers if isinstance(numbers, dict) else tree, path, tree)


def _of_samples(record: Record, path: Path, tree: Mapping[str, Any]) -> Measurement:
    sides = (tree.get("samples"), tree.get("reference"))
    ours, theirs = (side if isinstance(side, dict) else {} for side in sides)
    name = path.parent.name if path.name == "fid.json" else path.stem
    what = _join(f"samples {name}", _many(ours.get("count"), "images"))
    what += f" against {theirs['what']}" if "what" in theirs else ""
    return _measured(record, what, tree, path, tree)


def _many(count: Any, what: str) -> str:
    return f"{count:,} {what}" if isinstance(count, int) else ""


def _join(*words: str) -> str:
    return ", ".join(filter(None, words))


def _measured(
    record: Record, what: str, numbers: Mapping[str, Any], path: Path, tree: Mapping[str, Any]
) -> Measurement:
    interval, doubtful, details = map(tree.get, ("fid_interval", "doubtful", "details"))
    spread = {
        "fid": interval.get("std") if isinstance(interval, dict) else None,
        # an evaluation of stage one has it among its details
        "kid": (details if isinstance(details, dict) else tree).get("kid_std"),
    }
    doubts = [*_strings(tree.get("warnings")), *_strings(tree.get("notes"))]
    doubts += _strings(list(doubtful.values()) if isinstance(doubtful, dict) else None)
    about = _about(path, tree)
    return Measurement(record, what, _known(numbers), _known(spread), doubts, about)


def _strings(told: Any) -> list[str]:
    found = [each for each in told if isinstance(each, str)] if isinstance(told, list) else []
    return list(dict.fromkeys(found))  # one sentence may be said of several numbers


def _known(tree: Mapping[str, Any]) -> dict[str, float]:
    """Those of a file's values that are numbers a reader looks for."""
    found = {}
    for name in NUMBERS:
        value = tree.get(name)
        value = value.get("mean") if isinstance(value, dict) else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    return found


def _about(path: Path, tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All that a file says; how the model was trained is among the settings already."""
    rows, said = [("file", str(path))], {}
    for key, value in flatten(dict(tree)):
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
    rows += [(key, _text(value)) for key, value in flatten(record.described)]
    if record.sha256:
        rows.append(("ckpt.pt, SHA-256 of its weights", record.sha256))
    return rows


def _shown(measured: Measurement, name: str) -> str:
    if name not in measured.numbers:
        return ""
    digits = NUMBERS[name][1]
    text = format(measured.numbers[name], digits)
    return f"{text} ± {measured.spread[name]:{digits}}" if name in measured.spread else text


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
