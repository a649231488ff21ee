"""`ldm report`: the page, its notes and arguments."""

import pytest
import typer
from typer.testing import CliRunner

from ldm.cli.report import report
from ldm.errors import LdmError, UsageError
from tests.pipelines.report.run_folders import stage_one


@pytest.fixture
def command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(report)
    return lambda *words: CliRunner().invoke(app, [*map(str, words)])


def test_the_page_is_written_to_out(command, tmp_path):
    stage_one(tmp_path / "a"), stage_one(tmp_path / "b")
    done = command("a", "b", "--images", 1, "--resolution", 32, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "done: open report.html in a browser" in done.output
    assert "2 runs side by side" in (tmp_path / "report.html").read_text("utf-8")
    done = command("a", "--images", 1, "--out", "new/a.html", "--data", "photos")
    assert done.exit_code == 0 and (tmp_path / "new" / "a.html").is_file()


def test_fallbacks_are_printed(command, tmp_path, capsys):
    run = stage_one(tmp_path / "a")
    done = command("a", "--images", 1, "--data", "nowhere", "--device", "cpu")
    said = done.output + capsys.readouterr().out
    assert "note: a: No pictures of the model (data.source: nowhere does not exist" in said
    assert done.exit_code == 0 and "done: open report.html" in said
    (run / "ckpt.pt").unlink()
    said = command("a", "--images", 1, "--device", "cpu").output + capsys.readouterr().out
    assert "note: a: No pictures of the model (a holds no ckpt.pt" in said


def test_invalid_arguments_are_refused(command, tmp_path):
    assert command().exit_code == 2
    assert isinstance(command("nowhere").exception, LdmError)
    stage_one(tmp_path / "a")
    assert isinstance(command("a", "--images", 0).exception, UsageError)
