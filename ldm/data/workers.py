"""Work done by other processes, handed over in order, with a limit on every wait.

Each worker process has a socket of its own, and a thread of this process that starts it and
receives its results. PyTorch's DataLoader uses shared memory and locks instead: it waits for ever
when /dev/shm is full, which Docker limits to 64 MB, or when a worker is stopped.

Workers start by forkserver (else spawn), never by fork: a lock that one of the training process's
threads holds at a fork stays locked in the child. A script that uses workers therefore needs the
usual `if __name__ == "__main__":`.

Workers end with this process, however it ends, and a terminal's signals do not reach them.
"""

import atexit
import multiprocessing
import os
import pickle
import signal
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from io import BufferedRWPair, BytesIO
from itertools import cycle, islice
from multiprocessing import popen_forkserver, reduction, resource_tracker, spawn, util
from multiprocessing.connection import wait
from multiprocessing.context import set_spawning_popen
from multiprocessing.forkserver import ForkServer, read_signed
from multiprocessing.process import BaseProcess, parent_process
from queue import Empty, SimpleQueue
from threading import Event, Thread, current_thread
from time import monotonic
from traceback import format_exc
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ldm.console import STOPS
from ldm.errors import Interrupted, LdmError, brief

LIMIT = 600
"""Seconds that a result may take: a worker may have to start first, and disks may be slow."""
PATIENCE = 10
"""Seconds that a result may take in a process that was asked to stop."""
TO_END = 5
"""Seconds that killed workers may take to end, all together."""
AHEAD = 2  # keys that each worker has at a time

stopping = Event()
"""Set while this process has been asked to stop: a wait for a worker is then cut short."""


def load_in_workers(
    work: Callable[[Any], Any],
    keys: Iterable[Any],
    workers: int,
    advice: str,
    pin: bool = False,
    limit: int | None = None,
) -> Generator[Any]:
    """Yield `work(key)` for each key, in order, from worker processes; 0 works in this one.

    Args:
        work: travels by pickle, as do its results, tensors in their layout.
        advice: against a lack of memory, for the error of a worker that was killed.
        pin: move tensors into pinned memory.
        limit: seconds that a result may take; None: `LIMIT`.

    Raises:
        LdmError: raised by `work`; or a worker was killed, could not start, or was silent for ten
            minutes.
        Interrupted: `stopping` was set in a long wait.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # the cores that this process may use
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    if workers == 0:
        results = map(work, keys)
        yield from map(_pinned, results) if pin else results
        return
    count = min(workers, cores)  # more would wait for each other
    pickled = pickle.dumps(work)  # once for all, and by value: without shared memory
    pool = [_Worker(pickled, pin) for _ in range(count)]
    del pickled

    def end() -> None:
        for worker in pool:
            worker.kill()
        until = monotonic() + TO_END
        for worker in pool:
            worker.join(until)

    atexit.register(end)  # a traceback may hold this generator until then
    try:
        for worker in pool:
            worker.start()
        yield from _in_order(pool, keys, advice, limit)
    finally:
        end()
        atexit.unregister(end)


def _in_order(
    pool: "list[_Worker]", keys: Iterable[Any], advice: str, limit: int | None
) -> Iterator[Any]:
    waiting: deque[_Worker] = deque()
    turns = zip(keys, cycle(pool))

    def request(count: int) -> None:
        for key, worker in islice(turns, count):
            worker.request(key)
            waiting.append(worker)

    request(AHEAD * len(pool))
    while waiting:
        result = waiting.popleft().result(advice, limit)
        request(1)
        yield result


def _pinned(result: Any) -> Any:
    return tree_map_only(Tensor, Tensor.pin_memory, result)


class _Worker:
    """A worker process, and the thread of this one that starts it and receives its results."""

    def __init__(self, work: bytes, pin: bool) -> None:
        self._results: SimpleQueue[Any] = SimpleQueue()
        self._killed = False
        self._socket, theirs = socket.socketpair()
        for end in (self._socket, theirs):  # or they take `socket.setdefaulttimeout`, if it is set
            end.settimeout(None)
        self._file = self._socket.makefile("rwb")
        self._process = _process_type()(target=_serve, args=(theirs, work), daemon=True)
        device = torch.cuda.current_device() if pin else None
        self._thread = Thread(target=self._run, args=(theirs, device), daemon=True)

    def start(self) -> None:
        """Begin to start the process."""
        self._thread.start()

    def request(self, key: Any) -> None:
        """Hand over a key; it is small, and waits in the socket until the worker takes it."""
        with suppress(OSError):  # it was killed, as `result` will say
            _write(self._file, _pickled(key))

    def result(self, advice: str, limit: int | None) -> Any:
        """Wait for the next result."""
        limit = LIMIT if limit is None else limit
        # seconds are counted here, since a clock goes on while this process itself is stopped
        for waited in range(limit):
            try:
                result = self._results.get(timeout=1)
            except Empty:
                if stopping.is_set() and waited >= PATIENCE:
                    break
                continue
            if isinstance(result, EOFError) and stopping.is_set():  # by the same signal
                break
            if isinstance(result, EOFError | MemoryError):
                raise LdmError(
                    f"a loader worker was killed, usually because memory ran out: {advice}; or it "
                    'could not start, because the script lacks `if __name__ == "__main__":`'
                )
            if isinstance(result, Exception):
                raise result
            return result
        if stopping.is_set():
            raise Interrupted("stopped while waiting for a loader worker")
        raise LdmError(
            f"a loader worker gave no result for {limit} s: its process is stopped, or the disk "
            "does not answer; see to it, or load without workers, and run the same command again"
        )

    def kill(self) -> None:
        """End the process, even if it is stopped; and the thread."""
        self._killed = True
        if self._process.pid:
            self._process.kill()
            # does nothing once the forkserver has died; while the thread reads, the worker lives
            if self._thread.is_alive() and hasattr(signal, "SIGKILL"):
                with suppress(ProcessLookupError):
                    os.kill(self._process.pid, signal.SIGKILL)
        with suppress(OSError):  # the worker may have closed it
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread

    def join(self, until: float) -> None:
        """Wait for both to end after `kill`, until a time, but a moment at least."""
        # a garbage collection may close the pool in a thread of its own
        if self._thread.is_alive() and self._thread is not current_thread():
            self._thread.join(max(0.1, until - monotonic()))
        if self._process.pid:
            self._process.join(max(0.1, until - monotonic()))
            if self._process.is_alive():  # in a broken disk: Python's exit may not wait for it
                processes: Any = multiprocessing.process
                processes._children.discard(self._process)
        if not self._thread.is_alive():
            with suppress(OSError):  # a request that it did not take
                self._file.close()
            self._socket.close()

    def _run(self, theirs: socket.socket, device: int | None) -> None:
        try:
            with theirs:
                _block_signals()
                self._process.start()
            if self._killed:  # while it started
                self._process.kill()
            if device is not None:
                torch.cuda.set_device(device)
            while True:
                result = _receive(self._file)
                self._results.put(result if device is None else _pinned(result))
        except (ConnectionError, EOFError, pickle.UnpicklingError):  # it ended, perhaps in a result
            self._results.put(EOFError())
        except OSError as error:
            text = f"a loader worker could not start or answer ({brief(error)})"
            self._results.put(LdmError(text))
        except Exception as error:  # such as work that cannot be pickled
            self._results.put(error)


# ------------------------------------------------------------------------- starting a process
def _process_type() -> Any:
    """Return the type of a worker's process: forked by our server, or else spawned."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        return _Forked
    return multiprocessing.get_context("spawn").Process


def _block_signals() -> None:
    """Block the signals that stop a job in this thread and in the processes that it starts: a
    terminal and a cluster send them to all processes of a job, and the parent handles them."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        resource_tracker.ensure_running()  # unblocks them when it starts its process
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)


_server = ForkServer()
"""Imports torch once for all workers. Python's own server also forks processes of others, which
must answer the signals that are blocked in this one."""
_server.set_forkserver_preload(["ldm.data.loader"])


class _Launch(popen_forkserver.Popen):
    """Like its parent class, with `_server` in place of Python's own."""

    _fds: list[int]

    def _launch(self, process_obj: BaseProcess) -> None:
        message = BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process_obj.name), message)
            reduction.dump(process_obj, message)
        finally:
            set_spawning_popen(None)
        self.sentinel, pipe = _server.connect_to_new_process(self._fds)
        # the pipe stays open while this process lives, see `_end_with_parent`
        close: Any = util.close_fds  # type: ignore[attr-defined]
        self.finalizer = util.Finalize(self, close, (os.dup(pipe), self.sentinel))
        with os.fdopen(pipe, "wb") as file:
            file.write(message.getbuffer())
        self.pid = read_signed(self.sentinel)


class _Forked(BaseProcess):
    _start_method, _Popen = "forkserver", _Launch


# ----------------------------------------------------------------------- in a worker process
def _serve(connection: socket.socket, pickled: bytes) -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    _end_with_parent()
    work = pickle.loads(pickled)
    torch.set_num_threads(1)
    with connection, connection.makefile("rwb") as file:
        try:
            while True:
                _write(file, _attempt(work, _receive(file)))
        except (OSError, EOFError, pickle.UnpicklingError):
            os._exit(0)  # the parent has closed its end, perhaps amid a message


def _end_with_parent() -> None:
    """End this process when its parent does, even amid a piece of work."""
    parent: Any = parent_process()
    pipe = parent.sentinel  # whose other end the parent holds, perhaps with children
    watched = [pipe]
    with suppress(AttributeError, OSError):
        watched.append(os.pidfd_open(parent.pid))
    with suppress(ImportError, AttributeError, OSError):
        import fcntl

        # on Linux, the kernel ends this process, even if it is stopped or holds the GIL
        fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)

    def watch() -> None:
        wait(watched)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _attempt(work: Callable[[Any], Any], key: Any) -> "Message":
    try:
        return _pickled(work(key))
    except LdmError as error:
        return _pickled(error)
    except MemoryError:
        return _pickled(MemoryError())
    except Exception as error:  # of the work, or of a result that cannot be pickled
        return _pickled(RuntimeError(f"in a loader worker: {error!r}\n{format_exc()}"))


# ---------------------------------------------------------------------------------- messages
class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        # as an array without gaps, whose bytes need not be copied into the pickle
        order = sorted(range(value.ndim), key=value.stride, reverse=True)
        return _tensor, (value.permute(order).numpy(), order)


def _tensor(array: np.ndarray, order: list[int]) -> Tensor:
    return torch.from_numpy(array).permute([order.index(dim) for dim in range(array.ndim)])


Message = tuple[bytes, list[memoryview]]  # a pickle, and the bytes of its arrays


def _pickled(value: Any) -> Message:
    pickled, arrays = BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(pickled, 5, buffer_callback=arrays.append).dump(value)
    return pickled.getvalue(), [array.raw() for array in arrays]


def _write(file: BufferedRWPair, message: Message) -> None:
    pickled, parts = message
    pickle.dump((pickled, [len(part) for part in parts]), file)
    for part in parts:
        file.write(part)
    file.flush()


def _receive(file: BufferedRWPair) -> Any:
    pickled, sizes = pickle.load(file)
    parts = [bytearray(size) for size in sizes]
    if any(file.readinto(part) < len(part) for part in parts):
        raise EOFError
    return pickle.loads(pickled, buffers=parts)
