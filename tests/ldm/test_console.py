"""A console that goes away: no write fails, and the process gets a hangup."""

import os
import signal
import subprocess
import sys

import pytest

from ldm import console
from ldm.console import HANGUP, LastingOutput, outlast_console
from tests.small import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and pipes of POSIX")


@pytest.fixture
def hangups(monkeypatch):
    """The hangups that this process gets."""
    found: list[int] = []
    monkeypatch.setattr(LastingOutput, "lost", False)
    before = signal.signal(HANGUP, lambda number, _: found.append(number))
    yield found
    signal.signal(HANGUP, before)


@pytest.mark.parametrize("lost", ["pipe", "/dev/full", "closed"])
def test_a_lost_output_hangs_up_once_and_drops_what_follows(hangups, lost):
    read, write = os.pipe()
    os.close(read)
    if lost != "pipe":
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, write)
        os.close(full)
    output = LastingOutput(write, "w")
    if lost == "closed":
        os.close(write)
    assert [output.write(b"one"), output.write(b"three")] == [3, 5]
    assert hangups == [HANGUP]
    output.close()


def test_streams_that_a_caller_put_there_stay(capsys, hangups):
    streams = sys.stdout, sys.stderr
    outlast_console()
    assert (sys.stdout, sys.stderr) == streams
    assert signal.getsignal(HANGUP) not in (signal.SIG_DFL, signal.default_int_handler)


SCRIPT = """
import signal, sys, time
{before}
from ldm.console import outlast_console
outlast_console()
print("ê", flush=True)
sys.stderr.write("after")
time.sleep({seconds})
"""


def python(before="", seconds=0, unbuffered=False, **streams):
    script = SCRIPT.format(before=before, seconds=seconds)
    command = [sys.executable, *(["-u"] if unbuffered else []), "-c", script]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, **streams)


@pytest.mark.parametrize("unbuffered", [False, True])
def test_what_is_printed_arrives(unbuffered):
    out, err = python(unbuffered=unbuffered, stdout=subprocess.PIPE).communicate()
    assert (out.decode(), err.decode()) == ("ê\n", "after")


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_lost_output_acts_as_ctrl_c(unbuffered):
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        process = python(unbuffered=unbuffered, stdout=full)
        _, err = process.communicate()
    assert process.returncode != 0 and "KeyboardInterrupt" in err.decode()


def test_an_ignored_hangup_stays_ignored():
    ignore = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        process = python(ignore, stdout=full)
        _, err = process.communicate()
    lost = "standard output is lost (No space left on device)\n"
    assert (process.returncode, err.decode()) == (0, f"{lost}after")


def test_the_first_signal_is_the_exit_status(monkeypatch):
    monkeypatch.setattr(console, "received", [])
    assert console.exit_status() == 130
    for number in (signal.SIGTERM, HANGUP, signal.SIGINT, signal.SIGINT):
        assert not console.receive(number)
    assert console.receive(signal.SIGINT)  # the third Ctrl-C
    assert console.exit_status() == 143


def test_a_file_never_gets_the_number_of_a_closed_output():
    """A library that prints would write into it."""
    code = (
        "import os, sys; from ldm.console import outlast_console; outlast_console()\n"
        "sys.exit(min(os.open(os.devnull, os.O_RDONLY) for _ in range(9)))"
    )
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh", sys.executable, "-c", code], cwd=ROOT
    )
    assert process.wait(60) == 3
