"""What is kept of a finished row, and how far the rows of a table are.

<row>/row.json     the numbers, what was asked, what was trained or taken, the network of features,
                   whether --force made a difference, the machine, versions, command, time
<row>/images.npz   what every image has in them: by these two rows are compared
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from autoencoders.losses.trunks import has_trunk
from ldm.config import to_tree
from ldm.data.identity import listing_identity
from ldm.files import to_json, write_together
from ldm.metrics.inception import SHA256, digest, published_weights
from pipelines.reproduce.plan import DECISIVE, Job, Training
from pipelines.reproduce.scales import SCALES, Measuring
from pipelines.reproduce.tables import Row

FORMAT = 3
OF_FEATURES = ("rfid", "fid")
"""Numbers that are of Inception, or of what was given in its place."""
RECORD, EACH = "row.json", "images.npz"
State = Literal["done", "begun", "–"]


def read_record(path: Path) -> dict[str, Any]:
    """A JSON file of ours; {} where there is none that can be read."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(
    job: Job, record: dict[str, Any], each: Mapping[str, NDArray] = MappingProxyType({})
) -> None:
    """Keep a finished row.

    Args:
        each: the numbers of every image by itself.
    """
    if is_main():
        whole = to_json({"format": FORMAT, "state": "done", "each": sorted(each), **record})
        files = {job.folder / EACH: lambda file: np.savez(file, **each)} if each else {}
        write_together(files | {job.folder / RECORD: lambda file: file.write(whole)})


def read_each(folder: Path) -> dict[str, NDArray]:
    """The numbers of every image of a row; {} where there are none."""
    try:
        with np.load(folder / EACH, allow_pickle=False) as file:
            each = dict(file)
    except (OSError, EOFError, ValueError, BadZipFile):
        return {}
    whole = "k" in each and len({values.shape for values in each.values()}) == 1
    return each if whole else {}


def is_main() -> bool:
    """Whether this is the process that writes and speaks, of however many were launched."""
    return os.environ.get("RANK", "0") == "0"


def row_states(out: Path, row: Row) -> dict[str, State]:
    """How far a row is, by scale."""
    return {scale: _state(out / scale / row.table / row.name) for scale in SCALES}


def _state(folder: Path) -> State:
    if read_record(folder / RECORD).get("state") == "done":
        return "done"
    return "begun" if folder.is_dir() else "–"


# ------------------------------------------------------------------------------- what was asked
def asked_of(job: Job, measuring: Measuring) -> dict[str, Any]:
    """All settings that decide a row's numbers, as plain values."""
    stages = {"recipe": _decisive(job.training)}
    if job.stage_two is not None:
        stages["stage_one"] = _decisive(job.stage_one)
    data = to_tree(job.data)
    data.pop("workers")
    measured = {
        "resolution": job.resolution,
        "data": data,
        **asdict(measuring),
    }
    # as JSON has it: what is compared was read from there
    return json.loads(json.dumps({"trained": stages, "measured": measured}))


def listings_of(job: Job) -> dict[str, str | None]:
    """Which images a row's data sets hold, those of its stage one with them."""
    sources = (training.recipe.data.source for training in (job.stage_one, job.training))
    return {source: listing_of(source) for source in sources}


def finished(
    job: Job,
    asked: dict[str, Any],
    taken_sha256: str | None,
    weights: Path | None,
    force: bool = False,
) -> dict[str, Any] | None:
    """The record of a row that need not be done again.

    A row that was measured with a checkpoint given to it stays so until another one is given. One
    whose columns are empty for want of weights is measured again when they are there, and one whose
    numbers are of another Inception than is meant now, too, so that no table mixes two. The version
    of ldm is told, and decides nothing.

    Args:
        taken_sha256: of the checkpoint that is given now.
        weights: Inception's, where they are given now.
        force: whether doubts are overridden now.
    """
    record = read_record(job.folder / RECORD)
    if record.get("format") != FORMAT or record.get("state") != "done":
        return None
    then = record["asked"]
    theirs = (record["taken"] or {}).get("sha256")
    if then["measured"] != asked["measured"] or taken_sha256 not in (None, theirs):
        return None
    if theirs is None and then["trained"] != asked["trained"]:
        return None
    before = then.get("listings", {})
    if not all(same_listing(before.get(k), now) for k, now in asked.get("listings", {}).items()):
        return None
    if not read_each(job.folder).keys() >= set(record["each"]):  # lost: it is measured again
        return None
    if not _same_network(record, weights) or record.get("force") not in (None, force):
        return None
    still = lacking(record["lacked"], weights)
    return record if still == record["lacked"] else None


def taken_before(job: Job) -> tuple[Path, str] | None:
    """The checkpoint that a row was last measured with, where one had been given for it, and the
    SHA-256 of its weights then."""
    taken = read_record(job.folder / RECORD).get("taken")
    return (Path(taken["path"]), taken["sha256"]) if taken else None


def _same_network(record: Mapping[str, Any], weights: Path | None) -> bool:
    """Whether the numbers of features, if there are any, are of the network that is meant now."""
    if all(record["numbers"].get(name) is None for name in OF_FEATURES):
        return True
    if weights is None and published_weights() is None:
        return True  # nothing could take their place
    # where none is given, none but the published one is taken
    now = SHA256 if weights is None else digest(weights)
    return (record.get("extractor") or {}).get("sha256") == now


@cache
def listing_of(data: str) -> str | None:
    """Which images a data set holds, asked once; None where it is not here now."""
    return listing_identity(data)


def same_listing(then: str | None, now: str | None) -> bool:
    """Whether a data set holds what it held, as far as either is known."""
    return None in (then, now) or then == now


def lacking(numbers: Iterable[str], weights: Path | None) -> list[str]:
    """Those of some numbers whose weights are not on this machine.

    Args:
        weights: Inception's, where they are given.
    """
    return [name for name in numbers if not _is_there(name, weights)]


def _decisive(training: Training) -> dict[str, Any]:
    """A recipe without what only says how a run is watched."""
    tree = to_tree(training.recipe)
    tree["run"] = {k: value for k, value in tree["run"].items() if f"run.{k}" in DECISIVE}
    tree["data"].pop("workers")
    tree.pop("validate_images", None)
    return tree


def _is_there(number: str, weights: Path | None) -> bool:
    """Whether the weights that a number needs, if it needs any, are on this machine."""
    if number == "lpips":
        return has_trunk("VGG-16")
    if number in OF_FEATURES:
        return weights is not None or published_weights() is not None
    return True
