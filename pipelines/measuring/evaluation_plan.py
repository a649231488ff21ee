"""What is to be measured: models that are autoencoders, data that is there, sizes that fit.

All that can be refused is refused here, before anything is measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState

from autoencoders import AutoencoderConfig
from autoencoders.loading import assemble, read_autoencoder
from autoencoders.wavelet import check_size
from ldm.checkpoint import fingerprint
from ldm.config import validate
from ldm.data import DataConfig, Source, open_source
from ldm.data.dataset import PHOTOS
from ldm.data.split import Split
from ldm.errors import LdmError, UsageError
from ldm.processes import fail_together
from pipelines.measuring.comparability import place
from pipelines.measuring.overlap import Overlap, find_overlap

Compared = dict[tuple[DataConfig, DataConfig, int], Overlap | LdmError]
"""Data measured, data trained on, and the resolution that both are cut to, for it decides whether
two images are the same → what they share, or why that is not known."""

SMALLEST = 16  # pixels: LPIPS halves images four times, and SSIM's window has 11


@dataclass(frozen=True)
class Job:
    """One autoencoder, to be measured at one resolution."""

    model: Path
    said: dict[str, Any]
    """Which model it is, and what its file says of itself."""
    data: DataConfig
    split: Split
    resolution: int
    source: Source
    seen: dict[str, Any]
    """Whether the model may have been trained on these images; see `_compare`."""


class _Model(NamedTuple):
    """A model file, read once and put away again."""

    path: Path
    config: AutoencoderConfig
    said: dict[str, Any]
    data: DataConfig | None
    """What it was trained on, and at which resolution last, as far as it says."""
    resolution: int | None


def plan_jobs(
    models: Sequence[Path],
    data: str | DataConfig | None,
    split: Split,
    resolutions: Sequence[int] | None,
    limit: int | None,
    ranks: PartialState,
    force: bool,
) -> list[Job]:
    """Every model at every resolution, in this order; what is left out, as each file says.

    Data that a model was trained on is split as its training split it.

    Raises:
        UsageError: data or resolution left out, and a file does not say.
        LdmError: a file is no autoencoder, the data cannot be read, an autoencoder cannot take a
            resolution, or (without `force`) images to be measured as held out were trained on.
    """
    with fail_together(ranks):
        jobs = _open(models, data, split, resolutions)
    compared: Compared = {}
    for i, job in enumerate(jobs):
        seen = _compare(job, _trained_on(job.said), limit, ranks, force, compared)
        jobs[i] = replace(job, seen=seen)
    return jobs


def _open(
    models: Sequence[Path],
    data: str | DataConfig | None,
    split: Split,
    resolutions: Sequence[int] | None,
) -> list[Job]:
    """The jobs of `plan_jobs`, before it is known what was seen."""
    jobs: list[Job] = []
    opened: dict[tuple[DataConfig, int], Source] = {}
    for model in [_read(path) for path in models]:
        config = _choose_data(model, data)
        for resolution in dict.fromkeys(resolutions or [model.resolution]):
            if config is None or resolution is None:
                lacking = "--data" if config is None else "--resolution"
                raise UsageError(
                    f"{model.path} does not say what it was trained on: give {lacking}"
                )
            _check_takes(model, resolution)
            if (config, resolution) not in opened:
                opened[config, resolution] = open_source(config, split, resolution)
            source = opened[config, resolution]
            jobs.append(Job(model.path, model.said, config, split, resolution, source, {}))
    return jobs


# -------------------------------------------------------------------------------------- models
def _read(path: Path) -> _Model:
    file = read_autoencoder(path)
    config = assemble(file, path).config
    phases = (file.provenance.get("recipe") or {}).get("phases")
    said = {"path": str(path), "sha256": fingerprint(file.weights), "format": file.format}
    told = ("images_seen", "recipe", "imported")
    said["trained"] = {name: file.provenance[name] for name in told if name in file.provenance}
    return _Model(
        path, config, said, _trained_on(said), phases[-1]["resolution"] if phases else None
    )


def _trained_on(said: Mapping[str, Any]) -> DataConfig | None:
    recipe = said["trained"].get("recipe") or {}
    return validate(DataConfig, recipe["data"]) if "data" in recipe else None


def _check_takes(model: _Model, resolution: int) -> None:
    """Refuse images that the autoencoder, or a metric, cannot take."""
    encoder = model.config.encoder
    least = max(SMALLEST, encoder.downsampling)
    if resolution < least:
        raise LdmError(
            f"--resolution {resolution}: {least} is the least at which {model.path} can be measured"
        )
    if encoder.type != "sdvae":
        padded = resolution + -resolution % encoder.downsampling
        try:
            check_size((padded, padded), encoder.depth, encoder.wavelet)
        except LdmError as error:
            raise LdmError(
                f"--resolution {resolution}: {model.path} cannot take it: {error}"
            ) from error


# ---------------------------------------------------------------------------------------- data
def _choose_data(model: _Model, data: str | DataConfig | None) -> DataConfig | None:
    if data is None or isinstance(data, DataConfig):
        return data or model.data
    same = model.data is not None and place(model.data.source) == place(data)
    # with the split of the training, for another one would take in what was trained on
    return model.data if same else DataConfig(source=data)


def _compare(
    job: Job,
    trained_on: DataConfig | None,
    limit: int | None,
    ranks: PartialState,
    force: bool,
    compared: Compared,
) -> dict[str, Any]:
    """Whether a job's images were trained on, as far as it can be known.

    They are compared where they are meant to be held out, which are those of "val", and all images
    of other data than the model's own. A model that does not say what it was trained on is taken
    to have been trained on the training split of the same data.

    Args:
        compared: what was found before, of models of the same data at the same
            resolution; it is added to.

    Returns:
        `held_out` (None where it is not known), a `note` where there is something to say, and
        the `overlap` where both sides were compared.

    Raises:
        LdmError: images meant to be held out were trained on, and not `force`.
    """
    own = trained_on is not None and place(trained_on.source) == place(job.data.source)
    if job.split == "train" or (job.split == "all" and own):
        note = f"{job.model} was trained on these images, or some of them" if own else None
        return {"held_out": False if own else None, "note": note, "overlap": None}
    against = trained_on or (job.data if job.split == "val" else None)
    if against is None:
        return {"held_out": None, "note": None, "overlap": None}
    if PHOTOS in (against.source, job.data.source):
        # no file is one of the photographs, and their right thirds are never trained on
        return {"held_out": True, "note": None, "overlap": None}
    key = (job.data, against, job.resolution)
    if key not in compared:
        compared[key] = _overlap(job, against, limit, ranks)
    overlap = compared[key]
    if isinstance(overlap, LdmError):
        note = f"not known whether {job.model} was trained on these images: {overlap}"
        return {"held_out": None, "note": note, "overlap": None}
    note = None
    if overlap.shared:
        note = (
            f"{overlap.shared:,} of {overlap.held_out:,} images of {job.data.source}, {job.split}, "
            f"are also training images of {against.source}, such as {overlap.example}"
        )
        if not force:
            raise LdmError(f"{note}: measure other images, or give --force")
    found = overlap.to_tree() | {"against": against.source}
    return {"held_out": not overlap.shared, "note": note, "overlap": found}


def _overlap(
    job: Job, against: DataConfig, limit: int | None, ranks: PartialState
) -> Overlap | LdmError:
    """What a job's images and training images share, or why that cannot be known."""
    try:
        with fail_together(ranks):
            train = open_source(against, "train", job.resolution)
        return find_overlap(job.source, train, job.resolution, ranks, limit, job.data.workers)
    except LdmError as error:
        return error
