"""Standard output and error that may go away while a job runs.

A closed terminal and `ldm … | head -1` must not lose the work since the last save: a failed write
raises nothing where it happens. It acts as a hangup of the terminal instead, and a hangup acts as
Ctrl-C and SIGTERM do: a training saves its state and stops, other jobs stop and keep their finished
files. Under torchrun one process that gets a signal stops them all.
"""

import io
import os
import select
import signal
import sys
import threading
from errno import EPIPE
from typing import Any

HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)
"""Signal of a terminal that went away; Windows has none."""
STOPS = {signal.SIGINT, signal.SIGTERM, HANGUP}
"""Signals that ask a job to stop."""

received: list[int] = []
"""The signals of `STOPS` that this process has received; the first is its exit status."""


def receive(number: int) -> bool:
    """Record a signal; return True for a third Ctrl-C, which aborts whatever is being saved.

    Launchers repeat SIGTERM, and torchrun repeats a terminal's Ctrl-C.
    """
    received.append(number)
    return number == signal.SIGINT and received.count(number) > 2


def exit_status() -> int:
    """Return the exit status of a process that a signal has stopped."""
    return 128 + next(iter(received), signal.SIGINT)


def _interrupt(number: int, _frame: object) -> None:
    if receive(number) or len(received) == 1:
        raise KeyboardInterrupt


class LastingOutput(io.FileIO):
    """An output of this process, by its file descriptor, whose writes do not fail.

    The first write that would (a pipe without a reader, a lost terminal, a full disk) sends this
    process a hangup. From then on everything is dropped, so that no later line fails as well.
    """

    lost = False
    """True once this process has lost an output, of which one hangup is enough."""

    def write(self, data: Any, /) -> int:
        """Write bytes, or drop them; return their number."""
        try:
            while (written := super().write(data)) is None:  # another program made it non-blocking
                select.select([], [self.fileno()], [], 1)
            return written
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if not LastingOutput.lost:
                LastingOutput.lost = True
                if error.errno != EPIPE and sys.stderr is not None and self.fileno() != 2:
                    sys.stderr.write(f"standard output is lost ({error.strerror})\n")
                signal.raise_signal(HANGUP)
            return len(data)


def outlast_console() -> None:
    """Replace standard output and error by lasting ones, and let other signals act as Ctrl-C.

    A signal that is ignored, as a hangup under nohup, stays ignored: the job goes on in silence.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # closed: no file may get its number,
        os.set_inheritable(number, True)  # into which a library then prints
    os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is not io.TextIOWrapper:  # none, or one that a caller put there
            continue
        stream.flush()
        raw = LastingOutput(stream.fileno(), "w", closefd=False)
        # python -u writes at once, without a buffer
        buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
        lasting = io.TextIOWrapper(
            buffer,
            encoding=stream.encoding,
            errors="replace",  # for terminals without σ and ²
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, lasting)
    is_main = threading.current_thread() is threading.main_thread()  # others may set no handlers
    for number in STOPS if is_main else ():
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _interrupt)
