"""`ldm analyze`: output, files and arguments."""

import json

import pytest
from typer.testing import CliRunner

from ldm.cli import app
from ldm.errors import UsageError
from tests.pipelines.analysis.subjects import save
from tests.pipelines.analysis.test_gradients import write_run


def command(*words):
    done = CliRunner().invoke(app, ["analyze", *map(str, words)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_help_names_every_analysis():
    done = command("--help")
    for name in ("mmd", "scale", "latents", "features", "gradients"):
        assert name in done.output


@pytest.mark.parametrize(
    ("words", "files", "told"),
    [
        (["mmd", "--n", 4, "--draws", 2, "--sigmas", "8,25.5"], ["mmd"], "25.5"),
        (["scale", "--no-fid", "--limit", 2, "--resolutions", "32,64"], ["scale"], "64²"),
        (["latents", "--n", 4, "--images", 1], ["latents", "latents-statistics"], "n_z"),
        (["features", "--images", 1], ["features"], "SMC"),
    ],
)
def test_a_model_given_by_its_path(tmp_path, words, files, told):
    folder = save(tmp_path / "a-model")
    done = command(*words, f"mine={folder}", "--device", "cpu", "--out", tmp_path / "out")
    assert told in done.output and "mine" in done.output
    assert done.exit_code == 0
    for name in files:
        assert f"wrote {tmp_path / 'out' / name}.png" in done.output.replace("\n", "")
        assert (tmp_path / "out" / f"{name}.png").is_file()
    assert (tmp_path / "out" / f"{files[0]}.csv").is_file()


def test_the_default_is_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "runs" / "20250101-000000-tiny", [0.1, 0.2, 10.0])
    (run / "run.json").write_text(json.dumps({"kind": "autoencoder", "preset": "tiny"}))
    done = command("gradients")
    assert done.exit_code == 0 and "tiny" in done.output and "constant" in done.output
    assert (run / "analysis" / "gradients.png").is_file()


def test_tables_are_never_truncated(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    run = write_run(tmp_path / "[run]", [0.1, 0.2])
    printed = command("gradients", f"a-long-name-for-so-narrow-a-terminal={run}").output
    (row,) = [line for line in printed.splitlines() if "a-long-name" in line]
    assert "a-long-name-for-so-narrow-a-terminal" in row and "constant" in row and "…" not in row


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["mmd", "--sigmas", "25,many"],
            "--sigmas 25,many: expected number\\(s\\) separated by commas",
        ),
        (["scale", "--resolutions", "32.5"], "--resolutions 32.5: expected whole number"),
    ],
)
def test_malformed_numbers_are_refused(words, told):
    with pytest.raises(UsageError, match=told):
        command(*words)
