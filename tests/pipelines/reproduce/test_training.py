"""Which runs a row's model takes, and that they learnt from the images that are there now."""

from dataclasses import replace
from pathlib import Path

import pytest

from ldm.errors import LdmError
from ldm.files import write_json
from pipelines.reproduce import rows as training
from pipelines.reproduce.plan import Plan, find_scale
from pipelines.reproduce.rows import Taken, check_images, listing_of, make_model, trainings_of
from pipelines.reproduce.tables import find_tables
from tests.ldm.data.pictures import noise, png_folder

AUTOENCODER = Taken(Path("ae.pt"), "autoencoder", "0" * 64)
DIFFUSION = Taken(Path("diffusion.pt"), "diffusion", "0" * 64)


def job_of(word, *settings, data=()):
    [table] = find_tables(word)
    return Plan(find_scale("smoke"), data, settings).jobs(table)[0]


def test_the_runs_that_are_needed():
    one, two = job_of("t4"), job_of("t13")
    assert trainings_of(one) == (one.stage_one,) and trainings_of(one, AUTOENCODER) == ()
    assert trainings_of(two) == (two.stage_one, two.stage_two)
    assert trainings_of(two, DIFFUSION) == ()
    # on a first stage of its own
    [second] = trainings_of(two, AUTOENCODER)
    assert second == replace(two.stage_two, folder=two.folder / "diffusion")


@pytest.mark.parametrize(("word", "taken"), [("t4", None), ("t13", None), ("t13", AUTOENCODER)])
def test_other_images_are_refused_before_anything_is_trained(word, taken, tmp_path, monkeypatch):
    """Those of a stage two that stands on a checkpoint, too."""
    monkeypatch.chdir(tmp_path)
    data = png_folder(tmp_path / "data", [noise(n, 64, 64) for n in range(24)])
    listing_of.cache_clear()
    job = job_of(word, data=[str(data)])
    run = trainings_of(job, taken)[-1].folder
    write_json(run / ".training.json", {"seconds": 1.0, "listing": listing_of(str(data))})
    check_images(job, taken)
    (data / "0000.png").unlink()
    listing_of.cache_clear()
    trained = []
    for name in ("train_autoencoder", "train_diffusion"):
        monkeypatch.setattr(training, name, lambda *how: trained.append(how))
    with pytest.raises(LdmError, match=f"{run} was trained on other images than"):
        make_model(job, taken)
    assert not trained
