"""Measure autoencoders' reconstructions: rFID, LPIPS, PSNR, SSIM, KID, precision, recall, SWD.

Metrics whose weights are unavailable are skipped and reported as missing. A run's validation, the
demo and `ldm eval-ae` share one loop, `pipelines.validation`.
"""

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from autoencoders import Autoencoder, AutoencoderConfig, load_autoencoder
from autoencoders.losses import LPIPS, load_lpips
from ldm.config import Resolution, format_size, to_tree
from ldm.data import DataConfig, evaluation_batches
from ldm.data.loader import FaultCount, read_preparation, stop_if_too_many
from ldm.data.sources import Split
from ldm.device import full_float32, keep_freed_memory, memory_format
from ldm.distributed import fail_together, from_main, join_processes
from ldm.errors import check_at_least
from ldm.files import check_writable, write_json
from ldm.logbook import console, show_progress
from ldm.metrics.inception import Extractor, describe_channels, refuse_channels
from ldm.run_folder import newest_run, provenance
from pipelines.measuring import evaluation, statistics
from pipelines.measuring.evaluation import NUMBERS, Evaluation, EvaluationJob
from pipelines.measuring.statistics import MeasureOptions, SetStatistics
from pipelines.validation import Scores, reconstruct

OF_FEATURES = ("rfid", "kid", "precision", "recall")  # the numbers that need an extractor
NO_FID = "--no-fid"  # the reason for their absence where the user has left them out


class Metrics(NamedTuple):
    """The networks to measure with; `missing` gives the reason for each number without one."""

    lpips: LPIPS | None
    extractor: Extractor | None
    missing: dict[str, str]


@full_float32()
def evaluate_checkpoints(
    models: Sequence[Path | str] = (),
    data: str | DataConfig | None = None,
    split: Split = "val",
    resolutions: Sequence[Resolution] | None = None,
    batch_size: int = 16,
    lpips: LPIPS | None = None,
    **options: Any,
) -> list[Evaluation]:
    """Measure autoencoders in files, and write the results as JSON.

    Images are centre-cropped to each resolution, never mirrored; reconstructions are the
    posterior's mode, in float32, rounded to 8 bits. PSNR, SSIM and LPIPS are means over images.
    rFID, KID, precision and recall compare Inception's features of all originals with those of
    all reconstructions; SWD compares patches of both, of 16,384 images at most. Numbers whose
    weights are unavailable are left out, as is an rFID over fewer images than features; the result
    gives the reasons. Under a distributed launch the processes share the images, and all return
    the same.

    Args:
        models: stage-one files or folders, ours or others', as `load_autoencoder` takes them;
            none: the newest run.
        data: `photos`, a folder, a zip, or shards; None: each model's training data.
        resolutions: sizes of the images in pixels; None: the last of each model's training.
        batch_size: images at a time, per process.
        lpips: used in place of the published LPIPS.
        options: the other fields of `MeasureOptions`; `out` is one JSON for all, and without it
            there is one per model and resolution, in `eval/` beside the model.

    Returns:
        One evaluation of each model at each resolution, in this order.

    Raises:
        UsageError: data or resolution is omitted and a file does not name it; a number is below
            one; options exclude each other; or two results would be written to one file.
        LdmError: a file is no autoencoder, or cannot take a resolution; the data or requested
            weights cannot be read; held-out images were trained on; or numbers are not finite.
    """
    how = MeasureOptions(batch_size=batch_size, **options)
    for resolution in resolutions or ():
        check_at_least(1, resolution=resolution)
    ranks, device = join_processes(str(how.device))
    keep_freed_memory(device)
    chosen = list(dict.fromkeys(map(Path, models)))
    chosen = chosen or [from_main(ranks, lambda: newest_run("autoencoder"))]
    jobs = evaluation.plan_jobs(chosen, data, split, resolutions, how, ranks)
    paths = [how.out] * len(jobs) if how.out else evaluation.default_paths(jobs, *how.words())
    from_main(ranks, lambda: check_writable(*paths))
    metrics = load_metrics(how, jobs[0].resolution, device, ranks, lpips)
    _print_missing(metrics.missing, ranks)
    done: list[Evaluation] = []
    for job, path in zip(jobs, paths, strict=True):
        if not done or done[-1].model != job.model:
            with fail_together(ranks):
                ae = load_autoencoder(job.model, device).to(memory_format=memory_format(device))
        done.append(_measure(ae, job, path, how, _that_fit(metrics, ae, ranks), device, ranks))
        trees = [each.to_tree() for each in done]
        tree = {"format": evaluation.FORMAT, "evaluations": trees} if how.out else trees[-1]
        from_main(ranks, partial(write_json, path, tree))
    return done


def load_metrics(
    how: MeasureOptions,
    resolution: Resolution,
    device: torch.device,
    ranks: PartialState,
    lpips: LPIPS | None = None,
) -> Metrics:
    """Load LPIPS, unless it is given, and a feature extractor, if their weights are available."""
    missing = {}
    if lpips is None:
        load = partial(load_lpips, device, instead="continue without it, as here")
        lpips, why = statistics.load_on_all(load, ranks)
        missing = {} if why is None else {"lpips": why}
    extractor, why = None, NO_FID
    if how.fid:
        extractor, why = statistics.find_extractor(how, resolution, device, ranks)
    if why is not None:
        missing |= dict.fromkeys(OF_FEATURES, why)
    return Metrics(lpips, extractor, missing)


def _that_fit(metrics: Metrics, ae: Autoencoder, ranks: PartialState) -> Metrics:
    """The networks, without an extractor that does not take images of as many channels."""
    why = refuse_channels(ae.config.image_channels)
    if why is None or metrics.extractor is None:
        return metrics
    missing = metrics.missing | dict.fromkeys(OF_FEATURES, why)
    _print_missing(missing, ranks)
    return metrics._replace(extractor=None, missing=missing)


def _measure(
    ae: Autoencoder,
    job: EvaluationJob,
    path: Path,
    how: MeasureOptions,
    metrics: Metrics,
    device: torch.device,
    ranks: PartialState,
) -> Evaluation:
    """Measure this process's share of the images, and merge all shares."""
    size = format_size(job.resolution)
    _print(f"measuring {job.model} on the {job.split} split of {job.data.source} at {size}", ranks)
    world = ranks.num_processes
    total = min(len(job.source), how.limit or len(job.source))
    scores, faults = Scores(), FaultCount(total)
    real = SetStatistics(total, job.resolution, metrics.extractor, patch_seed=statistics.SEED + 1)
    fake = SetStatistics(total, job.resolution, metrics.extractor)
    stream = evaluation_batches(
        job.source, job.resolution, how.batch_size * world, how.limit, ranks.process_index, world,
        job.data.workers, faults,
    )  # fmt: skip
    with (
        fail_together(ranks),
        show_progress("measuring", total, ranks.is_main_process) as advance,
        closing(reconstruct(ae, stream, device)) as pairs,
    ):
        for pair in pairs:
            scores.add(pair, metrics.lpips and metrics.lpips.each)
            real.update(pair.images, pair.k, metrics.extractor)
            fake.update(pair.recon, pair.k, metrics.extractor)
            advance(len(pair.k) * world)
    shares = gather_object([(scores, faults.found)])
    real, fake = (statistics.gather_statistics(side, ranks) for side in (real, fake))

    def conclude() -> Evaluation:
        everything = Scores()
        corrupt: dict[str, str] = {}
        for share, found in shares:
            everything.merge(share)
            corrupt |= found
        stop_if_too_many(corrupt, total)
        means = everything.means()  # no image at all is an error
        count = everything.count
        distances = statistics.compare_sets(fake, real, device)
        numbers, about = _conclude(job, means, distances, count, metrics, how.force, ae.config)
        about |= {
            "limit": how.limit,
            "corrupt": len(corrupt),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": world,
            "batch_size": how.batch_size,
            **provenance("clean-fid", "lpips", "pillow", "torchvision"),
        }
        each = everything.in_order()
        return Evaluation(job.model, job.resolution, count, numbers, about, path, each)

    found: Evaluation = from_main(ranks, conclude)
    missing = found.about["missing"].items()
    _print_missing({name: why for name, why in missing if name not in metrics.missing}, ranks)
    return found


def _conclude(
    job: EvaluationJob,
    means: dict[str, float],
    distances: dict[str, Any],
    count: int,
    metrics: Metrics,
    force: bool,
    config: AutoencoderConfig,
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """The numbers, without those that mean nothing, and what they depend on."""
    known = distances | means | {"rfid": distances["fid"], "swd": distances["swd"]["mean"]}
    numbers = {name: known.get(name) for name in NUMBERS}
    missing, doubtful = dict(metrics.missing), {}
    extractor = metrics.extractor
    notes = [job.seen["note"]] if job.seen["note"] else []
    if extractor is not None and count <= statistics.NEAREST:
        extractor = None
        numbers |= dict.fromkeys(OF_FEATURES)
        missing |= dict.fromkeys(OF_FEATURES, f"{count} image(s) have too few neighbours")
    elif extractor is not None and count < extractor.dim:
        few = f"{count:,} images are fewer than the {extractor.dim:,} features of each"
        if force:
            doubtful["rfid"] = f"{few}: compare it only with rFIDs over as many"
        else:
            numbers["rfid"] = None
            missing["rfid"] = f"{few}; --force measures it anyway"
    if extractor is not None and not extractor.is_published:
        notes.append(
            f"{extractor.name} is not the published Inception: compare rFID, KID, precision "
            "and recall only with those of the same network"
        )
    channels, pixels = config.image_channels, config.pixels
    depth = {"uint8": "8 bits", "uint16": "16 bits"}.get(pixels.type)
    if channels != 3:
        notes.append(describe_channels(channels))
    return numbers, {
        "model": job.about_model,
        **({} if channels == 3 else {"image_channels": channels}),
        **({} if pixels.is_plain else {"pixels": to_tree(pixels)}),
        "data": to_tree(job.data),
        "prepared": read_preparation(job.data),
        "split": job.split,
        "seen": job.seen,
        "recon": "posterior's mode, float32" + (f", rounded to {depth}" if depth else ""),
        "lpips": metrics.lpips and "VGG-16",
        "extractor": statistics.describe_extractor(extractor),
        "missing": missing,
        "doubtful": doubtful,
        "notes": notes,
        "details": {name: distances[name] for name in ("kid_std", "swd", "swd_images")},
    }


def _print(text: str, ranks: PartialState) -> None:
    if ranks.is_main_process:
        console.print(text, markup=False)


def _print_missing(missing: dict[str, str], ranks: PartialState) -> None:
    """Print one line for each reason."""
    for why in dict.fromkeys(why for why in missing.values() if why != NO_FID):
        names = [number.title for name, number in NUMBERS.items() if missing.get(name) == why]
        _print(f"without {', '.join(names)}: {why}", ranks)
