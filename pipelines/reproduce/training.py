"""A row's model: trained, gone on with, found finished, or taken as it was given."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from autoencoders import load_autoencoder
from autoencoders.loading import read_autoencoder
from autoencoders.losses.trunks import trunk_file
from ldm.checkpoint import fingerprint, load_model
from ldm.errors import LdmError
from ldm.files import write_json
from ldm.run_folder import is_finished
from pipelines.reproduce.plan import Job, Training
from pipelines.reproduce.records import is_main, listing_of, read_record, same_listing
from pipelines.reproduce.stand_ins import random_trunk
from pipelines.train_autoencoder import train_autoencoder
from pipelines.train_diffusion import train_diffusion
from pipelines.training.autoencoder_recipe import AutoencoderRecipe
from pipelines.training.diffusion_recipe import DiffusionRecipe

NOTES = ".training.json"  # a run folder may hold it before the run does
ESRGAN_TRUNK = "VGG-19"


@dataclass(frozen=True)
class Model:
    """What is measured in a row."""

    path: Path
    """The file."""
    sha256: str
    """Identity of its weights."""
    taken: bool = False
    """Whether it was given, and not trained here."""
    stage_one: "Model | None" = None
    """Of a stage-two model, what it stands on, where that is not inside a file that was given."""
    seconds: float | None = None
    """Spent on its training, over all starts; None where it was given."""

    def to_tree(self) -> dict[str, Any]:
        """Plain values."""
        under = self.stage_one and self.stage_one.to_tree()
        plain = {"path": str(self.path), "sha256": self.sha256, "taken": self.taken}
        return plain | {"seconds": self.seconds, "stage_one": under}


@dataclass(frozen=True)
class Taken:
    """A checkpoint that was given for a row."""

    path: Path
    stage: Literal["autoencoder", "diffusion"]
    sha256: str
    """Identity of its weights."""


def find_taken(job: Job) -> Taken | None:
    """The checkpoint given for a row, if one was.

    Raises:
        LdmError: it cannot be read, or is of a stage that the row has no use for.
    """
    if job.taken is None:
        return None
    try:
        found = Taken(job.taken, "diffusion", load_model(job.taken, "diffusion").sha256)
    except LdmError:  # an autoencoder, ours or others', or nothing that can be read
        weights = read_autoencoder(job.taken).weights
        return Taken(job.taken, "autoencoder", fingerprint(weights))
    if job.stage_two is None:
        raise LdmError(
            f"{job.taken} is a stage-two diffusion model; row '{job.row.name}' takes an autoencoder"
        )
    return found


def make_model(job: Job, taken: Taken | None = None, stand_in: bool = False) -> Model:
    """The model of a row, trained as far as it is not.

    Args:
        taken: a checkpoint in place of training; of a row of stage two an autoencoder does, too,
            and is what the diffusion model is then trained on.
        stand_in: whether random weights do where ESRGAN's loss has no published ones.

    Raises:
        LdmError: as `check_images`, `train_autoencoder` and `train_diffusion`.
        Interrupted: asked to stop; the same call goes on.
    """
    check_images(job, taken)
    model = None if taken is None else Model(taken.path, taken.sha256, taken=True)
    for training in trainings_of(job, taken):
        model = _train(training, model, stand_in)
    assert model is not None
    return model


def trainings_of(job: Job, taken: Taken | None = None) -> tuple[Training, ...]:
    """The runs that a row's model takes, in their order: none of what is given."""
    if taken is None:
        return (job.stage_one,) if job.stage_two is None else (job.stage_one, job.stage_two)
    if taken.stage == "diffusion" or job.stage_two is None:
        return ()
    # another first stage than the one that equal rows stand on
    return (replace(job.stage_two, folder=job.folder / "diffusion"),)


def check_weights(recipe: AutoencoderRecipe) -> str | None:
    """Why a recipe cannot be trained for want of published weights; fetched where they can be.

    Only of ESRGAN's loss, which one row in all has; without LPIPS's there is nothing to train.
    """
    if not recipe.loss.esrgan:
        return None
    try:
        trunk_file(ESRGAN_TRUNK, "go without this row, as here")
    except LdmError as error:
        return str(error)
    return None


def _train(training: Training, stage_one: Model | None, stand_in: bool) -> Model:
    folder, recipe = training.folder, training.recipe
    if isinstance(recipe, AutoencoderRecipe):
        trunk = random_trunk(ESRGAN_TRUNK, stand_in and bool(recipe.loss.esrgan))
        with trunk, _noting(training):
            train_autoencoder(recipe, training.preset, folder)
    else:
        recipe = _standing_on(recipe, stage_one)
        with _noting(training):
            train_diffusion(recipe, training.preset, folder)
    kind = "diffusion" if isinstance(recipe, DiffusionRecipe) else "autoencoder"
    path = folder / "ckpt.pt"
    if not path.is_file():
        raise LdmError(
            f"{folder} is finished, but its ckpt.pt is gone: put it back, or remove that folder to "
            "have it trained again"
        )
    if stage_one is not None:
        _check_stands_on(path, stage_one)
    seconds = _noted(folder).get("seconds")
    return Model(path, load_model(path, kind).sha256, False, stage_one, seconds)


def _standing_on(recipe: DiffusionRecipe, stage_one: Model | None) -> DiffusionRecipe:
    assert stage_one is not None
    return recipe.model_copy(update={"autoencoder": str(stage_one.path)})


def _check_stands_on(path: Path, stage_one: Model) -> None:
    """Whether a finished stage two was trained on what its stage one is now.

    Raises:
        LdmError: on other weights.
    """
    now = fingerprint(load_autoencoder(stage_one.path).state_dict())
    if load_model(path, "diffusion").provenance.get("autoencoder_sha256") != now:
        raise LdmError(
            f"{path.parent} was trained on another autoencoder than {stage_one.path} is now (other "
            "weights): remove that folder, or give --out another one"
        )


def check_images(job: Job, taken: Taken | None = None) -> None:
    """Whether those of a row's runs that were begun learnt from the images that their data holds
    now.

    Raises:
        LdmError: one did from others.
    """
    for training in trainings_of(job, taken):
        folder, source = training.folder, training.recipe.data.source
        if not same_listing(_noted(folder).get("listing"), listing_of(source)):
            raise LdmError(
                f"{folder} was trained on other images than {source} holds now: remove that "
                "folder, or give --out another one"
            )


@contextmanager
def _noting(training: Training) -> Iterator[None]:
    """Note the images that a run learns from before it begins, for it may end in any way, and
    afterwards the time it took, added to that of earlier starts."""
    folder, began = training.folder, time.monotonic()
    if is_finished(folder):
        yield
        return
    noted = _noted(folder)
    listing = noted.get("listing") or listing_of(training.recipe.data.source)

    def note() -> None:
        seconds = noted.get("seconds", 0.0) + time.monotonic() - began
        if is_main():
            write_json(folder / NOTES, {"seconds": round(seconds, 2), "listing": listing})

    note()
    try:
        yield
    finally:
        note()


def _noted(folder: Path) -> dict[str, Any]:
    """What was noted of a run."""
    return read_record(folder / NOTES)
