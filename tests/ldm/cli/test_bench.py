"""`ldm bench`: what it prints, and the words it takes."""

import json

import pytest
import typer
from typer.testing import CliRunner

from ldm.cli.bench import bench
from ldm.errors import UsageError


@pytest.fixture
def command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.logbook.console.width", 200)
    app = typer.Typer()
    app.command()(bench)
    return lambda *words: CliRunner().invoke(app, [*map(str, words)])


def test_it_prints_ours_beside_theirs_and_writes_both_files(command, tmp_path, capsys):
    small = ("--resolution", 32, "--batch", 2, "--repeats", 1, "--device", "cpu")
    done = command("litevae-s", "dwt", *small, "--out", "new")
    assert done.exit_code == 0, done.output
    said = done.output + capsys.readouterr().out
    assert "1.04" in said and "384" in said and "note" in said and "RTX 6000" in said
    assert "2 image(s) of 32²" in said and "wrote new/bench.md" in said
    tree = json.loads((tmp_path / "new" / "bench.json").read_text("utf-8"))
    assert [row["name"] for row in tree["encoders"]] == ["litevae-s", "dwt"]


def test_what_it_does_not_know_is_said(command):
    assert command("--precision", "fp8").exit_code == 2
    done = command("litevea-s")
    assert isinstance(done.exception, UsageError) and "did you mean 'litevae-s'" in str(
        done.exception
    )
