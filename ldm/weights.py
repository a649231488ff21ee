"""Pretrained weights: found in the usual caches, or downloaded once."""

import os
import socket
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from ldm.errors import LdmError


def cache_folder() -> Path:
    """Return the folder of downloaded weights: `$LDM_CACHE`, or `~/.cache/ldm`."""
    return Path(os.environ.get("LDM_CACHE") or Path.home() / ".cache" / "ldm")


def find_or_fetch(
    name: str, url: str, hash_prefix: str, folders: Sequence[Path], instead: str
) -> Path:
    """Find the file `name` in one of `folders`, or download it into the first."""
    found = (folder / name for folder in folders if (folder / name).is_file())
    return next(found, None) or fetch(name, url, hash_prefix, folders[0], instead)


def fetch(name: str, url: str, hash_prefix: str, folder: Path, instead: str) -> Path:
    """Download the file `name` into a folder.

    It is written beside its final name, its SHA-256 checked against `hash_prefix`, and renamed: a
    broken download leaves nothing, and concurrent processes all get the complete file.

    Args:
        instead: the end of the error message: an alternative to downloading the file.
    """
    from torch.hub import download_url_to_file

    target, timeout = folder / name, socket.getdefaulttimeout()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(30)  # seconds; torch's download has none
        download_url_to_file(url, str(target), hash_prefix=hash_prefix, progress=True)
    except (OSError, HTTPException, ValueError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or error
        raise LdmError(
            f"{name} is not on this machine and could not be fetched from {url} ({reason}): "
            f"put the file at {from_home(target)}, or {instead}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return target


def from_home(path: Path) -> str:
    """Shorten a path in the home folder to `~/…`."""
    home = Path.home()
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)
