"""What runs have left in their folders, read once; what is missing is said, not raised."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ldm.config import Tree
from ldm.errors import LdmError, UsageError
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
    return [_read(folder, label) for (_, folder), label in read]


def read_tree(path: Path) -> Any | None:
    """What a JSON file holds; None where it cannot be read."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


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


def _read(folder: Path, label: str) -> Record:
    notes = []
    config = read_config(folder)
    if config is None:
        notes.append("config.yaml is not there or damaged: its settings are not shown.")
    rows = read_rows(folder / "metrics.jsonl")
    if not rows:
        notes.append("metrics.jsonl is not there or empty: it has no curves.")
    result = read_tree(folder / "result.json")
    if is_finished(folder) and not isinstance(result, dict):
        notes.append("result.json is damaged: its last numbers are not shown.")
    described = read_tree(folder / "run.json")
    result = result if isinstance(result, dict) else None
    kind = described["kind"]
    return Record(folder, kind, label, described, config or {}, rows, result, notes)


def _kind(folder: Path) -> Kind | None:
    described = read_tree(folder / "run.json")
    kind = described.get("kind") if isinstance(described, dict) else None
    return kind if kind in STAGES else None
