"""Tar shards as webdataset writes them, indexed once and then read by position.

An image is found by its offset in its shard, so any order, and resuming at any image, costs no more
than reading in sequence. The file is opened anew for each image, so no handle is shared between
processes. A class is a number in a `.cls` member beside its image, read with the index.
"""

import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

import numpy as np

from ldm.config import Resolution
from ldm.data.labels import (
    LABEL_COLUMNS,
    match_labels,
    named_labels,
    numbered_labels,
    read_label_file,
)
from ldm.data.sources import UTF8, LeftOut, Source
from ldm.data.transforms import (
    MAX_BYTES,
    SUFFIXES,
    CorruptImage,
    decode,
    image_size,
    is_hidden,
    is_image,
)
from ldm.errors import LdmError, UsageError, brief, refuse_newer
from ldm.files import (
    HeaderReader,
    lfs_pointer,
    open_regular,
    sha256_of,
    write_atomically,
    write_json,
)
from ldm.logbook import show_progress
from ldm.records import Count, FileName, checked, parse_json, read_json, schema

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
AGAIN = "run `ldm data prepare` again"
SIDECAR = ".tar.json"
"""Suffix of the description that preparation writes beside each finished shard."""
MAX_HEADER = 2**20
"""Bytes of an extended header in a tar, such as a long name."""
MAX_GLOBAL = 100
"""Global headers in a tar; reading a member goes through all of them."""


SHARD = {"name": FileName, "count": Count}
SIDECAR_SCHEMA = schema(**SHARD, sha256=str, bytes=Count)
_SPLIT = schema(count=Count, shards=list[schema(**SHARD)])  # type: ignore[misc]
_MANIFEST = schema(
    size=(Resolution, 1), classes=(list[str] | None, None),
    splits=schema(train=_SPLIT, val=_SPLIT),
)  # fmt: skip


class Member(NamedTuple):
    """An image in a tar: its name, the position of its bytes, and its class, if that was read."""

    name: str
    offset: int
    size: int
    label: int | str | None = None


class ShardSource(Source):
    """Every image in local tar shards, shard by shard in the order given.

    A manifest knows the number of images in each shard, and names of classes. With labels, classes
    are read from a label file, or from `.cls` and `.json` members (`LABEL_COLUMNS`); without a
    manifest, numbers are named "0", "1", ….
    """

    def __init__(
        self,
        shards: Sequence[Path],
        manifest: Mapping[str, Any] | None = None,
        labels: bool = False,
        label_file: str = "",
    ) -> None:
        counts, in_members = _counts(manifest) if manifest else {}, labels and not label_file
        left_out = LeftOut()
        index = [index_shard(path, counts.get(path.name), in_members, left_out) for path in shards]
        members = [(i, member) for i, found in enumerate(index) for member in found]
        searched = " … ".join(dict.fromkeys((str(shards[0]), str(shards[-1]))))
        if not members:
            raise LdmError(f"no images in {searched}{left_out}: {' '.join(SUFFIXES)} are read")
        left_out.tell(searched, len(members))
        self._shards = list(shards)
        self._names = [member.name for _, member in members]
        self._places = np.array([(i, m.offset, m.size) for i, m in members])  # (n, 3)
        if in_members:
            self._read_labels([member.label for _, member in members], manifest)
        elif labels:
            path = Path(label_file).expanduser()
            self.classes, self.labels = match_labels(self._names, read_label_file(path), path)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self.file(index)}/{self._names[index]}"

    def file(self, index: int) -> Path:
        return self._shards[self._places[index, 0]]

    def identity(self) -> str:
        shards = [f"{shard.name} {shard.stat().st_size}" for shard in self._shards]
        return sha256("\0".join([*shards, str(len(self))]).encode(*UTF8)).hexdigest()

    def load(self, index: int) -> np.ndarray:
        return decode(self.read(index), Path(self._names[index]).suffix)

    def size(self, index: int) -> tuple[int, int]:
        return image_size(self.read(index), Path(self._names[index]).suffix)

    def read(self, index: int) -> bytes:
        """Read the file of an image, or raise `CorruptImage`."""
        _, offset, size = self._places[index].tolist()
        if size > MAX_BYTES:
            raise CorruptImage(f"{size:,} bytes, more than {MAX_BYTES:,}")
        try:
            with open_regular(self.file(index)) as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise CorruptImage(brief(error)) from error

    def _read_labels(
        self, labels: Sequence[int | str | None], manifest: Mapping[str, Any] | None
    ) -> None:
        if None in labels:
            raise UsageError(
                f"{self.name(labels.index(None))} has no .cls or .json member with its class: "
                "prepare the images with `ldm data prepare … --labels`, or omit labels"
            )
        numbers = [label for label in labels if isinstance(label, int)]
        if not numbers:
            self.classes, self.labels = named_labels([str(label) for label in labels])
            return
        if len(numbers) < len(labels):
            raise UsageError(f"{self._shards[0].parent} has names and numbers as classes: use one")
        self.classes, self.labels = numbered_labels(numbers, self.name)
        named = (manifest or {}).get("classes")
        if named is not None and max(numbers) >= len(named):
            raise UsageError(
                f"{self.name(numbers.index(max(numbers)))} has class {max(numbers)}, but "
                f"{MANIFEST} names only classes below {len(named)}: prepare the images again, or "
                "omit labels"
            )
        self.classes = self.classes if named is None else tuple(named)


def open_shards(path: Path, labels: bool = False, label_file: str = "") -> ShardSource:
    """Open a folder of `.tar` shards, one `.tar`, or several by a pattern as a/{000..009}.tar.

    If `ldm data prepare` wrote the folder, its manifest lists the shards and names the classes.
    """
    if not path.is_dir():
        from braceexpand import braceexpand

        shards = [path] if path.exists() else [Path(name) for name in braceexpand(str(path))]
        return ShardSource(shards, read_manifest(shards[0].parent), labels, label_file)
    manifest = read_manifest(path)
    if manifest:
        prepared = [path / name for name in _counts(manifest)]
        source = ShardSource(prepared, manifest, labels, label_file)
        source.held_out = manifest["splits"]["val"]["count"]
        return source
    if any(path.glob(f"*{SIDECAR}")):
        raise LdmError(
            f"{path} is not complete: run the same `ldm data prepare` again to resume it"
        )
    return ShardSource(find_shards(path), None, labels, label_file)


def find_shards(folder: Path) -> list[Path]:
    """Return the tars in a folder, by name, but hidden ones, such as macOS's copies."""
    tars = (path for path in folder.iterdir() if path.suffix.lower() == ".tar")
    return sorted(path for path in tars if not is_hidden(path.name))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest that `ldm data prepare` wrote in a folder; None without one."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path, AGAIN)
    if not isinstance(manifest, dict) or "splits" not in manifest:
        return None  # another tool's file of the same name
    checked(schema(format=Count), manifest, path, AGAIN)
    refuse_newer(path, manifest["format"], MANIFEST_FORMAT)
    checked(_MANIFEST, manifest, path, AGAIN)
    for name, split in manifest["splits"].items():
        if split["count"] != sum(shard["count"] for shard in split["shards"]):
            raise LdmError(
                f"{path} is damaged: splits.{name}.count: not that of its shards: {AGAIN}"
            )
    return manifest


def index_shard(
    path: Path,
    expected: int | None = None,
    labels: bool = False,
    left_out: LeftOut | None = None,
) -> list[Member]:
    """List the images in a tar, in its order: members with one dot, and the suffix of an image.

    A manifest can tell the number `expected`. With labels, `.cls` and `.json` members are read too,
    each with the class of the images with the same key; of both, `.cls` counts. Other members are
    counted in `left_out`.
    """
    left_out = LeftOut() if left_out is None else left_out
    members: list[tuple[str, Member]] = []  # and their keys
    texts: dict[str, dict[str, bytes]] = {".cls": {}, ".json": {}}  # by their keys
    try:
        with HeaderReader(path, MAX_HEADER) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                cast(Any, tar).members.clear()  # it would keep all, with their headers
                if member.size < 0 or member.issparse():  # the first would go around in circles
                    raise tarfile.ReadError("a member is sparse or of a negative size")
                if len(tar.pax_headers) > MAX_GLOBAL:
                    raise tarfile.ReadError(f"more than {MAX_GLOBAL} global headers")
                inside = PurePosixPath(member.name)
                if not member.isfile():
                    if member.issym() or member.islnk():
                        left_out.add("links", member.name)
                    continue
                suffix, key = inside.suffix.lower(), member.name.rpartition(".")[0]
                two_dots = inside.name.count(".") > 1  # to webdataset, a.seg.png is no image of a
                if labels and suffix in (".cls", ".json") and not two_dots:
                    content = tar.extractfile(member)
                    assert content is not None  # as of every regular file
                    # .cls: six digits, and white space
                    texts[suffix][key] = content.read(32 if suffix == ".cls" else MAX_HEADER)
                elif is_image(member.name) and two_dots:
                    left_out.add("images with two dots in their names", member.name)
                elif left_out.keeps(member.name):
                    image = Member(member.name, member.offset_data, member.size)
                    members.append((key, image))
            file.seek(tar.offset)
            # cut between two members, or with a broken header, a tar reads as a shorter one
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end-of-archive marker")
        if expected is not None and len(members) != expected:
            raise tarfile.ReadError(f"{len(members)} images, {expected} in the manifest")
    except FileNotFoundError as error:
        raise LdmError(f"shard {path} does not exist") from error
    except LdmError:
        raise
    except Exception as error:  # damage makes tarfile raise nearly anything
        if kind := find_compression(path):
            raise LdmError(f"shard {path} is compressed: unpack it by {kind} first") from error
        message = f"shard {path} is truncated or corrupt ({error}): copy or prepare it again"
        raise LdmError(lfs_pointer(path, "the shard") or message) from error
    return [image._replace(label=_read_class(path, key, texts)) for key, image in members]


COMPRESSIONS = {
    b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"
}  # fmt: skip
"""Programs that unpack, by the first bytes of their files."""


def find_compression(path: Path) -> str | None:
    """Return the program that unpacks a compressed file; None for another file."""
    try:
        with open_regular(path) as file:
            start = file.read(8)
    except OSError:
        return None
    return next((name for magic, name in COMPRESSIONS.items() if start.startswith(magic)), None)


def _read_class(path: Path, key: str, texts: Mapping[str, Mapping[str, bytes]]) -> int | str | None:
    """The class in an image's member `.cls`, else in its `.json`; None if it has none."""
    if key in texts[".cls"]:
        return _class_number(texts[".cls"][key], f"{path}/{key}.cls")
    if key in texts[".json"]:
        return _described_class(texts[".json"][key], f"{path}/{key}.json")
    return None


def _class_number(text: bytes, where: str) -> int:
    # at most six digits: a damaged number must not become millions of classes
    if not re.fullmatch(rb"\s*\d{1,6}\s*", text):
        raise LdmError(
            f"{where} holds {text!r}, not a class number from 0 to 999999: repair it, or omit "
            "labels"
        )
    return int(text)


def _described_class(text: bytes, where: str) -> int | str | None:
    """The class in a member of JSON, a number or a name; None if it has none."""
    try:
        tree = parse_json(text)
    except ValueError as error:
        raise LdmError(f"{where} is damaged ({error}): repair it, or omit labels") from error
    found = (tree.get(key) for key in LABEL_COLUMNS) if isinstance(tree, dict) else ()
    return next((label for label in found if type(label) in (int, str)), None)


def _counts(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Images per shard, by its name: training shards first."""
    splits = manifest["splits"]
    return {s["name"]: s["count"] for split in ("train", "val") for s in splits[split]["shards"]}


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
                writer.write({"__key__": f"{number:08d}", "png": png} | labelled)
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
