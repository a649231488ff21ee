import os
import time
from contextlib import closing

import pytest

from ldm.data.prepare import run_jobs
from ldm.errors import LdmError


def square(job, count):
    count()
    if job == 7:
        raise LdmError("seven")
    if job == 8:
        os._exit(9)
    return job * job


def dawdle(job, count):
    """`job` seconds in small pieces."""
    for _ in range(job * 100):
        time.sleep(0.01)
        count()
    return job


@pytest.mark.parametrize("processes", [0, 2])
def test_every_job_is_done_and_its_pieces_counted(processes):
    counted = []
    results = sorted(run_jobs(square, [1, 2, 3], processes, counted.append))
    assert results == [1, 4, 9]
    assert sum(counted) == 3


@pytest.mark.parametrize("processes", [0, 1])
def test_what_a_job_raises_reaches_the_caller(processes):
    with pytest.raises(LdmError, match=r"^seven$"):
        list(run_jobs(square, [7], processes, print))


def test_leaving_early_ends_a_running_job_at_its_next_piece():
    with closing(run_jobs(dawdle, [0, 60], 1, print)) as results:
        assert next(results) == 0
        started = time.monotonic()
    assert time.monotonic() - started < 20


def test_a_killed_worker_is_one_clear_line():
    with pytest.raises(LdmError, match=r"a worker was killed, .*fewer --workers"):
        list(run_jobs(square, [8], 1, print))
