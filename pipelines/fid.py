"""Measure samples against a reference: FID, KID, precision, recall, sliced Wasserstein distance.

<samples>/fid.json                   the numbers, and all they depend on: the two sets, the
                                     reference's preparation, the network, the versions
<samples>/fid-photos-val.json        the same against other data, a split, other features or a limit
<samples>/fid-swd.json               a result without an FID, where `fid.json` holds one
<samples>.zip.fid.json               the result for an archive
<model>/fid/seed0-steps18-n5000.json the result for samples straight from a model
"""

from contextlib import nullcontext, suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from ldm.config import validate
from ldm.data import DataConfig
from ldm.data.sources import Split
from ldm.distributed import fail_together, from_main, join_processes
from ldm.errors import LdmError, UsageError
from ldm.files import read_json, write_json
from ldm.logbook import console
from ldm.metrics.fid import bootstrap_fid
from ldm.metrics.inception import Extractor
from ldm.run_folder import provenance
from pipelines.measuring.checks import (
    check_writable,
    describe_limits,
    find_copies,
    find_issues,
    join_words,
    name_data,
    resolve,
    samples_filter,
)
from pipelines.measuring.reference import (
    PUBLISHED,
    ImageReference,
    Reference,
    choose_data,
    open_statistics,
)
from pipelines.measuring.statistics import (
    SWD_IMAGES,
    MeasureOptions,
    SetStatistics,
    accumulate,
    compare_sets,
    describe_extractor,
    find_extractor,
    pack_hashes,
)
from pipelines.sampling.sample_folder import newest_samples
from pipelines.sampling.source import ModelSamples, SampleFolder, Samples

FORMAT = 2
FID_50K = 50_000  # the usual number in papers
DEFAULT_SPLIT: Split = "all"


# ------------------------------------------------------------------------------- measurement
def measure_fid(
    samples: Path | None = None,
    data: DataConfig | str | None = None,
    split: Split | None = None,
    *,
    model: Path | None = None,
    reference: str | None = None,
    sampling: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure samples against one split of a data set, or statistics; write and return the result.

    The reference's images are centre-cropped to the samples' size, never mirrored. The eight
    built-in photographs are large, so random crops of them are used, as many as there are samples
    (split val: its tiles). Statistics of a reference are kept, and reused where the data is the
    same to the byte (see `pipelines.measuring.reference`).

    FID (Heusel et al. 2017) is over all images of both sides, KID (Bińkowski et al. 2018) and
    precision and recall (Kynkäänniemi et al. 2019) over at most 10,000 features of either, the
    sliced Wasserstein distance (Karras et al. 2018) over equally many images of each, drawn at
    random.

    Args:
        samples: a folder of `ldm sample` or of PNGs, a zip, or shards; None: the newest.
        data: `photos`, a folder, a zip, or shards; or a config; None: the training data of the
            samples' model.
        split: None: all images, training and held out, as published FIDs on FFHQ are measured
            against all 70,000; refused for a model that was trained on all of them.
        model: a stage-two file or run folder, to sample from without writing.
        reference: statistics in place of data: `ffhq256`, `ffhq1024`, or a file.
        sampling: with `model`: `n`, 50,000 by default, and the keywords of `sample_images`.
        options: the fields of `MeasureOptions`. `out` defaults to a file named after the
            non-default settings, for a config to `fid.json`.

    Raises:
        UsageError: arguments exclude each other or are out of range; or `data` is omitted, and the
            samples do not name their model's training data.
        LdmError: samples or reference cannot be read; a check refuses the comparison, without
            `force`; or the Inception weights are missing: then `fid.json` holds SWD and null for
            the other numbers. An FID that is there already stays, and SWD is in `fid-swd.json`.
    """
    how = MeasureOptions(**options)
    if how.limit == 1:
        raise UsageError("--limit 1: a covariance needs two images or more")
    for one, other, names in (
        (samples, model, "samples and --model"),
        (data, reference, "--data and --reference"),
        (split, reference, "--split and --reference"),
    ):
        if one is not None and other is not None:
            raise UsageError(f"{names} exclude each other: give one of them")
    fake = _open_samples(samples, model, sampling or {}, how)
    if isinstance(data, DataConfig):
        return _measure(fake, data, split, how.out or fake.result_path, how)
    against, name = (reference, reference) if reference else _choose_data(data, fake)
    out = how.out or fid_path(fake.result_path, name, split, how)
    return _measure(fake, against, split, out, how)


def _open_samples(
    samples: Path | None, model: Path | None, sampling: dict[str, Any], how: MeasureOptions
) -> Samples:
    if model is not None:
        n = sampling.get("n", FID_50K)
        some = {"n": n if how.limit is None else min(n, how.limit)}
        return ModelSamples(model, device=str(how.device), **(sampling | some))
    if sampling:
        raise UsageError(f"--{next(iter(sampling))} needs a model to sample from: give --model")
    return SampleFolder(samples or newest_samples(), how.limit, archives=True)


def _choose_data(data: str | None, samples: Samples) -> tuple[DataConfig, str | None]:
    """The named data, or the samples' own; and its name, None for the samples' own."""
    own = None
    with nullcontext() if data is None else suppress(UsageError):  # of another version
        own = _trained_on(samples)
    chosen = choose_data(data, own)
    if chosen is None:
        raise UsageError(f"{samples.path} does not name its model's training data: give --data")
    return chosen, None if chosen is own else data


def _trained_on(samples: Samples) -> DataConfig | None:
    """The training data of the samples' model, where they name it; a UsageError where its settings
    are of another version."""
    data = (samples.made_with or {}).get("data")
    return None if data is None else validate(DataConfig, data)


def _measure(
    samples: Samples, against: DataConfig | str, split: Split | None, out: Path, how: MeasureOptions
) -> dict[str, Any]:
    ranks, device = join_processes(str(how.device))
    if how.bootstrap and ranks.num_processes > 1:
        raise UsageError("--bootstrap is for one process: run without torchrun")
    from_main(ranks, lambda: check_writable(out))
    extractor, missing = find_extractor(how, samples.resolution, device, ranks)
    trained_on = None
    with fail_together(ranks):
        with suppress(UsageError):  # of another version: then it is not known
            trained_on = _trained_on(samples)
        reference = _open_reference(against, split, samples, extractor, missing, how.limit)
        issues = find_issues(samples, reference, trained_on, extractor, split)
        warnings = resolve(issues, how.force)
    if ranks.is_main_process:
        console.print(f"measuring {samples.what} against {reference.what}", markup=False)

    one_pass: dict[str, Any] = {
        "device": device,
        "batch_size": how.batch_size * ranks.num_processes,
        "workers": (reference.config or DataConfig()).workers,
        "swd_images": min(len(samples), len(reference), SWD_IMAGES) if reference.source else 0,
    }
    # the reference first: its problems show before hours of sampling from a model
    real = reference.statistics(ranks, extractor, **one_pass)
    fake = accumulate(samples, ranks, extractor, every_feature=how.bootstrap > 0, **one_pass)

    def conclude() -> dict[str, Any]:
        copies = resolve(find_copies(samples, fake, real), how.force)
        limits = resolve(describe_limits(reference, extractor, how.features is None), how.force)
        result = {
            "format": FORMAT,
            **_numbers(fake, real, device, how.bootstrap),
            "fid_missing": missing,
            "mode": how.mode if how.features is None else None,
            "resolution": samples.resolution,
            "samples": {
                "path": str(samples.path),
                "what": samples.what,
                "count": fake.count,
                "made_with": samples.made_with,
                "filter": samples_filter(samples, trained_on),
                # equal for the same images in the same order
                "fingerprint": sha256(pack_hashes(fake.hashes or {})).hexdigest(),
            },
            "reference": reference.about
            | {"split_asked": split, "count": real.count}
            | real.origin,
            "extractor": describe_extractor(extractor),
            "forced": how.force,
            "warnings": [*warnings, *copies, *limits],
            **provenance(),
        }
        result["versions"] |= {name: version(name) for name in ("clean-fid", "pillow")}
        path = out if result["fid"] is not None else path_without_fid(out)
        write_json(path, result)
        return result | {"written": str(path)}

    return _report(from_main(ranks, conclude), ranks)


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


def _open_reference(
    against: DataConfig | str,
    split: Split | None,
    samples: Samples,
    extractor: Extractor | None,
    missing: str | None,
    limit: int | None,
) -> Reference:
    if isinstance(against, DataConfig):
        chosen = split or DEFAULT_SPLIT
        return ImageReference(against, chosen, samples.resolution, len(samples), limit)
    if extractor is None:
        # statistics are of features alone
        raise LdmError(f"{against}: {missing}")
    return open_statistics(against, extractor)


# ------------------------------------------------------------------------------- the result
def _numbers(
    fake: SetStatistics, real: SetStatistics, device: torch.device, draws: int
) -> dict[str, Any]:
    numbers = compare_sets(fake, real, device)
    interval = None
    if fake.every_feature and real.features is not None:
        features, statistics = np.concatenate(fake.every_feature), real.features.statistics
        interval = bootstrap_fid(features, statistics, numbers["fid"], draws)._asdict()
    return {"fid": numbers.pop("fid"), "fid_interval": interval, **numbers}


def fid_path(plain: Path, other: str | None, split: Split | None, how: MeasureOptions) -> Path:
    """Return the file of a measurement: `plain`, with a word for each non-default setting.

    Args:
        other: the data or statistics to compare with; None: the samples' own data.
    """
    words = [
        *([] if other is None else [other if other in PUBLISHED else name_data(other)]),
        *([] if split in (None, DEFAULT_SPLIT) else [str(split)]),
        *how.words(),
    ]
    # the result of an archive keeps the archive's full name
    return plain.with_name("-".join([plain.stem, *map(join_words, words)]) + ".json")


def path_without_fid(path: Path) -> Path:
    """Return the file of a result without an FID: `path`, or one beside it if `path` has an FID."""
    has_fid = (read_json(path) or {}).get("fid") is not None
    return path.with_name(f"{path.stem}-swd.json") if has_fid else path
