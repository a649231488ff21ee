"""Images that make the loss not finite: skipped, counted and named in both stages."""

import logging
from itertools import count

import pytest
import torch

from autoencoders import build_autoencoder
from ldm.checkpoint import ModelFile, save_model
from ldm.config import to_tree
from ldm.data.loader import image_name
from ldm.data.photos import PhotoSource
from ldm.errors import LdmError
from ldm.images import as_float
from ldm.logbook import read_rows
from pipelines import latents, train_autoencoder, train_diffusion
from tests.small import autoencoder_recipe, diffusion_recipe

QUIET = "run={precision: fp32, log_every_steps: 4, validate_every_steps: 99, save_every_steps: 99}"


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory):
    """The file of an untrained autoencoder."""
    path = tmp_path_factory.mktemp("one") / "ckpt.pt"
    model = autoencoder_recipe().model
    weights = build_autoencoder(model).state_dict()
    save_model(path, ModelFile("autoencoder", to_tree(model), weights))
    return path


def train(stage, stage_one, folder, *settings):
    if stage == "one":
        own = "phases=[{resolution: 32, steps: 16}]", "adversarial.weight=0", "loss.lpips=0"
        recipe = autoencoder_recipe(*own, QUIET, *settings)
        return train_autoencoder.train_autoencoder(recipe, "tiny", folder)
    recipe = diffusion_recipe(stage_one, "steps=16", QUIET, *settings)
    return train_diffusion.train_diffusion(recipe, "tiny", folder)


def spoil(monkeypatch, module, spoiled, value=float("nan")) -> None:
    """Give the second image of micro-batches, by their number from 0, a value not finite."""
    numbers = count()

    def spoiling(pixels):
        images = as_float(pixels)
        if spoiled(next(numbers)):
            images[1, 0, 5, 5] = value
        return images

    monkeypatch.setattr(module, "as_float", spoiling)


def named(k: int) -> str:
    return image_name(PhotoSource("train", 32), 0, k)


WHERE = {"one": train_autoencoder, "two": latents}
VALUES = [float("nan"), float("inf")]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_bad_image_is_skipped_counted_and_named(
    stage, value, stage_one, tmp_path, monkeypatch, caplog
):
    # the second micro-batch of the second step: images 6 and 7
    spoil(monkeypatch, WHERE[stage], lambda number: number == 3, value)
    folder = train(stage, stage_one, tmp_path / "run", "accumulate=2")
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["skipped"] for row in rows if "skipped" in row] == [1, 1, 1, 1]
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith("skipped a step of the ") and line.endswith(f"for {named(7)}")


@pytest.mark.parametrize("stage", ["one", "two"])
def test_ten_bad_steps_in_a_row_name_the_last_image(stage, stage_one, tmp_path, monkeypatch):
    spoil(monkeypatch, WHERE[stage], lambda number: number >= 2)
    with pytest.raises(LdmError, match="not finite in 10 steps in a row, the last for") as stopped:
        train(stage, stage_one, tmp_path / "run")
    assert f"the last for {named(4 * 11 + 1)}; stopped" in str(stopped.value)


def test_a_bad_image_is_left_out_of_the_statistics(stage_one, tmp_path, monkeypatch, caplog):
    plain = train("two", stage_one, tmp_path / "plain", "steps=1", "batch_size=1")
    spoil(monkeypatch, train_diffusion, lambda number: number == 1)
    folder = train("two", stage_one, tmp_path / "run", "steps=1")
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert line.endswith(f"the latents of {named(5)} are not finite")
    means = [
        torch.load(run / "ckpt.pt", weights_only=True)["statistics"]["mean"]
        for run in (plain, folder)
    ]
    assert means[0] != means[1] and torch.tensor(means[1]).isfinite().all()
