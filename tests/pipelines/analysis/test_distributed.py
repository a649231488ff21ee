"""Two launched processes share the images, and give the numbers of one."""

import csv

import pytest

from pipelines.analysis.latents import analyze_latents
from pipelines.analysis.mmd import MmdSettings, analyze_mmd
from tests.pipelines.analysis.subjects import opened, save
from tests.small import ldm


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "table", "alone"),
    [
        (
            ["mmd", "--n", 10, "--draws", 2, "--sigmas", "8"], "mmd.csv",
            lambda model: analyze_mmd(*opened(model), MmdSettings(n=10, draws=2, sigmas=(8,))),
        ),
        (
            ["latents", "--n", 9, "--images", 1], "latents.csv",
            lambda model: analyze_latents(*opened(model), n=9, count=1),
        ),
    ],
)  # fmt: skip
def test_two_processes_give_the_numbers_of_one(tmp_path, words, table, alone):
    model, out = save(tmp_path / "model"), tmp_path / "out"
    asked = ["analyze", *words, model, "--device", "cpu", "--batch-size", 3, "--out", out]
    done = ldm(*asked, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"wrote {out / table}") == 1
    alone(model)
    rows = []
    for folder in (out, model / "analysis"):
        with (folder / table).open(encoding="utf-8", newline="") as file:
            rows.append(list(csv.reader(file)))
    assert rows[0][0] == rows[1][0] and len(rows[0]) == len(rows[1]) > 1
    for two, one in zip(*(part[1:] for part in rows), strict=True):
        for a, b in zip(two, one, strict=True):
            assert a == b or float(a) == pytest.approx(float(b), rel=1e-5, abs=1e-7)
