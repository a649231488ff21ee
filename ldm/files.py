"""Atomic writes, bounded reads of regular files, and the lock of a folder that a command fills.

A file is written beside its final name, flushed, then renamed: a full disk or a killed process
leaves the previous file intact. A power failure may not, because the folder is not flushed. What a
kill leaves of several files that belong together is finished by the next process that writes there.
"""

import io
import json
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from errno import EFBIG, EINVAL, EISDIR
from hashlib import file_digest
from pathlib import Path
from types import ModuleType
from typing import IO, Any, BinaryIO, cast

from ldm.errors import LdmError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # this system has no such locks
    fcntl = None

Content = bytes | Callable[[IO[bytes]], Any]
"""Bytes of a file, or a function that writes them into the open file."""
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
PARTIAL = re.compile(r"\.([^/\\]+)\.([0-9a-f]{16}|\d+)\.partial")
"""Name of a half-written file: its name to be, and a random number, in earlier versions that of the
process."""
DAY, PATIENCE = 86_400, 10
"""Seconds."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
"""Start of the text that Git keeps in the place of a large file."""
WRITER = "ldm writer"
"""Name of the threads of `BackgroundWriter`."""
SET = ".set"
"""Lists the files of a set that are written, and are being renamed."""


def write_atomically(path: Path, content: Content) -> None:
    """Write a file beside `path`, flush it, then rename it to `path`."""
    write_together({path: content})


def write_together(files: Mapping[Path, Content]) -> None:
    """Write several files of a folder beside their paths, then rename all of them in order.

    The last file describes the others. It is removed while they are replaced, so that a kill
    leaves an obviously incomplete set rather than a stale description; see `finish_set`.
    """
    token = secrets.token_hex(8)  # not the number of the process: machines share disks, not numbers
    partials = {path: path.with_name(f".{path.name}.{token}.partial") for path in files}
    try:
        with ExitStack() as opened:
            for path, content in files.items():
                _check_kept(path)
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.is_dir():  # the rename would fail, after the work
                    raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
                with _in_turn(path.parent):  # or it could be cleared before it is locked
                    file = opened.enter_context(open_regular(partials[path], NEW, "wb"))
                    lock_open(file.fileno())  # until it has its name, see `clear_partials`
                file.write(content) if isinstance(content, bytes) else content(file)
                file.flush()
                os.fsync(file.fileno())
                if fcntl is None:  # then no system renames a file that is open
                    file.close()
            if len(partials) > 1:
                _rename_set(path.parent, [partial.name for partial in partials.values()])
            else:
                finish_set(path.parent)  # or it would replace this file later
                partials[path].replace(path)
    except (OSError, RuntimeError) as error:
        # torch.save replaces the OSError of a failed write by a RuntimeError
        failure = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(failure, OSError):
            raise
        _check_kept(path)
        raise LdmError(
            f"could not write {path} ({failure.strerror or failure}): free disk space or choose "
            "another folder; earlier files are intact"
        ) from error
    finally:
        if not os.path.lexists(path.parent / SET):  # else `finish_set` needs them
            for partial in partials.values():
                with suppress(OSError):  # the error above is the one to report
                    partial.unlink()


def _rename_set(folder: Path, partials: list[str]) -> None:
    """Give complete files their names; if a kill interrupts it, the next process finishes it."""
    with _in_turn(folder):
        _finish(folder)
        beside = folder / f"{SET}.{secrets.token_hex(8)}.partial"
        try:
            with open_regular(beside, NEW, "wb") as file:
                file.write(to_json({"partials": partials}))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(folder / SET)
        finally:
            beside.unlink(missing_ok=True)
        _finish(folder)


def finish_set(folder: Path) -> list[Path]:
    """Rename the files of a `write_together` that was killed while it renamed them; return them."""
    if not os.path.lexists(folder / SET):
        return []
    with _in_turn(folder):
        return _finish(folder)


def _finish(folder: Path) -> list[Path]:
    marker, pairs = folder / SET, dict[Path, Path]()
    if not os.path.lexists(marker):
        return []
    try:
        content = json.loads(read_bytes(marker, 1 << 16))
        found = [PARTIAL.fullmatch(name) for name in content["partials"]]
        pairs = {folder / match[0]: folder / match[1] for match in found if match}
        *_, (last, described) = pairs.items()
        if last.exists():
            described.unlink(missing_ok=True)
        for partial, path in pairs.items():
            if partial.is_file() and not partial.is_symlink():
                partial.replace(path)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        marker.unlink(missing_ok=True)  # or it would block the folder
        if isinstance(error, OSError):
            raise
    marker.unlink(missing_ok=True)
    return [*pairs.values()]


def clear_partials(folders: Iterable[Path]) -> None:
    """Remove the half-written files of killed processes; one that is being written is locked.

    Where nothing can be locked, those of a day ago are removed.
    """
    for folder in filter(Path.is_dir, folders):
        with _in_turn(folder):
            _finish(folder)
            for path in folder.glob(".*.partial"):
                if not PARTIAL.fullmatch(path.name):
                    continue
                # opened to write: NFS locks no others
                with suppress(OSError), open_regular(path, os.O_RDWR) as file:
                    locked, written = lock_open(file.fileno()), os.fstat(file.fileno()).st_mtime
                    if locked or (locked is None and written < time.time() - DAY):
                        path.unlink()


class BackgroundWriter:
    """Runs jobs that write files, one after another, in a thread beside the caller.

    After a job that failed, none of those that wait is begun: their files may describe its own.

    Args:
        on_failure: called in the thread, as soon as a job has failed.
    """

    def __init__(self, on_failure: Callable[[], None]) -> None:
        self.on_failure = on_failure
        self._last: threading.Thread | None = None
        self._error: Exception | None = None

    def submit(self, job: Callable[[], Any]) -> threading.Thread:
        """Begin a job in a thread once those before it are done; it must own all that it reads."""

        def work(before: threading.Thread | None = self._last) -> None:
            if before is not None:
                before.join()
            try:
                if self._error is None:
                    job()
            except Exception as error:
                self._error = error
                self.on_failure()

        # a daemon: a process that a third Ctrl-C ends does not wait for it
        self._last = threading.Thread(target=work, name=WRITER, daemon=True)
        self._last.start()
        return self._last

    def join(self, job: threading.Thread | None = None) -> None:
        """Wait for a job, by default the last.

        It joins the thread: one that still frees tensors while Python exits aborts the process.
        """
        if thread := job or self._last:
            thread.join()

    def wait(self, job: threading.Thread | None = None) -> None:
        """Wait for a job, by default the last; then raise the error of the failed one, once."""
        self.join(job)
        error, self._error = self._error, None
        if error is not None:
            raise error

    @staticmethod
    def any_at_work() -> bool:
        """True if a writer of this process is at work, or waits for its turn."""
        return any(thread.name == WRITER for thread in threading.enumerate())


# --------------------------------------------------------------------------------- processes
def lock_open(descriptor: int, wait: bool = False) -> bool | None:
    """Lock an open file or folder until it is closed; False if another process has locked it.

    None where the system or the file system has no such locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES
        return False
    except OSError:
        return None
    return True


@contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """Wait until no other process renames a set in this folder, for some seconds: such takes none,
    and the folder may be locked by others, as by `flock FOLDER ldm …`."""
    with ExitStack() as opened:
        with suppress(OSError):  # a system that does not open folders
            descriptor = os.open(folder, os.O_RDONLY)
            opened.callback(os.close, descriptor)
            until = time.monotonic() + PATIENCE
            while lock_open(descriptor) is False and time.monotonic() < until:
                time.sleep(0.01)
        yield


@contextmanager
def keep(folder: Path, is_ours: Callable[[], bool] | None = None) -> Iterator[None]:
    """Refuse to write into a folder that someone removes meanwhile: it would begin in the middle.

    Args:
        is_ours: tells whether it is still the same folder; None: whether there is one.
    """
    folder = folder.absolute()
    if folder in _kept or not folder.is_dir():  # the lock keeps it; or this disk shows it late
        yield
        return
    _kept[folder] = is_ours or folder.is_dir
    try:
        yield
    finally:
        del _kept[folder]


_kept: dict[Path, Callable[[], bool]] = {}


def _check_kept(path: Path) -> None:
    for folder in path.absolute().parents if _kept else ():
        is_ours = _kept.get(folder)  # threads may let go of it meanwhile
        if is_ours is not None and not is_ours():
            raise LdmError(
                f"{folder} was removed or replaced while this process worked in it: run the same "
                "command to begin again"
            )


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


# ------------------------------------------------------------------------------------ checks
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
        beside = folder / f".{path.name}.{secrets.token_hex(8)}.partial"
        try:
            clear_partials([path.parent])
            open_regular(beside, NEW).close()
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
            raise OSError(EINVAL, "another name of a file elsewhere: remove it", str(path))
        return cast(BinaryIO, open(path, mode, opener=lambda *_: descriptor))
    except OSError:
        os.close(descriptor)
        raise


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file; an OSError if it is larger than `limit` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(EFBIG, f"larger than {limit} bytes", str(path))
        return file.read(size)


def lfs_pointer(path: Path, content: str = "the weights") -> str | None:
    """The error message for a Git LFS pointer in place of a file's content; None for another."""
    try:
        with open_regular(path) as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return None
    how = "run `git lfs pull`, or download the file"
    return f"{path} is a Git LFS pointer, not {content}: {how}" if is_pointer else None


COMPRESSIONS = {
    b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"
}  # fmt: skip
"""Programs that unpack, by the first bytes of their files."""


def find_compression(path: Path) -> str | None:
    """Return the program that unpacks a compressed file; None for another file."""
    try:
        with open_regular(path) as file:
            start = file.read(8)
    except OSError:
        return None
    return next((name for magic, name in COMPRESSIONS.items() if start.startswith(magic)), None)


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a regular file."""
    with open_regular(path) as file:
        return file_digest(cast(Any, file), "sha256").hexdigest()


class HeaderReader(io.BufferedReader):
    """A regular file for a library that takes sizes from the file itself.

    An OSError for more than `limit` bytes at once; a negative size reads what is left.
    """

    def __init__(self, path: Path, limit: int) -> None:
        super().__init__(cast(io.BufferedReader, open_regular(path)).detach())
        self._limit = limit

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(os.fstat(self.fileno()).st_size - self.tell(), 0)
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > self._limit:
            raise OSError(EFBIG, f"a header of {wanted:,} bytes")
        return super().read(wanted)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, atomically."""
    write_atomically(path, to_json(value))


def to_json(value: Any) -> bytes:
    """Format a value as readable JSON; a byte of a path that is no UTF-8 is an escape in it."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")


def refuse_to_overwrite(paths: Iterable[Path], folder: Path, force: bool) -> None:
    """Raise an LdmError if one of a command's paths in a folder exists, unless forced; what a kill
    left of the same command does not count."""
    interrupted = finish_set(folder)  # by a kill: the same command writes them again
    clear_partials([folder])
    there = min((path for path in paths if path.exists() and path not in interrupted), default=None)
    if there and not force:
        raise LdmError(f"{there} exists: give another name, or --force to overwrite it")
