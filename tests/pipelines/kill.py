"""Training runs killed at a chosen moment, and what they must leave once resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.checkpoint import load_model
from ldm.files import BackgroundWriter
from ldm.logbook import read_rows
from ldm.run_folder import TrainingState

VOLATILE = ("images_per_second", "data_wait")
"""Metrics of the machine, in result.json and the log."""


class Killed(BaseException):
    """Stands for a kill: nothing in the code catches it."""


def kill(patch: pytest.MonkeyPatch, owner: Any, name: str, images_seen: int) -> None:
    """Raise after the first call of `owner.name` with `images_seen` images trained on.

    Files are written at once, not beside training, so that the moment is known.
    """
    seen, advance, call = [0], TrainingState.advance, getattr(owner, name)

    def counted(state):
        advance(state)
        seen[0] = state.images_seen

    def killing(*args, **kwargs):
        result = call(*args, **kwargs)
        if seen[0] == images_seen:
            raise Killed
        return result

    def at_once(writer, job):
        job()

    patch.setattr(BackgroundWriter, "submit", at_once)
    patch.setattr(TrainingState, "advance", counted)
    patch.setattr(owner, name, killing)


def outcome(folder: Path, kind: str) -> dict[str, Any]:
    """Everything that a finished run leaves, apart from times."""
    models = {}
    for path in (*folder.glob("*.pt"), *folder.glob("*.safetensors")):
        model = load_model(path, kind)
        origin = {key: model.provenance.get(key) for key in ("images_seen", "held_out")}
        models[path.name] = (model.sha256, origin)
    result = json.loads((folder / "result.json").read_text())
    # a NaN, of a band of noise levels without an image, does not equal itself
    numbers = {key: repr(result[key]) for key in result if key not in VOLATILE}
    rows = [
        {key: value for key, value in row.items() if key not in VOLATILE}
        for row in read_rows(folder / "metrics.jsonl")
    ]
    pictures = {path.name: path.read_bytes() for path in (folder / "pictures").iterdir()}
    snapshots = {path.name: path.read_bytes() for path in folder.glob("ema/*")}
    found = {"models": models, "result": numbers, "rows": rows, "pictures": pictures}
    return found | {"snapshots": snapshots}


def forget(folder: Path, *names: str) -> None:
    """Take values out of the last saved state, as an earlier version left it; unfinish the run."""
    path = max(folder.glob("state/*/state.pt"), key=lambda path: int(path.parent.name))
    tree = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in tree.items() if key not in names}, path)
    (folder / "result.json").unlink()
