"""Sampling to disk: images, resuming, classes, refused settings."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoint import load_model, save_model
from ldm.errors import LdmError, UsageError
from ldm.images import to_uint8
from pipelines.sample import sample_images
from pipelines.sampling.model import LatentModel
from pipelines.sampling.sample_folder import SampleFolder, SampleStore, image_name
from tests.pipelines.untrained import CLASSES, pipeline
from tests.small import ROOT, ldm


def draw(model, out, n=6, **settings):
    settings = {"steps": 2, "batch_size": 4, "precision": "fp32", "device": "cpu"} | settings
    return sample_images(model, n, out, **settings)


def pixels(path):
    return np.array(Image.open(path))


def test_writes_pngs_a_manifest_and_a_grid(model, tmp_path):
    out = draw(model, None)
    assert out == model / "samples" / "seed0-steps2"
    images = sorted(out.rglob("img*.png"))
    assert [p.name for p in images] == [f"img{i:08d}.png" for i in range(6)]
    assert pixels(images[0]).shape == (32, 32, 3)
    told = json.loads((out / "samples.json").read_text())
    assert told["n"] == 6 and told["seed"] == 0 and told["steps"] == 2
    assert len(told["model"]["sha256"]) == 64 and told["data"]["source"] == "photos"
    assert pixels(out / "grid.png").shape == (2 * 34 + 32, 34 + 32, 3)
    assert not [p for p in out.rglob("*") if "partial" in p.name]


def test_thousand_images_per_folder():
    assert image_name(49_999) == "00049/img00049999.png"


def test_images_equal_the_pipelines(conditional, tmp_path):
    pipe = pipeline(0, CLASSES)
    how = {"guidance": 2, "churn": {"S_churn": 4}, "sampler": "euler", "interval": (0.1, 9)}
    out = draw(conditional, tmp_path / "out", seed=3, batch_size=6, **how)
    pictures = pipe(6, 3, steps=2, output="pil", **how)
    for i, picture in enumerate(pictures):
        assert np.array_equal(pixels(out / image_name(i)), np.array(picture))


def test_only_missing_images_are_sampled(model, tmp_path):
    out = draw(model, tmp_path / "out")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("img*.png")}
    lost = out / image_name(3)
    lost_pixels = pixels(lost).astype(int)
    lost.unlink()
    draw(model, out, n=8)
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("img*.png")}
    assert len(after) == 8
    assert abs(pixels(lost) - lost_pixels).max() <= 1  # its batch is another one
    assert all(after[p] == before[p] for p in before if p != lost)
    assert json.loads((out / "samples.json").read_text())["n"] == 8


def test_batch_size_does_not_matter(model, tmp_path):
    how = {"steps": 3, "churn": 10, "n": 7}
    one = draw(model, tmp_path / "one", batch_size=1, **how)
    for size in (3, 7):
        other = draw(model, tmp_path / f"by-{size}", batch_size=size, **how)
        for i in range(7):
            apart = pixels(one / image_name(i)).astype(int) - pixels(other / image_name(i))
            assert abs(apart).max() <= 1


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_images(model, tmp_path):
    out, how = tmp_path / "out", {"n": 24, "steps": 40, "batch_size": 1}
    words = ["sample", model, "--n", 24, "--steps", 40, "--batch-size", 1, "--precision", "fp32"]
    running = ldm(*words, "--format", "shards", "--out", out, cwd=tmp_path, start=True)
    deadline = time.monotonic() + 120
    while len(list(out.rglob("*.png"))) < 3:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait(60)
    there = len(list(out.rglob("img*.png")))
    assert 3 <= there < 24 and not (out / "grid.png").exists()
    with pytest.raises(LdmError, match="of its 24 samples"):
        SampleFolder(out)

    draw(model, out, files="shards", **how)
    folder, pngs = SampleFolder(out), SampleFolder(draw(model, tmp_path / "pngs", **how))
    assert len(folder) == len(pngs) == 24
    assert all(np.array_equal(folder.load(i), pngs.load(i)) for i in range(24))
    assert (out / "grid.png").read_bytes() == (tmp_path / "pngs" / "grid.png").read_bytes()
    assert not list(out.glob("[0-9]*"))


TWO_PROCESSES = """
import sys
from pathlib import Path
from accelerate import PartialState
from ldm.errors import LdmError
from pipelines import sample
from pipelines.sampling import sample_folder
from pipelines.sampling.sample_folder import SampleStore

rank, how = PartialState(cpu=True).process_index, dict(batch_size=2, device="cpu")
how |= dict(steps=3, churn=10, precision="fp32", n=9, model=sys.argv[1])
write = SampleStore.write
def watched(store, i, picture):
    with open(f"wrote-{rank}", "a") as file:
        print(i, file=file)
    write(store, i, picture)
SampleStore.write = watched
sample_folder.THOUSAND = 4
sample.sample_images(out="two", files="shards", **how)
try:
    sample.sample_images(out="two", seed=1, files="shards", **how)
except LdmError as error:
    Path(f"refused-{rank}").write_text(str(error))
PartialState().destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_the_work_and_fail_together(model, tmp_path):
    (tmp_path / "job.py").write_text(TWO_PROCESSES)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "job.py", str(model)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    wrote = [(tmp_path / f"wrote-{rank}").read_text().split() for rank in range(2)]
    assert [sorted(map(int, mine)) for mine in wrote] == [[0, 1, 4, 5, 8], [2, 3, 6, 7]]
    for rank in range(2):
        told = (tmp_path / f"refused-{rank}").read_text()
        assert told == "two holds samples with other settings (seed): give --out another folder"
    one = SampleFolder(draw(model, tmp_path / "one", n=9, steps=3, churn=10, batch_size=2))
    two = SampleFolder(tmp_path / "two")
    assert len(two) == 9 and not list(two.path.glob("[0-9]*"))
    for i in range(9):  # a process of one thread rounds differently
        assert abs(one.load(i).astype(int) - two.load(i)).max() <= 1
    assert pixels(two.path / "grid.png").shape == pixels(one.path / "grid.png").shape


def test_grid_never_shrinks(model, tmp_path):
    out = draw(model, tmp_path / "out", n=5)
    five = (out / "grid.png").read_bytes()
    draw(model, out, n=2)
    assert (out / "grid.png").read_bytes() == five
    draw(model, out, n=7)
    assert pixels(out / "grid.png").shape[0] > 2 * 34
    # a larger job that was stopped: as far as there is no gap
    (out / image_name(3)).unlink()
    draw(model, out, n=2)
    assert pixels(out / "grid.png").shape == (34 + 32, 34 + 32, 3)


@pytest.mark.parametrize("files", ["zip", "shards"])
def test_other_forms_hold_the_same_images(model, tmp_path, files):
    pngs = SampleFolder(draw(model, tmp_path / "png", n=7))
    draw(model, tmp_path / "out", n=5, files=files)
    out = draw(model, tmp_path / "out", n=7, files=files)
    folder = SampleFolder(out)
    assert len(folder) == 7
    for i in range(7):
        assert abs(folder.load(i).astype(int) - pngs.load(i)).max() <= 1
    with pytest.raises(LdmError, match=r"other settings \(files\)"):
        draw(model, out)


# ----------------------------------------------------------------------------------- classes
def test_classes_are_drawn_or_cycled(conditional, tmp_path):
    pipe = pipeline(0, CLASSES)
    out = draw(conditional, tmp_path / "drawn", n=4)
    draw(conditional, out, n=6)
    drawn = json.loads((out / "labels.json").read_text())
    assert drawn == {"classes": list(CLASSES), "labels": list(pipe.classes.choose(None, 6, 0))}
    draw(conditional, out, n=2)
    assert json.loads((out / "labels.json").read_text()) == drawn

    turns = draw(conditional, tmp_path / "turns", n=5, labels=["dog", "0"])
    assert json.loads((turns / "labels.json").read_text())["labels"] == [1, 0, 1, 0, 1]
    given = draw(conditional, tmp_path / "given", n=3, labels=[1])
    apart = [
        abs(pixels(turns / image_name(i)).astype(int) - pixels(given / image_name(i))).max()
        for i in range(3)
    ]
    assert apart[0] <= 1 and apart[2] <= 1 and apart[1] > 3
    with pytest.raises(LdmError, match=r"other settings \(labels\)"):
        draw(conditional, given)


def test_labels_of_any_type(conditional, tmp_path):
    out = draw(conditional, tmp_path / "out", n=2, labels=np.array([1, 0]))
    assert json.loads((out / "samples.json").read_text())["labels"] == [1, 0]
    draw(conditional, out, n=2, labels=["dog", " cat"])
    one = draw(conditional, tmp_path / "one", n=1, labels="dog", seed=np.int64(0))
    assert json.loads((one / "labels.json").read_text())["labels"] == [1]


def test_unknown_classes_are_refused(model, conditional, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="this model has no classes"):
        draw(model, out, labels=["cat"])
    with pytest.raises(UsageError, match="label 7: classes are 0 to 2"):
        draw(conditional, out, labels=["cat", "7"])
    for which in (model, conditional):
        with pytest.raises(UsageError, match="labels are empty"):
            draw(which, out, labels=[])
    with pytest.raises(UsageError, match="label -1 is the unconditional model"):
        draw(conditional, out, labels=[0, -1], guidance=2)
    assert not out.exists()


# --------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("bad", [{"n": 0}, {"n": -3}, {"steps": 0}, {"batch_size": 0}])
def test_counts_below_one_are_refused(model, tmp_path, bad):
    with pytest.raises(UsageError, match=r"must be at least 1|should be greater than 0"):
        draw(model, tmp_path / "out", **bad)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"sigma_max": 99}, "sigma_max=99: this model denoises"),
        ({"batch_size": 2.5}, "--batch-size 2.5: it must be a whole number"),
        ({"seed": 1.0}, "--seed 1.0: it must be a whole number"),
        ({"files": "jpg"}, "--format jpg: it must be one of png, shards, zip"),
        ({"steps": 10**20}, "'steps': input should be less than or equal to 100000"),
        ({"interval": (0.2, 3)}, "interval has no effect without guidance"),
        ({"guidance": 2}, "cannot guide itself"),
        ({"churn": 2, "sampler": "dpmpp-2m"}, "does not support churn"),
        ({"step": 3}, "unknown key 'step'; did you mean 'steps'"),
    ],
)
def test_invalid_settings_leave_no_folder(model, tmp_path, bad, message):
    with pytest.raises(UsageError, match=message):
        draw(model, tmp_path / "out", **bad)
    assert not (tmp_path / "out").exists()


def test_failed_write_is_an_error(model, tmp_path, monkeypatch):
    out = draw(model, tmp_path / "out", n=1)
    (out / "00000" / "img00000002.png").mkdir()
    with pytest.raises(LdmError, match="could not write"):
        draw(model, out, n=4)


def forget_every_other_image(monkeypatch):
    """Write every other image elsewhere, as another machine without the shared disk would."""
    write = SampleStore.write
    here = lambda store, i, picture: None if i % 2 else write(store, i, picture)  # noqa: E731
    monkeypatch.setattr(SampleStore, "write", here)


@pytest.mark.parametrize("files", ["png", "shards", "zip"])
def test_images_that_are_not_here_are_no_success(model, tmp_path, monkeypatch, files):
    with monkeypatch.context() as patch:
        forget_every_other_image(patch)
        with pytest.raises(LdmError) as error:
            draw(model, tmp_path / "out", files=files)
    assert "lacks 3 of 6 images, which other processes wrote: it is not on" in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "grid.png").exists()
    draw(model, tmp_path / "whole", files=files)
    again, whole = (
        SampleFolder(draw(model, tmp_path / "out", files=files)),
        SampleFolder(tmp_path / "whole"),
    )
    assert len(again) == 6
    assert all(np.array_equal(again.load(i), whole.load(i)) for i in range(6))


def test_paths_may_be_strings(model, tmp_path):
    out = draw(str(model), str(tmp_path / "out"), n=1)
    assert (out / image_name(0)).is_file() and draw(model, out, n=1) == out


def test_images_that_are_not_finite_are_not_written(model, tmp_path):
    whole = load_model(model, "diffusion")
    weights = {name: tensor * 1e30 for name, tensor in whole.weights.items()}
    (tmp_path / "nan").mkdir()
    save_model(tmp_path / "nan" / "ckpt.pt", replace(whole, weights=weights))
    with pytest.raises(LdmError, match="images 0 to 3 are not finite"):
        draw(tmp_path / "nan", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.png"))


def test_images_leave_the_device_as_pixels(model, tmp_path, monkeypatch):
    """A quarter of the bytes of floats, and the same pixels."""
    floats, sample = [], LatentModel.sample

    def kept(self, *arguments, finish, **settings):
        def both(images):
            floats.append(images)
            return finish(images)

        images = sample(self, *arguments, finish=both, **settings)
        assert images.dtype == torch.uint8
        return images

    monkeypatch.setattr(LatentModel, "sample", kept)
    out = draw(model, tmp_path / "out", n=3)
    expected = to_uint8(torch.cat(floats)).permute(0, 2, 3, 1).numpy()
    found = np.stack([pixels(out / image_name(i)) for i in range(3)])
    np.testing.assert_array_equal(found, expected)
