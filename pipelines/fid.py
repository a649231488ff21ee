"""Samples straight from a model, of which none is written.

Measure samples against a reference: FID, KID, precision, recall, sliced Wasserstein distance.

<samples>/fid.json                   the numbers, and all they depend on: the two sets, how the
                                     reference was made, the network, the versions
<samples>/fid-photos-val.json        of other data, another split, other features or a limit
<samples>.zip.fid.json               the same of an archive
<model>/fid/seed0-steps18-n5000.json the same of samples straight from a model
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ldm.config import validate
from ldm.data import Batch, DataConfig
from ldm.data.split import Split
from ldm.distributed import fail_together, from_main, join_processes
from ldm.errors import LdmError, UsageError
from ldm.files import write_json
from ldm.images import to_uint8
from ldm.logbook import console
from ldm.metrics.inception import Extractor
from ldm.run_folder import provenance
from pipelines.measuring.checks import check_size, find_copies, find_doubts, place, samples_filter
from pipelines.measuring.evaluation import check_writable
from pipelines.measuring.metrics import describe_extractor, find_extractor, notes_on
from pipelines.measuring.options import DEFAULT_SPLIT, Measuring, fid_path, path_without_fid
from pipelines.measuring.reference import (
    ImageReference,
    StatisticsReference,
    open_statistics,
    survey_reference,
)
from pipelines.measuring.statistics import (
    SWD_IMAGES,
    FeatureRows,
    Seen,
    Tools,
    bootstrap_fid,
    compare_surveys,
    identify_set,
    survey_images,
)
from pipelines.sampling.model import SamplingJob
from pipelines.sampling.sample_folder import newest_samples
from pipelines.sampling.settings import positive_int
from pipelines.sampling.source import SampleFolder

FID_50K = 50_000  # as many as papers take


class ModelSamples:
    """Images 0 … n−1 of a seed, as `ldm sample` writes them with the same settings, in memory.

    Args:
        job: see `SamplingJob`, which takes the other arguments.

    Attributes:
        made_with: what a `samples.json` of them would say.
        resolution: edge of the images, pixels.
    """

    def __init__(self, model: Path, n: int = FID_50K, seed: int = 0, **job: Any) -> None:
        self._n = positive_int("--n ", n)
        self._job = SamplingJob(model, seed, **job)
        self.path, self.resolution = model, self._job.resolution
        self.made_with: dict[str, Any] = {"n": self._n} | self._job.settings

    def __len__(self) -> int:
        return self._n

    @property
    def what(self) -> str:
        """What the images are, in words."""
        return f"{self._n} images of {self.path}, seed {self._job.seed}"

    @property
    def result_path(self) -> Path:
        """Where a measurement of the samples is written: `fid/seed0-steps18-n50000.json` beside
        the model."""
        return self._job.folder / "fid" / f"{self._job.slug()}-n{self._n}.json"

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        return f"image {index} of seed {self._job.seed}"

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """Every image once over all processes, sampled as it is asked for.

        Args:
            batch_size: images at a time, over all processes.
            workers: there are none; the model is here.

        Raises:
            LdmError: (while iterating) images came out that are not finite.
        """
        share = -(-batch_size // world)
        for first in range(rank * share, self._n, world * share):
            indices = range(first, min(first + share, self._n))
            labels = torch.tensor([self._job.label(i) for i in indices])
            yield Batch(to_uint8(self._job.sample(indices)), torch.tensor(indices), labels)


Samples = SampleFolder | ModelSamples
Reference = ImageReference | StatisticsReference

FORMAT = 2
NO_PATCHES = (
    "SWD is left out: it compares patches of images, and statistics hold none; give the images "
    "with --data"
)


def fid_of_samples(
    samples: Path | None = None,
    data: str | None = None,
    split: Split | None = None,
    weights: Path | None = None,
    device: str = "auto",
    batch_size: int = 64,
    limit: int | None = None,
    *,
    model: Path | None = None,
    reference: str | None = None,
    sampling: dict[str, Any] | None = None,
    **measuring: Any,
) -> dict[str, Any]:
    """`measure_fid` with what is left out filled in: the newest samples, their model's own data,
    and a file that is named by what is measured.

    Args:
        samples: a folder, a zip or shards.
        data: `photos`, a folder, a zip, or shards.
        model: a stage-two file or run folder, to sample from without writing.
        reference: statistics in the place of data: `ffhq256`, `ffhq1024`, or a file.
        sampling: of the model: the keywords of `ModelSamples`.
        measuring: the other fields of `Measuring`.

    Raises:
        UsageError: things that exclude each other are given; or `data` is left out, and the
            samples do not say what their model learnt from.
        LdmError: as `measure_fid`; or there are no samples.
    """
    how = Measuring(weights=weights, device=device, batch_size=batch_size, limit=limit, **measuring)
    for one, other, names in (
        (samples, model, "samples and --model"),
        (data, reference, "--data and --reference"),
        (split, reference, "--split and --reference"),
    ):
        if one is not None and other is not None:
            raise UsageError(f"{names} exclude each other: give one of them")
    made: Samples
    if model is not None:
        asked = sampling or {}
        if limit is not None:
            asked = asked | {"n": min(asked.get("n", FID_50K), limit)}
        made = ModelSamples(model, device=device, **asked)
    elif sampling:
        raise UsageError(
            f"--{next(iter(sampling))} is of sampling from a model: give --model, or leave it out"
        )
    else:
        made = SampleFolder(samples or newest_samples(), limit, archives=True)
    against: DataConfig | str | None
    against, is_own = (reference, False) if reference else _choose_data(data, made)
    if against is None:
        raise UsageError(f"{made.path} does not say what data to compare with: give --data")
    out = how.out or fid_path(made.result_path, None if is_own else reference or data, split, how)
    return _measure(made, against, split, replace(how, out=out))


def measure_fid(
    samples: Path,
    reference: DataConfig | str,
    split: Split | None = None,
    weights: Path | None = None,
    device: str | torch.device = "auto",
    batch_size: int = 64,
    limit: int | None = None,
    **measuring: Any,
) -> dict[str, Any]:
    """Measure samples against one split of a data set; write `fid.json`, or `out`, and return it.

    The reference's images are cut at their centres to the samples' size, never mirrored. Of the
    built-in photographs, which are eight and large, it is as many random crops as there are
    samples (split val: its tiles). Its statistics are kept, and taken up where the data is the same
    to the byte (see `pipelines.measuring.reference`).

    FID (Heusel et al. 2017) is over all images of both sides, KID (Bińkowski et al. 2018) and
    precision and recall (Kynkäänniemi et al. 2019) over at most 10,000 features of either, the
    sliced Wasserstein distance (Karras et al. 2018) over equally many images of each, drawn at
    random.

    Args:
        samples: as `ldm sample` writes it; any folder of PNGs; a zip or shards of lossless images.
        reference: the data; or statistics: `ffhq256`, `ffhq1024`, or a file of such.
        split: by default all images, training and held out, as published FIDs on FFHQ are measured
            against all 70,000. Where a model was trained on all of them, that is refused: a person
            has to say that it is meant, by naming the split.
        limit: only the first so many images of either side.
        measuring: the other fields of `Measuring`.

    Raises:
        UsageError: a batch size below one, or a limit below two.
        LdmError: samples or reference cannot be measured; there is a doubt whether they may be
            compared, and no `force`; or the Inception weights cannot be had: then SWD is in
            `fid.json`, and the other numbers in it are null. Where an FID is there already, it
            stays, and SWD is in `fid-swd.json`.
    """
    how = Measuring(weights=weights, device=device, batch_size=batch_size, limit=limit, **measuring)
    return _measure(SampleFolder(samples, limit, archives=True), reference, split, how)


# -------------------------------------------------------------------------------- the work
def _measure(
    samples: Samples, against: DataConfig | str, split: Split | None, how: Measuring
) -> dict[str, Any]:
    ranks, where = join_processes(str(how.device))
    if how.bootstrap and ranks.num_processes > 1:
        raise UsageError("--bootstrap is for one process: leave torchrun out")
    out = how.out or samples.result_path
    from_main(ranks, lambda: check_writable(out))
    extractor, missing = find_extractor(
        how.features, how.mode, how.weights, samples.resolution, where, ranks
    )
    trained_on = None
    with fail_together(ranks):
        reference = _open_reference(against, split, samples, extractor, missing, how)
        check_size(samples, reference)
        with suppress(UsageError):  # of another version: then it is not known
            trained_on = _trained_on(samples)
        doubts = list(find_doubts(samples, reference, trained_on, extractor, split))
        _refuse(doubts, how.force)
    if ranks.is_main_process:
        console.print(f"measuring {samples.what} against {reference.what}", markup=False)

    has_images = isinstance(reference, ImageReference)
    chosen = min(len(samples), len(reference), SWD_IMAGES) if has_images else 0
    workers = against.workers if isinstance(against, DataConfig) else DataConfig().workers
    tools = Tools(extractor, where, how.batch_size, workers, ranks, chosen)
    rows = FeatureRows(extractor.dim) if extractor and how.bootstrap else None
    # the reference first: what is wrong with it shows before hours of sampling from a model
    real = survey_reference(reference, tools, how.mode) if has_images else reference.seen()
    made = survey_images(samples, tools, rows)

    def conclude() -> dict[str, Any]:
        copies = list(find_copies(samples, made.prints, real.prints))
        _refuse(copies, how.force)
        notes = [*notes_on(extractor, how.features), *([] if has_images else [NO_PATCHES])]
        numbers = _numbers(made, real, rows, where, how.bootstrap)
        path = out if numbers["fid"] is not None else path_without_fid(out)
        result = {
            "format": FORMAT,
            **numbers,
            "fid_missing": missing,
            "mode": how.mode if how.features is None else None,
            "resolution": samples.resolution,
            "samples": {
                "path": str(samples.path),
                "what": samples.what,
                "count": made.survey.count,
                "made_with": samples.made_with,
                "filter": samples_filter(samples, trained_on),
                "fingerprint": identify_set(made.prints),
            },
            "reference": reference.about()
            | {"split_asked": split, "count": real.survey.count}
            | real.about,
            "extractor": describe_extractor(extractor),
            "forced": how.force,
            "warnings": [*doubts, *copies, *notes],
            **_made_by(),
        }
        write_json(path, result)
        return result | {"written": str(path)}

    result = from_main(ranks, conclude)
    if ranks.is_main_process:
        for warning in result["warnings"]:
            # rich would draw :four: of module:four: as a picture
            console.print(f"note: {warning}", markup=False)
    if missing:
        swd = f"SWD {result['swd']['mean']:.3f} (×10³)"
        raise LdmError(f"{missing}; without FID, {swd} was measured and is in {result['written']}")
    return result


def _open_reference(
    against: DataConfig | str,
    split: Split | None,
    samples: Samples,
    extractor: Extractor | None,
    missing: str | None,
    how: Measuring,
) -> Reference:
    if isinstance(against, DataConfig):
        chosen = split or DEFAULT_SPLIT
        return ImageReference(against, chosen, samples.resolution, len(samples), how.limit)
    if extractor is None:
        # of statistics nothing can be measured without features
        raise LdmError(f"{against}: {missing}")
    return open_statistics(against, extractor, how.mode)


def _choose_data(data: str | None, samples: Samples) -> tuple[DataConfig | None, bool]:
    """The data that is named, or the samples' own; that of their model is split as for training.
    And whether it is their own."""
    if data is None:
        return _trained_on(samples), True
    own = None
    with suppress(UsageError):  # of another version
        own = _trained_on(samples)
    # by another split, images that were trained on would be among those held out
    same = own is not None and place(own.source) == place(data)
    return (own, True) if same else (DataConfig(source=data), False)


def _trained_on(samples: Samples) -> DataConfig | None:
    """The data that the samples' model learnt from, where they say; a UsageError where that is of
    another version."""
    data = (samples.made_with or {}).get("data")
    return None if data is None else validate(DataConfig, data)


def _refuse(doubts: list[str], force: bool) -> None:
    if doubts and not force:
        raise LdmError(f"{doubts[0]}; --force measures all the same")


# ------------------------------------------------------------------------------- the result
def _numbers(
    made: Seen, real: Seen, rows: FeatureRows | None, device: torch.device, draws: int
) -> dict[str, Any]:
    numbers = compare_surveys(made.survey, real.survey, device)
    interval = None
    if rows is not None and real.survey.features is not None:
        statistics = real.survey.features.statistics
        interval = bootstrap_fid(rows, statistics, numbers["fid"], draws)._asdict()
    return {"fid": numbers.pop("fid"), "fid_interval": interval, **numbers}


def _made_by() -> dict[str, Any]:
    made_by = provenance()
    made_by["versions"] |= {name: version(name) for name in ("clean-fid", "pillow")}
    return made_by
