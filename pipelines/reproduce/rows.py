"""Build one row of a table: get its model, and measure it.

The model is trained, resumed, reused from a finished run, or the checkpoint passed to --take.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from autoencoders import load_autoencoder
from autoencoders.losses import LPIPS, find_lpips, load_esrgan, random_lpips
from autoencoders.losses.perceptual import CONV5_4, ESRGANPerceptual, backbone_file, has_backbone
from autoencoders.pretrained import read_autoencoder
from ldm.checkpoint import Kind, fingerprint, load_model
from ldm.config import short_size
from ldm.data.dataset import PHOTOS, open_images
from ldm.data.sources import UTF8
from ldm.device import name_device, resolve_device
from ldm.distributed import join_processes
from ldm.errors import LdmError
from ldm.files import write_json
from ldm.metrics.inception import FeatureExtractor, published_weights
from ldm.records import read_tree, schema
from ldm.run_folder import is_finished
from pipelines.analysis.subjects import open_analysis
from pipelines.bench import bench_encoders
from pipelines.doctor.costs import count_parameters
from pipelines.evaluate import evaluate_checkpoints
from pipelines.fid import measure_fid
from pipelines.measuring.evaluation import plan_jobs
from pipelines.measuring.statistics import MeasureOptions
from pipelines.recipes import AutoencoderRecipe
from pipelines.reproduce.plan import BuildPlan, Protocol, Target, Training
from pipelines.reproduce.tables import Number, Table
from pipelines.sample import sample_images
from pipelines.train_autoencoder import train_autoencoder
from pipelines.train_diffusion import train_diffusion

NOTES = ".training.json"  # a run folder may hold it before the run does
ESRGAN_BACKBONE = "VGG-19"
OF_FEATURES = ("rfid", "fid")
"""The numbers that need Inception, or a network in its place."""
ENOUGH = FeatureExtractor.dim
"""Images of an FID that counts: of fewer than features the covariance is singular."""
PAPER_LATENT = 4 * 32 * 32
"""Values in an image's latent in Table 6."""
SIMILAR = "The held-out crops are of eight photographs, and similar: a ± is underestimated."
NOT_PUBLISHED = "this scale uses a substitute for the published network, to test that the code runs"


# --------------------------------------------------------------------------------- the model
@dataclass(frozen=True)
class Checkpoint:
    """The model that is measured in a row."""

    path: Path
    sha256: str
    """Identity of its weights."""
    stage: Kind
    taken: bool = False
    """It was passed to --take, not trained here."""
    stage_one: "Checkpoint | None" = None
    """The autoencoder below a stage two that was trained here."""
    seconds: float | None = None
    """Training time over all starts; None if it was passed to --take."""

    def to_tree(self) -> dict[str, Any]:
        """Return the plain values of a record."""
        below = self.stage_one and self.stage_one.to_tree()
        plain = {"path": str(self.path), "sha256": self.sha256, "taken": self.taken}
        return plain | {"seconds": self.seconds, "stage_one": below}


def load_taken(target: Target) -> Checkpoint | None:
    """Read the checkpoint that was passed for a row, if any."""
    path = target.taken
    if path is None:
        return None
    try:
        found = Checkpoint(path, load_model(path, "diffusion").sha256, "diffusion", taken=True)
    except LdmError:  # an autoencoder, ours or another project's, or an unreadable file
        weights = read_autoencoder(path).weights
        return Checkpoint(path, fingerprint(weights), "autoencoder", taken=True)
    if target.stage_two is None:
        raise LdmError(
            f"{path} is a stage-two diffusion model: give row '{target.row.name}' an autoencoder"
        )
    return found


def make_model(
    target: Target, taken: Checkpoint | None = None, substitutes: bool = False
) -> Checkpoint:
    """Return a row's model, after the training that is left.

    A checkpoint that was passed for it replaces the training; for a row of stage two, an
    autoencoder replaces that of stage one. With `substitutes`, random weights stand in for
    missing ones of ESRGAN's loss.
    """
    model = taken
    for training in trainings_of(target, taken):
        model = _train(training, model, substitutes)
    assert model is not None
    return model


def trainings_of(target: Target, taken: Checkpoint | None = None) -> tuple[Training[Any], ...]:
    """Return the runs that a row's model needs, in order."""
    if taken is None:
        return tuple(filter(None, (target.stage_one, target.stage_two)))
    if taken.stage == "diffusion" or target.stage_two is None:
        return ()
    # in a folder of its own: other rows with this recipe have another stage one
    return (replace(target.stage_two, folder=target.folder / "diffusion"),)


def missing_weights(recipe: AutoencoderRecipe) -> str | None:
    """Return why ESRGAN's loss has no weights, after trying to fetch them."""
    try:
        if recipe.loss.esrgan:
            backbone_file(ESRGAN_BACKBONE, "go without this row, as here")
    except LdmError as error:
        return str(error)
    return None


def has_weights(number: str, weights: Path | None) -> bool:
    """Return true if the weights that a number needs are here."""
    if number == "lpips":
        return has_backbone("VGG-16")
    return number not in OF_FEATURES or weights is not None or published_weights() is not None


def _train(training: Training[Any], stage_one: Checkpoint | None, substitutes: bool) -> Checkpoint:
    folder, recipe, preset = training.folder, training.recipe, training.preset
    stage: Kind = "autoencoder" if stage_one is None else "diffusion"
    start, notes, finished = time.monotonic(), _notes(folder), is_finished(folder)
    listing = notes.get("listing") or listing_of(recipe.data.source)

    def note() -> None:
        """Note the images of the run, and its time over all starts."""
        seconds = round(notes.get("seconds", 0.0) + time.monotonic() - start, 2)
        if is_main() and not finished:
            write_json(folder / NOTES, {"seconds": seconds, "listing": listing})

    note()
    try:
        if stage_one is not None:
            recipe = recipe.model_copy(update={"autoencoder": str(stage_one.path)})
            train_diffusion(recipe, preset, folder)
        else:
            perceptual = {"esrgan": smoke_esrgan()} if substitutes and recipe.loss.esrgan else {}
            train_autoencoder(recipe, preset, folder, perceptual)
    finally:
        note()
    path = folder / "ckpt.pt"
    if not path.is_file():
        raise LdmError(
            f"{folder} is finished, but its ckpt.pt is missing: restore it, or remove the folder "
            "to train again"
        )
    trained = load_model(path, stage)
    if stage_one is not None:
        now = fingerprint(load_autoencoder(stage_one.path).state_dict())
        if trained.provenance.get("autoencoder_sha256") != now:
            raise LdmError(
                f"{folder} was trained on other weights than those in {stage_one.path}: remove "
                "that folder, or choose another --out"
            )
    return Checkpoint(path, trained.sha256, stage, False, stage_one, _notes(folder).get("seconds"))


def check_images(target: Target, taken: Checkpoint | None = None) -> None:
    """Refuse to resume or reuse a row's runs if their data has changed since they began."""
    for training in trainings_of(target, taken):
        folder, source = training.folder, training.recipe.data.source
        if not same_listing(_notes(folder).get("listing"), listing_of(source)):
            raise LdmError(
                f"{folder} was trained on other images than those now in {source}: remove that "
                "folder, or choose another --out"
            )


def listing_identity(data: str) -> str | None:
    """SHA-256 over the relative names of all images of a data set and the sizes of their files.

    It is quick, and blind to a file that changed and kept its name and size. None if the data set,
    a `DataConfig.source`, cannot be read; the built-in photographs are always themselves.
    """
    if data == PHOTOS:
        return PHOTOS
    path, listing = Path(data).expanduser(), sha256()
    try:
        images = open_images(data)
    except LdmError:
        return None
    size_of = cache(_size)  # of an archive once for all of its images
    for index in range(len(images)):
        name = images.name(index).removeprefix(f"{path}/")
        listing.update(f"{name}\0{size_of(images.file(index))}\0".encode(*UTF8))
    return listing.hexdigest()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1


listing_of = cache(listing_identity)
"""Identity of a data set's list of images, read once; None if the data set is missing."""


def same_listing(before: str | None, now: str | None) -> bool:
    """Return true if two listings are equal, or one is unknown."""
    return None in (before, now) or before == now


def _notes(folder: Path) -> dict[str, Any]:
    notes = schema(seconds=(float, 0.0), listing=(str | None, None))
    return read_tree(folder / NOTES, notes) or {}


def is_main() -> bool:
    """Return true in the one process that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


# --------------------------------------------------------------------------- the measurements
@dataclass
class RowNumbers:
    """The numbers measured in a row, and the fields of its record that describe them."""

    numbers: dict[str, Number | None]
    """By column; None if one could not be measured."""
    missing: dict[str, str] = field(default_factory=dict)
    """The reason why a number is missing, or does not count for the claims."""
    notes: list[str] = field(default_factory=list)
    """Differences from the paper's measurement."""
    count: int | None = None
    """Images measured."""
    each: dict[str, NDArray] = field(default_factory=dict)
    """By column the numbers of every image, and the images' indices as `k`."""
    extractor: dict[str, Any] | None = None
    """The network of the features, if any number needs them."""
    force: bool | None = None
    """--force, if it mattered: images were trained on, or too few for rFID; else None."""
    counted: tuple[str, ...] = ()
    """Columns that were counted, and have no error, besides those that never have."""


def measure(table: Table, target: Target, model: Checkpoint, plan: BuildPlan) -> RowNumbers:
    """Measure one row."""
    kinds = {"reconstruction": _reconstruction, "mmd": _latents, "generation": _samples}
    found = kinds[table.measure](target, model, plan)
    columns = table.all_columns
    if "params" in columns or "aggregator_params" in columns:
        encoder = load_autoencoder(model.path).encoder
        parts = {"params": encoder, "aggregator_params": getattr(encoder, "aggregator", None)}
        found.numbers |= {n: count_parameters(p) / 1e6 for n, p in parts.items() if p is not None}
    found.numbers = {name: found.numbers.get(name) for name in columns}
    found.missing = {name: why for name, why in found.missing.items() if name in columns}
    if all(found.numbers.get(name) is None for name in OF_FEATURES):
        found.extractor = None
    if found.each and target.data.source == PHOTOS:
        found.notes.append(SIMILAR)
    if not plan.scale.protocol.published and target.stage_one.recipe.loss.esrgan:
        found.notes.append("ESRGAN's loss used a VGG-19 of random weights.")
    return found


def measure_costs(table: Table, device: str, protocol: Protocol) -> dict[str, RowNumbers]:
    """Measure all rows of Table 3, timed alternately."""
    names = [row.name for row in table.rows]  # they are presets
    side, batch = protocol.encoder_side, protocol.encoder_batch
    costs = bench_encoders(names, side, batch, device, protocol.encoder_repeats).costs
    where = resolve_device(device)
    notes = [f"Measured on {name_device(where)}, {batch} images of {side}²."]
    counted: tuple[str, ...] = ()
    if where.type != "cuda":
        counted = ("memory",)
        notes.append(
            "Memory: counted, as the bytes alive between two operations; the speed is of a few "
            "images at a time, as suits a CPU."
        )
    found = {}
    for cost in costs:
        numbers: dict[str, Number | None] = {
            "params": cost.parameters / 1e6,
            "memory": cost.peak_mib * 2**20 / 1e6,
            "images_per_second": cost.images_per_second,
            "gmac": cost.gmac,
        }
        found[cost.name] = RowNumbers(numbers, notes=notes, counted=counted)
    return found


def _reconstruction(target: Target, model: Checkpoint, plan: BuildPlan) -> RowNumbers:
    protocol = plan.scale.protocol
    published = protocol.published
    [found] = evaluate_checkpoints(
        [model.path], target.data, "val", [target.resolution], limit=protocol.images,
        device=target.device, weights=plan.weights, features=None if published else FEATURES,
        out=target.folder / "evaluation.json", force=plan.force,
        lpips=None if published else smoke_lpips(),
    )  # fmt: skip
    about = found.about
    numbers: dict[str, Number | None] = dict(found.numbers)
    missing = about["missing"] | about["doubtful"]
    notes = [
        f"Measured over {found.count:,} held-out images of {target.data.source} at "
        f"{short_size(target.resolution)}.",
    ]
    if published:
        notes += about["notes"]
    else:
        missing |= dict.fromkeys(("rfid", "lpips"), NOT_PUBLISHED)
        numbers |= dict.fromkeys(("rfid", "lpips"))
    each = {k: v for k, v in found.each.items() if k == "k" or numbers.get(k) is not None}
    extractor = about["extractor"]
    few = published and extractor is not None and found.count < extractor["dim"]
    forced = plan.force if few or about["seen"]["held_out"] is False else None
    return RowNumbers(numbers, missing, notes, found.count, each, extractor, forced)


def _latents(target: Target, model: Checkpoint, plan: BuildPlan) -> RowNumbers:
    from pipelines.analysis.mmd import SIGMAS, MmdSettings, latents_mmd

    protocol, data, size = plan.scale.protocol, target.data, target.resolution
    ranks, _ = join_processes(target.device)
    how = MeasureOptions(force=plan.force)  # to refuse images that were trained on
    [planned] = plan_jobs([model.path], data, "val", [size], how, ranks)
    [subject], images = open_analysis([model.path], data, "val", size, target.device)
    found = latents_mmd(subject, images, MmdSettings(protocol.latents, SIGMAS, protocol.draws))
    values = prod(subject.autoencoder.config.latent_shape(size))
    few = f" (all; {protocol.latents:,} requested)" if found.count < protocol.latents else ""
    notes = [
        f"Latents of {found.count:,} held-out images of {data.source} at {short_size(size)}{few}, "
        f"divided by their standard deviation; MMD² × 100, over {protocol.draws} draws of noise "
        "for the same images. The ± is the standard error over images, by the jackknife.",
        *([planned.seen["note"]] if planned.seen["note"] else []),
    ]
    if values != PAPER_LATENT:
        notes.append(
            f"Latents of {values:,} values; the kernels' widths suit the paper's {PAPER_LATENT:,}, "
            "whose square root is 64."
        )
    numbers: dict[str, Number | None] = {f"mmd_{s:g}": found.distances[s] for s in SIGMAS}
    each = {"k": np.array(found.ks)} | {f"mmd_{s:g}": v for s, v in found.shares.items()}
    forced = plan.force if planned.seen["held_out"] is False else None
    return RowNumbers(numbers, {}, notes, found.count, each, force=forced)


def _samples(target: Target, model: Checkpoint, plan: BuildPlan) -> RowNumbers:
    protocol = plan.scale.protocol
    folder = target.folder / f"samples-{model.sha256[:8]}"
    if not model.taken and not (model.stage_one and model.stage_one.taken):
        folder = target.training.folder.parent / "samples"  # shared by rows with this recipe
    steps = protocol.sampler_steps
    folder = sample_images(model.path, protocol.samples, folder, steps=steps, device=target.device)
    written = folder / "fid.json"
    written.unlink(missing_ok=True)
    found: dict[str, Any] | None
    try:
        found = measure_fid(
            folder, target.data, "train", weights=plan.weights, device=target.device, force=True,
            features=None if protocol.published else FEATURES,
        )  # fmt: skip
    except LdmError:  # without Inception's weights: the other numbers
        found = read_tree(written)
        if not found:  # another problem
            raise
    reference, fid, why = found["reference"], found["fid"], ""
    few = min(protocol.samples, reference["count"])
    if not protocol.published:
        fid, why = None, NOT_PUBLISHED
    elif fid is None:
        why = found["fid_missing"] or "not measured"
    elif few < ENOUGH:
        why = f"over {few:,} images: below {ENOUGH:,} the covariance is singular"
    notes = [
        f"{protocol.samples:,} samples, {steps} steps of Heun's sampler, against "
        f"{reference['what']}.",
        *(found["warnings"] if protocol.published else []),
    ]
    return RowNumbers(
        {"fid": fid, "swd": (found.get("swd") or {}).get("mean")},
        {"fid": why} if why else {},
        notes,
        protocol.samples,
        extractor=found["extractor"],
    )


# --------------------------------------------------------------------- smoke-test substitutes
# Of the published networks: nothing is fetched, and none of their numbers is shown.
FEATURES = f"{__name__}:mean_colours"
"""In place of Inception, as `load_extractor` takes it."""


def smoke_lpips() -> LPIPS:
    """LPIPS, of random weights where the published ones are missing."""
    if published := find_lpips():
        return published
    with torch.random.fork_rng(devices=[]):
        network = random_lpips("vgg")
        _randomise(network.net)
    return LPIPS(network)


def smoke_esrgan() -> ESRGANPerceptual:
    """ESRGAN's loss, of random weights where the published ones are missing."""
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
    """Return an extractor: images (B, 3, H, W) uint8 to the mean colours of quarters (B, 12)."""
    return lambda images: F.adaptive_avg_pool2d(images.float(), 2).flatten(1)
