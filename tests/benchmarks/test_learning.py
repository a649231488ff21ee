"""The comparison of how fast encoders learn: what is finished is kept and not trained again."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import learning

SIZES = [
    "--held-out",
    "4",
    "--steps",
    "2",
    "--every",
    "1",
    "--channels",
    "8",
    "--latent-channels",
    "4",
]
SETTINGS = ["phases=[{resolution: 32, steps: 2}]", "batch_size=2", "run.device=cpu"]


@pytest.fixture
def compare(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "time_interleaved", lambda calls, *_: dict.fromkeys(calls, 0.5))
    (images := tmp_path / "images").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")

    def run(*arguments, sizes=SIZES):
        folders = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
        command = ["learning", str(images), *SETTINGS, *sizes, *folders, *arguments]
        monkeypatch.setattr(sys, "argv", command)
        learning.main()
        return json.loads((tmp_path / "out" / "learning.json").read_text())

    return run


def test_finished_trainings_are_kept_where_the_runs_are_gone(tmp_path, compare, monkeypatch):
    found = compare("--only", "litevae", "--seeds", "2")["psnr"]
    assert found.keys() == {"litevae"} and found["litevae"].keys() == {"0", "1"}
    assert all(curve.keys() == {"1", "2"} for curve in found["litevae"].values())

    shutil.rmtree(tmp_path / "work")
    trained = []
    train = learning.train_autoencoder
    monkeypatch.setattr(
        learning, "train_autoencoder", lambda *a, **k: (trained.append(1), train(*a, **k))
    )
    both = compare("--only", "litevae", "--only", "sdvae", "--seeds", "1")["psnr"]
    assert len(trained) == 1
    assert both["litevae"] == found["litevae"] and both["sdvae"].keys() == {"0"}
    page = (tmp_path / "out" / "learning.md").read_text()
    assert "| litevae |" in page.replace("  ", "") and " ± " in page


def test_what_is_finished_is_written_without_training(compare, capsys):
    found = compare("--only", "litevae", "--seeds", "1")
    again = compare("--no-training")
    assert again["psnr"] == found["psnr"]
    assert "35 of 36 trainings are not finished" in capsys.readouterr().out


def test_results_of_other_trainings_are_refused(compare):
    compare("--only", "litevae", "--seeds", "1")
    with pytest.raises(SystemExit, match=r"is of other trainings, .*give another --name"):
        compare("--no-training", sizes=[*SIZES[:-1], "12"])
