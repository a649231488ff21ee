"""The comparison of how fast encoders learn: what is finished is kept and not trained again."""

import json
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
from PIL import Image

from benchmarks import learning
from ldm.errors import LdmError

SIZES = ["--held-out=4", "--steps=2", "--every=1", "--channels=8", "--latent-channels", "4"]
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
        path = tmp_path / "out" / "learning.json"
        return json.loads(path.read_text()) if path.exists() else None

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
    assert again["psnr"] == found["psnr"] and "--no-training" not in again["command"]
    line = "50 of 51 trainings are not finished: omit --no-training\n"
    assert line in capsys.readouterr().out


def test_the_share_that_ends_last_writes(tmp_path, compare, capsys):
    both = ["--only", "litevae", "--only", "litevae, shortcut", "--seeds", "1"]
    assert compare(*both, "--share", "1/2") is None
    assert "1 of 2 trainings are not finished: run the other share" in capsys.readouterr().out
    assert compare(*both, "--share", "2/2")["psnr"].keys() == {"litevae", "litevae, shortcut"}


def test_results_of_other_trainings_are_refused(tmp_path, compare, monkeypatch):
    compare("--only", "litevae", "--seeds", "1")
    with pytest.raises(
        SystemExit, match=r"is of other trainings \(latent_channels\): give another"
    ):
        compare("--no-training", sizes=[*SIZES[:-1], "12"])
    with pytest.raises(
        SystemExit, match=r"is of other trainings \(settings\): give another --name"
    ):
        compare("--no-training", "lr=0.01")
    with monkeypatch.context() as changed:
        changed.setitem(learning.VARIANTS, "litevae", ("litevae-b-quarter", ["lr=0.01"]))
        with pytest.raises(SystemExit, match=r"is of other trainings \(litevae\): give another"):
            compare("--no-training")

    (tmp_path / "out" / "learning.json").unlink()
    with pytest.raises(
        SystemExit, match=r"litevae-seed-0 is of other settings \(lr\): give another"
    ):
        compare("--no-training", "lr=0.01")
    with pytest.raises(LdmError, match="has no PSNR at step 3: give --every as it was trained"):
        learning.measured({1: 9.0, 2: 9.5}, Namespace(every=1, steps=3), tmp_path)


@pytest.mark.parametrize("psnr", [{"litevae": [{"1": 9.0}]}, {"litevae": {"x": {}}}])
def test_damaged_results_are_named(tmp_path, compare, psnr):
    compare("--only", "litevae", "--seeds", "1")
    path = tmp_path / "out" / "learning.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"psnr": psnr}))
    with pytest.raises(
        SystemExit, match=r"learning.json is damaged: psnr.litevae.*another --name$"
    ):
        compare("--no-training")
