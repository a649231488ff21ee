"""Measure autoencoders' reconstructions: rFID, LPIPS, PSNR, SSIM, KID, precision, recall, SWD.

What needs weights that are not to be had is left out, and said to be. A run's validation, the demo
and `ldm eval-ae` share one loop, `pipelines.validation`.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from autoencoders import Autoencoder, load_autoencoder
from autoencoders.losses import LPIPS
from ldm.data import DataConfig, evaluation_batches
from ldm.data.loader import FaultCount, stop_if_too_many
from ldm.data.split import Split
from ldm.device import keep_freed_memory, memory_format
from ldm.distributed import fail_together, from_main, join_processes
from ldm.errors import UsageError
from ldm.logbook import console, progress_bar
from ldm.metrics.inception import Mode
from ldm.run_folder import newest_run
from pipelines.measuring.evaluation import (
    NUMBERS,
    Evaluation,
    Job,
    check_writable,
    conclude,
    default_paths,
    plan_jobs,
    write_last,
)
from pipelines.measuring.metrics import NOT_ASKED, Instruments, find_instruments
from pipelines.measuring.statistics import NEAREST, Surveyor, compare_surveys, gather_surveys
from pipelines.validation import Scores, reconstruct


# -------------------------------------------------------------------------------- from files
def evaluate_checkpoints(
    models: Sequence[Path | str] = (),
    data: str | DataConfig | None = None,
    split: Split = "val",
    resolutions: Sequence[int] | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    device: str = "auto",
    fid: bool = True,
    weights: Path | None = None,
    features: str | None = None,
    mode: Mode = "clean",
    out: Path | None = None,
    force: bool = False,
    lpips: LPIPS | None = None,
) -> list[Evaluation]:
    """Measure autoencoders in files, and write what comes of it as JSON.

    Images are cut at their centres to each resolution, never mirrored; reconstructions are the
    posterior's mode, in float32, rounded to 8 bits. PSNR, SSIM and LPIPS are means over images.
    rFID, KID, precision and recall compare Inception's features of all originals with those of
    all reconstructions; SWD compares patches of both, of 16,384 images at most, so that memory does
    not grow with more. Under a distributed launch the processes share the images, each of which is
    measured once, and all return the same.

    Numbers whose weights cannot be had are left out, and so is an rFID over fewer images than
    there are features. What is there, and why the rest is not, is in the result.

    Args:
        models: stage-one files or folders, ours or others', as `load_autoencoder` takes them;
            none: the newest run.
        data: `photos`, a folder, a zip, or shards; None: what each model was trained on.
        resolutions: sides of the images, pixels; None: that at which each model's training ended.
        batch_size: images at a time, per process.
        limit: only the first so many images.
        fid: False leaves out all that needs features.
        weights: `inception-2015-12-05.pt`; by default from where it usually lies, or fetched.
        features: an extractor of one's own, as `load_extractor` takes it.
        mode: how Inception's images are resized.
        out: one JSON for all; by default one of each model and resolution beside the model, in
            `eval/`.
        force: measure images as held out that were trained on, and rFID over few images, both
            noted in the result.
        lpips: used in place of the published LPIPS.

    Returns:
        One evaluation of each model at each resolution, in this order.

    Raises:
        UsageError: data or resolution left out, and a file does not say; a number below one; or
            options that do not go together; or two results would be written to one place.
        LdmError: a file is no autoencoder, or cannot take a resolution; the data cannot be read;
            held-out images were trained on; weights that were asked for cannot be had;
            reconstructions or features are not finite; or the result cannot be written.
    """
    for name, value in (
        ("--batch-size", batch_size), ("--limit", limit),
        *(("--resolution", resolution) for resolution in resolutions or []),
    ):  # fmt: skip
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: it must be at least 1")
    ranks, where = join_processes(device)
    keep_freed_memory(where)
    paths = list(dict.fromkeys(map(Path, models)))
    paths = paths or [from_main(ranks, lambda: newest_run("autoencoder"))]
    jobs = plan_jobs(paths, data, split, resolutions, limit, ranks, force)
    settings = [
        *([f"first{limit}"] if limit else []), *([] if fid else ["no-fid"]),
        *([features] if features else []), *([mode] if mode != "clean" else []),
    ]  # fmt: skip
    places = [out] * len(jobs) if out else default_paths(jobs, *settings)
    from_main(ranks, lambda: [check_writable(place) for place in places])
    instruments = find_instruments(
        fid, weights, features, mode, jobs[0].resolution, where, ranks, lpips
    )
    _say_missing(instruments.missing, ranks)

    done: list[Evaluation] = []
    for job, place in zip(jobs, places, strict=True):
        if not done or done[-1].model != job.model:
            with fail_together(ranks):
                ae = load_autoencoder(job.model, where).to(memory_format=memory_format(where))
        _say(
            f"measuring {job.model} on the {split} split of {job.data.source} "
            f"at {job.resolution}×{job.resolution}",
            ranks,
        )
        done.append(_measure(ae, job, place, instruments, batch_size, limit, force, where, ranks))
        fresh = {n: w for n, w in done[-1].about["missing"].items() if n not in instruments.missing}
        _say_missing(fresh, ranks)
        from_main(ranks, lambda: write_last(done, together=out is not None))
    return done


def _measure(
    ae: Autoencoder,
    job: Job,
    path: Path,
    instruments: Instruments,
    batch_size: int,
    limit: int | None,
    force: bool,
    device: torch.device,
    ranks: PartialState,
) -> Evaluation:
    """One pass over this process's share of the images, and what all shares say together."""
    world, total = ranks.num_processes, min(len(job.source), limit or len(job.source))
    perceptual = instruments.lpips and instruments.lpips.each
    scores, faults = Scores(), FaultCount(total)
    real, made = (Surveyor(total, job.resolution, instruments.extractor, device) for _ in range(2))
    stream = evaluation_batches(
        job.source, job.resolution, batch_size * world, limit, ranks.process_index, world,
        job.data.workers, faults,
    )  # fmt: skip
    bar = progress_bar("images")
    bar.disable = bar.disable or not ranks.is_main_process
    with fail_together(ranks), bar, closing(reconstruct(ae, stream, device)) as pairs:
        task = bar.add_task("measuring", total=total, speed="", note="")
        for pair in pairs:
            scores.add(pair, perceptual)
            real.add(pair.images, pair.k)
            made.add(pair.recon, pair.k)
            speed = bar.tasks[task].speed
            shown = f"{speed:.1f} images/s" if speed else ""
            bar.update(task, advance=len(pair.k) * world, speed=shown)
    shares = gather_object([(scores, faults.found)])
    originals, recons = (gather_surveys(side.survey, ranks) for side in (real, made))

    def together() -> Evaluation:
        everything, corrupt = Scores(), {}
        for some, found in shares:
            everything.merge(some)
            corrupt |= found
        stop_if_too_many(corrupt, total)
        means = everything.means()  # where there was no image, this says so
        extractor = instruments.extractor if everything.count > NEAREST else None
        compared = compare_surveys(recons, originals, device)
        how = {
            "limit": limit, "corrupt": len(corrupt), "device": _device_name(device),
            "processes": world, "batch_size": batch_size,
        }  # fmt: skip
        return conclude(
            job, path, means, everything.in_order(), compared, extractor, instruments, force, how
        )

    return from_main(ranks, together)


# ------------------------------------------------------------------------------------- telling
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _say(text: str, ranks: PartialState) -> None:
    if ranks.is_main_process:
        console.print(text, markup=False)


def _say_missing(missing: dict[str, str], ranks: PartialState) -> None:
    """One line for each reason."""
    for why in dict.fromkeys(why for why in missing.values() if why != NOT_ASKED):
        names = [title for name, title in NUMBERS.items() if missing.get(name) == why]
        _say(f"without {', '.join(names)}: {why}", ranks)
