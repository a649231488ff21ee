"""A folder of samples: its manifest and lock, and its images as PNGs, tar shards or one zip.

<out>/samples.json   the manifest: model, seed, settings, form, and how many images there will be
<out>/labels.json    the class of each image, where the model has classes
<out>/grid.png       the first images as one picture
<out>/…              the images, by the manifest's `files`:
  png      00000/img00000000.png …              a thousand per folder
  shards   train-00000.tar … manifest.json      a thousand per shard, as `ldm data prepare` writes
  zip      samples.zip                          the PNGs of all folders, uncompressed

Pixels that no PNG can hold (`file_suffix`) are written as .npy in place of PNGs.

Every image is first written as a PNG in its folder. A complete thousand is packed into a shard; a
zip is packed at the end. A folder is removed only once its images are packed, so a stop at any
moment loses no finished image and leaves no half-written file.
"""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from ldm.config import Resolution, height_width, plain_size, read_resolution, to_tree, validate
from ldm.data import Batch, DataConfig, Source, evaluation_batches
from ldm.data.dataset import find_kind, open_images
from ldm.data.shards import (
    MANIFEST,
    MANIFEST_FORMAT,
    SIDECAR_SCHEMA,
    ShardSource,
    common_folder,
    sidecar,
    write_shard,
)
from ldm.data.sources import FolderSource, ZipSource, name_size
from ldm.data.transforms import NOT_RESIZED, CorruptImage, is_hidden
from ldm.errors import LdmError, UsageError, try_call
from ldm.files import ANOTHER, clear_partials, lock, write_atomically, write_json
from ldm.images import Pixels, PixelType, file_suffix, write_pixels
from ldm.records import Count, read_tree, schema
from ldm.run_folder import RUNS, provenance
from pipelines.sampling.model import ModelSamples
from pipelines.sampling.settings import Sampling

Files = Literal["png", "shards", "zip"]
SAMPLES, LABELS, ZIP = "samples.json", "labels.json", "samples.zip"
LOSSY = {".jpg", ".jpeg", ".webp", ".avif", ".gif"}
ARCHIVES = {".zip", ".tar"}
GRID, NEIGHBOURS = "grid.png", "neighbours.png"
"""Sheets that our commands write beside samples; they are not samples."""
THOUSAND = 1000
MIDNIGHT = (1980, 1, 1, 0, 0, 0)  # the date of a zip's members: the same images, the same bytes


def image_name(i: int, suffix: str = ".png") -> str:
    """The path of image i relative to the folder, and its name in a zip."""
    return f"{i // THOUSAND:05d}/img{i:08d}{suffix}"


# ------------------------------------------------------------------------------ the manifest
_MODEL = schema(path=(str, ""))
_MANIFEST = schema(  # older ones lack some keys
    n=(Count, 0), model=(_MODEL, {}), weaker=(_MODEL | None, None), data=(dict[str, Any], {}),
    files=(Files, "png"), image_channels=(Count, 3), pixels=(Pixels, Pixels()),
)  # fmt: skip


_LABELS = schema(labels=list[int])
AGAIN = "delete it, or sample again"


def read_manifest(folder: Path, advice: str) -> dict[str, Any] | None:
    """Read a folder's `samples.json`, if there is one; `advice` ends the error of a damaged one."""
    return read_tree(folder / SAMPLES, _MANIFEST, advice)


def open_for_writing(out: Path, settings: Mapping[str, Any], held: ExitStack) -> int:
    """Create or reopen a sample folder: take its lock, check its manifest, and write it.

    Files that a killed process left half-written are removed. `held` keeps the lock.

    Returns:
        The number of images that the manifest announces, at least `settings["n"]`.
    """
    try:
        visible = [p for p in out.iterdir() if not p.name.startswith(".")] if out.is_dir() else []
        if visible and out / SAMPLES not in visible:
            raise LdmError(f"{out} is not empty and holds no {SAMPLES}: {ANOTHER}")
        held.enter_context(lock(out))
        manifest = read_manifest(out, ANOTHER)
        if manifest is not None and (other := _changed(manifest, settings)):
            raise LdmError(
                f"{out} holds samples with other settings ({', '.join(other)}): {ANOTHER}"
            )
        clear_partials(out.glob("[0-9]*"))
    except OSError as error:
        raise LdmError(f"could not write to {out} ({error.strerror}): {ANOTHER}") from error
    announced = (manifest or {}).get("n", 0)
    if settings["n"] > announced:
        write_json(out / SAMPLES, {"format": 1, **settings, **provenance()})
    return max(settings["n"], announced)


def _changed(manifest: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """The settings that decide an image and differ; paths and data do not."""
    # an older manifest lacks the settings that were at their defaults, and the models' identity
    defaults = {**to_tree(Sampling()), "weaker": None, "labels": None, "files": "png"}
    defaults["schedule"] = "karras"
    before = {**defaults, **manifest}
    shared = (*Sampling.model_fields, "seed", "labels", "files", "precision", "resolution")
    changed = [key for key in shared if before.get(key) != settings.get(key)]
    for key, name in (("model", "model"), ("weaker", "guide")):
        ours, theirs = settings[key] or {}, before.get(key) or {}
        if not is_same_model(theirs, ours) or bool(ours) != bool(theirs):
            changed.append(name)
    return changed


def is_same_model(named: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Compare the model that a manifest names with another; older manifests name less of it."""
    return all(named.get(key, ours.get(key)) == ours.get(key) for key in ("sha256", "identity"))


def newest_samples() -> Path:
    """Return the sample folder under `runs/` whose manifest was written last."""
    # as deep as those of a demo's run lie, and no deeper: among the images there is none
    manifests = [path for depth in range(1, 5) for path in RUNS.glob("*/" * depth + SAMPLES)]
    if not manifests:
        raise LdmError(f"no samples under {RUNS}/: give their folder, or run `ldm sample` first")
    return max(manifests, key=lambda path: path.stat().st_mtime).parent


# ------------------------------------------------------------------------------ the images
Packed = dict[int, Callable[[], bytes]]
"""Images of an archive by number, each a function that reads its PNG."""


class SampleStore:
    """The images of a sample folder, as PNGs of their own or packed into archives.

    Every process writes images; one of them calls the other methods.

    Args:
        label: image i → its class, −1 for none.
        suffix: of an image's file.
    """

    def __init__(
        self,
        out: Path,
        files: str = "png",
        label: Callable[[int], int] = lambda i: -1,
        suffix: str = ".png",
    ) -> None:
        self.out, self.files, self.label, self.suffix = out, files, label, suffix

    def missing(self, n: int) -> list[int]:
        """Return the images among 0 … n−1 that are not there yet."""
        there = {i for folder in self._folders() for i in self._loose(folder)}
        there.update(*map(self._packed, self._archives()))
        return [i for i in range(n) if i not in there]

    def begin(self) -> None:
        """Get ready for more images."""
        if self.files == "shards":
            (self.out / MANIFEST).unlink(missing_ok=True)  # it lists shards that will grow

    def write(self, i: int, pixels: ArrayLike) -> None:
        """Write the pixels (H, W, C) of image i as a file, whole or not at all."""
        path = self.out / image_name(i, self.suffix)
        # level 1: 2.5 times as many 256² images a second as with 6, the default, and 9 % larger
        write = partial(write_pixels, np.asarray(pixels), compress_level=1)
        write_atomically(path, write)

    def tidy(self) -> None:
        """Pack the shards that are complete while sampling continues."""
        for folder in self._folders() if self.files == "shards" else ():
            tar = self._archive(folder)
            if len(self._loose(folder).keys() | self._packed(tar).keys()) >= THOUSAND:
                self._pack(tar, [folder])

    def finish(
        self, size: Resolution, source: str, classes: Sequence[str],
        channels: int = 3, kind: PixelType = "uint8",
    ) -> None:  # fmt: skip
        """Pack and describe the whole set of images of a size, once all are written.

        Args:
            channels, kind: of the images, and the type of their pixels.
        """
        if self.files == "png":
            return
        parts: dict[Path, list[Path]] = {archive: [] for archive in self._archives()}
        parts |= {path: list(group) for path, group in groupby(self._folders(), self._archive)}
        for archive, folders in parts.items():
            self._pack(archive, folders)
        if self.files == "zip":
            return
        shards = [read_tree(sidecar(tar), SIDECAR_SCHEMA) or {} for tar in self._archives()]
        count = sum(shard["count"] for shard in shards)
        splits = {"train": {"count": count, "shards": shards}, "val": {"count": 0, "shards": []}}
        manifest = {
            "format": MANIFEST_FORMAT, "count": count, "size": plain_size(size),
            "filter": NOT_RESIZED, "crop": "none", "source": source, "splits": splits,
            "skipped": [],
            **({} if channels == 3 else {"channels": channels}),
            **({} if kind == "uint8" else {"dtype": kind}),
        }  # fmt: skip
        write_json(self.out / MANIFEST, manifest | ({"classes": list(classes)} if classes else {}))

    def images(self) -> Source:
        """Return the images as a source, ordered by number."""
        if archives := self._archives():
            return _open_archives(archives)
        folders = [] if self.files in ("zip", "shards") else self._folders()
        loose = sorted(png for folder in folders for png in self._loose(folder).values())
        return PngSource(self.out, [png.relative_to(self.out).as_posix() for png in loose])

    def _folders(self) -> list[Path]:
        return sorted(self.out.glob("[0-9]" * 5))

    def _loose(self, folder: Path) -> dict[int, Path]:
        """The images in a folder by their numbers."""
        found = folder.glob("img" + "[0-9]" * 8 + self.suffix)
        return {_number(path.name): path for path in found if path.is_file()}

    def _archive(self, folder: Path) -> Path:
        """The archive that takes the PNGs of a folder."""
        return self.out / (ZIP if self.files == "zip" else f"train-{folder.name}.tar")

    def _archives(self) -> list[Path]:
        patterns = {"zip": ZIP, "shards": "train-?????.tar"}
        return sorted(self.out.glob(patterns[self.files])) if self.files in patterns else []

    def _packed(self, archive: Path) -> Packed:
        if not archive.is_file():
            return {}
        try:
            images = _open_archives([archive])
            return {_number(images.name(k)): partial(images.read, k) for k in range(len(images))}
        except (LdmError, ValueError) as error:
            raise LdmError(f"{archive} is damaged: delete it and sample again") from error

    def _pack(self, archive: Path, folders: Sequence[Path]) -> None:
        """Add the PNGs of some folders to an archive, then remove the folders.

        A shard whose sidecar is lost, damaged or of another shard is written again.
        """
        packed = self._packed(archive)
        loose = {i: png.read_bytes for folder in folders for i, png in self._loose(folder).items()}
        images = dict(sorted((loose | packed).items()))
        has_grown = len(images) > len(packed)
        try:
            if self.files == "zip" and has_grown:
                write_atomically(archive, partial(_write_zip, images, self.label, self.suffix))
            if self.files == "shards" and (has_grown or (packed and not _is_described(archive))):
                write_shard(archive, ((i, read(), self.label(i)) for i, read in images.items()), {})
        except CorruptImage as error:  # of an image packed before
            raise LdmError(f"{archive} is damaged: delete it and sample again") from error
        for folder in folders:
            shutil.rmtree(folder)


class PngSource(FolderSource):
    """The PNGs of a folder by their relative paths, without classes."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self._names = path, list(names)


def _number(name: str) -> int:
    return int(Path(name).stem.removeprefix("img"))


def _open_archives(archives: Sequence[Path]) -> ZipSource | ShardSource:
    if archives[0].suffix == ".zip":
        return ZipSource(archives[0])
    return ShardSource(*common_folder(archives))


def _write_zip(images: Packed, label: Callable[[int], int], suffix: str, file: IO[bytes]) -> None:
    """Write a zip laid out as by EDM's dataset tool.

    If every image has a class, `dataset.json` lists them in EDM's format, which cannot express an
    image without one.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as pack:
        for i, read in images.items():
            pack.writestr(zipfile.ZipInfo(image_name(i, suffix), MIDNIGHT), read())
        labels = [(image_name(i, suffix), label(i)) for i in images]
        if all(number >= 0 for _, number in labels):
            text = json.dumps({"labels": labels})
            pack.writestr(zipfile.ZipInfo("dataset.json", MIDNIGHT), text)


def _is_described(tar: Path) -> bool:
    """Test for a sidecar that is whole and of this shard."""
    note = try_call(read_tree, sidecar(tar), SIDECAR_SCHEMA)
    about = (tar.name, tar.stat().st_size)
    return isinstance(note, dict) and (note["name"], note["bytes"]) == about


# ------------------------------------------------------------------------------ reading
class SampleFolder(Source):
    """Samples on disk as a source: lossless, of one size.

    With a `samples.json`, only its own images count: numbered PNGs, shards or a zip. Without one,
    every image in the shards, or every PNG at any depth except our own sheets.

    Args:
        limit: use only the first `limit` images, by name.
        least: the number of images required; a covariance needs two.
        archives: also accept a .zip, a .tar, or several tars as a/{000..009}.tar.

    Attributes:
        made_with: the content of `samples.json`; None without one.
    """

    def __init__(
        self, path: Path, limit: int | None = None, least: int = 2, archives: bool = False
    ) -> None:
        # the archive of a sample folder stands for it
        if archives and path.name == ZIP and (path.parent / SAMPLES).is_file():
            path = path.parent
        is_archive = path.suffix.lower() in ARCHIVES and (path.is_file() or "{" in str(path))
        if not path.is_dir() and not (archives and is_archive):
            raise LdmError(f"no folder of samples at {path}: make one with `ldm sample`")
        self.path = path
        self.made_with = read_manifest(path, "delete it to measure the folder without it")
        self._images = _open(path, self.made_with)
        about = self.made_with or {}
        self.channels = self._images.channels = about.get("image_channels", self._images.channels)
        self.range = (about.get("pixels") or {}).get("range")
        self._images.keep = "float32" if self.range else "uint16"
        there, announced = len(self._images), (self.made_with or {}).get("n", 0)
        if there < min(announced, limit or announced):
            raise LdmError(
                f"{path} holds {there} of its {announced} samples: run the same `ldm sample` "
                "again to resume"
            )
        self._count = min(there, limit or there)
        if self._count < least:
            raise LdmError(
                f"{path} holds {self._count} PNG image(s), at least {least} are needed: sample "
                "more with `ldm sample --n`"
            )
        self.resolution = read_resolution(self._load(0).shape[:2])
        self.what = f"{self._count} images of {path}"
        table = read_tree(path / LABELS, _LABELS, AGAIN) if self.made_with else None
        if table is not None and len(table["labels"]) >= self._count:
            self._labels = np.array(table["labels"][: self._count])

    @property
    def result_path(self) -> Path:
        """The file for a measurement of the samples: in the folder, or beside the archive."""
        if self.path.is_dir():
            return self.path / "fid.json"
        return self.path.with_name(f"{self.path.name}.fid.json")

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """Yield every image once over all processes; `k` is its position in name order."""
        return evaluation_batches(
            self, self.resolution, batch_size, rank=rank, world=world, workers=workers
        )

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return self._images.name(index)

    def load(self, index: int) -> np.ndarray:
        """Load an image as pixels (H, W, C), of the size of the first."""
        image = self._load(index)
        wanted = height_width(self.resolution)
        if image.shape[:2] != wanted:
            here, there = (name_size(h, w, self.resolution) for h, w in (image.shape[:2], wanted))
            raise LdmError(
                f"{self.name(index)} is {here} but {self.name(0)} is {there}: samples must all "
                "have one size"
            )
        return image

    def _load(self, index: int) -> np.ndarray:
        try:
            return self._images.load(index)
        except CorruptImage as error:
            raise LdmError(
                f"{self.name(index)} is damaged ({error}): delete {self._images.file(index)} and "
                "sample again"
            ) from error


def _open(path: Path, manifest: dict[str, Any] | None) -> Source:
    """The images in the form in which they are stored."""
    if manifest is not None:
        kind = (manifest.get("pixels") or {}).get("type", "uint8")
        suffix = file_suffix(kind, manifest.get("image_channels", 3))
        return SampleStore(path, manifest.get("files", "png"), suffix=suffix).images()
    if find_kind(path) != "images":
        images = open_images(path)
        _refuse_lossy(path, map(images.name, range(len(images))))
        return images
    files = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    files = [file for file in files if not is_hidden(file.as_posix())]  # such as macOS's copies
    _refuse_lossy(path, map(str, files))
    inner = [str(path / file.parent) for file in files if file.name == SAMPLES]
    if inner:
        raise LdmError(f"{path} holds folders of samples, give one of them: {', '.join(inner)}")
    pngs = [file for file in files if file.suffix.lower() == ".png"]
    return PngSource(path, [png.as_posix() for png in pngs if png.name not in (GRID, NEIGHBOURS)])


def is_lossy(name: str) -> bool:
    """Test a file name for the suffix of a lossy image format."""
    return Path(name).suffix.lower() in LOSSY


def _refuse_lossy(path: Path, names: Iterable[str]) -> None:
    lossy = next(filter(is_lossy, names), None)
    if lossy:
        raise LdmError(
            f"{path} holds compressed images ({lossy.removeprefix(f'{path}/')}): compression "
            "changes every number; write samples as PNG"
        )


Samples = SampleFolder | ModelSamples


def trained_on(samples: Samples) -> DataConfig | None:
    """Return the training data of the samples' model, if they name it."""
    data = (samples.made_with or {}).get("data")
    try:
        return None if data is None else validate(DataConfig, data)
    except UsageError as error:  # of another version, or damaged
        raise UsageError(f"the data of {samples.what}: {error}") from error
