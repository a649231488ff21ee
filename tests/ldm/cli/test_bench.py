"""`ldm bench`: output and arguments."""

import json
import re

import pytest
import typer
from typer.testing import CliRunner

from ldm.cli.measure import bench
from ldm.errors import UsageError
from pipelines.bench import Bench, EncoderCost


@pytest.fixture
def command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.logbook.console.width", 200)
    app = typer.Typer()
    app.command()(bench)
    return lambda *words: CliRunner().invoke(app, [*map(str, words)])


def test_bench_prints_our_costs_beside_the_papers_and_writes_both_files(command, tmp_path, capsys):
    small = ("--resolution", 32, "--batch", 2, "--repeats", 1, "--device", "cpu")
    done = command("litevae-s", "dwt", *small, "--out", "new")
    assert done.exit_code == 0, done.output
    printed = done.output + capsys.readouterr().out
    assert "1.04" in printed and "384" in printed and "note" in printed and "RTX 6000" in printed
    assert "batch size 2 at 32²" in printed and "wrote new/bench.md" in printed
    tree = json.loads((tmp_path / "new" / "bench.json").read_text("utf-8"))
    assert [row["name"] for row in tree["encoders"]] == ["litevae-s", "dwt"]


def test_its_columns_fit_into_a_terminal_and_say_whose_they_are(monkeypatch, capsys):
    widest = EncoderCost("litevae-m", 32_750_000, 136.36, 12130.0, 1250.0)
    result = Bench([EncoderCost("sdvae", 34_163_592, 136.36, 8000.0, 50.0), widest],
                   {"memory": "", "speed": ""})  # fmt: skip
    monkeypatch.setattr("pipelines.bench.bench_encoders", lambda *asked: result)
    monkeypatch.setattr("ldm.logbook.console.width", 80)
    bench()
    lines = capsys.readouterr().out.splitlines()
    whose, what = (line.split() for line in lines[2:4])
    assert whose == ["paper's"] * 4 and len(what) == 11  # "weights, M" is two words
    ends = [found.end() for found in re.finditer("paper's", lines[2])]
    units = [lines[3][:end].rsplit(maxsplit=1)[1] for end in ends]
    assert units == ["M", "GMAC", "MB", "images/s"], "each stands above its own"
    assert all(len(line) <= 80 for line in lines[:6]) and "12,130" in lines[5]


def test_what_it_does_not_know_is_said(command):
    assert command("--precision", "fp8").exit_code == 2
    done = command("litevea-s")
    assert isinstance(done.exception, UsageError) and "did you mean 'litevae-s'" in str(
        done.exception
    )
