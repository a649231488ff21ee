"""Tar shards as webdataset writes them, indexed once and then read by position.

An image is found by its offset in its shard, so any order, and resuming at any image, costs what
reading in sequence does; the file is opened anew for each image, and no handle is ever shared
between processes. A class is a number in a `.cls` member beside its image, read with the index.

One shard of prepared images: the unit of work of `prepare`, and of going on after a stop.
"""

import io
import json
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from hashlib import file_digest
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ldm.data.sources import Labels, Source, label_of, load_at_least, printable, unlabelled
from ldm.data.transforms import SUFFIXES, CorruptImage, center_crop, decode, is_image
from ldm.errors import LdmError, UsageError
from ldm.files import read_json, write_atomically, write_json

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
SIDECAR = ".tar.json"
"""Ends the name of the note that preparation leaves beside each finished shard."""

_LONGEST_CLASS = 32  # bytes of a .cls that are read: a number of six digits, and space around it


class Member(NamedTuple):
    """One image in a tar: its name there, where its bytes are, and its class, if that was read."""

    name: str
    offset: int
    size: int
    label: int | None = None


class ShardSource:
    """Every image in local tar shards, shard by shard in the order given.

    Args:
        counts: images per shard by its name, as a manifest says.
        labels: read the `.cls` members.
        classes: names of the classes; None: they are called by their numbers, "0" to the highest.

    Attributes:
        held_out: how many of the last images the manifest holds out; None where it does not say.

    Raises:
        LdmError: a shard is not there, truncated, corrupt, or holds another number of images than
            `counts` says; or there is no image in any.
        UsageError: labels are asked for and an image has none, or none of `classes`.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        counts: Mapping[str, int] | None = None,
        held_out: int | None = None,
        labels: bool = False,
        classes: Sequence[str] | None = None,
    ):
        self.held_out = held_out
        self._shards = list(shards)
        index = [index_shard(path, (counts or {}).get(path.name), labels) for path in shards]
        self._names = [member.name for members in index for member in members]
        if not self._names:
            raise LdmError(f"no images in {_listed(shards)}: {' '.join(SUFFIXES)} are read")
        self._places = np.array(  # (n, 3): shard, offset, size
            [(i, m.offset, m.size) for i, members in enumerate(index) for m in members]
        )
        self.classes, self._labels = (
            self._read_labels([member.label for members in index for member in members], classes)
            if labels
            else unlabelled(len(self._names))
        )

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self._shards[self._places[index, 0]]}/{self._names[index]}"

    def load(self, index: int) -> np.ndarray:
        shard, offset, size = self._places[index].tolist()
        try:
            with self._shards[shard].open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise CorruptImage(error.strerror or str(error)) from error
        return decode(data, Path(self._names[index]).suffix)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def _read_labels(self, labels: list[int | None], classes: Sequence[str] | None) -> Labels:
        if None in labels:
            raise UsageError(
                f"{self.name(labels.index(None))} has no class, a .cls beside it: "
                "prepare the images with `ldm data prepare … --labels`, or leave labels out"
            )
        highest = max(labels)
        names = tuple(map(str, range(highest + 1)) if classes is None else classes)
        if highest >= len(names):
            raise UsageError(
                f"{self.name(labels.index(highest))} is of class {highest}, and {MANIFEST} names "
                f"only those below {len(names)}: prepare the images again, or leave labels out"
            )
        return names, np.array(labels, np.int32)


def open_shards(path: Path, labels: bool = False) -> ShardSource:
    """A folder of `.tar` shards, one `.tar`, or several by a pattern such as a/{000..009}.tar.

    A folder that `ldm data prepare` wrote is read as its manifest says: these shards, with these
    numbers of images, this split, and these names of classes.

    Args:
        labels: read the classes of the images.

    Raises:
        LdmError: as `ShardSource`; or the preparation of the folder was not finished.
        UsageError: as `ShardSource`.
    """
    if path.is_dir():
        manifest = read_manifest(path)
        if manifest:
            counts, held_out = _counts(manifest), manifest["splits"]["val"]["count"]
            shards = [path / name for name in counts]
            return ShardSource(shards, counts, held_out, labels, manifest.get("classes"))
        if any(path.glob(f"*{SIDECAR}")):
            raise LdmError(
                f"{path} is not complete: run the `ldm data prepare` that began it again, "
                "it goes on where it stopped"
            )
        return ShardSource(sorted(path.glob("*.tar")), labels=labels)
    if path.exists():
        shards = [path]
    else:
        from braceexpand import braceexpand

        shards = [Path(name) for name in braceexpand(str(path))]
    manifest = read_manifest(shards[0].parent)
    classes = manifest and manifest.get("classes")
    return ShardSource(shards, _counts(manifest), labels=labels, classes=classes)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `ldm data prepare` wrote in a folder, or None where it wrote nothing.

    Raises:
        LdmError: it is damaged, or of a newer format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise LdmError(f"{path} is damaged: run `ldm data prepare` again") from error
    if not isinstance(manifest, dict) or "splits" not in manifest:
        return None  # another tool's file of the same name
    if manifest["format"] > MANIFEST_FORMAT:
        raise LdmError(
            f"{path} has format {manifest['format']}, this version reads up to {MANIFEST_FORMAT}: "
            "upgrade ldm"
        )
    return manifest


def index_shard(path: Path, expected: int | None = None, labels: bool = False) -> list[Member]:
    """The images in a tar, in its order: members whose name after the first dot is an image's.

    Args:
        expected: how many there should be, where a manifest says.
        labels: read the `.cls` members too, each the class of the images with the same key.

    Raises:
        LdmError: the shard is not there, truncated or corrupt, or a `.cls` holds no number.
    """
    members, classes = [], {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                if _is_image_member(member.name):
                    members.append(Member(member.name, member.offset_data, member.size))
                elif labels and (key := _class_key(member.name)):
                    text = tar.extractfile(member).read(_LONGEST_CLASS)
                    classes[key] = _class_number(text, f"{path}/{member.name}")
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read(tarfile.BLOCKSIZE)
    except FileNotFoundError as error:
        raise LdmError(f"shard {path} is not there") from error
    except (tarfile.TarError, OSError) as error:
        raise LdmError(_damaged(path, str(error))) from error
    # cut between two members, or with a broken header, a tar reads as a shorter one without error
    if end != bytes(tarfile.BLOCKSIZE):
        raise LdmError(_damaged(path, "it does not end as a tar does"))
    if expected is not None and len(members) != expected:
        raise LdmError(_damaged(path, f"{len(members)} images, {expected} in the manifest"))
    return [member._replace(label=classes.get(_key(member.name))) for member in members]


def _is_image_member(name: str) -> bool:
    """Webdataset's key ends at the first dot of the last part: `a.seg.png` is no image of `a`."""
    return is_image(name) and PurePosixPath(name).name.count(".") == 1


def _key(name: str) -> str:
    """What the members of one sample share, for a name with one dot in its last part."""
    return name.rpartition(".")[0]


def _class_key(name: str) -> str | None:
    """The key of a `.cls` member; None for any other member."""
    path = PurePosixPath(name)
    return _key(name) if path.suffix.lower() == ".cls" and path.name.count(".") == 1 else None


def _class_number(text: bytes, where: str) -> int:
    # six digits: a number gone wrong does not become a million millions of classes
    if not re.fullmatch(rb"\s*\d{1,6}\s*", text):
        raise LdmError(
            f"{where} holds {text!r}, not the number of a class from 0 to 999999: "
            "repair it, or leave labels out"
        )
    return int(text)


def _counts(manifest: Mapping[str, Any] | None) -> dict[str, int]:
    """Images per shard, by its name: training shards first."""
    if manifest is None:
        return {}
    splits = manifest["splits"]
    return {s["name"]: s["count"] for split in ("train", "val") for s in splits[split]["shards"]}


def _damaged(path: Path, reason: str) -> str:
    return f"shard {path} is truncated or corrupt ({reason}): copy or prepare it again"


def _listed(shards: Sequence[Path]) -> str:
    return str(shards[0]) if len(shards) == 1 else f"{shards[0]} … {shards[-1]}"


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
        report = read_json(path) or {}
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
