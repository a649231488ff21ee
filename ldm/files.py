"""Atomic writes, and bounded reads of regular files.

A file is written beside its final name, flushed, then renamed: a full disk or a killed process
leaves the previous file intact. A power failure may not, because the folder is not flushed.
"""

import json
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from errno import EFBIG, EINVAL, EISDIR
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from ldm.errors import LdmError

Content = bytes | Callable[[IO[bytes]], Any]
"""Bytes of a file, or a function that writes them into the open file."""


def write_atomically(path: Path, content: Content) -> None:
    """Write a file beside `path`, flush it, then rename it to `path`."""
    write_together({path: content})


def write_together(files: Mapping[Path, Content]) -> None:
    """Write several files beside their paths, then rename all of them in order.

    The last file describes the others. It is removed while they are replaced, so that a crash
    leaves an obviously incomplete set rather than a stale description.
    """
    partials = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in files}
    *others, last = files
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():  # the rename would fail, after the work
                raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
            with partials[path].open("wb") as file:
                file.write(content) if isinstance(content, bytes) else content(file)
                file.flush()
                os.fsync(file.fileno())
        if others:
            last.unlink(missing_ok=True)
        for path, partial in partials.items():
            partial.replace(path)
    except (OSError, RuntimeError) as error:
        # torch.save replaces the OSError of a failed write by a RuntimeError
        failure = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(failure, OSError):
            raise
        raise LdmError(
            f"could not write {path} ({failure.strerror or failure}): free disk space or choose "
            "another folder; earlier files are intact"
        ) from error
    finally:
        for partial in partials.values():
            with suppress(OSError):  # the error above is the one to report
                partial.unlink()


def check_writable(*paths: Path, advice: str = "give --out another file") -> None:
    """Raise an LdmError for files that could not be written, before hours of work.

    Nothing is created: a file that is removed at once is written where the folders begin that are
    missing. `advice` ends the error message.
    """
    for path in paths:
        if path.is_dir():
            inside = path / f"result{path.suffix or '.json'}"
            raise LdmError(f"{path} is a folder: give a file, such as {inside}")
        folder = next(folder for folder in path.absolute().parents if os.access(folder, os.F_OK))
        beside = folder / f".{path.name}.{os.getpid()}.partial"
        try:
            beside.touch()
            beside.unlink(missing_ok=True)
        except OSError as error:
            reason = f"{folder} is a file" if folder.is_file() else error.strerror
            raise LdmError(f"could not write {path} ({reason}): {advice}") from error


def open_regular(path: Path, flags: int = os.O_RDONLY, mode: str = "rb") -> BinaryIO:
    """Open a file; an OSError for a pipe, a socket or a device, which may block or never end.

    With flags that write, links are not followed either: what they point to is not ours.
    """
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if flags & (os.O_WRONLY | os.O_RDWR):
        flags |= getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(EINVAL, "not a regular file", str(path))
        if flags & (os.O_WRONLY | os.O_RDWR) and found.st_nlink > 1:
            raise OSError(EINVAL, "a file with another name elsewhere", str(path))
        return cast(BinaryIO, os.fdopen(descriptor, mode))
    except OSError:
        os.close(descriptor)
        raise


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file; an OSError if it is larger than `limit` bytes."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise OSError(EFBIG, f"larger than {limit} bytes", str(path))
        return file.read()


def read_json(path: Path) -> dict[str, Any] | None:
    """Read the JSON object in a file; None if it is absent, unreadable or not an object."""
    try:
        tree = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, atomically."""
    write_atomically(path, to_json(value))


def to_json(value: Any) -> bytes:
    """Format a value as readable JSON."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
