"""One shard of prepared images: the unit of work of `prepare`, and of going on after a stop."""

import io
import json
from collections.abc import Callable, Sequence
from hashlib import file_digest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ldm.data.decode import CorruptImage
from ldm.data.labels import printable
from ldm.data.shards import SIDECAR
from ldm.data.source import Source, label_of, load_at_least
from ldm.data.transforms import center_crop
from ldm.errors import LdmError
from ldm.files import write_atomically, write_json


class ShardJob(NamedTuple):
    """A shard to write: its name without `.tar`, and the images of the source that go into it."""

    name: str
    indices: Sequence[int]


_NAMED = {"names_sha256": "the list of images", "labels_sha256": "the class labels"}
"""Settings that stand for more than can be shown."""


def write_shard(
    source: Source,
    job: ShardJob,
    settings: dict[str, Any],
    destination: Path,
    count: Callable[[], None],
) -> dict[str, Any]:
    """Write `<name>.tar` and the sidecar that describes it; return what that holds.

    Beside an image with a class goes its number, as decimal text in webdataset's `.cls`.
    The same images and settings give the same bytes. A corrupt image is left out and reported under
    "skipped" as [name, reason].

    Args:
        count: called after each image; what it raises ends the work and leaves no file.

    Raises:
        LdmError: an image is smaller than the size asked for, or the disk is full.
    """
    tar, size = destination / f"{job.name}.tar", settings["size"]
    report: dict[str, Any] = {"name": tar.name, "settings": settings, "resized": 0, "skipped": []}

    def write(file: io.BufferedWriter) -> None:
        from webdataset import TarWriter

        with TarWriter(file, encoder=False, mtime=0) as writer:
            for index in job.indices:
                try:
                    image = load_at_least(source, index, size)
                except CorruptImage as error:
                    report["skipped"].append([printable(source.name(index)), str(error)])
                else:
                    square = center_crop(image, size, settings["filter"])
                    report["resized"] += min(image.shape[:2]) != size
                    label = label_of(source, index)
                    labelled = {} if label < 0 else {"cls": b"%d" % label}
                    writer.write({"__key__": f"{index:08d}", "png": _as_png(square)} | labelled)
                count()
        file.flush()
        with Path(file.name).open("rb") as written:
            report["sha256"] = file_digest(written, "sha256").hexdigest()
        report["bytes"] = file.tell()
        report["count"] = len(job.indices) - len(report["skipped"])
        # before the tar gets its name: a tar without a sidecar is then never ours
        write_json(sidecar(tar), report)

    write_atomically(tar, write)
    return report


def finished_shard(
    job: ShardJob, settings: dict[str, Any], destination: Path
) -> dict[str, Any] | None:
    """The sidecar of a shard that is there and whole, or None.

    Raises:
        LdmError: it was made with other settings.
    """
    tar = destination / f"{job.name}.tar"
    path = sidecar(tar)
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text("utf-8"))
        before, size = dict(report["settings"]), report["bytes"]
    except (ValueError, KeyError, TypeError) as error:
        raise LdmError(f"{path} is damaged: delete it, the shard is then made again") from error
    differing = [
        _NAMED.get(key) or f"{key} {before.get(key)!r} there, {settings.get(key)!r} now"
        for key in settings | before
        if before.get(key) != settings.get(key)
    ]
    if differing:
        raise LdmError(
            f"{destination} was prepared with other settings ({'; '.join(differing)}): "
            "choose another destination, or empty this one"
        )
    return report if tar.is_file() and tar.stat().st_size == size else None


def sidecar(tar: Path) -> Path:
    """Where the description of a shard is written: beside it."""
    return tar.with_name(tar.stem + SIDECAR)


def _as_png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
