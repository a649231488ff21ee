"""A row's runs, measurements and smoke-test substitutes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.errors import LdmError
from ldm.files import write_json
from ldm.metrics.inception import load_extractor
from pipelines.reproduce import rows
from pipelines.reproduce.plan import BuildPlan, load_scale
from pipelines.reproduce.rows import (
    FEATURES,
    Checkpoint,
    check_images,
    listing_of,
    measure,
    smoke_esrgan,
    smoke_lpips,
    trainings_of,
)
from pipelines.reproduce.tables import find_tables
from tests.ldm.data.pictures import noise, png_folder
from tests.pipelines.analysis.subjects import save

AUTOENCODER = Checkpoint(Path("ae.pt"), "0" * 64, "autoencoder", taken=True)
DIFFUSION = Checkpoint(Path("diffusion.pt"), "0" * 64, "diffusion", taken=True)
[TABLE_6] = find_tables("t6")


@pytest.fixture
def data(tmp_path):
    return png_folder(tmp_path / "data", [noise(n, 64, 64) for n in range(24)])


# ------------------------------------------------------------------------------- the model
def target_of(word, *settings, data=()):
    [table] = find_tables(word)
    return BuildPlan(load_scale("smoke"), data, settings).targets(table)[0]


def test_runs_depend_on_the_checkpoint():
    one, two = target_of("t4"), target_of("t13")
    assert trainings_of(one) == (one.stage_one,) and trainings_of(one, AUTOENCODER) == ()
    assert trainings_of(two) == (two.stage_one, two.stage_two)
    assert trainings_of(two, DIFFUSION) == ()
    # on a first stage of its own
    [second] = trainings_of(two, AUTOENCODER)
    assert second == replace(two.stage_two, folder=two.folder / "diffusion")


@pytest.mark.parametrize(("word", "taken"), [("t4", None), ("t13", None), ("t13", AUTOENCODER)])
def test_changed_data_is_refused(word, taken, data, tmp_path, monkeypatch):
    """Those of a stage two that stands on a checkpoint, too."""
    monkeypatch.chdir(tmp_path)
    listing_of.cache_clear()
    target = target_of(word, data=[str(data)])
    run = trainings_of(target, taken)[-1].folder
    write_json(run / ".training.json", {"seconds": 1.0, "listing": listing_of(str(data))})
    check_images(target, taken)
    (data / "0000.png").unlink()
    listing_of.cache_clear()
    with pytest.raises(LdmError, match=f"{run} was trained on other images than"):
        check_images(target, taken)


# ------------------------------------------------------------------------ the measurements
def latents(data, model, tmp_path, *settings, force=False):
    plan = BuildPlan(load_scale("smoke"), [str(data)], settings, tmp_path / "out", force=force)
    taken = Checkpoint(model / "ckpt.pt", "0" * 64, "autoencoder", taken=True)
    return measure(TABLE_6, plan.targets(TABLE_6)[0], taken, plan)


def test_latents_are_of_the_rows_split(data, tmp_path):
    found = latents(data, save(tmp_path / "model"), tmp_path, "data.held_out=5", "data.workers=0")
    assert found.count == 5 and list(found.each["k"]) == [0, 1, 2, 3, 4]
    for sigma in (25, 50, 100, 250, 500):
        shares = found.each[f"mmd_{sigma}"]
        expected = shares.mean(), shares.std(ddof=1) / np.sqrt(5)
        assert found.numbers[f"mmd_{sigma}"] == pytest.approx(expected)
    assert found.notes[0].startswith(
        f"Latents of 5 held-out images of {data} at 64² (all; 32 requested), "
    )
    assert (found.force, found.extractor) == (None, None)


def test_latents_of_training_images_are_refused(data, tmp_path):
    """As the tables of reconstructions do."""
    elsewhere = tmp_path / "elsewhere"  # with copies under other names
    elsewhere.mkdir()
    for path in data.iterdir():
        (elsewhere / f"copy-{path.name}").write_bytes(path.read_bytes())
    (elsewhere / "other.png").write_bytes((elsewhere / "copy-0000.png").read_bytes())
    model = save(tmp_path / "model", data=str(elsewhere), resolution=64)
    given = (data, model, tmp_path, "data.held_out=4", "data.workers=0")
    with pytest.raises(LdmError, match=r"4 of 4 images of .*/data, val, are also training images"):
        latents(*given)
    found = latents(*given, force=True)
    assert found.force is True and any("are also training images" in note for note in found.notes)


# ------------------------------------------------------------------- smoke-test substitutes
@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def images(seed):
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.usefixtures("nowhere")
def test_esrgan_of_random_weights_has_a_useful_gradient(tmp_path):
    loss = smoke_esrgan()
    a, b = images(0).requires_grad_(), images(1)
    value = loss(a, b)
    value.backward()
    assert 0.01 < value.item() < 100 and a.grad.abs().max() > 0
    assert loss(b, b).item() == 0
    assert not list(tmp_path.iterdir()), "nothing is fetched or written"


@pytest.mark.usefixtures("nowhere")
def test_random_weights_are_the_same_every_time():
    before = torch.get_rng_state()
    for load in (smoke_lpips, smoke_esrgan):
        values = [load()(images(0), images(1)).item() for _ in range(2)]
        assert values[0] == values[1] > 0
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.usefixtures("nowhere")
def test_published_weights_come_first(monkeypatch):
    monkeypatch.setattr(rows, "find_lpips", lambda: "published LPIPS")
    monkeypatch.setattr(rows, "has_backbone", lambda network: network == "VGG-19")
    monkeypatch.setattr(rows, "load_esrgan", lambda: "published VGG-19")
    assert (smoke_lpips(), smoke_esrgan()) == ("published LPIPS", "published VGG-19")


def test_features_tell_images_apart():
    extractor = load_extractor(FEATURES, "clean", None, "cpu", 32)
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    pixels[1, 0, :16, :16] = 255
    features = extractor(pixels)
    assert features.shape == (2, 12) and not extractor.is_published
    assert features[1].tolist() == [255.0] + 11 * [0.0]
