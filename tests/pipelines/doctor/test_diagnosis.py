"""What counts as ready."""

import pytest

from pipelines.doctor.checks import Problem
from pipelines.doctor.doctor import Diagnosis, Length, Machine


@pytest.mark.parametrize(
    ("levels", "ready"),
    [([], True), (["note", "warning"], True), (["note", "error"], False)],
)
def test_only_an_error_stops_a_run(levels, ready):
    machine = Machine("cpu", "2 cores", "fp32", memory=2**30, disk=2**30)
    length = Length(8, 4, processes=1, accumulate=1, each=4, images=32, data=8)
    problems = tuple(Problem(level, "what, where, what to do") for level in levels)
    found = Diagnosis("tiny", "autoencoder", "photos", None, machine, length, problems)
    assert found.ready == ready and found.memory is None
