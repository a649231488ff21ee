import io
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch

from ldm.data import workers
from ldm.data.workers import load_in_workers
from ldm.errors import Interrupted, LdmError

ROOT = Path(__file__).parents[3]


def echo(key):
    return key, torch.full((2, 3), key)


def signal_itself(at, number, key):
    """Kill or stop the process that works on one key."""
    if key == at:
        os.kill(os.getpid(), number)
    return key


def run_out_of_memory(key):
    raise MemoryError


def fail(key):
    raise ZeroDivisionError("of a bug")


def large(key):
    return torch.full((3000, 3000), key, dtype=torch.uint8)


class Unstartable:
    """Ends the worker that unpickles it."""

    def __reduce__(self):
        return os._exit, (3,)


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """The workers that a test starts; none may be left at its end."""
    start, started = workers._Worker.start, []

    def record(worker):
        started.append(worker)
        start(worker)

    monkeypatch.setattr(workers._Worker, "start", record)
    yield started
    workers.stopping.clear()
    for worker in started:
        worker._thread.join(60)
        assert worker._process.pid is None or not worker._process.is_alive()


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_results_come_in_the_order_of_the_keys(processes):
    for expected, (key, tensor) in enumerate(load_in_workers(echo, range(20), processes, "")):
        assert key == expected
        assert torch.equal(tensor, torch.full((2, 3), key)) and not tensor.is_shared()


def test_tensors_keep_their_type_shape_and_layout():
    whole = torch.arange(120).reshape(2, 3, 4, 5)
    for sent in (
        whole, whole.permute(0, 3, 1, 2), whole.flatten().float(), torch.tensor(7), whole[:0],
        whole.to(memory_format=torch.channels_last), whole[:, 1],
    ):  # fmt: skip
        file = io.BytesIO()
        workers._write(file, workers._pickled({"it": sent}))
        file.seek(0)
        got = workers._receive(file)["it"]
        assert got.dtype == sent.dtype and torch.equal(got, sent)
        order = sorted(range(sent.ndim), key=sent.stride)
        assert order == sorted(range(got.ndim), key=got.stride)


def test_the_time_limit_of_a_process_for_its_sockets_is_not_that_of_workers():
    socket.setdefaulttimeout(0.01)
    try:
        assert [key for key, _ in load_in_workers(echo, range(3), 2, "")] == [0, 1, 2]
    finally:
        socket.setdefaulttimeout(None)


def test_half_a_message_is_no_message():
    file = io.BytesIO()
    workers._write(file, workers._pickled(torch.arange(10)))
    whole = file.getvalue()
    for length in range(len(whole)):
        with pytest.raises((EOFError, workers.pickle.UnpicklingError)):
            workers._receive(io.BytesIO(whole[:length]))


# ------------------------------------------------------------------- at whatever stage it fails
@pytest.mark.parametrize("at", [0, 5])
def test_a_killed_worker_is_one_line(at):
    results = load_in_workers(partial(signal_itself, at, signal.SIGKILL), count(), 1, "lower it")
    assert [next(results) for _ in range(at)] == list(range(at))
    with pytest.raises(LdmError, match=r"a loader worker was killed, .* memory ran out: lower it;"):
        next(results)


@pytest.mark.parametrize("at", [0, 5])
def test_a_stopped_worker_is_waited_for_up_to_a_limit(at, monkeypatch):
    results = load_in_workers(partial(signal_itself, at, signal.SIGSTOP), count(), 1, "")
    assert [next(results) for _ in range(at)] == list(range(at))
    monkeypatch.setattr(workers, "LIMIT", 1)
    with pytest.raises(LdmError, match="gave no result for 1 s: its process is stopped, or the "):
        next(results)


@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_request_to_stop_ends_the_wait_for_a_worker(at, number, monkeypatch):
    results = load_in_workers(partial(signal_itself, at, number), count(), 1, "")
    assert [next(results) for _ in range(at)] == list(range(at))
    monkeypatch.setattr(workers, "PATIENCE", 0)
    workers.stopping.set()
    with pytest.raises(Interrupted, match="stopped while waiting for a loader worker"):
        next(results)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_leaving_early_ends_workers_that_were_killed_or_stopped(number):
    results = load_in_workers(echo, count(), 2, "")
    assert [next(results)[0] for _ in range(2)] == [0, 1]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)
    results.close()


def test_a_worker_that_cannot_start_is_one_line():
    results = load_in_workers(partial(echo, Unstartable()), count(), 2, "")
    with pytest.raises(LdmError, match="or it could not start, because the script lacks `if __"):
        next(results)


def test_a_lack_of_memory_is_one_line():
    with pytest.raises(LdmError, match="memory ran out: lower it;"):
        next(load_in_workers(run_out_of_memory, range(3), 1, "lower it"))


def test_a_bug_comes_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)ZeroDivisionError\('of a bug'\).*in fail"):
        next(load_in_workers(fail, range(3), 1, ""))
    with pytest.raises(Exception, match="pickle"):
        next(load_in_workers(lambda key: key, range(3), 1, ""))


def test_ctrl_c_while_workers_start_ends_those_that_have(monkeypatch, started):
    start = workers._Worker.start

    def interrupted(worker):
        if started:
            raise KeyboardInterrupt
        start(worker)

    monkeypatch.setattr(workers._Worker, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(load_in_workers(echo, count(), 2, ""))
    assert len(started) == 1


def script(code: str, *before: str) -> subprocess.CompletedProcess:
    """Run lines of Python in a process of their own."""
    names = "from tests.ldm.data.test_workers import *\n"
    command = [*before, sys.executable, "-c", names + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_python_exits_although_its_workers_are_stopped():
    done = script(
        "results = load_in_workers(echo, count(), 2, '')\n"
        "print(next(results)[0], next(results)[0])\n"
        "[os.kill(worker.pid, signal.SIGSTOP) for worker in multiprocessing.active_children()]\n"
        "raise SystemExit(5)"
    )
    assert (done.returncode, done.stdout.strip()) == (5, "0 1"), done.stderr


SMALL_SHM = "mount -t tmpfs -o size=64k tmpfs /dev/shm && exec"
MAY_MOUNT = ["unshare", "--mount", "sh", "-c"]


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run([*MAY_MOUNT, f"{SMALL_SHM} true"], capture_output=True).returncode != 0,
    reason="this user may not mount",
)
def test_results_need_no_shared_memory():
    """Docker's default is 64 MB, for all workers of all processes."""
    code = "print([int(it[0, 0]) for it in load_in_workers(large, range(6), 2, '')])"
    done = script(code, *MAY_MOUNT, f'{SMALL_SHM} "$@"', "sh")
    assert done.stdout.strip() == "[0, 1, 2, 3, 4, 5]", done.stderr
