"""Measure samples against data: FID, and the sliced Wasserstein distance, which needs no weights.

<samples>/fid.json   both numbers, and all they depend on: the two sets, how the reference was
                     made, the network, the versions
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ldm.config import to_tree, validate
from ldm.data import Batch, DataConfig, batches, evaluation_batches, open_source
from ldm.data.dataset import PHOTOS
from ldm.data.shards import read_manifest
from ldm.data.split import Split
from ldm.device import resolve_device
from ldm.errors import LdmError, UsageError
from ldm.files import write_json
from ldm.logbook import console, progress_bar
from ldm.metrics import FeatureStatistics, PatchDescriptors, frechet_distance
from ldm.metrics.inception import FeatureExtractor, load_inception
from ldm.metrics.wasserstein import compare_descriptors
from ldm.run_folder import provenance
from ldm.seeds import generator
from pipelines.sample_folder import SampleFolder, newest_samples

FORMAT = 1
SEED = 0  # of patches, directions and crops: the same in every measurement, so that they compare
SWD_IMAGES = 16_384  # Karras et al. 2018, Section 5
ENOUGH_IMAGES = 2_048  # as many as features: with fewer the covariance is singular


def fid_of_samples(
    samples: Path | None = None,
    data: str | None = None,
    split: Split = "train",
    weights: Path | None = None,
    device: str = "auto",
    batch_size: int = 64,
    limit: int | None = None,
) -> dict[str, Any]:
    """`measure_fid` with what is left out filled in: the newest samples, their model's own data.

    Args:
        data: `photos`, a folder, a zip, or shards.

    Raises:
        UsageError: `data` is left out, and the samples do not say what their model learnt from.
        LdmError: as `measure_fid`; or there are no samples.
    """
    samples = samples or newest_samples()
    if data is not None:
        reference = DataConfig(source=data)
    else:
        made_with = SampleFolder(samples).made_with or {}
        if "data" not in made_with:
            raise UsageError(f"{samples} does not say what data to compare with: give --data")
        reference = validate(DataConfig, made_with["data"])
    console.print(
        f"measuring {samples} against the {split} split of {reference.source}", markup=False
    )
    return measure_fid(samples, reference, split, weights, device, batch_size, limit)


def measure_fid(
    samples: Path,
    reference: DataConfig,
    split: Split = "train",
    weights: Path | None = None,
    device: str | torch.device = "auto",
    batch_size: int = 64,
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure a folder of samples against one split of a data set; write and return `fid.json`.

    The reference's images are cut at their centres to the samples' size, never mirrored. Of the
    built-in photographs, which are eight and large, it is as many random crops as there are
    samples (split val: its tiles).

    FID (Heusel et al. 2017) is over all images of both sides, on clean-fid's features. The sliced
    Wasserstein distance (Karras et al. 2018) is over equally many of each, drawn at random.

    Args:
        samples: as `ldm sample` writes it, or any folder of PNGs.
        weights: `inception-2015-12-05.pt`; by default from where it usually lies, or fetched.
        limit: only the first so many images of either side.

    Raises:
        UsageError: a batch size below one, or a limit below two.
        LdmError: samples or reference cannot be measured; or the Inception weights cannot be had:
            then the other numbers are in `fid.json`, and `fid` in it is null.
    """
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size}: it must be at least 1")
    if limit is not None and limit < 2:
        raise UsageError(f"limit {limit}: a covariance needs two images or more")
    device = resolve_device(device) if isinstance(device, str) else device
    folder = SampleFolder(samples, limit)
    resolution, count = folder.resolution, len(folder)
    stream = evaluation_batches(folder, resolution, batch_size, workers=reference.workers)
    made = _Images("samples", count, stream)
    real = _open_reference(reference, split, resolution, count, batch_size, limit)
    extractor, missing = _find_inception(weights, device)

    chosen = min(made.count, real.count, SWD_IMAGES)
    with progress_bar("images") as bar:
        ours, theirs = (
            _survey(side, resolution, chosen, extractor, device, bar) for side in (made, real)
        )
    swd = compare_descriptors(ours.patches, theirs.patches, SEED, device=device)
    fid = None
    if extractor is not None:
        a, b = ours.features, theirs.features
        fid = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    made_by = provenance()
    made_by["versions"] |= {name: version(name) for name in ("clean-fid", "pillow")}
    result = {
        "format": FORMAT,
        "fid": fid,
        "fid_missing": str(missing) if missing else None,
        "swd": swd,
        "swd_images": min(ours.patches.count, theirs.patches.count),
        "resolution": folder.resolution,
        "samples": {"path": str(samples), "count": ours.count, "made_with": folder.made_with},
        "reference": {
            "what": real.what,
            "split": split,
            "count": theirs.count,
            "data": to_tree(reference),
            "prepared": _preparation(reference),
        },
        "extractor": {"name": extractor.name, "sha256": extractor.sha256} if extractor else None,
        "warnings": _warnings(ours.count, theirs.count, extractor),
        **made_by,
    }
    write_json(samples / "fid.json", result)
    for warning in result["warnings"]:
        console.print(f"note: {warning}", markup=False)
    if missing:
        raise LdmError(
            f"{missing}; without FID, SWD {swd['mean']:.3f} (×10³) was measured and is in "
            f"{samples / 'fid.json'}"
        ) from missing
    return result


# --------------------------------------------------------------------------------- two sides
@dataclass(frozen=True)
class _Images:
    """One side: what it is, in words, how many images, and the images."""

    what: str
    count: int
    batches: Iterator[Batch]


def _open_reference(
    config: DataConfig,
    split: Split,
    resolution: int,
    samples: int,
    batch_size: int,
    limit: int | None,
) -> _Images:
    source = open_source(config, split, resolution)
    if config.source == PHOTOS and split != "val":
        unmirrored = config.model_copy(update={"flip": False})
        stop = -(-samples // batch_size) * batch_size  # whole batches; the last is cut
        crops = batches(source, unmirrored, resolution, SEED, 0, stop, batch_size)
        what = f"photos, {split}: {samples} random crops, seed {SEED}"
        return _Images(what, samples, _first(crops, samples))
    prepared = _preparation(config)
    if prepared and prepared["size"] != resolution:
        size = prepared["size"]
        raise LdmError(
            f"{config.source} was prepared at {size}×{size} and the samples are "
            f"{resolution}×{resolution}: resizing twice changes every number; prepare the data "
            f"with --size {resolution}"
        )
    count = min(len(source), limit or len(source))
    what = f"{config.source}, {split}: {count} images, centre-cropped"
    if count < 2:
        raise LdmError(f"{what}: a covariance needs two images or more, give another --data")
    images = evaluation_batches(source, resolution, batch_size, limit, workers=config.workers)
    return _Images(what, count, images)


def _first(stream: Iterator[Batch], count: int) -> Iterator[Batch]:
    for batch in stream:
        yield Batch(*(part[:count] for part in batch))
        count -= len(batch.images)


def _preparation(config: DataConfig) -> dict[str, Any] | None:
    """How `ldm data prepare` made the reference (size, filter, crop, source), where it did."""
    path = Path(config.source).expanduser()
    if config.source == PHOTOS or path.suffix == ".zip":
        return None
    manifest = read_manifest(path if path.is_dir() else path.parent)
    return manifest and {key: manifest[key] for key in ("size", "filter", "crop", "source")}


# ----------------------------------------------------------------------------- one pass each
@dataclass
class _Survey:
    """What one pass over a set of images keeps of it."""

    patches: PatchDescriptors
    features: FeatureStatistics | None
    count: int = 0


def _survey(
    images: _Images,
    resolution: int,
    chosen: int,
    extractor: FeatureExtractor | None,
    device: torch.device,
    bar: Progress,
) -> _Survey:
    """Features of all images, and patches of `chosen` of them."""
    features = FeatureStatistics(extractor.dim) if extractor else None
    survey = _Survey(PatchDescriptors(resolution, seed=SEED), features)
    # at random: a data set may be sorted by class
    draw = generator(SEED, "swd images", 0).permutation(images.count)[:chosen]
    wanted = torch.zeros(images.count, dtype=torch.bool)
    wanted[torch.from_numpy(draw)] = True
    task = bar.add_task(images.what, total=images.count, speed="", note="")
    for batch in images.batches:
        survey.patches.update(batch.images[wanted[batch.k]].to(device))
        if extractor is not None and features is not None:
            features.update(extractor(batch.images))
        survey.count += len(batch.images)
        speed = bar.tasks[task].speed
        shown = f"{speed:.1f} images/s" if speed else ""
        bar.update(task, advance=len(batch.images), speed=shown)
    return survey


def _find_inception(
    weights: Path | None, device: torch.device
) -> tuple[FeatureExtractor | None, LdmError | None]:
    """The extractor, or why there is none. A file that was asked for must be there."""
    try:
        return load_inception(weights, device), None
    except LdmError as error:
        if weights is not None:
            raise
        return None, error


def _warnings(samples: int, real: int, extractor: FeatureExtractor | None) -> list[str]:
    if extractor is None:
        return []
    warnings = []
    if min(samples, real) < ENOUGH_IMAGES:
        warnings.append(
            f"FID over {samples:,} samples and {real:,} images is biased upwards: compare it only "
            f"with FIDs over as many; below {ENOUGH_IMAGES:,} the covariance is singular"
        )
    if not extractor.is_published:
        warnings.append(
            "the network is not the published Inception (another SHA-256): compare this FID only "
            "with others of the same file"
        )
    return warnings
