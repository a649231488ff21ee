"""Files written whole or not at all.

Each is written beside its final name, flushed, then renamed: a full disk or a kill at any moment
leaves the last good file as it was. A power cut may not, for the folder itself is not flushed.
"""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from errno import EISDIR
from pathlib import Path
from typing import IO, Any

from ldm.errors import LdmError


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Call `write(file)` on a file beside `path`, flush it, then rename it to `path`.

    Raises:
        LdmError: the disk is full or the folder cannot be written; what stood at `path` stays.
    """
    write_together({path: write})


def write_together(files: Mapping[Path, Callable[[IO[bytes]], Any]]) -> None:
    """Write several files that belong together: each beside its path, then all renamed in order.

    The last one tells what the others are. While they are exchanged it is not there, so that a kill
    just then leaves what is plainly incomplete, not new files under an old description.

    Raises:
        LdmError: the disk is full or the folder cannot be written; what stood there stays.
    """
    besides = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in files}
    *others, last = files
    try:
        for path, write in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():  # renaming would fail, and too late
                raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
            with besides[path].open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        if others:
            last.unlink(missing_ok=True)
        for path, beside in besides.items():
            beside.replace(path)
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError of its own in the place of a failed write's OSError
        failure = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(failure, OSError):
            raise
        raise LdmError(
            f"could not write {path} ({failure.strerror or failure}): make room or choose another "
            "folder; what was saved before is untouched"
        ) from error
    finally:
        for beside in besides.values():
            with suppress(OSError):  # what went wrong above is what is told
                beside.unlink()


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if it is absent, unreadable or something else."""
    try:
        tree = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, whole or not at all."""
    write_atomically(path, lambda file: file.write(to_json(value)))


def to_json(value: Any) -> bytes:
    """Readable JSON."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
