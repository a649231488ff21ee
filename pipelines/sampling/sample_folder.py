"""A folder of samples: its manifest and lock, and its images as PNGs, tar shards or one zip.

<out>/samples.json   the manifest: model, seed, settings, form, and how many images there will be
<out>/labels.json    the class of each image, where the model has classes
<out>/grid.png       the first images as one picture
<out>/…              the images, by the manifest's `files`:
  png      00000/img00000000.png …              a thousand per folder
  shards   train-00000.tar … manifest.json      a thousand per shard, as `ldm data prepare` writes
  zip      samples.zip                          the PNGs of all folders, uncompressed

Every image is first written as a PNG in its folder. A complete thousand is packed into a shard; a
zip is packed at the end. A folder is removed only once its images are packed, so a stop at any
moment loses no finished image and leaves no half-written file.
"""

import json
import re
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from hashlib import file_digest
from pathlib import Path
from typing import IO, Any, Literal

from PIL import Image

from ldm.config import to_tree
from ldm.data import Source
from ldm.data.shards import MANIFEST, MANIFEST_FORMAT, Member, ShardSource, index_shard, sidecar
from ldm.data.sources import FolderSource, ZipSource
from ldm.data.transforms import NOT_RESIZED
from ldm.errors import LdmError
from ldm.files import read_json, write_atomically, write_json
from ldm.run_folder import RUNS, lock, provenance
from pipelines.sampling.settings import Sampling

Files = Literal["png", "zip", "shards"]
SAMPLES, LABELS, ZIP = "samples.json", "labels.json", "samples.zip"
GRID, NEIGHBOURS = "grid.png", "neighbours.png"
"""Sheets that our commands write beside samples; they are not samples."""
THOUSAND = 1000
MIDNIGHT = (1980, 1, 1, 0, 0, 0)  # the date of a zip's members: the same images, the same bytes
ELSEWHERE = "give --out another folder"


def image_name(i: int) -> str:
    """The path of image i relative to the folder, and its name in a zip."""
    return f"{i // THOUSAND:05d}/img{i:08d}.png"


# ------------------------------------------------------------------------------ the manifest
def read_manifest(folder: Path, advice: str) -> dict[str, Any] | None:
    """Read a folder's `samples.json`, if there is one; `advice` ends the error of a damaged one."""
    path = folder / SAMPLES
    if not path.is_file():
        return None
    kinds = {"n": int, "model": dict, "weaker": dict | None, "data": dict, "files": str}
    manifest = read_json(path)
    if manifest is None or not all(
        isinstance(manifest[key], kind) for key, kind in kinds.items() if key in manifest
    ):
        raise LdmError(f"{path} is damaged: {advice}")
    return manifest


def open_for_writing(out: Path, settings: Mapping[str, Any], n: int, held: ExitStack) -> int:
    """Create or reopen a sample folder: take its lock, check its manifest, and write it.

    Files that a killed process left half-written are removed.

    Args:
        settings: the manifest's content, apart from the number of images.
        held: keeps the folder's lock.

    Returns:
        The number of images that the manifest announces, at least n.
    """
    try:
        visible = [p for p in out.iterdir() if not p.name.startswith(".")] if out.is_dir() else []
        if visible and out / SAMPLES not in visible:
            raise LdmError(f"{out} is not empty and holds no {SAMPLES}: {ELSEWHERE}")
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock(out))
        manifest = read_manifest(out, ELSEWHERE)
        if manifest is not None and (other := _changed(manifest, settings)):
            raise LdmError(
                f"{out} holds samples with other settings ({', '.join(other)}): {ELSEWHERE}"
            )
        for partial in [*out.glob(".*.partial"), *out.glob("*/.*.partial")]:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise LdmError(f"could not write to {out} ({error.strerror}): {ELSEWHERE}") from error
    announced = (manifest or {}).get("n", 0)
    if n > announced:
        write_json(out / SAMPLES, {"format": 1, "n": n} | dict(settings) | provenance())
    return max(n, announced)


def _changed(manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """The settings that decide an image and differ; paths and data do not."""
    # an older manifest lacks the settings that were at their defaults, and the models' identity
    defaults = {**to_tree(Sampling()), "weaker": None, "labels": None, "files": "png"}
    before = {**defaults, **manifest}
    shared = (*Sampling.model_fields, "seed", "labels", "files", "precision", "resolution")
    changed = [key for key in shared if before.get(key) != settings.get(key)]
    for key, name in (("model", "model"), ("weaker", "guide")):
        ours, theirs = settings[key] or {}, before.get(key) or {}
        same = all(theirs.get(k, ours.get(k)) == ours.get(k) for k in ("sha256", "identity"))
        if not same or bool(ours) != bool(theirs):
            changed.append(name)
    return changed


def write_labels(out: Path, labels: Sequence[int], names: Sequence[str]) -> None:
    """Write the class of each image, in order, and the names of the classes."""
    text = json.dumps({"classes": list(names), "labels": list(labels)}, ensure_ascii=False)
    write_atomically(out / LABELS, lambda file: file.write(text.encode()))


def newest_samples() -> Path:
    """Return the sample folder under `runs/` whose manifest was written last."""
    # as deep as those of a demo's run lie, and no deeper: among the images there is none
    manifests = [path for depth in range(1, 5) for path in RUNS.glob("*/" * depth + SAMPLES)]
    if not manifests:
        raise LdmError(f"no samples under {RUNS}/: give their folder, or run `ldm sample` first")
    return max(manifests, key=lambda path: path.stat().st_mtime).parent


# -------------------------------------------------------------------- the images, in each form
Pngs = dict[int, Callable[[], bytes]]
"""Images by number, each a function that reads its PNG."""


class PngStore:
    """Images as PNGs of their own; the other forms pack these into archives.

    Every process writes images; one of them calls the other methods.

    Args:
        label: the class of image i, −1 for none; None for a model without classes.
    """

    def __init__(self, out: Path, label: Callable[[int], int] | None = None) -> None:
        self.out, self.label = out, label

    def missing(self, n: int) -> list[int]:
        """Return the images among 0 … n−1 that are not there yet."""
        there = self._there()
        return [i for i in range(n) if i not in there]

    def begin(self) -> None:
        """Get ready for more images."""

    def write(self, i: int, picture: Image.Image) -> None:
        """Write image i as a PNG, whole or not at all."""
        write_atomically(self.out / image_name(i), lambda file: picture.save(file, format="png"))

    def tidy(self) -> None:
        """Pack what is complete while sampling continues."""

    def finish(self, size: int, source: str, classes: Sequence[str]) -> None:
        """Pack and describe the whole set of images of a size, once all are written."""

    def images(self) -> Source | None:
        """Return the images as a source, ordered by number; None if there are none."""
        numbered = re.compile(r"\d{5}/img\d{8}\.png")
        names = (png.relative_to(self.out).as_posix() for png in self.out.glob("*/*.png"))
        return PngSource(self.out, sorted(filter(numbered.fullmatch, names)))

    def _there(self) -> set[int]:
        return {i for folder in self._folders() for i in self._loose(folder)}

    def _folders(self) -> list[Path]:
        return sorted(self.out.glob("[0-9]" * 5))

    def _loose(self, folder: Path) -> dict[int, Path]:
        """The PNGs in a folder by their numbers."""
        found = folder.glob("img" + "[0-9]" * 8 + ".png")
        return {int(path.stem[3:]): path for path in found if path.is_file()}


class ArchiveStore(PngStore, ABC):
    """Images packed into archives."""

    @abstractmethod
    def _archives(self) -> list[Path]: ...

    @abstractmethod
    def _members(self, archive: Path) -> Pngs: ...

    @abstractmethod
    def _write(self, file: IO[bytes], archive: Path, pngs: Pngs) -> None: ...

    def _there(self) -> set[int]:
        packed = {i for archive in self._archives() for i in self._members(archive)}
        return super()._there() | packed

    def _pack(self, archive: Path, folders: Sequence[Path]) -> None:
        """Add the PNGs of some folders to an archive, then remove the folders."""
        packed = self._members(archive) if archive.is_file() else {}
        loose = {i: png for folder in folders for i, png in self._loose(folder).items()}
        if loose.keys() - packed.keys():
            pngs = {i: png.read_bytes for i, png in loose.items()} | packed
            write_atomically(archive, lambda file: self._write(file, archive, pngs))
        for folder in folders:
            shutil.rmtree(folder)


class PngSource(FolderSource):
    """The PNGs of a folder by their relative paths, without classes."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self._names, self.classes = path, list(names), ()


class ShardStore(ArchiveStore):
    """A thousand images per tar, in the format of `ldm data prepare`.

    The class of an image is stored beside it as webdataset's `.cls`; an image without one has none.
    """

    def begin(self) -> None:
        (self.out / MANIFEST).unlink(missing_ok=True)  # it lists shards that will grow

    def tidy(self) -> None:
        for folder in self._folders():
            tar = self._shard(folder)
            packed = self._members(tar) if tar.is_file() else {}
            if len(self._loose(folder).keys() | packed.keys()) >= THOUSAND:
                self._pack(tar, [folder])

    def finish(self, size: int, source: str, classes: Sequence[str]) -> None:
        for folder in self._folders():
            self._pack(self._shard(folder), [folder])
        shards = [self._read_note(tar) for tar in self._archives()]
        count = sum(shard["count"] for shard in shards)
        splits = {"train": {"count": count, "shards": shards}, "val": {"count": 0, "shards": []}}
        manifest = {
            "format": MANIFEST_FORMAT, "count": count, "size": size, "filter": NOT_RESIZED,
            "crop": "none", "source": source, "splits": splits, "skipped": [],
        }  # fmt: skip
        write_json(self.out / MANIFEST, manifest | ({"classes": list(classes)} if classes else {}))

    def images(self) -> Source | None:
        return ShardSource(self._archives()) if self._archives() else None

    def _shard(self, folder: Path) -> Path:
        return self.out / f"train-{folder.name}.tar"

    def _archives(self) -> list[Path]:
        return sorted(self.out.glob("train-?????.tar"))

    def _members(self, archive: Path) -> Pngs:
        def read(member: Member) -> bytes:
            with archive.open("rb") as file:
                file.seek(member.offset)
                return file.read(member.size)

        try:
            return {int(Path(m.name).stem): partial(read, m) for m in index_shard(archive)}
        except (LdmError, ValueError) as error:
            raise LdmError(f"{archive} is damaged: delete it and sample again") from error

    def _write(self, file: IO[bytes], archive: Path, pngs: Pngs) -> None:
        from webdataset import TarWriter

        with TarWriter(file, encoder=False, mtime=0) as writer:
            for i in sorted(pngs):
                label = -1 if self.label is None else self.label(i)
                labelled = {} if label < 0 else {"cls": b"%d" % label}
                writer.write({"__key__": f"{i:08d}", "png": pngs[i]()} | labelled)
        file.flush()
        # before the tar gets its name, so that every shard has a note; a stop between the two
        # leaves the folder, and the shard is packed again
        self._write_note(archive, Path(file.name), len(pngs))

    def _write_note(self, tar: Path, file: Path, count: int) -> dict[str, Any]:
        with file.open("rb") as written:
            digest = file_digest(written, "sha256").hexdigest()
        note = {"name": tar.name, "count": count, "sha256": digest, "bytes": file.stat().st_size}
        write_json(sidecar(tar), note)
        return note

    def _read_note(self, tar: Path) -> dict[str, Any]:
        """Read a shard's sidecar; rewrite one that is lost, damaged or of another shard."""
        with suppress(OSError, KeyError):
            content = read_json(sidecar(tar)) or {}
            note = {key: content[key] for key in ("name", "count", "sha256", "bytes")}
            if (note["name"], note["bytes"]) == (tar.name, tar.stat().st_size):
                return note
        return self._write_note(tar, tar, len(self._members(tar)))


class ZipStore(ArchiveStore):
    """All images in one archive, laid out as by EDM's dataset tool.

    If every image has a class, `dataset.json` lists them in EDM's format, which cannot express an
    image without one.
    """

    def finish(self, size: int, source: str, classes: Sequence[str]) -> None:
        self._pack(self.out / ZIP, self._folders())

    def images(self) -> Source | None:
        return ZipSource(self.out / ZIP) if self._archives() else None

    def _archives(self) -> list[Path]:
        return list(self.out.glob(ZIP))

    def _members(self, archive: Path) -> Pngs:
        try:
            pack = zipfile.ZipFile(archive)
            names = [name for name in pack.namelist() if "/" in name]
            return {int(Path(name).stem[3:]): partial(pack.read, name) for name in names}
        except (zipfile.BadZipFile, ValueError) as error:
            raise LdmError(f"{archive} is damaged: delete it and sample again") from error

    def _write(self, file: IO[bytes], archive: Path, pngs: Pngs) -> None:
        indices = sorted(pngs)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as pack:
            for i in indices:
                pack.writestr(zipfile.ZipInfo(image_name(i), MIDNIGHT), pngs[i]())
            labels = [self.label(i) for i in indices] if self.label else [-1]
            if min(labels) >= 0:
                named = [[image_name(i), label] for i, label in zip(indices, labels, strict=True)]
                text = json.dumps({"labels": named})
                pack.writestr(zipfile.ZipInfo("dataset.json", MIDNIGHT), text)


STORES: dict[str, type[PngStore]] = {"png": PngStore, "shards": ShardStore, "zip": ZipStore}
