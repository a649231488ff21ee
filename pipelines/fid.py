"""Measure samples against a reference: FID, KID, precision, recall, sliced Wasserstein distance;
and sFID, Inception Score and FD-DINOv2.

<samples>/fid.json                   the numbers, and all they depend on: the two sets, the
                                     reference's preparation, the network, the versions
<samples>/fid-photos-val.json        the same against other data, a split, other features or a limit
<samples>/fid-swd.json               a result without an FID, where `fid.json` holds one
<samples>.zip.fid.json               the result for an archive
<model>/fid/seed0-steps18-n5000.json the result for samples straight from a model
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

from accelerate import PartialState

from ldm.config import Resolution, format_size, height_width, plain_size
from ldm.data import DataConfig, Source, holds_out, loader, open_source
from ldm.data.dataset import PHOTOS
from ldm.data.sources import Split
from ldm.data.transforms import NOT_RESIZED
from ldm.device import full_float32
from ldm.distributed import fail_together, from_main, join_processes
from ldm.errors import LdmError, UsageError, try_call
from ldm.files import check_writable, write_json
from ldm.images import find_shared, pack_hashes
from ldm.logbook import console
from ldm.metrics.features import ReferenceBatch
from ldm.metrics.inception import Extractor, Mode, describe_channels
from ldm.records import NUMBERS, read_tree
from ldm.run_folder import provenance
from pipelines.measuring import reference as references
from pipelines.measuring import statistics
from pipelines.measuring.batch import FID_50K, BatchReference, find_differences
from pipelines.measuring.reference import (
    OTHER,
    PUBLISHED,
    ImageReference,
    Reference,
)
from pipelines.measuring.statistics import (
    DEFAULT,
    SWD_IMAGES,
    MeasureOptions,
    SetStatistics,
    accumulate,
)
from pipelines.sampling.model import ModelSamples
from pipelines.sampling.sample_folder import (
    SampleFolder,
    Samples,
    is_lossy,
    newest_samples,
    trained_on,
)

FORMAT = 2
DEFAULT_SPLIT: Split = "all"


# ------------------------------------------------------------------------------- measurement
@full_float32()
def measure_fid(
    samples: Path | None = None,
    data: DataConfig | str | None = None,
    split: Split | None = None,
    *,
    model: Path | str | None = None,
    reference: str | None = None,
    sampling: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure samples against a data set, statistics or both; write and return the result.

    The reference's images are centre-cropped to the samples' size, never mirrored; of the built-in
    photographs there are as many random crops as samples (split val: its tiles). Statistics of
    other data are kept, and reused where the data is the same to the byte.

    FID (Heusel et al. 2017) is over all images of both sides, KID (Bińkowski et al. 2018) and
    precision and recall (Kynkäänniemi et al. 2019) over at most 10,000 features of either, the
    sliced Wasserstein distance (Karras et al. 2018) over equally many random images of each.

    Args:
        samples: a folder of `ldm sample` or of PNGs, a zip, or shards; None: the newest.
        data: `photos`, a folder, a zip, or shards; or a config; None: the samples' model's own.
        split: None: all images, as published FIDs on FFHQ are against all 70,000; refused for a
            model that was trained on all of them.
        model: a stage-two file, run folder or Hub repository, to sample from without writing.
        reference: in place of data: `ffhq256`, `ffhq1024`, kept statistics, or an ADM batch.
        sampling: with `model`: `n`, 50,000 by default, and the keywords of `sample_images`.
        options: of `MeasureOptions`, with other defaults for an ADM batch, see `_complete`; `out`
            defaults to a file named after other settings, for a config to `fid.json`.

    Raises:
        UsageError: arguments exclude each other or are out of range; or `data` is omitted, and the
            samples do not name their model's training data.
        LdmError: samples or reference cannot be read; a check refuses the comparison, without
            `force`; or Inception's weights are missing: then `fid.json`, or `fid-swd.json` where
            there is an FID already, holds SWD and null for other numbers.
    """
    how = MeasureOptions(**{name: each for name, each in options.items() if each is not None})
    if how.limit == 1:
        raise UsageError("--limit 1: a covariance needs two images or more")
    for one, other, names in (
        (samples, model, "samples and --model"),
        (data, reference, "--data and --reference"),
        (split, reference, "--split and --reference"),
    ):
        if one is not None and other is not None:
            raise UsageError(f"{names} exclude each other: give one of them")
    plain, how = how, _complete(how, reference, options.get("mode"))
    fake = _open_samples(samples, model, sampling or {}, how)
    own, needed = None, data is None and reference is None
    with nullcontext() if needed else suppress(UsageError):  # settings of another version
        own = trained_on(fake)
    against = reference or loader.choose_data(data, own)
    if against is None:
        raise UsageError(f"{fake.path} does not name its model's training data: give --data")
    out = how.out or fake.result_path
    if how.out is None and not isinstance(data, DataConfig):
        out = fid_path(out, reference or (None if against is own else data), split, plain)
    return _measure(fake, against, split, out, how)


def _open_batch(reference: DataConfig | str | None) -> ReferenceBatch | None:
    if not isinstance(reference, str) or reference in PUBLISHED:
        return None
    path = Path(reference).expanduser()
    return ReferenceBatch(path, OTHER) if ReferenceBatch.is_one(path, OTHER) else None


def _complete(how: MeasureOptions, reference: str | None, mode: str | None) -> MeasureOptions:
    """Complete the options for a reference batch of ADM: its resizing, and all metrics but
    FD-DINOv2 that it allows."""
    if reference is not None:
        references.check_statistics(reference)
    if (batch := _open_batch(reference)) is None:
        return how
    metrics = how.metrics
    if metrics is None:
        ours = ("is",) if how.features is None else ()
        theirs = ("sfid", *DEFAULT) if len(batch) else batch.given
        metrics = tuple(each for each in (*theirs, *ours) if how.features is None or each != "sfid")
    if mode is None and how.features is None:
        if not batch.is_adm:
            raise UsageError(
                f"{reference} holds mean and covariance alone, not how their images were resized: "
                f"give --mode {' or '.join(get_args(Mode))}, as they were computed"
            )
        how = replace(how, mode="legacy-tensorflow")
    return replace(how, metrics=metrics)


def _open_samples(
    samples: Path | None, model: Path | str | None, sampling: dict[str, Any], how: MeasureOptions
) -> Samples:
    if model is not None:
        n = sampling.get("n", FID_50K)
        some = {"n": n if how.limit is None else min(n, how.limit)}
        return ModelSamples(model, device=str(how.device), **(sampling | some))
    if sampling:
        raise UsageError(f"--{next(iter(sampling))} needs a model to sample from: give --model")
    return SampleFolder(samples or newest_samples(), how.limit, archives=True)


def _measure(
    samples: Samples, against: DataConfig | str, split: Split | None, out: Path, how: MeasureOptions
) -> dict[str, Any]:
    ranks, device = join_processes(str(how.device))
    if how.bootstrap and ranks.num_processes > 1:
        raise UsageError("--bootstrap is for one process: run without torchrun")
    from_main(ranks, lambda: check_writable(out))
    own = None
    with fail_together(ranks):  # what was given comes before the weights, which may be fetched
        with suppress(UsageError):  # settings of another version
            own = trained_on(samples)
        if isinstance(against, DataConfig):
            against = _as_samples(against, samples)
            size, chosen = samples.resolution, split or DEFAULT_SPLIT
            reference: Reference = ImageReference(against, chosen, size, len(samples), how.limit)
    extractor, others, missing = statistics.find_extractors(how, samples, device, ranks)
    with fail_together(ranks):
        if not isinstance(against, DataConfig):
            reference = _open_file(against, samples, how, extractor, missing)
        networks = {"fid": extractor if how.wants("fid") else None, **others}
        warnings = how.refuse(find_issues(samples, reference, own, networks, split))
    if ranks.is_main_process:
        console.print(f"measuring {samples.what} against {reference.what}", markup=False)
    has_patches = reference.source and how.wants("swd")
    one_pass: dict[str, Any] = {
        "device": device,
        "batch_size": how.batch_size * ranks.num_processes,
        "workers": (reference.config or DataConfig()).workers,
        "swd_images": min(len(samples), len(reference), SWD_IMAGES) if has_patches else 0,
    }
    # the reference first: its problems show before hours of sampling from a model
    main = extractor if how.wants("fid", "kid", "precision", "recall") else None
    real = reference.statistics(ranks, main, others=others, **one_pass)
    one_pass |= {"others": others, "kept": reference.kept, "every_feature": how.bootstrap > 0}
    fake = accumulate(samples, ranks, main, **one_pass)

    def conclude() -> dict[str, Any]:
        warnings.extend(how.refuse(find_copies(samples, fake, real)))
        warnings.extend(find_limits(reference, extractor, samples.channels))
        count = len(real.hashes) or len(reference)  # published statistics have no hashes
        ours = _describe(samples, fake, own)
        if isinstance(reference, BatchReference):
            warnings.extend(find_differences(reference, ours))
        result = {
            "format": FORMAT,
            **statistics.compare_sets(fake, real, device, how.bootstrap, how.metrics or DEFAULT),
            "fid_missing": missing,
            "mode": how.mode if how.features is None else None,
            "resolution": plain_size(samples.resolution),
            "samples": ours,
            "reference": reference.about | {"split_asked": split, "count": count},
            **statistics.describe_extractors(extractor, others),
            "forced": how.force,
            "warnings": warnings,
            **provenance("clean-fid", "pillow"),
        }
        write_json(path := out if missing is None else path_without_fid(out), result)
        return result | {"written": str(path)}

    return _report(from_main(ranks, conclude), ranks)


def _open_file(
    name: str, samples: Samples, how: MeasureOptions, extractor: Extractor | None, why: str | None
) -> Reference:
    """Open a reference that is a file; `why` is the reason for the absence of an extractor."""
    metrics = set(how.metrics or DEFAULT)
    if (opened := _open_batch(name)) is None:
        reference = references.open_statistics(name, extractor, why)
        able = {"fid"} if name in PUBLISHED else {"fid", "kid", "precision", "recall"}
        if how.metrics and (lacking := sorted(metrics - able - {"is"})):
            raise LdmError(f"{name} has no statistics for {', '.join(lacking)}: omit these metrics")
        return reference
    batch = BatchReference(opened, metrics, extractor, samples.resolution)
    if why is not None and batch.source is None:
        raise LdmError(f"{name}: {why}")
    return batch


def _as_samples(config: DataConfig, samples: Samples) -> DataConfig:
    """Read a reference as the samples are: of their channels, and their range of pixels."""
    channels = None if samples.channels == 3 else samples.channels
    pixels = (samples.made_with or {}).get("pixels") or {}
    range = config.range if config.range != "type" else pixels.get("range") or "type"
    update = {"channels": channels, "range": range if isinstance(range, str) else tuple(range)}
    return config.model_copy(update=update)


def _describe(samples: Samples, fake: SetStatistics, own: DataConfig | None) -> dict[str, Any]:
    return {
        "path": str(samples.path),
        "what": samples.what,
        "count": len(fake.hashes),
        "made_with": samples.made_with,
        "image_channels": samples.channels,
        "filter": samples_preparation(samples, own)[0],
        "labels": loader.count_labels(samples),
        # equal for the same images in the same order
        "fingerprint": sha256(pack_hashes(fake.hashes)).hexdigest(),
    }


def _report(result: dict[str, Any], ranks: PartialState) -> dict[str, Any]:
    """Print the warnings; fail, on all processes, where there is no FID."""
    if ranks.is_main_process:
        for warning in result["warnings"]:
            # rich would draw :four: of module:four: as a picture
            console.print(f"note: {warning}", markup=False)
    if missing := result["fid_missing"]:
        swd = f"SWD {result['swd']['mean']:.3f} (×10³)"
        raise LdmError(f"{missing}; without FID, {swd} was measured and is in {result['written']}")
    return result


# ------------------------------------------------------------------------- checks of a comparison
def find_issues(
    samples: Samples,
    reference: Reference,
    own: DataConfig | None,
    networks: Mapping[str, Extractor | None],
    split: Split | None,
) -> Iterator[str]:
    """Check a comparison before anything is computed; images of another size are an LdmError.

    `own` is the training data of the samples' model, if known; `split` the requested one;
    `networks` are those of the metrics to measure, by their names in a result.
    """
    size, other = format_size(samples.resolution), format_size(reference.resolution)
    if size != other:
        raise LdmError(
            f"{reference.what} are {other} and the samples {size}: "
            "FID between sizes measures the resizing; give a reference of the samples' size"
        )
    for name, network in networks.items():
        is_given = name in reference.given  # of a whole data set, whose size is not known
        few = len(samples) if is_given else min(len(samples), len(reference))
        if network is not None and name != "is" and few < network.dim:
            yield (
                f"{NUMBERS[name][0]} over {len(samples):,} samples"
                f"{'' if is_given else f' and {len(reference):,} images'} is biased upwards, and "
                f"with fewer than {network.dim:,}, one per feature, the covariance is singular: "
                f"give more images, or compare it only with {NUMBERS[name][0]}s over as many"
            )
    if (
        own is not None
        and split is None
        and reference.about["split"] == "all"
        and loader.is_same(reference.config, own.source)
        and not holds_out(own)
    ):
        yield (
            f"{reference.what} are all images that the model was trained on, and none is held out: "
            "a model that memorised them would score best; if that is intended, as in many papers, "
            "give --split train"
        )
    ours, are_crops = samples_preparation(samples, own)
    if ours and reference.filter and ours != reference.filter:
        yield (
            f"{reference.what} were downsampled by {reference.filter}, and the samples' training "
            f"images by {ours}: FID between them measures the filter; prepare both with the same "
            "--filter"
        )
    # a reference that was not downsampled may be crops that the user has cut
    if are_crops and reference.filter:
        yield (
            f"{reference.what} are whole images, downsampled, and the model was trained on crops "
            "of larger ones at native size (data.crop=random): FID between them measures the crop; "
            f"give --data of such crops, {size} each"
        )
    compressed = reference.source and find_compressed(reference.source, reference.resolution)
    if compressed is not None:
        yield (
            f"{compressed} is compressed at the size of the comparison, and the samples are not: "
            "FID between JPEG and PNG measures the compression; give uncompressed reference images"
        )


def samples_preparation(samples: Samples, own: DataConfig | None) -> tuple[str | None, bool]:
    """Return the filter of prepared samples, or of the training images, and if these were crops.

    The built-in photographs do not count as crops: a reference of them is made of crops as well.
    """
    if samples.made_with is None and samples.path.is_dir():
        prepared = loader.read_preparation(DataConfig(source=str(samples.path.resolve())))
        if prepared and prepared["filter"] != NOT_RESIZED:
            return prepared["filter"], False
    with suppress(LdmError):  # the data is gone
        if own is not None:
            source = open_source(own, "all", samples.resolution)
            if own.crop == "center":
                return loader.find_filter(own, source, samples.resolution), False
            if own.source != PHOTOS:
                return None, loader.is_larger(own, source, samples.resolution)
    return None, False


def find_compressed(source: Source, resolution: Resolution) -> str | None:
    """Return the name of an image that is lossy at the very size at which it is compared."""
    # downsampling removes the traces of compression with the details
    lossy = [i for i in range(len(source)) if is_lossy(source.name(i))]
    heights = loader.crop_heights(source, lossy, resolution)
    exact, _ = height_width(resolution)
    return next((source.name(i) for i, height in heights if height == exact), None)


def find_copies(samples: Samples, fake: SetStatistics, real: SetStatistics) -> Iterator[str]:
    """Check that no sample is an image of the reference, if its images are known."""
    copies = find_shared(fake.hashes, real.hashes)
    if copies:
        yield (
            f"{len(copies):,} of {len(samples):,} samples (such as {samples.name(copies[0])}) are "
            "images of the reference, bit for bit, and a set is near itself whatever the model: "
            "remove the copies, or give a reference without them"
        )


def find_limits(
    reference: Reference, extractor: Extractor | None, channels: int = 3
) -> Iterator[str]:
    """Yield what limits the use of the numbers, without making them wrong."""
    if extractor is not None and channels != 3:
        yield describe_channels(channels)
    if extractor is not None and not extractor.is_published:
        yield (
            "the network is not the published Inception (another SHA-256): compare this FID only "
            "with others of the same file"
            if extractor.mode is not None
            else f"the features are of {extractor.name}, not Inception: compare these numbers only "
            "with others of the same function and weights, not with published FIDs and KIDs"
        )
    if reference.source is None:
        yield (
            "no SWD: it compares patches of images, and the reference is statistics without "
            "images; give the images with --data"
        )


# ------------------------------------------------------------------------------- result files
def fid_path(plain: Path, other: str | None, split: Split | None, how: MeasureOptions) -> Path:
    """Return the file of a measurement: `plain`, with a word for each non-default setting.

    `other` names the data or statistics to compare with; None: the samples' own data.
    """
    words = [
        *([] if other is None else [other if other in PUBLISHED else loader.name_data(other)]),
        *([] if split in (None, DEFAULT_SPLIT) else [str(split)]),
        *how.words(),
    ]
    # the result of an archive keeps the archive's full name
    return plain.with_name("-".join([plain.stem, *map(statistics.join_words, words)]) + ".json")


def path_without_fid(path: Path) -> Path:
    """Return the file of a result without an FID: `path`, or one beside it if `path` has an FID."""
    found = try_call(read_tree, path)  # a damaged one may be replaced
    has_fid = isinstance(found, dict) and found.get("fid") is not None
    return path.with_name(f"{path.stem}-swd.json") if has_fid else path
