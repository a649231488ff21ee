"""Worker processes end when their trainer does, and signals to a job do not end them before."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch

from ldm.data import workers
from ldm.data.workers import load_in_workers

ROOT = Path(__file__).parents[3]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
METHODS = ["forkserver", "spawn"]


# ------------------------------------------------------------------------ in the trainer's process
def load(method: str, work) -> Iterator:
    if method == "spawn":
        workers._process_type = lambda: multiprocessing.get_context("spawn").Process
    return load_in_workers(work, count(), 2, "")


def sleep(key):
    say(f"works {os.getpid()}")
    time.sleep(1000)


def hold_the_gil(key):
    say(f"works {os.getpid()}")
    return 3 ** (3**19)  # some minutes


def answer(key):
    say(f"works {os.getpid()}")
    return torch.zeros(1 << 24)  # more than a socket holds


class Unfinished:
    """Sleeps in the worker that unpickles it."""

    def __reduce__(self):
        return sleep, (0,)


unpickle = partial(answer, Unfinished())


def say(word: object) -> None:
    os.write(1, f"{word}\n".encode())  # whole, where `print` may write its newline later


# --------------------------------------------------------------------------------- in the test
@pytest.fixture
def start():
    """Start a trainer; its whole tree is killed at the end of the test."""
    mark = f"LDM_TEST_MARK={os.getpid()}-{time.monotonic_ns()}"

    def start(code: str) -> subprocess.Popen:
        name, value = mark.split("=")
        script = f"from tests.ldm.data.test_worker_lifetime import *\n{code}"
        return subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, name: value},
            stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def tree() -> dict[int, str]:
        """The processes of the trainer's tree that live, with their command lines."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_text()
        return found

    start.tree = tree
    yield start
    for pid in tree():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def working(trainer: subprocess.Popen) -> set[int]:
    """Wait until two workers work; return them."""
    pids: set[int] = set()
    while len(pids) < 2:
        line = trainer.stdout.readline()
        assert line, "the trainer ended"
        if line.startswith("works "):
            pids.add(int(line.split()[1]))
    return pids


def ends(tree, seconds: float) -> None:
    until = time.monotonic() + seconds
    while alive := tree():
        assert time.monotonic() < until, alive
        time.sleep(0.05)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("work", "stopped"),
    [
        ("sleep", ""), ("hold_the_gil", ""), ("unpickle", ""),
        ("answer", "trainer"), ("sleep", "workers"),
    ],
)  # fmt: skip
def test_nothing_outlives_a_killed_trainer(method, work, stopped, start):
    trainer = start(f"results = load({method!r}, {work}); next(results); time.sleep(1000)")
    pids = working(trainer)
    for pid in {"": [], "trainer": [trainer.pid], "workers": pids}[stopped]:
        os.kill(pid, signal.SIGSTOP)
    assert len(start.tree()) >= 4  # with a resource tracker
    trainer.kill()
    trainer.wait()
    ends(start.tree, 30)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("processes", [2, 4])
def test_nothing_outlives_a_trainer_killed_while_workers_start(method, processes, start):
    trainer = start(f"next(load({method!r}, sleep))")
    while len(start.tree()) < min(processes, 4):
        assert trainer.poll() is None
    trainer.kill()
    trainer.wait()
    ends(start.tree, 60)  # they import torch first


def test_workers_end_although_a_child_of_the_trainer_holds_its_pipes(start):
    trainer = start(
        "results = load('forkserver', sleep)\n"
        "from threading import Thread; Thread(target=next, args=(results,), daemon=True).start()\n"
        "while len(multiprocessing.active_children()) < 2: time.sleep(0.01)\n"
        "if os.fork() == 0: time.sleep(1000)\n"
        "time.sleep(1000)"
    )
    pids = working(trainer)
    time.sleep(0.5)
    trainer.kill()
    trainer.wait()
    ends(lambda: pids & start.tree().keys(), 30)


@pytest.mark.parametrize("method", METHODS)
def test_signals_to_a_job_do_not_end_workers_that_start(method, start):
    trainer = start(
        "from threading import Thread\n"
        "for number in workers.STOPS: signal.signal(number, lambda *_: None)\n"
        "def repeat():\n"
        "    while True:\n"
        "        for number in workers.STOPS: os.killpg(0, number)\n"
        "        time.sleep(0.02)\n"
        "Thread(target=repeat, daemon=True).start()\n"
        f"results = load({method!r}, answer)\n"
        "say(sum(len(next(results)) for _ in range(6)) >> 24)\n"
        "results.close()"
    )
    lines = trainer.communicate(timeout=240)[0].splitlines()
    assert trainer.returncode == 0
    assert [line for line in lines if "works" not in line] == ["6"]  # workers run ahead of it
    ends(start.tree, 30)


def test_other_processes_of_python_s_fork_server_answer_signals(start):
    trainer = start(
        "results = load('forkserver', answer)\n"
        "next(results)\n"
        "context = multiprocessing.get_context('forkserver')\n"
        "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):\n"
        "    other = context.Process(target=sleep, args=(0,))\n"
        "    other.start()\n"
        "    time.sleep(0.5)\n"
        "    os.kill(other.pid, number)\n"
        "    other.join(60)\n"
        "    say(other.exitcode)\n"
        "results.close()"
    )
    lines = trainer.communicate(timeout=240)[0].splitlines()
    assert [line for line in lines if "works" not in line] == ["-15", "1", "-1"]
