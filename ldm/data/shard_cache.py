"""Files from object storage, web servers and pipes: fetched whole, tried again, and kept.

Transfers are those of fsspec, or of a pipe's command.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from errno import EDQUOT, ENOSPC
from functools import partial
from hashlib import sha256
from pathlib import Path
from queue import Empty, SimpleQueue
from secrets import token_hex
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from ldm.data.shard_index import INDEX, ShardIndex, Stamp, read_index, read_shards, write_index
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
SMALL_FILE = 2**26
"""Bytes of a manifest or list of shards, at most."""
ANOTHER_CACHE = "set LDM_CACHE to another folder"


# ---------------------------------------------------------------------------------- transfers
def fetch(url: str, target: Path, limit: int, check: Callable[[Path], object] = Path.stat) -> None:
    """Fetch a file to `target`; what does not arrive, or not whole, is tried again.

    Args:
        limit: bytes that are taken at most.
        check: raises an OSError for a file that is not whole, before it has its name.

    Raises:
        LdmError: the file does not exist or may not be read, or all attempts failed.
    """
    for attempt in range(TRIES):
        # the name of a half-written file, which `clear_partials` removes
        beside = target.with_name(f".{target.name}.{token_hex(8)}.partial")
        try:
            _attempt(url, beside, limit)
            check(beside)
            beside.replace(target)
            return
        except OSError as error:
            last = error
        finally:
            beside.unlink(missing_ok=True)
        if attempt < TRIES - 1 and stopping.wait(PAUSE * 2**attempt):
            raise Interrupted(f"stopped while fetching {url}")
    raise LdmError(
        f"{url} could not be fetched in {TRIES} attempts, the last of which ended so: "
        f"{brief(last)}: see to the connection, and run the same command again"
    ) from last


def _attempt(url: str, path: Path, limit: int) -> None:
    """Transfer a file once; an OSError for a failure that may pass, an LdmError for another."""
    try:
        _transfer_watched(url, path, limit)
    except (Interrupted, LdmError):
        raise
    except Exception as error:  # of any library
        reason = brief(error)
        if getattr(error, "errno", None) in (ENOSPC, EDQUOT):
            raise LdmError(
                f"{url} does not fit on the disk of {path.parent} ({reason}): free space, or lower "
                "data.cache_gb"
            ) from error
        if isinstance(error, ImportError):
            text = f"{url} needs another package ({reason}): pip install 'ldm[remote]'"
            raise LdmError(text) from error
        if _is_final(error):
            text = f"{url} cannot be read ({reason}): check it, and your access"
            raise LdmError(text) from error
        raise OSError(reason) from error


def _is_final(error: Exception) -> bool:
    """True if another attempt would fail in the same way."""
    answer = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(answer, "status_code", None) or 0
    return (
        isinstance(error, FileNotFoundError | PermissionError | ValueError)
        or (400 <= status < 500 and status not in (408, 429))  # these two ask to try again
        or "Credential" in type(error).__name__
    )


class _Abandoned(Exception):
    """Ends the thread of a transfer for which nobody waits any more."""


def _transfer_watched(url: str, path: Path, limit: int) -> None:
    """Transfer a file in a thread, which is given up when no byte comes for `PATIENCE`."""
    ended: SimpleQueue[BaseException | None] = SimpleQueue()
    commands: list[subprocess.Popen[bytes]] = []
    given_up = threading.Event()

    def advance() -> None:
        if given_up.is_set():
            raise _Abandoned

    def run() -> None:
        try:
            _transfer(url, path, advance, commands)
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    threading.Thread(target=run, daemon=True).start()
    size, since = -1, time.monotonic()
    try:
        while True:
            with suppress(Empty):
                if error := ended.get(timeout=min(1, PATIENCE / 4)):
                    raise error
                return
            now = path.stat().st_size if path.exists() else -1
            if now > size:
                size, since = now, time.monotonic()
            if size > limit:
                raise LdmError(
                    f"{url} has more than {limit:,} bytes: check it, or raise data.cache_gb"
                )
            if time.monotonic() - since > PATIENCE:
                raise TimeoutError(f"no byte for {PATIENCE} s")
            if stopping.is_set():
                raise Interrupted(f"stopped while fetching {url}")
    except BaseException:
        given_up.set()
        for command in commands:
            # its shell may have ended before its other processes
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(command.pid, signal.SIGKILL)
        raise


def _transfer(
    url: str,
    path: Path,
    advance: Callable[[], None],
    commands: list[subprocess.Popen[bytes]],
) -> None:
    """Transfer a file; a command that it starts is added to `commands`."""
    if url.startswith(PIPE):
        # in a session of its own, so that all of its processes can be ended
        command = subprocess.Popen(
            url.removeprefix(PIPE), shell=True, stdout=subprocess.PIPE, start_new_session=True
        )
        commands.append(command)
        with command, path.open("wb") as file:
            assert command.stdout is not None
            while data := command.stdout.read(2**20):
                file.write(data)
                advance()
        if command.returncode:
            raise OSError(f"its command ended with status {command.returncode}")
        return
    from fsspec.callbacks import Callback

    class Watched(Callback):
        def relative_update(self, inc: int = 1) -> None:  # after each part
            advance()

    system, inside = file_system(url)
    system.get_file(inside, str(path), callback=Watched())


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and its path there."""
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout

        # its own limit, 5 min for a whole file, would cut off large shards
        options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=PATIENCE)}
    return fsspec.core.url_to_fs(url, **options)


def read_small(url: str) -> bytes | None:
    """Read a small file, such as a manifest; None if there is none."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        try:
            fetch(url, path, SMALL_FILE)
        except LdmError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        return path.read_bytes()


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
        limit: bytes of all together, beside those that are being fetched.
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
        if shard.bytes > self.limit:
            raise LdmError(
                f"{shard.url} has {shard.bytes / 1e9:.1f} GB, more than data.cache_gb="
                f"{self.limit / 1e9:g} allows: raise it"
            )
        with lock(home, ANOTHER_CACHE, wait=True):  # of several processes, one fetches it
            if not self._find(home):
                self._make_room(shard.bytes)
                index = home / f".{INDEX}.{token_hex(8)}.partial"
                check = partial(self._check, shard, index)
                fetch(shard.url, home / MEMBER, shard.bytes or self.limit, check)
                index.replace(home / INDEX)
                self._make_room(0, home)
        return self._find(home) or self.open(shard)

    def _find(self, home: Path) -> tuple[Path, ShardIndex] | None:
        tar = home / MEMBER
        index = read_index(home / INDEX)
        with suppress(OSError):
            sizes = [] if index is None else index.table["bytes"].tolist()
            if index and sizes == [tar.stat().st_size] and index.has_labels >= self.labels:
                os.utime(tar)  # it was used now
                return tar, index
        return None

    def _check(self, shard: Shard, index: Path, path: Path) -> None:
        """Raise an OSError if a shard is not whole; else write its index."""
        size = path.stat().st_size
        if shard.bytes and size != shard.bytes:
            raise OSError(f"{size:,} of {shard.bytes:,} bytes arrived")
        if shard.sha256 and sha256_of(path) != shard.sha256:
            raise OSError("other bytes arrived than were written (SHA-256)")
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        read = partial(read_shards, path.parent, {}, self.labels)
        try:
            write_index(index, [Stamp(path.name, size, 0)], self.labels, read)
        except LdmError as error:
            text = str(error).replace(str(path), shard.url)
            if shard.bytes:  # it is whole: another attempt would bring the same
                raise type(error)(text) from error
            raise OSError(text) from error

    def _make_room(self, size: int, keep: Path | None = None) -> None:
        """Remove the longest unused shards until `size` bytes more do not pass the limit."""
        with lock(self.folder, ANOTHER_CACHE, wait=True):
            found = []
            for tar in self.folder.glob(f"*/{MEMBER}"):
                with suppress(OSError):
                    stat = tar.stat()
                    found.append((stat.st_mtime_ns, stat.st_size, tar.parent))
            total = size + sum(bytes for _, bytes, _ in found)
            for _, bytes, home in sorted(found):
                if total <= self.limit:
                    break
                if home == keep:
                    continue
                with suppress(LdmError, OSError), lock(home):  # not one that is being fetched
                    (home / MEMBER).unlink()
                    rmtree(home, ignore_errors=True)
                    total -= bytes
