"""Figures 5 and 8: default resolutions, and the numbers at each."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoders import load_autoencoder
from ldm.data import DataConfig, open_source
from ldm.data.prepare import prepare
from ldm.errors import LdmError, UsageError
from pipelines.analysis.scale import RESOLUTIONS, _fitting, analyze_scale
from pipelines.validation import evaluate_autoencoder
from tests.pipelines.analysis.subjects import save


@pytest.fixture
def folder(tmp_path):
    """Six images, the smallest of 140×100 pixels."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(6):
        shape = (100, 140, 3) if i == 3 else (160, 170, 3)
        coarse = np.random.default_rng(i).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        size = (shape[1], shape[0])
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(images / f"{i}.png")
    return images


# ---------------------------------------------------------------------------------- which
def test_default_resolutions_fit_the_smallest_image(folder):
    config = DataConfig(source=str(folder), workers=0)
    assert _fitting(config, "all", None) == [32, 64]
    assert _fitting(config, "all", 3) == [32, 64, 128]  # the small one is the fourth
    assert _fitting(DataConfig(), "val", None) == list(RESOLUTIONS)


def test_prepared_data_know_their_size(folder, tmp_path):
    prepare(folder, tmp_path / "shards", 64, held_out=1, workers=0)
    assert _fitting(DataConfig(source=str(tmp_path / "shards")), "val", None) == [32, 64]


def test_images_below_all_resolutions_are_refused(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "small.png")
    with pytest.raises(LdmError, match="an image has 20 pixels, below 32"):
        _fitting(DataConfig(source=str(tmp_path)), "all", None)


def test_default_resolutions_are_those_of_images_as_the_model_takes_them(tmp_path):
    deep = tmp_path / "deep"
    deep.mkdir()
    np.save(deep / "a.npy", np.random.default_rng(0).random((40, 40), np.float32))
    own = DataConfig(source=str(deep), held_out=0, workers=0)
    model = save(tmp_path / "a", data=own, image_channels=1,
                 pixels={"type": "float32", "range": [0, 1]})  # fmt: skip
    found = analyze_scale([model], split="all", fid=False, device="cpu", limit=2)
    assert [row[1] for row in found.rows] == ["32²"]


# ---------------------------------------------------------------------------------- numbers
def test_numbers_match_evaluate_autoencoder(folder, tmp_path):
    a, b = save(tmp_path / "a", norm="group"), save(tmp_path / "b", seed=1)
    found = analyze_scale(
        [f"GroupNorm={a}", f"SMC={b}"], str(folder), split="all", fid=False, device="cpu",
        batch_size=4,
    )  # fmt: skip
    assert [path.name for path in found.files] == ["scale.png", "scale.csv", "scale.json"]
    assert all(path.parent == a / "analysis" for path in found.files)
    assert found.files[0].stat().st_size > 10_000
    assert [row[:2] for row in found.rows] == [
        ("GroupNorm", "32²"), ("GroupNorm", "64²"), ("SMC", "32²"), ("SMC", "64²")
    ]  # fmt: skip
    with found.files[1].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        ae = load_autoencoder({"GroupNorm": a, "SMC": b}[row["model"]])
        side = int(row["resolution"])
        source = open_source(DataConfig(source=str(folder)), "all", side)
        expected = evaluate_autoencoder(ae, source, side, 2, torch.device("cpu"))
        assert row["images"] == "6" and row["rfid"] == ""
        assert float(row["psnr"]) == pytest.approx(expected["psnr"], abs=1e-3)
        assert float(row["ssim"]) == pytest.approx(expected["ssim"], abs=1e-4)


def test_a_file_with_two_names_is_measured_once(tmp_path):
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1, norm="group")
    how = {"resolutions": [32, 64], "limit": 2, "fid": False, "device": "cpu"}
    rows = analyze_scale([f"A={a}", f"again={a}", f"B={b}"], **how).rows
    assert [row[:2] for row in rows] == [
        (n, s) for n in ("A", "again", "B") for s in ("32²", "64²")
    ]
    assert [row[1:] for row in rows[:2]] == [row[1:] for row in rows[2:4]]
    assert [row[1:] for row in rows[4:]] == [row[1:] for row in analyze_scale([b], **how).rows]


def test_photographs_come_with_a_warning(tmp_path):
    found = analyze_scale([save(tmp_path)], resolutions=[64, 32], limit=2, fid=False, device="cpu")
    assert [row[1] for row in found.rows] == ["32²", "64²"]
    assert "cropped, not resized" in found.notes[0]


def test_a_limit_below_one_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--limit 0: must be at least 1"):
        analyze_scale([save(tmp_path)], limit=0)
