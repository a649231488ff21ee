"""Long jobs shared out over worker processes that can be stopped, and leave nothing behind."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeVar

from ldm.data.workers import leave_signals_to_parent, start_method
from ldm.errors import LdmError

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    work: Callable[..., Any],
    jobs: Sequence[Job],
    processes: int,
    advance: Callable[[int], None],
) -> Iterator[Result]:
    """`work(job, count=…)` for every job; results as they are finished.

    Closing the iterator early, by Ctrl-C or an error, ends running jobs at their next count.

    Args:
        work: picklable; it must call `count()` after each small piece of a job, and clean up after
            itself when that raises.
        processes: 0 works in this process, in the order of the jobs.
        advance: told of the pieces counted since it was last called.

    Raises:
        LdmError: what `work` raises; or a worker was killed.
    """
    if processes:
        yield from _in_pool(work, jobs, processes, advance)
    else:
        for job in jobs:
            yield work(job, count=partial(advance, 1))


def _in_pool(
    work: Callable[..., Any], jobs: Sequence[Job], processes: int, advance: Callable[[int], None]
) -> Iterator[Result]:
    context = multiprocessing.get_context(start_method())
    stop, counted, told = context.Event(), context.Value("q", 0), 0
    # the work goes to each process once, not with every job: it may hold a large source
    pool = ProcessPoolExecutor(processes, context, _start_worker, (work, stop, counted))
    try:
        pending = {pool.submit(_do, job) for job in jobs}
        while pending:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            now = counted.value
            advance(now - told)
            told = now
            yield from (future.result() for future in finished)
    except BrokenProcessPool as error:
        raise LdmError(
            "a worker was killed, most often for want of memory: run the same command with fewer "
            "--workers, what is finished is kept"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------ in a worker process
class Stopped(Exception):
    """Ends a job whose result nobody waits for any more."""


def _start_worker(work: Callable[..., Any], stop: Any, counted: Any) -> None:
    leave_signals_to_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def count() -> None:
        with counted.get_lock():
            counted.value += 1
        if stop.is_set():
            raise Stopped

    global _work
    _work = partial(work, count=count)


def _do(job: Job) -> Any:
    return _work(job)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
