"""What is measured of a row's model: reconstructions, samples, latents, or what encoding costs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoencoders import load_autoencoder
from ldm.data.dataset import PHOTOS
from ldm.device import resolve_device
from ldm.distributed import join_processes
from ldm.errors import LdmError
from ldm.metrics.inception import FeatureExtractor
from ldm.timing import name_device
from pipelines.bench import bench_encoders
from pipelines.doctor.costs import count_parameters
from pipelines.evaluate import evaluate_checkpoints
from pipelines.measuring.evaluation import plan_jobs
from pipelines.reproduce.output import shown_columns
from pipelines.reproduce.plan import Job, Measuring
from pipelines.reproduce.rows import FEATURES, OF_FEATURES, Model, read_record, smoke_lpips
from pipelines.reproduce.tables import SIGMAS, Number, Table

ENOUGH = FeatureExtractor.dim
"""Images of a FID that is to be judged by: of fewer than features the covariance is singular."""
PAPER_LATENT = 4 * 32 * 32
"""Values of one image's latents where Table 6 was measured."""
STOOD_IN = "this scale asks for no published network: another stood in, to see that the code runs"


@dataclass
class Measured:
    """The numbers of a row."""

    numbers: dict[str, Number | None]
    """By column; None where one could not be measured."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why a number is not there, or is not to be judged by."""
    notes: list[str] = field(default_factory=list)
    """How it was measured, where that is not as in the paper."""
    count: int | None = None
    """Images measured."""
    each: dict[str, NDArray] = field(default_factory=dict)
    """The numbers of every image by itself, where they have any; and `k`, the images' own."""
    extractor: dict[str, Any] | None = None
    """What made the features that numbers are of, if any are."""
    force: bool | None = None
    """Whether doubts were overridden; None: there were none that it would override."""
    counted: tuple[str, ...] = ()
    """Numbers that were counted, and have no error, besides those that never have."""


@dataclass(frozen=True)
class Tools:
    """What rows are measured with."""

    how: Measuring
    weights: Path | None = None
    """Inception's; None: from where they usually lie, or fetched."""
    force: bool = False
    """Measure what there are doubts about, and note them."""


def measure(table: Table, job: Job, model: Model, tools: Tools) -> Measured:
    """The numbers of one row.

    Raises:
        LdmError: the model, the data or weights that were asked for cannot be read.
    """
    by = {"reconstruction": _reconstruction, "mmd": _latents, "generation": _samples}
    found = by[table.config.measure](job, model, tools)
    found.numbers = _parameters(table, model) | found.numbers
    shown = shown_columns(table)
    found.numbers = {name: found.numbers.get(name) for name in shown}
    found.missing = {name: why for name, why in found.missing.items() if name in shown}
    if all(found.numbers.get(name) is None for name in OF_FEATURES):
        found.extractor = None
    return found


def measure_costs(table: Table, device: str, how: Measuring) -> dict[str, Measured]:
    """Those of all rows of Table 3, whose encoders take turns."""
    names = [row.name for row in table.rows]  # they are presets
    side, batch = how.encoder_side, how.encoder_batch
    costs = bench_encoders(names, side, batch, device, how.encoder_repeats).costs
    where = resolve_device(device)
    notes = [f"Measured on {name_device(where)}, {batch} images of {side}²."]
    on_paper = where.type != "cuda"
    if on_paper:
        notes.append(
            "Memory: what is held between two operations, counted on paper; timed were a few "
            "images at a time, as a CPU takes them."
        )
    return {
        cost.name: Measured(
            {
                "params": cost.parameters / 1e6,
                "memory": cost.peak_mib * 2**20 / 1e6,
                "images_per_second": cost.images_per_second,
                "gmac": cost.gmac,
            },
            notes=notes,
            counted=("memory",) if on_paper else (),
        )
        for cost in costs
    }


# --------------------------------------------------------------------------------- the kinds
def _reconstruction(job: Job, model: Model, tools: Tools) -> Measured:
    how = tools.how
    [found] = evaluate_checkpoints(
        [model.path], job.data, "val", [job.resolution], limit=how.images,
        device=job.training.recipe.run.device, weights=tools.weights,
        features=None if how.published else FEATURES,
        out=job.folder / "evaluation.json", force=tools.force,
        lpips=None if how.published else smoke_lpips(),
    )  # fmt: skip
    numbers, missing = dict(found.numbers), found.about["missing"] | found.about["doubtful"]
    notes = [_over(found.count, job), *found.about["notes"]]
    if not how.published:
        notes = notes[:1]
        missing |= dict.fromkeys(("rfid", "lpips"), STOOD_IN)
        numbers |= dict.fromkeys(("rfid", "lpips"))
    each = {k: of for k, of in found.each.items() if k == "k" or numbers.get(k) is not None}
    extractor = found.about["extractor"]
    few = extractor is not None and found.count < extractor["dim"]
    mattered = (few and how.published) or _were_seen(found.about["seen"])
    return Measured(
        numbers, missing, notes + _alike(job), found.count, each, extractor,
        tools.force if mattered else None,
    )  # fmt: skip


def _over(count: int, job: Job) -> str:
    return f"Measured over {count:,} held-out images of {job.data.source} at {job.resolution}²."


def _alike(job: Job) -> list[str]:
    if job.data.source != PHOTOS:
        return []
    return [
        "The held-out crops are of eight photographs, and alike: a ± is smaller than it should be."
    ]


def _were_seen(seen: Mapping[str, Any]) -> bool:
    """Whether images meant to be held out were trained on, so that it took --force."""
    return seen["held_out"] is False


def _latents(job: Job, model: Model, tools: Tools) -> Measured:
    from pipelines.analysis.mmd import MmdSettings, latents_mmd
    from pipelines.analysis.subjects import open_analysis

    how, device = tools.how, job.training.recipe.run.device
    ranks, _ = join_processes(device)
    # it refuses images that were trained on
    [planned] = plan_jobs([model.path], job.data, "val", [job.resolution], None, ranks, tools.force)
    opened = open_analysis([model.path], job.data, "val", job.resolution, device)
    found = latents_mmd(opened[0][0], opened[1], MmdSettings(how.latents, SIGMAS, how.draws))
    autoencoder = load_autoencoder(model.path)
    side = job.resolution // autoencoder.downsampling
    values = autoencoder.config.latent_channels * side**2
    few = f", all there are of {how.latents:,} asked for" if found.count < how.latents else ""
    notes = [
        f"Latents of {found.count:,} held-out images of {job.data.source} at {job.resolution}²"
        f"{few}, divided by their standard deviation; MMD² × 100, over {how.draws} draws of noise "
        "that take the same images. The ± is the standard error over these, by the jackknife.",
        *([planned.seen["note"]] if planned.seen["note"] else []),
        *_alike(job),
    ]
    if values != PAPER_LATENT:
        notes.append(
            f"Latents of {values:,} values; the kernels' widths suit the paper's {PAPER_LATENT:,}, "
            "whose square root is 64."
        )
    each = {f"mmd_{sigma:g}": of for sigma, of in found.shares.items()}
    return Measured(
        {f"mmd_{sigma:g}": found.distances[sigma] for sigma in SIGMAS}, {}, notes, found.count,
        {"k": np.array(found.ks), **each},
        force=tools.force if _were_seen(planned.seen) else None,
    )  # fmt: skip


def _samples(job: Job, model: Model, tools: Tools) -> Measured:
    from pipelines.sample import sample_images

    how, device = tools.how, job.training.recipe.run.device
    beside = job.folder / f"samples-{model.sha256[:8]}"
    if not model.taken and not (model.stage_one and model.stage_one.taken):
        beside = job.training.folder.parent / "samples"  # equal rows have equal samples
    folder = sample_images(model.path, how.samples, beside, steps=how.sampler_steps, device=device)
    found = _compare(folder, job, device, tools)
    swd = (found.get("swd") or {}).get("mean")
    reference = found["reference"]
    notes = [
        f"{how.samples:,} samples, {how.sampler_steps} steps of Heun's sampler, against "
        f"{reference['what']}."
    ]
    if not how.published:
        return Measured({"fid": None, "swd": swd}, {"fid": STOOD_IN}, notes, how.samples)
    result = Measured({"fid": found["fid"], "swd": swd}, {}, notes, how.samples)
    result.extractor = found["extractor"]
    result.notes += found["warnings"]
    few = min(how.samples, reference["count"])
    if found["fid"] is None:
        result.missing["fid"] = found["fid_missing"] or "not measured"
    elif few < ENOUGH:
        result.missing["fid"] = f"over {few:,} images: below {ENOUGH:,} the covariance is singular"
    return result


def _compare(folder: Path, job: Job, device: str, tools: Tools) -> dict[str, Any]:
    """`measure_fid`; without Inception's weights, what else it measured."""
    from pipelines.fid import measure_fid

    features = None if tools.how.published else FEATURES
    written = folder / "fid.json"
    written.unlink(missing_ok=True)
    try:
        return measure_fid(
            folder,
            job.data,
            "train",
            weights=tools.weights,
            device=device,
            force=True,
            features=features,
        )
    except LdmError:
        found = read_record(written)
        if not found:  # something else was wrong
            raise
        return found


# --------------------------------------------------------------------------------- parameters
def _parameters(table: Table, model: Model) -> dict[str, Number | None]:
    """Millions of parameters, where the table has them."""
    wanted = {"params", "aggregator_params"} & set(table.config.columns)
    if not wanted:
        return {}
    encoder = load_autoencoder(model.path).encoder
    parts = {"params": encoder, "aggregator_params": getattr(encoder, "aggregator", None)}
    return {
        name: None if parts[name] is None else count_parameters(parts[name]) / 1e6
        for name in wanted
    }
