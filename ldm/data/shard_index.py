"""The index of tar shards: where each image lies in them, found once, kept, and memory-mapped.

    magic | blocks | table of the shards | facts, as JSON | their lengths and hash | magic

A shard's block holds a record for each of its images, then their names. A block is valid wherever
it stands, so the index of a folder that grew copies those of the shards that it knew: the shards
of the same name, size, and time or hash.
"""

import atexit
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple
from zlib import crc32

import numpy as np
from pydantic import Field

from ldm.data.labels import MOST_CLASSES, named_labels, numbered_labels
from ldm.data.sources import UTF8, LeftOut, tell
from ldm.data.tars import Member, index_shard
from ldm.data.workers import load_in_workers
from ldm.errors import LdmError
from ldm.files import (
    lock,
    open_regular,
    write_atomically,
)
from ldm.hub import cache_folder
from ldm.logbook import show_progress
from ldm.records import checked, parse_json, schema

INDEX = "shards.index"
"""File of an index: beside prepared shards, else in the cache."""
KEPT = 4
"""Indexes that are kept of a data set's shards at other times."""
FEW = 32
"""Shards that are indexed by this process alone: worker processes take seconds to start."""

Listed = Mapping[str, Mapping[str, Any]]
"""Entries of shards in a manifest, by their names: `count`, and perhaps `sha256`."""
ReadShards = Callable[[Sequence[str]], Generator["ShardBlock"]]
"""Reads shards, by their names, one after the other."""
MAGIC = b"ldmindex"
RECORD = np.dtype([("offset", "<u8"), ("size", "<u8"), ("label", "<i4"), ("name_end", "<u4")])
"""An image: the position of its bytes; its class, −1 for none, −2 − i for the i-th name of a class;
and the end of its name among those of its shard."""
ROW = [
    ("bytes", "<u8"), ("version", "<i8"), ("count", "<u8"),  # its file, and its images
    ("at", "<u8"), ("length", "<u8"), ("crc", "<u4"),  # its block
    ("unlabelled", "<u8"), ("highest", "<i4"),  # images without a class; the highest number of one
]  # fmt: skip
LeftOutKind = Annotated[list[int | str], Field(min_length=2, max_length=2)]
FACTS = schema(
    width=Annotated[int, Field(ge=1, le=4096)], labels=bool, classes=list[str],
    left_out=dict[str, dict[str, LeftOutKind]],
)  # fmt: skip
TAIL = struct.Struct("<QQ32s8s")  # lengths of table and facts, SHA-256 of both, magic


class Stamp(NamedTuple):
    """A shard's file at a time: its part of an index is valid as long as these stay."""

    name: str  # relative to the folder of the shards
    bytes: int
    version: int  # from its SHA-256 in a manifest, else the time of its last change


class ShardIndex:
    """An index in a file. It can be pickled: a worker maps the file itself.

    Raises:
        ValueError: the file is damaged, or is not that of which the SHA-256 is given.
        OSError: there is none.
    """

    def __init__(self, path: Path, digest: bytes | None = None) -> None:
        self.path = path
        with open_regular(path):  # no pipe or device
            self._bytes = np.memmap(path, np.uint8, "r")
        end = len(self._bytes) - TAIL.size
        if end < len(MAGIC):
            raise ValueError("too short")
        table, facts, self.digest, magic = TAIL.unpack(self._bytes[end:].tobytes())
        if magic != MAGIC or table + facts > end - len(MAGIC):
            raise ValueError("not an index")
        tail = self._bytes[end - facts - table : end]
        if sha256(tail.data).digest() != self.digest or digest not in (None, self.digest):
            raise ValueError("damaged, or written anew meanwhile")
        content = parse_json(tail[table:].tobytes())
        checked(FACTS, content, path)
        dtype = np.dtype([("name", f"S{content['width']}"), *ROW])
        self.table: np.ndarray = tail[:table].view(dtype)
        """A row for each shard, in their order; of `ROW`, and its name."""
        rows = self.table
        fits = rows["count"].astype(float) * RECORD.itemsize <= rows["length"]
        fits &= rows["at"].astype(float) + rows["length"] <= end
        if not np.all(fits & (rows["highest"] < MOST_CLASSES)):
            raise ValueError("more images or classes than it can hold")
        self.has_labels: bool = content["labels"]
        """True if classes were read."""
        self._names: list[str] = content["classes"]
        self.classes: tuple[str, ...] = ()
        """Names of classes, sorted, where these are not numbers."""
        if self._names:
            self.classes, self._ranks = named_labels(self._names)
        self.left_out: dict[str, dict[str, tuple[int, str]]] = content["left_out"]
        """Of each shard that has other members: their kinds, numbers and first names."""
        self.starts = np.concatenate([[0], np.cumsum(self.table["count"], dtype=np.int64)])
        """Number of the first image of each shard, and of all."""
        self._verified = bytearray(len(self.table))

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.path, self.digest)

    def find(self, index: int) -> tuple[int, int]:
        """Return the shard of an image, and its number among the images of that."""
        shard = int(np.searchsorted(self.starts, index, "right")) - 1
        return shard, int(index - self.starts[shard])

    def shard(self, shard: int) -> str:
        """Return the name of a shard, relative to the folder of all."""
        return bytes(self.table["name"][shard]).decode(*UTF8)

    def member(self, shard: int, number: int) -> Member:
        """Return an image of a shard, without its class."""
        records, names = self.block(shard)
        offset, size, _, end = records[number].tolist()
        start = int(records["name_end"][number - 1]) if number else 0
        return Member(names[start:end].tobytes().decode(*UTF8), offset, size)

    def label(self, shard: int, number: int) -> int:
        """Return the class of an image: its number, or that among `classes`; −1 for none."""
        label = int(self.block(shard)[0]["label"][number])
        return label if label >= -1 else int(self._ranks[-2 - label])

    def names(self) -> list[str]:
        """Return the names of all images."""
        numbers = ((shard, n) for shard, row in enumerate(self.table) for n in range(row["count"]))
        return [self.member(shard, number).name for shard, number in numbers]

    def first(self, shard: int, label: int) -> int:
        """Return the first image of a class in a shard, among all."""
        return int(self.starts[shard] + np.argmax(self.block(shard)[0]["label"] == label))

    def block(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the records of a shard's images, and the bytes of their names."""
        row = self.table[shard]
        block = self._bytes[row["at"] : row["at"] + row["length"]]
        length = int(row["count"]) * RECORD.itemsize
        records, names = block[:length].view(RECORD), block[length:]
        if not self._verified[shard]:  # once in each process
            ends = records["offset"].astype(float) + records["size"]
            if (
                crc32(block.data) != row["crc"] or np.any(ends > row["bytes"])
                or np.any(records["label"] < -1 - len(self._names))
            ):  # fmt: skip
                raise LdmError(f"{self.path} is damaged: delete it, and it is made again")
            self._verified[shard] = 1
        return records, names

    def whole_block(self, shard: int) -> "ShardBlock":
        """Return all that is known of a shard, for another index."""
        records, names = self.block(shard)
        left_out = self.left_out.get(self.shard(shard), {})
        return ShardBlock(records, names.tobytes(), self._names, left_out)


def _open_again(path: Path, digest: bytes) -> ShardIndex:
    try:
        return ShardIndex(path, digest)
    except (OSError, ValueError) as error:
        raise LdmError(
            f"{path} changed while it was in use ({error}): run the same command again"
        ) from error


# ---------------------------------------------------------------------------- open or make it
def open_index(
    folder: Path,
    shards: Sequence[str],
    key: str,
    listed: Listed,
    labels: bool = False,
) -> ShardIndex:
    """Open the index of shards, `folder`/`shards[i]`; make it if there is none, or shards changed.

    Args:
        key: names the data set in the cache.
        listed: the shards' entries in a manifest, if there is one.
        labels: read classes; an index with classes serves without them, too.
    """
    stamps = _stat(folder, shards, listed)
    beside = read_index(folder / INDEX)
    if beside is not None and _is_valid(beside, stamps, listed, labels):
        return beside
    return kept_index(key, stamps, listed, labels, partial(read_shards, folder, listed, labels))


def kept_index(
    key: str, stamps: Sequence[Stamp], listed: Listed, labels: bool, read: ReadShards
) -> ShardIndex:
    """Open the index that is kept in the cache by `key`, or make it by reading shards.

    Other processes may be using that of the same shards at another time, or without labels.
    """
    home = cache_folder() / "indexes" / _hash(key)
    labelled, without = (home / f"{_hash(json.dumps([stamps, of]))}.index" for of in (True, False))
    kept = labelled if labels else without

    def find() -> ShardIndex | None:
        found = (read_index(path) for path in (labelled, kept))
        return next((i for i in found if i and _is_valid(i, stamps, listed, labels)), None)

    if index := find():
        return index
    try:
        with lock(home, "set LDM_CACHE to another folder", wait=True):  # one process makes it
            if index := find():
                return index
            others = sorted(home.glob("*.index"), key=_changed, reverse=True)
            for path in others[KEPT:]:
                with suppress(OSError):  # some systems keep what is mapped
                    path.unlink()
            old = read_index(others[0]) if others else None
            return write_index(kept, stamps, labels, read, old)
    except LdmError as error:
        if not isinstance(error.__cause__, OSError) or os.access(home, os.W_OK):
            raise
        tell(f"{home} cannot be written: the index of {key} is made at each start")
    own = Path(tempfile.mkdtemp(prefix="ldm-index-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return write_index(own / INDEX, stamps, labels, read)


def _hash(text: str) -> str:
    return sha256(text.encode(*UTF8)).hexdigest()[:24]


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns


def keep_index(folder: Path, listed: Listed, labels: bool) -> None:
    """Write the index of prepared shards, the `listed` ones, beside them."""
    read = partial(read_shards, folder, listed, labels)
    write_index(folder / INDEX, _stat(folder, list(listed), listed), labels, read)


def write_index(
    path: Path,
    stamps: Sequence[Stamp],
    labels: bool,
    read: ReadShards,
    old: ShardIndex | None = None,
) -> ShardIndex:
    """Index shards into a file; blocks of an `old` index are copied where the shards are the same.

    When it is interrupted, or a shard is damaged, it keeps what is done: the next call goes on.
    """
    old = None if old is None or labels > old.has_labels else old
    known = {} if old is None else {stamp: i for i, stamp in enumerate(_stamps(old))}
    new = [stamp.name for stamp in stamps if stamp not in known]
    blocks, stopped = read(new), list[BaseException]()

    def write(file: IO[bytes]) -> None:
        writer = IndexWriter(file, labels)
        with closing(blocks), show_progress("indexing", len(new), unit="shards") as advance:
            for stamp in stamps:
                if old is not None and stamp in known:
                    writer.add(stamp, old.whole_block(known[stamp]))
                elif not stopped:
                    try:
                        writer.add(stamp, next(blocks))
                        advance(1)
                    except BaseException as error:  # raised below, when what is done is kept
                        stopped.append(error)
        writer.finish()

    write_atomically(path, write)
    if stopped:
        raise stopped[0]
    return ShardIndex(path)


def _is_valid(index: ShardIndex, stamps: Sequence[Stamp], listed: Listed, labels: bool) -> bool:
    if labels > index.has_labels or _stamps(index) != stamps:
        return False
    counts = zip(stamps, index.table["count"].tolist(), strict=True)
    return all(listed.get(stamp.name, {}).get("count", n) == n for stamp, n in counts)


def read_shards(
    folder: Path, listed: Listed, labels: bool, names: Sequence[str]
) -> Generator["ShardBlock"]:
    """Index shards of a folder one after the other, many by worker processes."""
    workers = 0 if len(names) < FEW else os.cpu_count() or 1
    keys = [(folder / name, listed.get(name, {}).get("count"), labels) for name in names]
    return load_in_workers(read_shard, keys, workers, "run the same command again")


def _stat(folder: Path, shards: Sequence[str], listed: Listed) -> list[Stamp]:
    def stamp(name: str) -> Stamp:
        path = f"{folder}/{name}"  # 10⁵ objects of pathlib would take seconds
        try:
            found = os.stat(path)  # noqa: PTH116
        except FileNotFoundError as error:
            raise LdmError(f"shard {path} does not exist") from error
        except OSError as error:
            raise LdmError(f"could not read shard {path} ({error.strerror})") from error
        digest = listed.get(name, {}).get("sha256")
        version = crc32(digest.encode(*UTF8)) if digest else found.st_mtime_ns
        return Stamp(name, found.st_size, version)

    parts = [shards[first : first + 1000] for first in range(0, len(shards), 1000)]
    with ThreadPoolExecutor() as pool:  # a remote disk answers many at once
        return list(chain(*pool.map(lambda part: list(map(stamp, part)), parts)))


def read_index(path: Path) -> ShardIndex | None:
    """Open an index; None if there is none, or it is damaged: it is made again."""
    try:
        return ShardIndex(path)
    except (OSError, ValueError, LdmError):
        return None


def _stamps(index: ShardIndex) -> list[Stamp]:
    columns = (index.table[key].tolist() for key in ("name", "bytes", "version"))
    return [Stamp(name.decode(*UTF8), *stamp) for name, *stamp in zip(*columns, strict=True)]


# ------------------------------------------------------------------------------------- blocks
class ShardBlock(NamedTuple):
    """The images of a shard, as in the file, and what else was found in it."""

    records: np.ndarray
    names: bytes
    classes: list[str]
    left_out: dict[str, tuple[int, str]]


def read_shard(shard: tuple[Path, int | None, bool]) -> ShardBlock:
    """Index one shard, given its path, the number of its images if known, and labels or not."""
    path, expected, labels = shard
    left_out = LeftOut()
    members = index_shard(path, expected, labels, left_out)
    names = [member.name.encode(*UTF8) for member in members]
    found = [member.label for member in members]
    numbered = [(i, label) for i, label in enumerate(found) if isinstance(label, int)]
    if numbered:  # or an error that names the image
        places, numbers = zip(*numbered, strict=True)
        numbered_labels(numbers, lambda i: f"{path}/{members[places[i]].name}")
    classes = sorted({label for label in found if isinstance(label, str)})
    number = {None: -1} | {name: -2 - i for i, name in enumerate(classes)}
    records = np.zeros(len(members), RECORD)
    records["offset"] = [member.offset for member in members]
    records["size"] = [member.size for member in members]
    records["label"] = [label if isinstance(label, int) else number[label] for label in found]
    records["name_end"] = np.cumsum([len(name) for name in names])
    return ShardBlock(records, b"".join(names), classes, left_out.kinds)


class IndexWriter:
    """Writes an index into an open file."""

    def __init__(self, file: IO[bytes], labels: bool) -> None:
        self._file, self._labels = file, labels
        self._rows: list[tuple[Any, ...]] = []
        self._classes: dict[str, int] = {}
        self._left_out: dict[str, dict[str, tuple[int, str]]] = {}
        self._file.write(MAGIC)
        self._at = len(MAGIC)

    def add(self, stamp: Stamp, block: ShardBlock) -> None:
        """Write the block of a shard."""
        records, labels = block.records.copy(), block.records["label"]
        for label in np.unique(labels[labels <= -2]):  # numbered in the block, now in the file
            name = block.classes[-2 - label]
            number = self._classes.setdefault(name, len(self._classes))
            records["label"][labels == label] = -2 - number
        content = records.tobytes() + block.names
        self._file.write(content)
        row = stamp.bytes, stamp.version, len(records), self._at, len(content), crc32(content)
        without = int((labels == -1).sum())
        self._rows.append((stamp.name.encode(*UTF8), *row, without, labels.max(initial=-1)))
        self._at += len(content)
        if block.left_out:
            self._left_out[stamp.name] = block.left_out

    def finish(self) -> None:
        """Write the table and the facts."""
        width = max((len(name) for name, *_ in self._rows), default=1)
        table = np.array(self._rows, np.dtype([("name", f"S{width}"), *ROW])).tobytes()
        facts = json.dumps(
            {
                "width": width,
                "labels": self._labels,
                "classes": list(self._classes),
                "left_out": self._left_out,
            }
        ).encode()
        digest = sha256(table + facts).digest()
        self._file.write(table + facts + TAIL.pack(len(table), len(facts), digest, MAGIC))
