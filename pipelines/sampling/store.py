"""Where samples are put, and what is there already: as PNGs, in shards, or in one zip.

png      <out>/00000/img00000000.png …        a thousand a folder
shards   <out>/train-00000.tar … manifest.json    a thousand a shard, as `ldm data prepare` writes
zip      <out>/samples.zip                    the PNGs of all folders, stored

Every image is a PNG in its folder first. A thousand that is complete becomes a shard, at the end
all of them become the zip, and only then do their folders go: a stop at any moment loses no image
that was written, and leaves no half file.
"""

import json
import shutil
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from hashlib import file_digest
from pathlib import Path
from typing import IO, Any, Literal

from PIL import Image

from ldm.data.shard_writer import sidecar
from ldm.data.shards import MANIFEST, MANIFEST_FORMAT, Member, index_shard
from ldm.data.transforms import NOT_RESIZED
from ldm.errors import LdmError
from ldm.files import write_atomically, write_json

Files = Literal["png", "zip", "shards"]
THOUSAND = 1000
ZIP = "samples.zip"
SHARDS = "train-?????.tar"
MIDNIGHT = (1980, 1, 1, 0, 0, 0)  # the date of a zip's members: the same images, the same bytes


def image_name(i: int) -> str:
    """Image i in a folder of samples, and in their zip: a thousand a folder."""
    return f"{i // THOUSAND:05d}/img{i:08d}.png"


def image_path(out: Path, i: int) -> Path:
    """Where image i of a sampling job is as a file of its own."""
    return out / image_name(i)


class PngStore:
    """Images as files of their own; what the other two begin with.

    Args:
        out: the folder.
        label: the class of image i, −1 for none; None where there are no classes.
        rank, world: which process this is, of how many; each packs its share.
    """

    def __init__(
        self, out: Path, label: Callable[[int], int] | None = None, rank: int = 0, world: int = 1
    ) -> None:
        self.out, self.label, self.rank, self.world = out, label, rank, world

    def missing(self, n: int) -> list[int]:
        """Which of images 0 … n−1 are yet to be made."""
        there = self._packed().union(*(self._loose(folder) for folder in self._folders()))
        return [i for i in range(n) if i not in there]

    def begin(self, indices: Sequence[int]) -> None:
        """Be told which images all processes together are going to make, before the first is."""

    def write(self, i: int, picture: Image.Image) -> None:
        """Write image i as a PNG, whole or not at all."""
        write_atomically(image_path(self.out, i), lambda file: picture.save(file, format="png"))

    def tidy(self) -> None:
        """Pack what is complete of this process's share, while more is being made."""

    def finish(self) -> None:
        """Pack the rest of this process's share, once all images are there."""

    def conclude(self, size: int, source: str, classes: Sequence[str]) -> None:
        """Describe the whole, on one process, once all have finished.

        Args:
            size: side of the images, pixels.
            source: where they come from, in words.
            classes: names of the classes, or none.
        """

    def _folders(self) -> list[Path]:
        return sorted(self.out.glob("[0-9]" * 5))

    def _loose(self, folder: Path) -> dict[int, Path]:
        """The images that are files of their own in a folder, by their numbers."""
        found = folder.glob("img" + "[0-9]" * 8 + ".png")
        return {int(path.stem[3:]): path for path in found if path.is_file()}

    def _packed(self) -> set[int]:
        """The images that have no file of their own any more."""
        return set()


class ShardStore(PngStore):
    """A thousand images a tar, in the form of `ldm data prepare`.

    Beside an image with a class is its number, as webdataset's `.cls`. Images without are a data
    set without labels: one that is read with them wants a class for every image.
    """

    def begin(self, indices: Sequence[int]) -> None:
        self._awaited: dict[Path, list[int]] = {}
        for i in indices:
            self._awaited.setdefault(image_path(self.out, i).parent, []).append(i)
        self._awaited = {f: needed for f, needed in self._awaited.items() if self._is_mine(f)}
        if indices and self.rank == 0:
            (self.out / MANIFEST).unlink(missing_ok=True)  # it speaks of shards that will grow

    def tidy(self) -> None:
        while self._awaited:
            folder = min(self._awaited)
            if not self._loose(folder).keys() >= set(self._awaited[folder]):
                break
            self._pack(folder)
            del self._awaited[folder]

    def finish(self) -> None:
        for folder in filter(self._is_mine, self._folders()):
            self._pack(folder)

    def conclude(self, size: int, source: str, classes: Sequence[str]) -> None:
        shards = [_report(tar) for tar in self._shards()]
        count = sum(shard["count"] for shard in shards)
        manifest = {
            "format": MANIFEST_FORMAT,
            "count": count,
            "size": size,
            "filter": NOT_RESIZED,
            "crop": "none",
            "source": source,
            "splits": {
                "train": {"count": count, "shards": shards},
                "val": {"count": 0, "shards": []},
            },
            "skipped": [],
        }
        write_json(self.out / MANIFEST, manifest | ({"classes": list(classes)} if classes else {}))

    def _is_mine(self, folder: Path) -> bool:
        return int(folder.name) % self.world == self.rank

    def _shards(self) -> list[Path]:
        return sorted(self.out.glob(SHARDS))

    def _packed(self) -> set[int]:
        return {i for tar in self._shards() for i in _index(tar)}

    def _pack(self, folder: Path) -> None:
        """Add a folder's images to its shard, then remove the folder."""
        tar, loose = self.out / f"train-{folder.name}.tar", self._loose(folder)
        packed = _index(tar) if tar.is_file() else {}
        if loose.keys() - packed.keys():
            with tar.open("rb") if packed else nullcontext() as before:
                write_atomically(tar, lambda file: self._write(file, tar, loose, packed, before))
        shutil.rmtree(folder)

    def _write(
        self,
        file: IO[bytes],
        tar: Path,
        loose: Mapping[int, Path],
        packed: Mapping[int, Member],
        before: IO[bytes] | None,
    ) -> None:
        from webdataset import TarWriter

        with TarWriter(file, encoder=False, mtime=0) as writer:
            for i in sorted(loose.keys() | packed.keys()):
                if i in packed and before is not None:
                    before.seek(packed[i].offset)
                    png = before.read(packed[i].size)
                else:
                    png = loose[i].read_bytes()
                label = -1 if self.label is None else self.label(i)
                labelled = {} if label < 0 else {"cls": b"%d" % label}
                writer.write({"__key__": f"{i:08d}", "png": png} | labelled)
        file.flush()
        # before the tar gets its name, so that every shard has one; a stop between the two leaves
        # the folder, and all this is done again
        _describe(tar, Path(file.name), len(loose.keys() | packed.keys()))


class ZipStore(PngStore):
    """All images in one archive, laid out like those of EDM's dataset tool.

    Where every image has a class, they are in `dataset.json`, as EDM reads them; it has no word for
    an image without. (Our own training reads labels from shards, not from there.)
    """

    def finish(self) -> None:
        if self.rank != 0:
            return
        path, packed = self.out / ZIP, self._packed()
        loose = {i: file for folder in self._folders() for i, file in self._loose(folder).items()}
        if loose.keys() - packed:
            with zipfile.ZipFile(path) if packed else nullcontext() as before:
                write_atomically(path, lambda file: self._write(file, loose, packed, before))
        for folder in self._folders():
            shutil.rmtree(folder)

    def _packed(self) -> set[int]:
        path = self.out / ZIP
        if not path.is_file():
            return set()
        try:
            with zipfile.ZipFile(path) as archive:
                return {int(Path(name).stem[3:]) for name in archive.namelist() if "/" in name}
        except (zipfile.BadZipFile, ValueError) as error:
            raise LdmError(f"{path} is damaged: delete it and sample again") from error

    def _write(
        self,
        file: IO[bytes],
        loose: Mapping[int, Path],
        packed: Collection[int],
        before: zipfile.ZipFile | None,
    ) -> None:
        everything = sorted({*loose, *packed})
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for i in everything:
                name = image_name(i)
                png = before.read(name) if before and i in packed else loose[i].read_bytes()
                archive.writestr(zipfile.ZipInfo(name, MIDNIGHT), png)
            labels = [[image_name(i), self.label(i)] for i in everything] if self.label else []
            if labels and all(label >= 0 for _, label in labels):
                text = json.dumps({"labels": labels})
                archive.writestr(zipfile.ZipInfo("dataset.json", MIDNIGHT), text)


STORES: dict[Files, type[PngStore]] = {"png": PngStore, "shards": ShardStore, "zip": ZipStore}


def _index(tar: Path) -> dict[int, Member]:
    """Where each image is in a shard.

    Raises:
        LdmError: it is damaged.
    """
    try:
        return {int(Path(member.name).stem): member for member in index_shard(tar)}
    except (LdmError, ValueError) as error:
        raise LdmError(f"{tar} is damaged: delete it and sample again") from error


def _describe(tar: Path, file: Path, count: int) -> dict[str, Any]:
    """Write the sidecar of a shard of so many images that lies, or will lie, at `tar`."""
    with file.open("rb") as written:
        digest = file_digest(written, "sha256").hexdigest()
    report = {"name": tar.name, "count": count, "sha256": digest, "bytes": file.stat().st_size}
    write_json(sidecar(tar), report)
    return report


def _report(tar: Path) -> dict[str, Any]:
    """What a shard's sidecar says; it is written anew where it is lost, damaged or of another."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads(sidecar(tar).read_text("utf-8"))
        report = {key: told[key] for key in ("name", "count", "sha256", "bytes")}
        if (report["name"], report["bytes"]) == (tar.name, tar.stat().st_size):
            return report
    return _describe(tar, tar, len(_index(tar)))
