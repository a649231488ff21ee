"""Tar shards as webdataset writes them: reading them by position, writing and checking them.

An image is found by its offset in its shard (see `ldm.data.shard_index`), so any order, and
resuming at any image, costs no more than reading in sequence. The file is opened anew for each
image, so no handle is shared between processes. A class is a number in a `.cls` member beside it.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
from pydantic import Field

from ldm.config import Resolution
from ldm.data.labels import match_labels, read_label_file
from ldm.data.shard_index import ShardIndex, open_index
from ldm.data.sources import UTF8, LeftOut, Source
from ldm.data.tars import Member, index_shard, read_member
from ldm.data.transforms import (
    SUFFIXES,
    CorruptImage,
    decode,
    image_size,
    is_hidden,
)
from ldm.errors import LdmError, UsageError, brief, refuse_newer
from ldm.files import (
    sha256_of,
    write_atomically,
    write_json,
)
from ldm.logbook import show_progress
from ldm.records import Count, FileName, checked, read_json, schema

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
AGAIN = "run `ldm data prepare` again"
SIDECAR = ".tar.json"
"""Suffix of the description that preparation writes beside each finished shard."""

Digest = Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]
SHARD = {"name": FileName, "count": Count}
SIDECAR_SCHEMA = schema(**SHARD, sha256=str, bytes=Count)
_LISTED = schema(**SHARD, sha256=(Digest, ""), bytes=(Count, 0))
_SPLIT = schema(count=Count, shards=list[_LISTED])  # type: ignore[valid-type]
_MANIFEST = schema(
    size=(Resolution, 1), channels=(Count, 3), classes=(list[str] | None, None),
    splits=schema(train=_SPLIT, val=_SPLIT),
)  # fmt: skip


class ShardSource(Source):
    """Every image in local tar shards, shard by shard in the order given.

    A manifest knows the number of images in each shard, and names of classes. With labels, classes
    are read from a label file, or from `.cls` and `.json` members (`LABEL_COLUMNS`); without a
    manifest, numbers are named "0", "1", ….

    Args:
        folder: of the shards.
        names: their paths in it.
        key: names the data set in the cache of indexes.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        manifest: Mapping[str, Any] | None = None,
        labels: bool = False,
        label_file: str = "",
        key: str = "",
    ) -> None:
        if not names:
            raise LdmError(f"no shards in {folder}: give another folder")
        in_members, self._folder = labels and not label_file, folder
        listed = listed_shards(manifest) if manifest else {}
        key = key or str((folder / names[0]).absolute())
        self._index = open_index(folder, names, key, listed, in_members)
        left_out = LeftOut()
        for kinds in self._index.left_out.values():
            left_out.merge(kinds)
        searched = " … ".join(dict.fromkeys(str(folder / names[end]) for end in (0, -1)))
        if not len(self):
            raise LdmError(f"no images in {searched}{left_out}: {' '.join(SUFFIXES)} are read")
        left_out.tell(searched, len(self))
        self._in_members = in_members
        if in_members:
            named = (manifest or {}).get("classes")
            self.classes = class_names(self._index, self.name, folder, named)
        elif labels:
            path = Path(label_file).expanduser()
            table = read_label_file(path)
            self.classes, self._labels = match_labels(self._index.names(), table, path)

    def __len__(self) -> int:
        return int(self._index.starts[-1])

    def name(self, index: int) -> str:
        return f"{self.file(index)}/{self._member(index).name}"

    def file(self, index: int) -> Path:
        return self._folder / self._index.shard(self._index.find(index)[0])

    def label(self, index: int) -> int:
        if not self._in_members:
            return super().label(index)
        return self._index.label(*self._index.find(index))

    def identity(self) -> str:
        table = self._index.table
        names = (self._index.shard(shard).rpartition("/")[2] for shard in range(len(table)))
        shards = [f"{n} {size}" for n, size in zip(names, table["bytes"].tolist(), strict=True)]
        return sha256("\0".join([*shards, str(len(self))]).encode(*UTF8)).hexdigest()

    def load(self, index: int) -> np.ndarray:
        return decode(*self._read(index), self.channels, self.keep)

    def size(self, index: int) -> tuple[int, int]:
        return image_size(*self._read(index), self.channels)

    def _member(self, index: int) -> Member:
        return self._index.member(*self._index.find(index))

    def read(self, index: int) -> bytes:
        """Read the file of an image, or raise `CorruptImage`."""
        return self._read(index)[0]

    def _read(self, index: int) -> tuple[bytes, str]:
        """The file of an image, and the suffix of its name."""
        try:
            return read_member(self.file(index), self._member(index))
        except OSError as error:
            raise CorruptImage(brief(error)) from error


def class_names(
    index: ShardIndex, name: Callable[[int], str], where: object, named: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the names of the classes in shards that were read with labels.

    Args:
        name: gives an image's name, for messages; `where` is that of all.
        named: names by a manifest.
    """
    table = index.table
    if (without := np.flatnonzero(table["unlabelled"])).size:
        raise UsageError(
            f"{name(index.first(int(without[0]), -1))} has no .cls or .json member with its class: "
            "prepare the images with `ldm data prepare … --labels`, or omit labels"
        )
    highest = int(table["highest"].max())
    if index.classes:
        if highest >= 0:
            raise UsageError(f"{where} has names and numbers as classes: use one")
        return index.classes
    if named is not None and highest >= len(named):
        first = index.first(int(table["highest"].argmax()), highest)
        raise UsageError(
            f"{name(first)} has class {highest}, but {MANIFEST} names only classes below "
            f"{len(named)}: prepare the images again, or omit labels"
        )
    return tuple(map(str, range(highest + 1))) if named is None else tuple(named)


def open_shards(path: Path, labels: bool = False, label_file: str = "") -> ShardSource:
    """Open a folder of `.tar` shards, one `.tar`, or several by a pattern as a/{000..009}.tar.

    If `ldm data prepare` wrote the folder, its manifest lists the shards and names the classes.
    """
    if not path.is_dir():
        from braceexpand import braceexpand

        shards = [path] if path.exists() else [Path(name) for name in braceexpand(str(path))]
        folder, names = common_folder(shards)
        manifest = read_manifest(folder)
        return ShardSource(folder, names, manifest, labels, label_file, str(path.absolute()))
    manifest, key = read_manifest(path), str(path.absolute())
    if manifest:
        prepared = list(listed_shards(manifest))
        source = ShardSource(path, prepared, manifest, labels, label_file, key)
        source.held_out = manifest["splits"]["val"]["count"]
        source.channels = manifest.get("channels", 3)
        return source
    if any(path.glob(f"*{SIDECAR}")):
        raise LdmError(
            f"{path} is not complete: run the same `ldm data prepare` again to resume it"
        )
    return ShardSource(path, find_shards(path), None, labels, label_file, key)


def common_folder(shards: Sequence[Path]) -> tuple[Path, list[str]]:
    """Return the folder that holds all of some files, and their paths in it."""
    folder = Path(os.path.commonpath([shard.parent for shard in shards]))
    return folder, [shard.relative_to(folder).as_posix() for shard in shards]


def find_shards(folder: Path) -> list[str]:
    """Return the names of the tars in a folder, sorted; but hidden ones, as macOS's copies."""
    tars = (entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(".tar"))
    return sorted(name for name in tars if not is_hidden(name))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest that `ldm data prepare` wrote in a folder; None without one."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    return check_manifest(read_json(path, AGAIN), path)


def check_manifest(manifest: Any, path: object) -> dict[str, Any] | None:
    """Return the content of a manifest, if it is one of `ldm data prepare`; else None."""
    if not isinstance(manifest, dict) or "splits" not in manifest:
        return None  # another tool's file of the same name
    checked(schema(format=Count), manifest, path, AGAIN)
    refuse_newer(path, manifest["format"], MANIFEST_FORMAT)
    checked(_MANIFEST, manifest, path, AGAIN)
    if len(listed_shards(manifest)) < sum(len(s["shards"]) for s in manifest["splits"].values()):
        raise LdmError(f"{path} is damaged: it lists a shard twice: {AGAIN}")
    for name, split in manifest["splits"].items():
        if split["count"] != sum(shard["count"] for shard in split["shards"]):
            raise LdmError(
                f"{path} is damaged: splits.{name}.count: not that of its shards: {AGAIN}"
            )
    return manifest


def listed_shards(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the entries of shards in a manifest, by their names: training shards first."""
    splits = manifest["splits"]
    return {shard["name"]: shard for split in ("train", "val") for shard in splits[split]["shards"]}


PNG = tuple[int, bytes, int]
"""An image for a shard: its number, its file, and its class, −1 for none."""


def write_shard(tar: Path, images: Iterable[PNG], report: dict[str, Any]) -> None:
    """Write a tar, and a sidecar beside it with `report`, which gets the tar's size and hash.

    The same images give the same bytes. A class is written as webdataset's `.cls`.
    """
    report |= {"name": tar.name, "count": 0}

    def write(file: IO[bytes]) -> None:
        from webdataset import TarWriter

        with TarWriter(file, encoder=False, mtime=0) as writer:
            for number, png, label in images:
                labelled = {} if label < 0 else {"cls": b"%d" % label}
                suffix = "npy" if png.startswith(b"\x93NUMPY") else "png"
                writer.write({"__key__": f"{number:08d}", suffix: png} | labelled)
                report["count"] += 1
        file.flush()
        report["sha256"] = sha256_of(Path(file.name))
        report["bytes"] = file.tell()
        # before the tar gets its name, so that a tar without a sidecar is never ours
        write_json(sidecar(tar), report)

    write_atomically(tar, write)


def sidecar(tar: Path) -> Path:
    """Path of the description of a shard, beside it."""
    return tar.with_name(tar.stem + SIDECAR)


# --------------------------------------------------------------------------------- checking
def check(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Compare the shards in a folder with its manifest; return that, and a line for each fault.

    Every byte of the shards is read; no image is decoded.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise LdmError(f"{folder} has no {MANIFEST} of `ldm data prepare`: give prepared data")
    shards = [shard for split in ("train", "val") for shard in manifest["splits"][split]["shards"]]
    for shard in shards:
        checked(SIDECAR_SCHEMA, shard, folder / MANIFEST, entry=shard["name"])
    progress = show_progress("checking", len(shards), unit="shards")
    faults: list[str] = []
    with ThreadPoolExecutor() as pool, progress as advance:
        for fault in pool.map(partial(_fault, folder), shards):
            faults += [fault] if fault else []
            advance(1)
    if (count := sum(shard["count"] for shard in shards)) != (total := manifest.get("count")):
        faults.append(f"{folder / MANIFEST} counts {total} images, its shards {count}")
    return manifest, faults


def _fault(folder: Path, shard: Mapping[str, Any]) -> str | None:
    path, again = folder / shard["name"], "delete it, then repeat the command that wrote it"
    try:
        found, size = sha256_of(path), path.stat().st_size
        if size != shard["bytes"]:
            return f"{path} has {size:,} bytes, not {shard['bytes']:,}: {again}"
        if found != shard["sha256"]:
            return f"{path} holds other bytes than were written (SHA-256): {again}"
        index_shard(path, shard["count"])
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}): {again}"
    except LdmError as error:
        return str(error)
    return None
