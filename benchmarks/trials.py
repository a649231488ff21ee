"""Commands of `ldm` as trials: forked after all imports, stopped or starved at a file operation.

A trial costs what the command itself costs: the parent has imported everything, computes nothing,
and keeps one thread, so that a child can begin with `ldm.cli.main`.
"""

import atexit
import errno
import faulthandler
import gc
import importlib
import io
import json
import mmap
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

PACKAGES = ("ldm", "autoencoders", "diffusion", "pipelines")
FAKE_DIM = 8
"""Features of the stand-in for Inception: matrix roots of 2048 take seconds."""
MEMORY = 3 << 30
"""Bytes that a command may take beyond what its parent has."""
# "kept": damaged statistics of a reference are named, and computed again to the same numbers
VOLATILE = {
    "created", "versions", "command", "images_per_second", "data_wait", "seconds", "platform",
    "kept",
}  # fmt: skip
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Of our own lines and progress bars on a terminal."""
CANARY, GHOSTSCRIPT = "canary", "#!/bin/sh\ntouch {}\n"


@dataclass(frozen=True)
class Fault:
    """The kill or the full disk that a command meets at its n-th file operation."""

    at: int
    full: bool = False
    """The disk is full from there on; else the process is killed."""
    torn: float = 1.0
    """Share of a file's content that was written when the kill came right after its opening."""


@dataclass(frozen=True)
class Outcome:
    """The end of a command.

    Attributes:
        code: exit status; −9 after a kill; None if it hung.
        operations: file operations that it made, or had made when it was killed.
        peak: most memory, beyond its parent's, bytes.
    """

    code: int | None
    text: str
    operations: int
    peak: int

    @property
    def refused(self) -> bool:
        """True if the command ended with one line of error."""
        errors = [line for line in self.text.splitlines() if line.startswith("error: ")]
        return self.code in (1, 2) and len(errors) == 1 and not self.unexpected

    @property
    def unexpected(self) -> bool:
        """True if the command did not end as its own code says: a traceback, a crash."""
        signs = ("(unexpected: --debug", "Traceback (most", "MemoryError")
        return self.code not in (0, 1, 2, 130) or any(sign in self.text for sign in signs)

    @property
    def last(self) -> str:
        """The line that says most: the error, else the last one."""
        lines = [line for line in self.text.splitlines() if line.strip()] or [""]
        if self.code is None:
            places = re.findall(r'File "(?:.*?/)?((?:ldm|autoencoders|diffusion|pipelines)/\S+?)", '
                                r"line (\d+)", self.text)  # fmt: skip
            return "in " + ", called by ".join(":".join(place) for place in places[:3])
        return next((line for line in lines if line.startswith("error: ")), lines[-1])


def import_everything() -> None:
    """Import all modules that a command may import, and let this process compute nothing."""
    os.environ.update(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", TORCH_CPP_LOG_LEVEL="ERROR")
    import torch

    torch.set_num_threads(1)
    for package in PACKAGES:
        module = importlib.import_module(package)
        for found in pkgutil.walk_packages(module.__path__, f"{package}."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)
    for name in (
        "torch.utils.tensorboard", "tensorboard.summary", "matplotlib.pyplot", "webdataset",
        "cleanfid.resize", "skimage.metrics", "PIL.PngImagePlugin", "torch._dynamo", "lpips",
    ):  # fmt: skip
        with suppress(ImportError):
            importlib.import_module(name)
    from ldm.metrics import inception

    inception.FeatureExtractor.dim = FAKE_DIM
    from pipelines import train_diffusion

    train_diffusion.SAMPLING_STEPS = 2
    gc.collect()
    gc.freeze()


# ------------------------------------------------------------------------------- one command
def run(
    words: Sequence[str],
    folder: Path,
    fault: Fault | None = None,
    seconds: float = 60,
    terminal: bool = False,
) -> Outcome:
    """Run `ldm <words>` in a folder, in a forked child.

    Args:
        seconds: after which it counts as hung.
        terminal: let its output pass for a terminal, so that nothing is left out of it.
    """
    log = folder.with_name(f"{folder.name}.log")
    shared = mmap.mmap(-1, 8)
    before = _resident()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _child(words, folder.resolve(), log, fault, shared, terminal)
    code, peak = _wait(pid, seconds)
    with suppress(ProcessLookupError):  # workers that it left
        os.killpg(pid, signal.SIGKILL)
    text = log.read_bytes()[-200_000:].decode("utf-8", "replace")
    text = COLOURS.sub("", text).replace("\r", "\n")
    return Outcome(code, text, struct.unpack("q", shared[:])[0], max(0, peak - before))


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * resource.getpagesize()


def _wait(pid: int, seconds: float) -> tuple[int | None, int]:
    """Wait for a child; return its exit status, None if it had to be killed, and peak memory."""
    until = time.monotonic() + seconds
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024
        if time.monotonic() > until:
            os.kill(pid, signal.SIGUSR1)  # for a traceback
            time.sleep(0.3)
            os.kill(pid, signal.SIGKILL)
            return None, os.wait4(pid, 0)[2].ru_maxrss * 1024
        time.sleep(0.005)


def _child(
    words: Sequence[str],
    folder: Path,
    log: Path,
    fault: Fault | None,
    shared: mmap.mmap,
    terminal: bool,
) -> NoReturn:
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        kind = _Terminal if terminal else io.TextIOWrapper
        sys.stdout, sys.stderr = (
            kind(open(number, "wb", closefd=False), "utf-8", "replace")  # noqa: SIM115
            for number in (1, 2)
        )
        _limit()
        _surround(folder)
        sys.addaudithook(_Watch(folder, fault, shared))
        sys.argv = ["ldm", *words]
        code = _main()
    finally:
        os._exit(code)


def _main() -> int:
    from ldm import cli

    exit_with_error = cli._exit_with_error

    def locating(text: str, code: int) -> NoReturn:
        if "(unexpected: --debug" in text:
            frames = traceback.extract_tb(sys.exc_info()[2])
            ours = [f for f in frames if any(f"/{name}/" in f.filename for name in PACKAGES)]
            text += f" [{_place(ours[-1])}, by {_place(frames[-1])}]"
        exit_with_error(text, code)

    cli._exit_with_error = locating
    faulthandler.register(signal.SIGUSR1)
    try:
        cli.main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 70
    with suppress(Exception):
        atexit._run_exitfuncs()  # which end loader workers
    return code


def _place(frame: traceback.FrameSummary) -> str:
    path = frame.filename
    here = f"{Path(__file__).parent.parent}/"
    return f"{path.removeprefix(here).rpartition('site-packages/')[2]}:{frame.lineno}"


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def _limit() -> None:
    size = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _surround(folder: Path) -> None:
    """Set the environment: no network, caches in the folder, a Ghostscript that tells on us."""
    tools = folder.with_name("tools")
    os.environ.update(
        PATH=f"{tools}:{os.environ['PATH']}", LDM_CACHE=str(folder / "kept"), COLUMNS="200",
        TORCH_HOME=str(tools / "torch"), HF_HUB_OFFLINE="1", HF_HOME=str(tools / "hf"),
    )  # fmt: skip
    os.environ["CANARY"] = str(folder / CANARY)


class _Watch:
    """An audit hook: counts operations that change files in the folder; kills or fails at one."""

    def __init__(self, folder: Path, fault: Fault | None, shared: mmap.mmap) -> None:
        self.folder, self.fault, self.shared = f"{folder}{os.sep}", fault, shared
        self.count, self.inside = 0, False
        self.opened: tuple[str, int] | None = None  # by the last operation: path and size then
        self.fsync, os.fsync = os.fsync, self._fsync

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.inside:
            return
        if event.startswith(("socket.connect", "socket.getaddrinfo", "urllib")):
            raise OSError(errno.ENETUNREACH, "no network in a trial")
        if event == "open":
            if not args[2] & WRITES or not isinstance(args[0], str | bytes | os.PathLike):
                return
        elif event not in CHANGES:
            return
        path = os.path.abspath(os.fsdecode(args[0]))  # noqa: PTH100  Path is slow in a hook
        if path.startswith(self.folder):
            self._step(event, path)

    def _fsync(self, number: int) -> None:
        self._step("fsync", "")
        self.fsync(number)

    def _step(self, event: str, path: str) -> None:
        self.count += 1
        self.shared[:] = struct.pack("q", self.count)
        size = -1
        if event == "open":
            with suppress(OSError):
                size = os.stat(path).st_size  # noqa: PTH116
        if self.fault is not None and self.count >= self.fault.at:
            self._fail(event, path, size)
        self.opened = (path, max(size, 0)) if event == "open" else None

    def _fail(self, event: str, path: str, size: int) -> None:
        assert self.fault is not None
        if self.fault.full:
            if event in ("fsync", "os.mkdir") or (event == "open" and size < 0):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            return
        self.inside = True
        with suppress(OSError):
            if self.opened:  # the kill came while its content was being written
                written, begun = self.opened
                grown = os.stat(written).st_size - begun  # noqa: PTH116
                os.truncate(written, begun + int(max(grown, 0) * self.fault.torn))
        os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------------------- what it left
def contents(folder: Path) -> dict[str, str]:
    """Hash all files of a folder by their meaning: without times, versions, speeds and its place.

    Hidden files and TensorBoard's logs are left out.
    """
    found, here = {}, str(folder.resolve().parent)
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and "tensorboard" not in parts and not any(p[0] == "." for p in parts):
            try:
                found["/".join(parts)] = _hash(_read(path), here)
            except Exception:  # of whatever is damaged, or no model
                found["/".join(parts)] = _hash(path.read_bytes())
    return found


def _read(path: Path) -> Any:
    import torch
    from safetensors.torch import load_file, safe_open

    match path.suffix:
        case ".pt" | ".ckpt":
            return _unsigned(torch.load(path, map_location="cpu", weights_only=True))
        case ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = dict(file.metadata() or {})
            if "ldm" in metadata:
                metadata["ldm"] = _unsigned(json.loads(metadata["ldm"]))
            return [metadata, load_file(path)]
        case ".npz":
            with np.load(path) as arrays:
                found = {name: arrays[name] for name in arrays.files}
            return found | {"about": json.loads(found["about"].tobytes())}
        case ".json":
            return json.loads(path.read_text("utf-8"))
        case ".jsonl":
            return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        case ".html":  # times and speeds
            return re.sub(
                r"\d{4}-\d\d-\d\d[T ][\d:+]+|[\d.]+ images/s", "", path.read_text("utf-8")
            )
    return path.read_bytes()


def _unsigned(tree: Any) -> Any:
    """A model file without its hash, which is over the time of its making, too."""
    if isinstance(tree, dict) and "kind" in tree:
        return {key: _unsigned(value) for key, value in tree.items() if key != "sha256"}
    return tree


def _hash(value: Any, here: str = "") -> str:
    digest = sha256()
    for part in _parts(value):
        digest.update(part.replace(here.encode(), b"") if here else part)
    return digest.hexdigest()[:16]


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            if key not in VOLATILE:
                yield f"{key}:".encode()
                yield from _parts(value[key])
    elif isinstance(value, list | tuple):
        yield b"["
        for item in value:
            yield from _parts(item)
        yield b"]"
    elif hasattr(value, "detach"):
        array = value.detach().contiguous()
        yield f"{array.dtype} {tuple(array.shape)}".encode()
        yield bytes(array.flatten().untyped_storage())
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, bytes):
        yield value
    else:
        yield repr(value).encode()


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """List the files that are missing, new or different."""
    return sorted(name for name in before | after if before.get(name) != after.get(name))


def copy(world: Path, needs: Sequence[str], folder: Path) -> Path:
    """Make a folder with copies of the named files and folders of the world.

    `a>b` copies a to b.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for need in needs:
        source, target = world / need.partition(">")[0], folder / need.rpartition(">")[2]
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
        else:
            shutil.copy(source, target)
    return folder


def seeded(*words: object) -> random.Random:
    """A generator that depends on the words alone."""
    return random.Random(" ".join(map(str, words)))
