"""What is kept of a finished row, and how far the rows of a table are.

<row>/row.json     the numbers, what was asked, what was trained or taken, the network of features,
                   whether --force made a difference, the machine, versions, command, time
<row>/images.npz   what every image has in them: by these two rows are compared

What stands in for published networks where a smoke test does without them.

Random weights where a loss or LPIPS looks for a VGG; a few mean colours in place of Inception's
features. Nothing is fetched, and no number that they give is shown: they mean nothing.

A row's model: trained, gone on with, found finished, or taken as it was given.
"""

import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders import load_autoencoder
from autoencoders.loading import read_autoencoder
from autoencoders.losses import LPIPS, find_lpips, load_esrgan
from autoencoders.losses.perceptual import CONV5_4, ESRGANPerceptual, backbone_file, has_backbone
from ldm.checkpoint import fingerprint, load_model
from ldm.config import to_tree
from ldm.data.dataset import listing_identity
from ldm.errors import LdmError
from ldm.files import read_json, to_json, write_json, write_together
from ldm.metrics.inception import SHA256, digest, published_weights
from ldm.run_folder import is_finished
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe
from pipelines.reproduce.plan import DECISIVE, SCALES, Job, Measuring, Training
from pipelines.reproduce.tables import Row
from pipelines.train_autoencoder import train_autoencoder
from pipelines.train_diffusion import train_diffusion

FORMAT = 3
OF_FEATURES = ("rfid", "fid")
"""Numbers that are of Inception, or of what was given in its place."""
RECORD, EACH = "row.json", "images.npz"
State = Literal["done", "begun", "–"]


def read_record(path: Path) -> dict[str, Any]:
    """The record in a JSON file; {} if none can be read."""
    return read_json(path) or {}


def write_record(
    job: Job, record: dict[str, Any], each: Mapping[str, NDArray] = MappingProxyType({})
) -> None:
    """Keep a finished row.

    Args:
        each: the numbers of every image by itself.
    """
    if is_main():
        whole = to_json({"format": FORMAT, "state": "done", "each": sorted(each), **record})
        files = {job.folder / EACH: lambda file: np.savez(file, **each)} if each else {}
        write_together(files | {job.folder / RECORD: lambda file: file.write(whole)})


def read_each(folder: Path) -> dict[str, NDArray]:
    """The numbers of every image of a row; {} where there are none."""
    try:
        with np.load(folder / EACH, allow_pickle=False) as file:
            each = dict(file)
    except (OSError, EOFError, ValueError, BadZipFile):
        return {}
    whole = "k" in each and len({values.shape for values in each.values()}) == 1
    return each if whole else {}


def is_main() -> bool:
    """Whether this is the process that writes and speaks, of however many were launched."""
    return os.environ.get("RANK", "0") == "0"


def row_states(out: Path, row: Row) -> dict[str, State]:
    """How far a row is, by scale."""
    return {scale: _state(out / scale / row.table / row.name) for scale in SCALES}


def _state(folder: Path) -> State:
    if read_record(folder / RECORD).get("state") == "done":
        return "done"
    return "begun" if folder.is_dir() else "–"


# ------------------------------------------------------------------------------- what was asked
def asked_of(job: Job, measuring: Measuring) -> dict[str, Any]:
    """All settings that decide a row's numbers, as plain values."""
    stages = {"recipe": _decisive(job.training)}
    if job.stage_two is not None:
        stages["stage_one"] = _decisive(job.stage_one)
    data = to_tree(job.data)
    data.pop("workers")
    measured = {
        "resolution": job.resolution,
        "data": data,
        **asdict(measuring),
    }
    # as JSON has it: what is compared was read from there
    return json.loads(json.dumps({"trained": stages, "measured": measured}))


def listings_of(job: Job) -> dict[str, str | None]:
    """Which images a row's data sets hold, those of its stage one with them."""
    sources = (training.recipe.data.source for training in (job.stage_one, job.training))
    return {source: listing_of(source) for source in sources}


def finished(
    job: Job,
    asked: dict[str, Any],
    taken_sha256: str | None,
    weights: Path | None,
    force: bool = False,
) -> dict[str, Any] | None:
    """The record of a row that need not be done again.

    A row that was measured with a checkpoint given to it stays so until another one is given. One
    whose columns are empty for want of weights is measured again when they are there, and one whose
    numbers are of another Inception than is meant now, too, so that no table mixes two. The version
    of ldm is told, and decides nothing.

    Args:
        taken_sha256: of the checkpoint that is given now.
        weights: Inception's, where they are given now.
        force: whether doubts are overridden now.
    """
    record = read_record(job.folder / RECORD)
    if record.get("format") != FORMAT or record.get("state") != "done":
        return None
    then = record["asked"]
    theirs = (record["taken"] or {}).get("sha256")
    if then["measured"] != asked["measured"] or taken_sha256 not in (None, theirs):
        return None
    if theirs is None and then["trained"] != asked["trained"]:
        return None
    before = then.get("listings", {})
    if not all(same_listing(before.get(k), now) for k, now in asked.get("listings", {}).items()):
        return None
    if not read_each(job.folder).keys() >= set(record["each"]):  # lost: it is measured again
        return None
    if not _same_network(record, weights) or record.get("force") not in (None, force):
        return None
    still = lacking(record["lacked"], weights)
    return record if still == record["lacked"] else None


def taken_before(job: Job) -> tuple[Path, str] | None:
    """The checkpoint that a row was last measured with, where one had been given for it, and the
    SHA-256 of its weights then."""
    taken = read_record(job.folder / RECORD).get("taken")
    return (Path(taken["path"]), taken["sha256"]) if taken else None


def _same_network(record: Mapping[str, Any], weights: Path | None) -> bool:
    """Whether the numbers of features, if there are any, are of the network that is meant now."""
    if all(record["numbers"].get(name) is None for name in OF_FEATURES):
        return True
    if weights is None and published_weights() is None:
        return True  # nothing could take their place
    # where none is given, none but the published one is taken
    now = SHA256 if weights is None else digest(weights)
    return (record.get("extractor") or {}).get("sha256") == now


@cache
def listing_of(data: str) -> str | None:
    """Which images a data set holds, asked once; None where it is not here now."""
    return listing_identity(data)


def same_listing(then: str | None, now: str | None) -> bool:
    """Whether a data set holds what it held, as far as either is known."""
    return None in (then, now) or then == now


def lacking(numbers: Iterable[str], weights: Path | None) -> list[str]:
    """Those of some numbers whose weights are not on this machine.

    Args:
        weights: Inception's, where they are given.
    """
    return [name for name in numbers if not _is_there(name, weights)]


def _decisive(training: Training) -> dict[str, Any]:
    """A recipe without what only says how a run is watched."""
    tree = to_tree(training.recipe)
    tree["run"] = {k: value for k, value in tree["run"].items() if f"run.{k}" in DECISIVE}
    tree["data"].pop("workers")
    tree.pop("validate_images", None)
    return tree


def _is_there(number: str, weights: Path | None) -> bool:
    """Whether the weights that a number needs, if it needs any, are on this machine."""
    if number == "lpips":
        return has_backbone("VGG-16")
    if number in OF_FEATURES:
        return weights is not None or published_weights() is not None
    return True


FEATURES = f"{__name__}:mean_colours"
"""As `load_extractor` takes it."""


def smoke_lpips() -> LPIPS:
    """LPIPS, of random weights where the published ones are not on this machine."""
    if published := find_lpips():
        return published
    import lpips

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # the package calls torchvision in an outdated way
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        _randomise(network.net)
    return LPIPS(network)


def smoke_esrgan() -> ESRGANPerceptual:
    """ESRGAN's loss, of random weights where the published ones are not on this machine."""
    if has_backbone(ESRGAN_BACKBONE):
        return load_esrgan()
    from torchvision.models import vgg19

    with torch.device("meta"):  # the classifier's weights would take seconds to draw
        features = vgg19().features[: CONV5_4 + 1]
    with torch.random.fork_rng(devices=[]):
        _randomise(features.to_empty(device="cpu"))
    return ESRGANPerceptual(features)


def _randomise(network: nn.Module) -> None:
    """Draw a VGG's weights, always the same, so that features neither vanish nor explode."""
    torch.manual_seed(0)
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            nn.init.constant_(part.get_parameter("bias"), 0.0)


def mean_colours() -> Callable[[Tensor], Tensor]:
    """Features (B, 12) of images (B, 3, H, W) uint8: the mean colours of their quarters."""
    return lambda images: F.adaptive_avg_pool2d(images.float(), 2).flatten(1)


NOTES = ".training.json"  # a run folder may hold it before the run does
ESRGAN_BACKBONE = "VGG-19"


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
        backbone_file(ESRGAN_BACKBONE, "go without this row, as here")
    except LdmError as error:
        return str(error)
    return None


def _train(training: Training, stage_one: Model | None, stand_in: bool) -> Model:
    folder, recipe = training.folder, training.recipe
    if isinstance(recipe, AutoencoderRecipe):
        perceptual = {"esrgan": smoke_esrgan()} if stand_in and recipe.loss.esrgan else {}
        with _noting(training):
            train_autoencoder(recipe, training.preset, folder, perceptual)
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
