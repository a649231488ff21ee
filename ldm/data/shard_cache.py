"""Files from object storage, web servers and pipes: fetched whole, tried again, and kept.

Transfers are those of fsspec, and of webdataset for pipes.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from errno import ENOSPC
from functools import partial
from hashlib import sha256
from pathlib import Path
from queue import Empty, SimpleQueue
from secrets import token_hex
from typing import Any, NamedTuple

from ldm.data.shard_index import INDEX, ShardIndex, Stamp, read_shards, write_index
from ldm.data.sources import UTF8
from ldm.data.workers import stopping
from ldm.errors import Interrupted, LdmError, brief
from ldm.files import lock, sha256_of
from ldm.hub import cache_folder

PIPE, MEMBER = "pipe:", "shard.tar"
TRIES, PAUSE = 5, 1.0
"""Attempts to fetch a file, and seconds between the first two, twice as many between the next."""
PATIENCE = 60
"""Seconds without a byte after which an attempt is given up."""


# ---------------------------------------------------------------------------------- transfers
def fetch(url: str, target: Path, check: Callable[[Path], object] = Path.stat) -> None:
    """Fetch a file to `target`; what does not arrive, or not whole, is tried again.

    Args:
        check: raises an OSError or LdmError for a file that is not whole, before it has its name.

    Raises:
        LdmError: the file does not exist or may not be read, or all attempts failed.
    """
    for attempt in range(TRIES):
        # the name of a half-written file, which `clear_partials` removes
        beside = target.with_name(f".{target.name}.{token_hex(8)}.partial")
        try:
            _transfer_watched(url, beside)
            check(beside)
            beside.replace(target)
            return
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception as error:  # of any library
            reason, last = brief(error), error
            if _is_final(error):
                text = f"{url} cannot be read ({reason}): check it, and your access"
                raise LdmError(text) from error
        finally:
            beside.unlink(missing_ok=True)
        if attempt < TRIES - 1 and stopping.wait(PAUSE * 2**attempt):
            raise Interrupted(f"stopped while fetching {url}")
    raise LdmError(
        f"{url} could not be fetched in {TRIES} attempts, the last of which ended so: {reason}: "
        "see to the connection, and run the same command again"
    ) from last


def _is_final(error: Exception) -> bool:
    """True if another attempt would fail in the same way."""
    status = getattr(error, "status", None) or 0  # of HTTP; 408 and 429 ask for another attempt
    return (
        isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError)
        or (400 <= status < 500 and status not in (408, 429))
        or getattr(error, "errno", None) == ENOSPC
        or "Credential" in type(error).__name__
    )


def _transfer_watched(url: str, path: Path) -> None:
    """Transfer a file in a thread, which is left alone when no byte comes for `PATIENCE`."""
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def run() -> None:
        try:
            _transfer(url, path)
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    threading.Thread(target=run, daemon=True).start()
    size, since = -1, time.monotonic()
    while True:
        try:
            error = ended.get(timeout=min(1, PATIENCE / 4))
        except Empty:
            now = path.stat().st_size if path.exists() else -1
            if now > size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                raise TimeoutError(f"no byte for {PATIENCE} s") from None
            if stopping.is_set():
                raise Interrupted(f"stopped while fetching {url}") from None
            continue
        if error is not None:
            raise error
        return


def _transfer(url: str, path: Path) -> None:
    if url.startswith(PIPE):
        from webdataset.gopen import gopen

        with gopen(url, "rb") as pipe, path.open("wb") as file:
            while data := pipe.read(2**20):
                file.write(data)
        return
    system, inside = file_system(url)
    system.get_file(inside, str(path))


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and its path there."""
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout

        # its own limit, 5 min for a whole file, would cut off large shards
        options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=PATIENCE)}
    return fsspec.core.url_to_fs(url, **options)


def read_small(url: str, missing: bytes | None = None) -> bytes | None:
    """Read a small file, such as a manifest; `missing` if there is none."""
    path = cache_folder() / "shards" / f"{token_hex(8)}.small"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fetch(url, path)
        return path.read_bytes()
    except LdmError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return missing
        raise
    finally:
        path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------- cache
class Shard(NamedTuple):
    """A shard elsewhere; `bytes` and `sha256` are 0 and "" if they are not known."""

    url: str
    bytes: int = 0
    version: int = 0
    sha256: str = ""


class ShardCache:
    """Whole shards in `$LDM_CACHE/shards`, shared by all processes; the longest unused make room.

    Args:
        limit: bytes of all together.
        labels: read classes.
    """

    def __init__(self, limit: int, labels: bool) -> None:
        self.folder, self.limit, self.labels = cache_folder() / "shards", limit, labels

    def open(self, shard: Shard) -> tuple[Path, ShardIndex]:
        """Return the file of a shard, which is fetched if need be, and its index."""
        name = sha256("\0".join(map(str, shard)).encode(*UTF8)).hexdigest()[:24]
        home = self.folder / name
        if found := self._find(home):
            return found
        with lock(home, wait=True):  # of several processes, one fetches it
            if not self._find(home):
                self._make_room(shard, shard.bytes)
                fetch(shard.url, home / MEMBER, lambda path: self._check(shard, path, home))
                self._make_room(shard, 0, home)
        return self._find(home) or self.open(shard)

    def _find(self, home: Path) -> tuple[Path, ShardIndex] | None:
        try:
            index = ShardIndex(home / INDEX)
            os.utime(home / MEMBER)  # it was used now
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (home / MEMBER, index) if index.has_labels >= self.labels else None

    def _check(self, shard: Shard, path: Path, home: Path) -> None:
        size = path.stat().st_size
        if shard.bytes and size != shard.bytes:
            raise OSError(f"{size:,} of {shard.bytes:,} bytes arrived")
        if shard.sha256 and sha256_of(path) != shard.sha256:
            raise OSError("other bytes arrived than were written (SHA-256)")
        read = partial(read_shards, home, {}, self.labels)
        try:
            write_index(home / INDEX, [Stamp(path.name, size, 0)], self.labels, read)
        except LdmError as error:
            raise OSError(str(error).replace(str(path), shard.url)) from error

    def _make_room(self, shard: Shard, size: int, keep: Path | None = None) -> None:
        """Remove the longest unused shards until `size` bytes more do not pass the limit."""
        if size > self.limit:
            raise LdmError(
                f"{shard.url} has {size / 1e9:.1f} GB, more than data.cache_gb="
                f"{self.limit / 1e9:g} allows: raise it"
            )
        with lock(self.folder, wait=True):
            stats = {}
            for file in self.folder.glob("*/*"):
                with suppress(OSError):
                    stats[file] = file.stat()
            total = size + sum(stat.st_size for stat in stats.values())
            tars = sorted((s.st_mtime_ns, f) for f, s in stats.items() if f.name == MEMBER)
            for _, tar in tars:
                if total <= self.limit:
                    break
                if tar.parent != keep:
                    with suppress(LdmError), lock(tar.parent):  # but not one that is being fetched
                        for file in (tar, tar.with_name(INDEX)):
                            file.unlink(missing_ok=True)
                            total -= stats[file].st_size if file in stats else 0
