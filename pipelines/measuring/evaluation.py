"""What came of measuring one autoencoder at one resolution, and where that is kept.

<run>/eval/<data>-<split>-<resolution>.json   the numbers, and all they depend on
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ldm.config import to_tree
from ldm.data import DataConfig
from ldm.errors import LdmError, UsageError
from ldm.files import write_json
from ldm.metrics.extractors import Extractor
from ldm.run_folder import installed_version, provenance
from pipelines.measuring.evaluation_plan import Job
from pipelines.measuring.features import describe_extractor
from pipelines.measuring.instruments import FEATURES, Instruments
from pipelines.measuring.preparation import preparation
from pipelines.measuring.result_names import join_words, name_data

FORMAT = 1
NUMBERS = {
    "rfid": "rFID", "lpips": "LPIPS", "psnr": "PSNR", "ssim": "SSIM", "kid": "KID",
    "precision": "precision", "recall": "recall", "swd": "SWD",
}  # fmt: skip
"""What is measured, and how it is written: in the paper's order, then what it does not report."""
PACKAGES = ("clean-fid", "lpips", "pillow", "torchvision")
"""Those that numbers depend on, besides what all provenance names."""


@dataclass(frozen=True)
class Evaluation:
    """One autoencoder's reconstructions, measured over one split at one resolution.

    Attributes:
        model: the file or folder it was read from.
        resolution: side of the images, pixels.
        count: how many images.
        numbers: each of `NUMBERS`; None where it could not be measured. PSNR is in dB; SWD is
            ×10³, as in its paper, and KID is not.
        about: all that the numbers depend on. `missing` and `doubtful` say, by a number's name,
            why it is not there, and why it may not mean what it seems to; `notes` are lines on
            all of them.
        path: the JSON that it is written to.
        each: the numbers of every image by itself, as `Scores.in_order` has them; not in the JSON.
    """

    model: Path
    resolution: int
    count: int
    numbers: dict[str, float | None]
    about: dict[str, Any]
    path: Path
    each: dict[str, NDArray] = field(default_factory=dict)

    def to_tree(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "format": FORMAT,
            "resolution": self.resolution,
            "count": self.count,
            "numbers": self.numbers,
            **self.about,
        }


def conclude(
    job: Job,
    path: Path,
    means: dict[str, float],
    each: dict[str, NDArray],
    compared: dict[str, Any],
    extractor: Extractor | None,
    instruments: Instruments,
    force: bool,
    how: dict[str, Any],
) -> Evaluation:
    """What was measured, without what it cannot say, and with all that it depends on.

    Args:
        path: where it is to be kept.
        means: over the images, by the names of `NUMBERS`.
        each: of every image, as `Scores.in_order` has it.
        compared: as `compare_surveys` has it.
        extractor: what made the features; None where the images that could be read were too few
            for any.
        instruments: what there was to measure with.
        force: keep an rFID over fewer images than features, marked as doubtful.
        how: further things to be told.
    """
    numbers: dict[str, float | None] = dict.fromkeys(NUMBERS) | means
    numbers |= {name: compared[name] for name in ("kid", "precision", "recall")}
    numbers |= {"rfid": compared["fid"], "swd": compared["swd"]["mean"]}
    missing, doubtful = dict(instruments.missing), {}
    notes = [job.seen["note"]] if job.seen["note"] else []
    count = len(each["k"])
    if extractor is None and instruments.extractor is not None:
        numbers |= dict.fromkeys(FEATURES)
        missing |= dict.fromkeys(FEATURES, f"{count} image(s) have too few neighbours")
    elif extractor is not None:
        if count < extractor.dim:
            few = f"{count:,} images are fewer than the {extractor.dim:,} features of each"
            if force:
                doubtful["rfid"] = f"{few}: compare it only with rFIDs over as many"
            else:
                numbers["rfid"] = None
                missing["rfid"] = f"{few}; --force gives it all the same"
        if not extractor.is_published:
            notes.append(
                f"{extractor.name} is not the published Inception: compare rFID, KID, precision "
                "and recall only with those of the same network"
            )
    about = {
        "model": job.said,
        "data": to_tree(job.data),
        "prepared": preparation(job.data),
        "split": job.split,
        "seen": job.seen,
        "recon": "posterior's mode, float32, rounded to 8 bits",
        "lpips": instruments.lpips and "VGG-16",
        "extractor": describe_extractor(extractor),
        "missing": missing,
        "doubtful": doubtful,
        "notes": notes,
        "details": {name: compared[name] for name in ("kid_std", "swd", "swd_images")},
        **how,
        **provenance(),
    }
    about["versions"] |= {name: installed_version(name) for name in PACKAGES}
    return Evaluation(job.model, job.resolution, count, numbers, about, path, each)


# ------------------------------------------------------------------------------------- on disk
def default_paths(jobs: Sequence[Job], *settings: str) -> list[Path]:
    """Where the evaluations of one call are kept, each as `default_path` has it.

    Raises:
        UsageError: two of them would be kept in one place.
    """
    paths = [default_path(j.model, j.data, j.split, j.resolution, *settings) for j in jobs]
    taken: dict[Path, Job] = {}
    for job, path in zip(jobs, paths, strict=True):
        other = taken.setdefault(path.resolve(), job)
        if other is not job:
            raise UsageError(
                f"{other.model} and {job.model} would both be written to {path}: leave one of "
                "them out, or give --out one file for all"
            )
    return paths


def default_path(
    model: Path, data: DataConfig, split: str, resolution: int, *settings: str
) -> Path:
    """Where an evaluation is kept beside its model: `eval/photos-val-64.json`, and for other data
    two folders of its path with a few digits of the whole: `eval/imagenet-val-1f0c52-val-64.json`.

    Args:
        settings: further words that tell it from others of this model.
    """
    words = [name_data(data.source), split, str(resolution), *settings]
    # best.pt lies beside ckpt.pt, and one of another format may beside either
    which = model.stem if model.suffix == ".pt" else model.name
    if model.is_file() and which != "ckpt":
        words.insert(0, which)
    folder = model if model.is_dir() else model.parent
    return folder / "eval" / f"{join_words(*words)}.json"


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written, before hours of work that it is to hold.

    Raises:
        LdmError: it is a folder, or its own folder cannot be made or written.
    """
    elsewhere = "give --out another file"
    if path.is_dir():
        raise LdmError(f"{path} is a folder: {elsewhere}, such as {path / 'eval.json'}")
    beside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch()
        beside.unlink()
    except OSError as error:
        raise LdmError(f"could not write {path} ({error.strerror}): {elsewhere}") from error


def write_last(evaluations: Sequence[Evaluation], together: bool) -> None:
    """Write the last evaluation to its file; or all of them, `together` in one file.

    Raises:
        LdmError: the disk is full or the folder cannot be written; what stood there stays.
    """
    trees = [each.to_tree() for each in evaluations]
    tree = {"format": FORMAT, "evaluations": trees} if together else trees[-1]
    write_json(evaluations[-1].path, tree)
