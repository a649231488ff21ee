"""Evaluations: which jobs are planned or refused, where results are kept, how tables look."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image

from autoencoders import build_autoencoder
from ldm.checkpoint import ModelFile, save_model
from ldm.config import to_tree
from ldm.data import DataConfig
from ldm.data.sources import FolderSource
from ldm.errors import LdmError, UsageError
from pipelines.measuring import evaluation
from pipelines.measuring.evaluation import (
    NUMBERS,
    Evaluation,
    EvaluationJob,
    default_path,
    default_paths,
    find_overlap,
    format_evaluations,
    name_models,
    plan_jobs,
)
from pipelines.measuring.statistics import MeasureOptions
from tests.pipelines.measuring.reconstructed import crops, save_images, save_run


# -------------------------------------------------------------------------------------- jobs
def plan(*models, data=None, split="val", resolutions=(32,), **options):
    ranks = PartialState(cpu=True)
    return plan_jobs(models, data, split, resolutions, MeasureOptions(**options), ranks)


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
def test_data_and_resolution_default_to_those_of_training(run, folder):
    (job,) = plan(run, resolutions=None)
    assert (job.resolution, job.data.source, len(job.source)) == (16, str(folder), 3)
    assert job.about_model["trained"]["images_seen"] == 8


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
    assert jobs[0].about_model["sha256"] != jobs[2].about_model["sha256"]
    assert jobs[0].source is jobs[2].source


def test_a_file_without_training_data_needs_options(tmp_path):
    run = save_run(tmp_path / "run")
    with pytest.raises(UsageError, match="does not name its training data: give --data"):
        plan(run)
    with pytest.raises(UsageError, match="does not name its training data: give --resolution"):
        plan(run, data="photos", resolutions=None)
    build_autoencoder("tiny").save_pretrained(tmp_path / "hub")
    with pytest.raises(UsageError, match="give --data"):
        plan(tmp_path / "hub")


# ------------------------------------------------------------------------------- refused
def test_a_file_that_is_no_autoencoder_is_refused(tmp_path, run):
    with pytest.raises(LdmError, match="no checkpoint at"):
        plan(run, tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("no model")
    with pytest.raises(LdmError, match=r"text\.pt is truncated or damaged"):
        plan(tmp_path / "text.pt")
    save_model(tmp_path / "two" / "ckpt.pt", ModelFile("diffusion", {}, {}))
    with pytest.raises(LdmError, match="is a stage-two diffusion model; a stage-one autoencoder"):
        plan(tmp_path / "two")


def test_resolutions_that_do_not_fit_are_refused(run, tmp_path):
    with pytest.raises(LdmError, match=r"--resolution 8: .*run needs 16 or more"):
        plan(run, data="photos", resolutions=[32, 8])
    longer = build_autoencoder("tiny", encoder={"wavelet": "db8"})
    model = ModelFile("autoencoder", to_tree(longer.config), longer.state_dict())
    save_model(tmp_path / "db8" / "ckpt.pt", model)
    with pytest.raises(LdmError, match=r"--resolution 32: .*db8 cannot take it: .*too small for"):
        plan(tmp_path / "db8", data="photos")


# --------------------------------------------------------------------------- held out or not
def test_held_out_images_are_compared_with_training_images(run):
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
        f"{said}, such as {folder}/z.bmp: measure other images; --force measures anyway"
    )
    (job,) = plan(run, force=True)
    assert job.seen["held_out"] is False and job.seen["note"].startswith(said)
    assert job.seen["overlap"]["shared"] == 1
    (first,) = plan(run, limit=2)  # not among those that are measured
    assert first.seen["held_out"] is True


def test_a_training_image_in_another_folder_is_refused(run, tmp_path, folder):
    other = save_images(tmp_path / "other", crops(12)[9:])
    (job,) = plan(run, data=str(other), split="all")
    assert job.seen["held_out"] is True  # they are training's held-out ones
    copy(other, 0, to="new")
    with pytest.raises(LdmError, match=f"1 of 4 images of {other}, all, .*of {folder}, such as"):
        plan(run, data=str(other), split="all")


def test_images_are_compared_at_every_resolution(tmp_path):
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


def test_a_model_without_training_data_is_compared_with_the_same_data(tmp_path, folder):
    """It is taken to have been trained on the rest of the same data."""
    run = save_run(tmp_path / "silent")
    (job,) = plan(run, data=str(folder))
    assert job.seen["overlap"]["against"] == str(folder) and job.seen["held_out"] is True
    copy(folder, 0, to="z")
    with pytest.raises(LdmError, match="1 of 1 images"):
        plan(run, data=str(folder))
    (job,) = plan(run, data=str(folder), split="all")
    assert job.seen == {"held_out": None, "note": None, "overlap": None}


def test_requested_training_images_are_noted(run):
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


def test_training_data_that_is_gone_or_too_small_is_noted(tmp_path, folder):
    gone = to_tree(DataConfig(source=str(tmp_path / "gone")))
    (job,) = plan(save_run(tmp_path / "a", {"data": gone}), data=str(folder))
    assert job.seen["held_out"] is None
    assert "not known whether" in job.seen["note"] and "gone does not exist" in job.seen["note"]
    small = save_images(tmp_path / "small", [np.zeros((16, 16, 3), np.uint8)] * 2)
    tree = to_tree(DataConfig(source=str(small), workers=0))
    (job,) = plan(save_run(tmp_path / "b", {"data": tree}), data=str(folder))
    assert "16×16, smaller than the 32×32" in job.seen["note"]


# ------------------------------------------------------------------------------- overlap
@pytest.fixture
def ranks():
    return PartialState(cpu=True)


def folders(tmp_path, ours: list[np.ndarray], theirs: list[np.ndarray]):
    save_images(tmp_path / "ours", ours, ".bmp")
    save_images(tmp_path / "theirs", theirs)
    trained_on = DataConfig(source=str(tmp_path / "theirs"), held_out=0)
    return FolderSource(tmp_path / "ours"), trained_on


def test_copies_are_found_under_other_names_and_formats(tmp_path, ranks):
    images = crops(9)
    ours, theirs = folders(tmp_path, images[5:], images[:7])
    found = find_overlap(ours, theirs, 32, ranks)
    assert (found["shared"], found["held_out"], found["train"]) == (2, 4, 7)
    assert (found["held_out_of"], found["train_of"]) == (4, 7)
    assert found["example"] == f"{tmp_path}/ours/000.bmp"


def test_a_changed_pixel_is_no_copy(tmp_path, ranks):
    changed = crops(1)[0].copy()
    changed[3, 4, 1] ^= 1
    ours, theirs = folders(tmp_path, [changed], crops(1))
    found = find_overlap(ours, theirs, 32, ranks)
    assert found["shared"] == 0 and found["example"] is None


def test_images_are_compared_as_they_are_measured(tmp_path, ranks):
    """A training image that was prepared at the resolution, and the larger one it was made of."""
    (large,) = crops(1, size=64)
    prepared = np.asarray(Image.fromarray(large).resize((32, 32), Image.Resampling.LANCZOS))
    ours, theirs = folders(tmp_path, [large], [prepared])
    assert find_overlap(ours, theirs, 32, ranks)["shared"] == 1


def test_a_limit_leaves_later_held_out_images_out(tmp_path, ranks):
    images = crops(6)
    ours, theirs = folders(tmp_path, images[:4], images[3:])
    assert find_overlap(ours, theirs, 32, ranks, limit=3)["shared"] == 0
    assert find_overlap(ours, theirs, 32, ranks, limit=9)["shared"] == 1


def test_of_large_sets_some_images_are_drawn(tmp_path, ranks, monkeypatch):
    """Of a split that lies wholly in the other some are found; those drawn are in their order."""
    monkeypatch.setattr(evaluation, "COMPARED", 6)
    ours, theirs = folders(tmp_path, crops(9), crops(9))
    found = find_overlap(ours, theirs, 32, ranks)
    assert (found["held_out"], found["train"]) == (6, 6)
    assert (found["held_out_of"], found["train_of"]) == (9, 9)
    assert found["shared"] == 6  # of equally many the same are drawn
    assert found["example"].endswith(".bmp")


def test_training_images_too_small_are_an_error(tmp_path, ranks):
    ours, theirs = folders(tmp_path, crops(2, size=48), crops(2, size=32))
    with pytest.raises(LdmError, match="is 32×32, smaller than the 48×48"):
        find_overlap(ours, theirs, 48, ranks)


# ---------------------------------------------------------------------------------- on disk
def job(model: Path, source="photos", split="val", resolution=64) -> EvaluationJob:
    data = DataConfig(source=source)
    return EvaluationJob(model, {}, None, data, split, resolution, None, {})


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("photos", "photos-val-64"),
        ("data/ffhq", "data-ffhq-#-val-64"),
        ("/sets/imagenet/val", "imagenet-val-#-val-64"),
        ("/faces.zip", "faces.zip-#-val-64"),
        ("sets/{000..009}.tar", "sets-_000..009_.tar-#-val-64"),
        ("/faces", "faces-#-val-64"),
    ],
)
def test_a_file_is_named_after_data_split_and_resolution(tmp_path, source, name):
    run = save_run(tmp_path / "run")
    path, same = (default_path(job(model, source)) for model in (run, run / "ckpt.pt"))
    assert re.sub("-[0-9a-f]{6}-", "-#-", path.name) == f"{name}.json"
    assert path == same and path.parent == run / "eval"


def test_other_data_has_a_file_of_its_own(tmp_path, monkeypatch):
    sources = ("/a/x/val", "/b/x/val", "/a/x-val", "/faces", "/faces.zip", "./photos", "photos")
    paths = {default_path(job(tmp_path, source)) for source in sources}
    assert len(paths) == len(sources)
    monkeypatch.chdir(tmp_path)
    one, same = (
        default_path(job(tmp_path, source)) for source in ("x/val", str(tmp_path / "x" / "val"))
    )
    assert one == same


def test_other_weights_and_settings_have_files_of_their_own(tmp_path):
    run = save_run(tmp_path / "run")
    (run / "ckpt.pt").rename(run / "best.pt")
    best = job(run / "best.pt", split="all", resolution=32)
    path = default_path(best, "first8", "my_net:vit/b")
    assert path == run / "eval" / "best-photos-all-32-first8-my_net_vit_b.json"


def test_files_of_one_folder_do_not_overwrite_each_other(tmp_path, monkeypatch):
    names = ("vae.pt", "vae.safetensors", "vae.ckpt", "ckpt.pt", "ckpt.safetensors")
    for name in names:
        (tmp_path / name).touch()
    paths = default_paths([job(tmp_path / name) for name in names], "no-fid")
    assert [path.name.removesuffix("photos-val-64-no-fid.json") for path in paths] == [
        "vae-", "vae.safetensors-", "vae.ckpt-", "", "ckpt.safetensors-"
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for twice in (tmp_path / "ckpt.pt", Path("ckpt.pt")):
        with pytest.raises(UsageError) as refused:
            default_paths([job(tmp_path), job(twice)])
        told = f"{tmp_path} and {twice} would both be written to "
        assert str(refused.value).startswith(told) and "give --out" in str(refused.value)


# ------------------------------------------------------------------------------------ table
ABOUT = {
    "data": {"source": "data/ffhq_256"}, "split": "val", "recon": "8 bits", "extractor": None,
    "versions": {"ldm": "1.2.3"}, "doubtful": {}, "notes": [],
}  # fmt: skip


def row(model: str = "runs/b_1", resolution: int = 256, about=None, **numbers):
    known = dict.fromkeys(NUMBERS) | {"psnr": 28.334, "ssim": 0.82149, "kid": 0.00123} | numbers
    about = ABOUT | (about or {})
    return Evaluation(Path(model), resolution, 5000, known, about, Path("x.json"))


def test_a_terminal_gets_columns():
    rows = [row(rfid=0.4149), row("runs/longer", psnr=9.5)]
    assert format_evaluations(rows).splitlines() == [
        "model   resolution  images  rFID ↓  PSNR ↑  SSIM ↑  KID ×10³ ↓",
        "b_1           256²    5000    0.41   28.33   0.821        1.23",
        "longer        256²    5000       –    9.50   0.821        1.23",
        "measured on data/ffhq_256, val: 8 bits; ldm 1.2.3",
    ]


def test_markdown_is_a_table():
    about = {"doubtful": {"rfid": "few images"}, "notes": ["a note"]}
    text = format_evaluations([row("a|b.pt", rfid=0.4, about=about)], "markdown")
    assert text.splitlines() == [
        "| model       | resolution | images | rFID ↓ | PSNR ↑ | SSIM ↑ | KID ×10³ ↓ |",
        "|:------------|-----------:|-------:|-------:|-------:|-------:|-----------:|",
        "| a&#124;b.pt |       256² |   5000 |  0.40* |  28.33 |  0.821 |       1.23 |",
        "",
        "measured on data/ffhq_256, val: 8 bits; ldm 1.2.3  ",
        r"\* few images  ",
        "a note  ",
    ]


def test_latex_is_a_tabular_of_booktabs():
    extractor = {"name": "inception.pt"}
    text = format_evaluations(
        [row(rfid=0.4, about={"extractor": extractor}), row("50%&_{x}^~.pt")], "latex"
    )
    assert text.splitlines() == [
        "% measured on data/ffhq_256, val: 8 bits; features of inception.pt; ldm 1.2.3",
        "% measured on data/ffhq_256, val: 8 bits; ldm 1.2.3",
        r"\begin{tabular}{lrrrrrr}",
        r"\toprule",
        r"model & resolution & images & rFID $\downarrow$ & PSNR $\uparrow$ & SSIM $\uparrow$ & "
        r"KID $\times 10^3$ $\downarrow$ \\",
        r"\midrule",
        r"b\_1 & 256$^2$ & 5000 & 0.40 & 28.33 & 0.821 & 1.23 \\",
        r"50\%\&\_\{x\}\textasciicircum{}\textasciitilde{}.pt & 256$^2$ & 5000 & -- & 28.33 & "
        r"0.821 & 1.23 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_json_holds_whole_evaluations():
    rows = [row(rfid=0.4), row("runs/other")]
    assert json.loads(format_evaluations(rows, "json")) == [row.to_tree() for row in rows]


def test_models_at_one_resolution_stand_together():
    rows = [row(model, side) for model in ("a.pt", "b.pt") for side in (256, 128)]
    lines = format_evaluations(rows).splitlines()[1:5]
    assert [line.split()[:2] for line in lines] == [
        ["a.pt", "256²"], ["b.pt", "256²"], ["a.pt", "128²"], ["b.pt", "128²"],
    ]  # fmt: skip


def test_data_that_differs_is_a_column():
    other = {"data": {"source": "photos"}}
    text = format_evaluations([row(), row("runs/c", about=other)], "latex")
    assert r"\begin{tabular}{llrrrrr}" in text
    assert re.search(r"^model & data & resolution", text, re.M)
    assert r"c & photos, val & 256" in text


def test_names_are_short_and_distinguish_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("runs/x", "old/x", "runs/y"):
        Path(run).mkdir(parents=True)
        (Path(run) / "run.json").write_text("{}")
    words = ["runs/y", "runs/x/ckpt.pt", "old/x", "runs/y/best.pt", "sd-vae.ckpt", "."]
    assert name_models(list(map(Path, words))) == [
        "y", "runs/x/ckpt.pt", "old/x", "y/best.pt", "sd-vae.ckpt", tmp_path.name,
    ]  # fmt: skip


def test_an_unknown_layout_is_a_usage_error():
    with pytest.raises(UsageError, match="--format html: it must be one of table, markdown, latex"):
        format_evaluations([row()], "html")
