"""Every check that a CPU can run passes at a toy's size; nothing here looks at a clock."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_trainings
from benchmarks.gpu_check import CHECKS, main, run
from benchmarks.gpu_trainings import Setting, Training
from ldm.errors import Interrupted

OF_CUDA = {"side stream", "memory"}


@pytest.fixture
def setting(tmp_path) -> Setting:
    return Setting(torch.device("cpu"), True, tmp_path)


@pytest.mark.slow
def test_every_check_runs_and_lands_on_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--quick", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["checks"]
    outcomes = {result["name"]: result["outcome"] for result in results}
    assert outcomes == {name: "not run" if name in OF_CUDA else "passed" for name in CHECKS}
    page = (tmp_path / "out" / "gpu_check.md").read_text()
    assert all(f"## {name.capitalize()}" in page for name in CHECKS if name not in OF_CUDA)
    assert len(list((tmp_path / "out").glob("gpu_check-*.json.gz"))) == 2


@pytest.mark.parametrize("name", ["Adam", "averages", "sampler", "Inception", "loader"])
def test_a_small_part_passes(name, setting):
    result = run(name, setting)
    assert (result.outcome, result.note) == ("passed", "") and result.figures


def test_a_failure_keeps_its_figures_and_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    def fail(_):
        yield {"": "before", "figure": "1"}
        raise ZeroDivisionError("of a bug")

    monkeypatch.setattr(gpu_check, "CHECKS", {"bad": fail, "good": CHECKS["averages"]})
    assert main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    bad, good = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    assert (bad["outcome"], good["outcome"]) == ("failed", "passed")
    assert bad["note"] == "ZeroDivisionError: of a bug" and "in fail" in bad["traceback"]
    assert bad["figures"] == [{"": "before", "figure": "1"}]
    assert "bad: failed ZeroDivisionError: of a bug" in capsys.readouterr().out


def test_no_check_begins_when_the_time_is_over(tmp_path):
    assert main(["--quick", "--device", "cpu", "--minutes", "0", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    assert [result["outcome"] for result in results] == ["not run"] * len(CHECKS)


def test_another_bit_in_a_resumed_run_fails(setting, monkeypatch):
    def train(_setting, name, *_):
        if name.endswith("resumed") and not stopped:
            stopped.append(name)
            raise Interrupted
        return Training(Path(name), [], 0)

    stopped = []
    monkeypatch.setattr(gpu_trainings, "train", train)
    monkeypatch.setattr(gpu_trainings, "difference", lambda a, b: 1e-7 * (a.folder != b.folder))
    result = run("resume", setting)
    assert result.outcome == "failed" and "differ by 1.0e-07" in result.note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skipped": 1}, "1 steps were skipped"),
        ({"loss": float("nan")}, "the loss went from nan to nan"),
        ({"mfu": 1.5}, "the model FLOPs utilisation is 1.5"),
    ],
)
def test_a_training_that_went_wrong_fails(change, message):
    rows = [{"loss": 1.0, "skipped": 0, "images_per_second": 1.0}]
    assert Training(None, rows, 0).figures["last"] == "1.0000"
    with pytest.raises(AssertionError, match=message):
        _ = Training(None, [rows[0] | change], 0).figures
