"""`ldm report` and `ldm reproduce`: arguments, output and errors."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ldm.cli.results import report, reproduce
from ldm.errors import LdmError, UsageError
from ldm.files import write_json
from pipelines.reproduce import runner as jobs
from pipelines.reproduce.runner import FORMAT
from tests.pipelines.report.run_folders import stage_one


# ------------------------------------------------------------------------------------ report
@pytest.fixture
def report_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(report)
    return lambda *words: CliRunner().invoke(app, [*map(str, words)])


def test_the_page_is_written_to_out(report_command, tmp_path):
    stage_one(tmp_path / "a"), stage_one(tmp_path / "b")
    done = report_command("a", "b", "--images", 1, "--resolution", 32, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "done: open report.html in a browser" in done.output
    assert "2 runs side by side" in (tmp_path / "report.html").read_text("utf-8")
    done = report_command("a", "--images", 1, "--out", "new/a.html", "--data", "photos")
    assert done.exit_code == 0 and (tmp_path / "new" / "a.html").is_file()


def test_fallbacks_are_printed(report_command, tmp_path, capsys):
    run = stage_one(tmp_path / "a")
    done = report_command("a", "--images", 1, "--data", "nowhere", "--device", "cpu")
    said = done.output + capsys.readouterr().out
    assert (
        "note: a: Could not draw the model's pictures (the held-out images could not be read: data."
        in said
    )
    assert done.exit_code == 0 and "done: open report.html" in said
    (run / "ckpt.pt").unlink()
    said = report_command("a", "--images", 1, "--device", "cpu").output + capsys.readouterr().out
    assert "note: a: Could not draw the model's pictures (a holds no ckpt.pt" in said


def test_invalid_arguments_of_report_are_refused(report_command, tmp_path):
    assert report_command().exit_code == 2
    assert isinstance(report_command("nowhere").exception, LdmError)
    stage_one(tmp_path / "a")
    assert isinstance(report_command("a", "--images", 0).exception, UsageError)


# --------------------------------------------------------------------------------- reproduce
@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call the command in an empty folder: its output."""
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(reproduce)

    def call(*words):
        done = CliRunner().invoke(app, [str(word) for word in words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.stdout

    return call


class Result:
    files = (Path("t09/table.md"), Path("t09/table.json"))
    lines = ("# T9: a table", "| a [b] |")


def test_what_is_passed_on_and_printed(run, monkeypatch):
    asked = []

    def faked(*words):
        asked.append(words)
        return [Result(), Result()]

    monkeypatch.setattr(jobs, "reproduce", faked)
    out = run(
        "t9", "loss.lpips=0", "lr=1e-3", "--scale", "smoke", "--data", "ffhq=/x", "--data", "/y",
        "--take", "gaussian=a.pt", "--out", "o", "--weights", "w.pt", "--force", "--seeds", "3",
        "--ours",
    )  # fmt: skip
    [words] = asked
    assert words == (
        "t9", "smoke", ["ffhq=/x", "/y"], ["gaussian=a.pt"], ["loss.lpips=0", "lr=1e-3"],
        Path("o"), Path("w.pt"), True, 3, True,
    )  # fmt: skip
    assert out.count("| a [b] |") == 2 and "done: t09/table.md, t09/table.json" in out


def test_what_is_left_out(run, monkeypatch):
    asked = []
    monkeypatch.setattr(jobs, "reproduce", lambda *words: asked.append(words) or [])
    run("T9")
    assert asked == [("T9", "small", (), (), [], Path("reproduce"), None, False, 1, False)]


def test_the_list_has_every_table_and_how_far_its_rows_are(run, tmp_path):
    done = {"format": FORMAT, "state": "done"}
    write_json(tmp_path / "reproduce/small/t04/smc/row.json", done)
    state = tmp_path / "reproduce/smoke/t04/smc/autoencoder/state/8/state.pt"
    state.parent.mkdir(parents=True)
    state.touch()
    (tmp_path / "reproduce/smoke/t04/group/autoencoder").mkdir(parents=True)  # no step yet
    lines = run("--list").splitlines()
    for number in ("T1 ", "T2a ", "T2b ", "T13 ", "T22 "):
        assert sum(line.startswith(number) for line in lines) == 1, number
    [smc] = [line for line in lines if line.split()[:1] == ["smc"]]
    assert smc.split() == ["smc", "smoke", "begun", "small", "done", "paper", "–"]
    [group] = [line for line in lines if line.split()[:1] == ["group"]]
    assert group.split()[2::2] == ["–", "–", "–"]
    assert any("small: about an hour a table on a GPU" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["t23"], "no table 't23'; did you mean 'T3'? choose from T1, T2a"),
        ([], "which table? choose from T1, T2a"),
        (["lr=3"], "which table"),
        (["t4", "smc"], "'smc' is not of the form key=value"),
        (["--list", "t4"], "omit the other arguments"),
    ],
)
def test_words_that_cannot_be(run, words, told):
    with pytest.raises(UsageError) as caught:
        run(*words)
    assert told in str(caught.value) and "\n" not in str(caught.value)
