"""Other people's pretrained weights: found where people keep them, or fetched once, whole."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from ldm.errors import LdmError


def cache_folder() -> Path:
    """Where fetched weights are kept: `$LDM_CACHE`, else `~/.cache/ldm`."""
    return Path(os.environ.get("LDM_CACHE") or Path.home() / ".cache" / "ldm")


def find_or_fetch(
    name: str, url: str, hash_prefix: str, folders: Sequence[Path], instead: str
) -> Path:
    """The file `name` from the first of `folders` that has it, else fetched into the first.

    Raises:
        LdmError: it is in none of the folders and cannot be fetched.
    """
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    return fetch(name, url, hash_prefix, folders[0], instead)


def fetch(name: str, url: str, hash_prefix: str, folder: Path, instead: str) -> Path:
    """The file `name`, fetched into a folder.

    It is written beside its final name, its SHA-256 checked against `hash_prefix`, and renamed: a
    broken download leaves nothing, and processes that race all end with the whole file.

    Args:
        instead: what a person can do when the file cannot be had, as the end of the error line.

    Raises:
        LdmError: it cannot be fetched.
    """
    target = folder / name
    try:
        from torch.hub import download_url_to_file

        target.parent.mkdir(parents=True, exist_ok=True)
        with _patience(seconds=30):
            download_url_to_file(url, str(target), hash_prefix=hash_prefix, progress=True)
    except (OSError, HTTPException, ValueError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or error
        raise LdmError(
            f"{name} is not on this machine and could not be fetched from {url} ({reason}): "
            f"put the file at {from_home(target)}, or {instead}"
        ) from error
    return target


def from_home(path: Path) -> str:
    """A path as people write it: `~/.cache/…` below the home folder."""
    home = Path.home()
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Give up on a server that says nothing for so long: torch's download has no limit itself."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
