"""Tar shards as webdataset writes them, indexed once and then read by position.

An image is found by its offset in its shard, so any order, and resuming at any image, costs what
reading in sequence does; the file is opened anew for each image, and no handle is ever shared
between processes.
"""

import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from ldm.data.decode import SUFFIXES, CorruptImage, decode, is_image
from ldm.errors import LdmError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
SIDECAR = ".tar.json"
"""Ends the name of the note that preparation leaves beside each finished shard."""


class Member(NamedTuple):
    """One image in a tar: its name there, and where its bytes are."""

    name: str
    offset: int
    size: int


class ShardSource:
    """Every image in local tar shards, shard by shard in the order given.

    Attributes:
        held_out: how many of the last images the manifest holds out; None where it does not say.

    Raises:
        LdmError: a shard is not there, truncated, corrupt, or holds another number of images than
            `counts` says; or there is no image in any.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        counts: Mapping[str, int] | None = None,
        held_out: int | None = None,
    ):
        self.held_out = held_out
        self._shards = list(shards)
        index = [index_shard(path, (counts or {}).get(path.name)) for path in shards]
        self._names = [member.name for members in index for member in members]
        if not self._names:
            raise LdmError(f"no images in {_listed(shards)}: {' '.join(SUFFIXES)} are read")
        self._places = np.array(  # (n, 3): shard, offset, size
            [(i, m.offset, m.size) for i, members in enumerate(index) for m in members]
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


def open_shards(path: Path) -> ShardSource:
    """A folder of `.tar` shards, one `.tar`, or several by a pattern such as a/{000..009}.tar.

    A folder that `ldm data prepare` wrote is read as its manifest says: these shards, with these
    numbers of images, and this split.

    Raises:
        LdmError: as `ShardSource`; or the preparation of the folder was not finished.
    """
    if path.is_dir():
        manifest = read_manifest(path)
        if manifest:
            shards = [path / name for name in _counts(manifest)]
            return ShardSource(shards, _counts(manifest), manifest["splits"]["val"]["count"])
        if any(path.glob(f"*{SIDECAR}")):
            raise LdmError(
                f"{path} is not complete: run the `ldm data prepare` that began it again, "
                "it goes on where it stopped"
            )
        return ShardSource(sorted(path.glob("*.tar")))
    if path.exists():
        shards = [path]
    else:
        from braceexpand import braceexpand

        shards = [Path(name) for name in braceexpand(str(path))]
    return ShardSource(shards, _counts(read_manifest(shards[0].parent)))


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


def index_shard(path: Path, expected: int | None = None) -> list[Member]:
    """The images in a tar, in its order: members whose name after the first dot is an image's.

    Args:
        expected: how many there should be, where a manifest says.

    Raises:
        LdmError: the shard is not there, truncated or corrupt.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members = [
                Member(member.name, member.offset_data, member.size)
                for member in tar
                if member.isfile() and _is_image_member(member.name)
            ]
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
    return members


def _is_image_member(name: str) -> bool:
    """Webdataset's key ends at the first dot of the last part: `a.seg.png` is no image of `a`."""
    return is_image(name) and PurePosixPath(name).name.count(".") == 1


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
