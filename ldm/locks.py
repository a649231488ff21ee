"""The lock of a folder that a command fills, so that two commands do not mix their files in it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import LdmError
from ldm.files import clear_partials, keep, lock_open, open_regular

ANOTHER = "give --out another folder"


@contextmanager
def lock(folder: Path, advice: str = ANOTHER, wait: bool = False) -> Iterator[None]:
    """Make a folder and lock it; inside the `with`, no other process fills it.

    Half-written files of killed processes are removed from it. Once someone has removed the folder,
    nothing is written into it any more. On several processes, the main one takes the lock.

    Args:
        advice: ends the error messages.
        wait: until another process is done, for moments of writing, rather than fail.

    Raises:
        LdmError: another process holds the lock, or the folder cannot be written.
    """
    path = folder / ".lock"
    for tries in reversed(range(10)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # never truncated, read or removed
            file = open_regular(path, os.O_WRONLY | os.O_CREAT, "wb")
        except OSError as error:
            at = path if os.path.lexists(path) else folder
            raise LdmError(f"could not write in {at} ({error.strerror}): {advice}") from error

        def is_ours(descriptor: int = file.fileno()) -> bool:
            try:
                return os.path.samestat(path.stat(), os.fstat(descriptor))
            except OSError:
                return False

        with file:
            if lock_open(file.fileno(), wait) is False:
                raise LdmError(f"another process is at work in {folder}: wait for it, or {advice}")
            if tries and not is_ours():  # the folder was removed in between
                continue
            clear_partials([folder])
            # some file systems number a file anew at every look
            with keep(folder, is_ours if is_ours() else None):
                yield
            return
