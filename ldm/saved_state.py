"""The state a run resumes from: a folder for each, whole or not there, the newest few kept."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint import Damaged, read_tensors
from ldm.errors import LdmError
from ldm.files import write_atomically


def save_state(folder: Path, images_seen: int, tree: dict[str, Any], keep: int = 2) -> Path:
    """Write all that resuming needs to `folder/<images_seen>/`; keep the newest `keep`.

    The older ones go only after the new one is whole.
    """
    final, beside = folder / str(images_seen), folder / f".writing-{images_seen}"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        write_atomically(beside / "state.pt", lambda file: torch.save(tree, file))
        shutil.rmtree(final, ignore_errors=True)
        beside.replace(final)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for old in _states(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest_state(folder: Path) -> Path | None:
    """The newest complete state under a run's `state/` folder, or None."""
    states = _states(folder)
    return states[-1] if states else None


def load_state(state: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        LdmError: it cannot be read, or is damaged.
    """
    try:
        return read_tensors(state / "state.pt")
    except Damaged as error:
        raise Damaged(
            f"{state} is damaged: delete that folder, and the state before it is used"
        ) from error


def restore(parts: Mapping[str, Any], tree: Mapping[str, Any]) -> None:
    """Load into every part, by its name, what its `state_dict` gave when the tree was saved.

    Raises:
        LdmError: a part is of another shape than the one that was saved.
    """
    for name, part in parts.items():
        try:
            part.load_state_dict(tree[name])
        except torch.OutOfMemoryError:  # a RuntimeError, which says it well
            raise
        except (KeyError, RuntimeError, ValueError) as error:
            raise LdmError(
                f"the saved state of {name} does not fit: this run was begun by another version "
                "of the code (see its run.json): go on with that one, or give --out another folder"
            ) from error


def _states(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if p.name.isdigit() and (p / "state.pt").is_file())
    return sorted(found, key=lambda p: int(p.name))
