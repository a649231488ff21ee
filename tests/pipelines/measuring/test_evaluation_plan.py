"""What is measured: models that are some, data split as training split it, images never seen."""

import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image

from autoencoders import build_autoencoder
from ldm.checkpoint import ModelFile, save_model
from ldm.config import to_tree
from ldm.data import DataConfig
from ldm.errors import LdmError, UsageError
from pipelines.measuring.evaluation import plan_jobs
from tests.pipelines.measuring.reconstructed import crops, save_images, save_run


def plan(*models, data=None, split="val", resolutions=(32,), limit=None, force=False):
    ranks = PartialState(cpu=True)
    return plan_jobs(models, data, split, resolutions, limit, ranks, force)


@pytest.fixture
def folder(tmp_path):
    """Twelve images, of which training held out three."""
    return save_images(tmp_path / "data", crops(12))


@pytest.fixture
def run(tmp_path, folder):
    data = to_tree(DataConfig(source=str(folder), held_out=3, workers=0))
    return save_run(tmp_path / "run", {"data": data, "phases": [{"resolution": 16, "steps": 1}]})


def copy(folder, number: int, to: str, suffix: str = ".png"):
    """One of the images again, in another file."""
    (folder / to).parent.mkdir(exist_ok=True)
    Image.fromarray(crops(12)[number]).save(folder / f"{to}{suffix}")


# ------------------------------------------------------------------------------- left out
def test_what_the_file_says(run, folder):
    (job,) = plan(run, resolutions=None)
    assert (job.resolution, job.data.source, len(job.source)) == (16, str(folder), 3)
    assert job.said["trained"]["images_seen"] == 8


def test_its_own_data_is_split_as_training_split_it(run, folder, monkeypatch):
    """By default one in twenty is held out: of these twelve, one that training saw among others."""
    (job,) = plan(run, data=str(folder))
    assert len(job.source) == 3
    monkeypatch.chdir(folder.parent)
    (job,) = plan(run, data="data")
    assert len(job.source) == 3
    (other,) = plan(run, data=DataConfig(source=str(folder), held_out=2, workers=0))
    assert len(other.source) == 2


def test_every_model_at_every_resolution(run, tmp_path):
    other = save_run(tmp_path / "other", seed=1)
    jobs = plan(run, other, data="photos", resolutions=[32, 16, 32])
    assert [(job.model, job.resolution) for job in jobs] == [
        (model, resolution) for model in (run, other) for resolution in (32, 16)
    ]
    assert jobs[0].said["sha256"] != jobs[2].said["sha256"]
    assert jobs[0].source is jobs[2].source


def test_a_file_that_does_not_say_what_it_was_trained_on(tmp_path):
    run = save_run(tmp_path / "run")
    with pytest.raises(UsageError, match="does not say what it was trained on: give --data"):
        plan(run)
    with pytest.raises(UsageError, match="does not say what it was trained on: give --resolution"):
        plan(run, data="photos", resolutions=None)
    build_autoencoder("tiny").save_pretrained(tmp_path / "hub")
    with pytest.raises(UsageError, match="give --data"):
        plan(tmp_path / "hub")


# ------------------------------------------------------------------------------- refused
def test_what_is_no_autoencoder(tmp_path, run):
    with pytest.raises(LdmError, match="no checkpoint at"):
        plan(run, tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("no model")
    with pytest.raises(LdmError, match=r"text\.pt is truncated or damaged"):
        plan(tmp_path / "text.pt")
    save_model(tmp_path / "two" / "ckpt.pt", ModelFile("diffusion", {}, {}))
    with pytest.raises(LdmError, match="is a stage-two diffusion model; a stage-one autoencoder"):
        plan(tmp_path / "two")


def test_resolutions_that_cannot_be(run, tmp_path):
    with pytest.raises(LdmError, match=r"--resolution 8: 16 is the least at which .*run can be"):
        plan(run, data="photos", resolutions=[32, 8])
    longer = build_autoencoder("tiny", encoder={"wavelet": "db8"})
    model = ModelFile("autoencoder", to_tree(longer.config), longer.state_dict())
    save_model(tmp_path / "db8" / "ckpt.pt", model)
    with pytest.raises(LdmError, match=r"--resolution 32: .*db8 cannot take it: .*too small for"):
        plan(tmp_path / "db8", data="photos")


# --------------------------------------------------------------------------- held out or not
def test_images_that_training_never_saw(run):
    (job,) = plan(run)
    assert job.seen["held_out"] is True and job.seen["note"] is None
    assert job.seen["overlap"] == {
        "shared": 0, "example": None, "held_out": 3, "held_out_of": 3, "train": 9, "train_of": 9,
        "against": job.data.source,
    }  # fmt: skip


def test_a_training_image_among_the_held_out_is_refused(run, folder):
    copy(folder, 4, to="z", suffix=".bmp")  # the last by name, and so held out
    with pytest.raises(LdmError) as error:
        plan(run)
    said = f"1 of 3 images of {folder}, val, are also training images of {folder}"
    assert str(error.value) == (
        f"{said}, such as {folder}/z.bmp: measure other images, or give --force"
    )
    (job,) = plan(run, force=True)
    assert job.seen["held_out"] is False and job.seen["note"].startswith(said)
    assert job.seen["overlap"]["shared"] == 1
    (first,) = plan(run, limit=2)  # not among those that are measured
    assert first.seen["held_out"] is True


def test_another_folder_with_a_training_image(run, tmp_path, folder):
    other = save_images(tmp_path / "other", crops(12)[9:])
    (job,) = plan(run, data=str(other), split="all")
    assert job.seen["held_out"] is True  # they are training's held-out ones
    copy(other, 0, to="new")
    with pytest.raises(LdmError, match=f"1 of 4 images of {other}, all, .*of {folder}, such as"):
        plan(run, data=str(other), split="all")


def test_every_resolution_is_compared_by_itself(tmp_path):
    """Of a model trained on smaller copies: at the larger size nobody can tell, in any order."""
    large = crops(3, size=64)
    data = save_images(tmp_path / "large", large)
    small = [Image.fromarray(image).resize((32, 32), Image.Resampling.LANCZOS) for image in large]
    copies = save_images(tmp_path / "small", [*map(np.asarray, small), *crops(1)])
    trained_on = to_tree(DataConfig(source=str(copies), held_out=1, workers=0))
    run = save_run(tmp_path / "run", {"data": trained_on})
    for resolutions in ([32], [32, 64], [64, 32]):
        with pytest.raises(LdmError, match=r"3 of 3 images of .*large, all, are also training"):
            plan(run, data=str(data), split="all", resolutions=resolutions)
        jobs = plan(run, data=str(data), split="all", resolutions=resolutions, force=True)
        assert all(
            job.seen["held_out"] is (False if job.resolution == 32 else None) for job in jobs
        )


def test_of_a_model_that_does_not_say(tmp_path, folder):
    """It is taken to have been trained on the rest of the same data."""
    run = save_run(tmp_path / "silent")
    (job,) = plan(run, data=str(folder))
    assert job.seen["overlap"]["against"] == str(folder) and job.seen["held_out"] is True
    copy(folder, 0, to="z")
    with pytest.raises(LdmError, match="1 of 1 images"):
        plan(run, data=str(folder))
    (job,) = plan(run, data=str(folder), split="all")
    assert job.seen == {"held_out": None, "note": None, "overlap": None}


def test_training_images_asked_for(run):
    for split in ("train", "all"):
        (job,) = plan(run, split=split)
        assert job.seen["held_out"] is False
        assert job.seen["note"] == f"{run} was trained on these images, or some of them"


def test_a_note_names_its_own_model(run, tmp_path, folder):
    """Of several models of the same data."""
    recipe = {"data": to_tree(DataConfig(source=str(folder), held_out=3, workers=0))}
    other = save_run(tmp_path / "other", recipe, seed=1)
    for job in plan(run, other, split="train"):
        assert job.seen["note"] == f"{job.model} was trained on these images, or some of them"
    gone = {"data": to_tree(DataConfig(source=str(tmp_path / "gone")))}
    models = [save_run(tmp_path / name, gone) for name in ("a", "b")]
    for job in plan(*models, data=str(folder)):
        assert job.seen["note"].startswith(f"not known whether {job.model} was trained")


def test_photographs_are_never_shared(run, tmp_path, folder):
    (job,) = plan(run, data="photos")
    assert job.seen == {"held_out": True, "note": None, "overlap": None}
    photos = save_run(tmp_path / "photos", {"data": to_tree(DataConfig())})
    for data in ("photos", str(folder)):
        (job,) = plan(photos, data=data)
        assert job.seen["held_out"] is True


def test_training_data_that_is_gone_or_too_small(tmp_path, folder):
    gone = to_tree(DataConfig(source=str(tmp_path / "gone")))
    (job,) = plan(save_run(tmp_path / "a", {"data": gone}), data=str(folder))
    assert job.seen["held_out"] is None
    assert "not known whether" in job.seen["note"] and "gone is not there" in job.seen["note"]
    small = save_images(tmp_path / "small", [np.zeros((16, 16, 3), np.uint8)] * 2)
    tree = to_tree(DataConfig(source=str(small), workers=0))
    (job,) = plan(save_run(tmp_path / "b", {"data": tree}), data=str(folder))
    assert "16×16, smaller than the 32×32" in job.seen["note"]
