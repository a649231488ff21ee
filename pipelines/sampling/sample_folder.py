"""Where samples are put, and what is there already: as PNGs, in shards, or in one zip.

png      <out>/00000/img00000000.png …        a thousand a folder
shards   <out>/train-00000.tar … manifest.json    a thousand a shard, as `ldm data prepare` writes
zip      <out>/samples.zip                    the PNGs of all folders, stored

Every image is a PNG in its folder first. A thousand that is complete becomes a shard, at the end
all of them become the zip, and only then do their folders go: a stop at any moment loses no image
that was written, and leaves no half file.

Samples on disk, read back: as `ldm sample` wrote them in any form, or those of others.

Whose a folder of samples is: one model's and one setting's, and one process's at a time.
"""

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from hashlib import file_digest
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from PIL import Image

from ldm.config import to_tree, validate
from ldm.data import Batch, Source, evaluation_batches
from ldm.data.dataset import open_images
from ldm.data.shards import MANIFEST, MANIFEST_FORMAT, Member, ShardSource, index_shard, sidecar
from ldm.data.sources import ZipSource
from ldm.data.transforms import NOT_RESIZED, CorruptImage, decode
from ldm.errors import LdmError
from ldm.files import write_atomically, write_json
from ldm.run_folder import RUNS, lock, provenance
from pipelines.sampling.settings import Sampling, told_apart

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


MARK = "samples.json"
GRID, NEIGHBOURS = "grid.png", "neighbours.png"
"""Sheets of pictures that our commands write beside samples, and are none."""
NUMBERED = re.compile(r"\d{5}/img\d{8}\.png")
LOSSY = {".jpg", ".jpeg", ".webp"}
ARCHIVES = {".zip", ".tar"}
KINDS = {"n": int, "model": dict, "weaker": dict | None, "data": dict, "files": str}
"""What is read of a `samples.json`, and of which kind it is."""


class SampleFolder:
    """The images of a folder as a data source: square, of one size, lossless.

    Where there is a `samples.json`, only the images it speaks of count, numbered PNGs, shards or a
    zip; elsewhere all that shards hold, or every PNG, however deep, but for sheets named as those
    that we write.

    Args:
        limit: only the first so many images, by name.
        least: how many there must be; a covariance needs two.
        archives: take a .zip, a .tar, or several as a/{000..009}.tar, too.

    Attributes:
        path: the folder or file; of a `samples.zip` that `ldm sample` wrote, its folder.
        made_with: what `samples.json` says of model, seed and sampler; None without one.
        resolution: edge of the images, pixels.

    Raises:
        LdmError: no such folder, too few images, sampling was not finished, compressed images,
            images that are not square, several folders of samples in one, or a damaged archive.
    """

    def __init__(
        self, path: Path, limit: int | None = None, least: int = 2, archives: bool = False
    ) -> None:
        if archives and path.name == ZIP and (path.parent / MARK).is_file():
            path = path.parent
        if not path.is_dir() and not (archives and _is_archive(path)):
            raise LdmError(f"no folder of samples at {path}: make one with `ldm sample`")
        self.path = path
        self.made_with = read_mark(path, "delete it to measure the folder without it")
        self._images = _open(path, self.made_with)
        there = len(self._images) if self._images else 0
        announced = (self.made_with or {}).get("n", 0)
        if there < min(announced, limit or announced):
            raise LdmError(
                f"{path} holds {there} of its {announced} samples: run the `ldm sample` that "
                "began it again, it goes on where it stopped"
            )
        self._count = there if limit is None else min(there, limit)
        if self._count < least:
            needed = "a covariance needs two or more" if least == 2 else f"{least} are needed"
            raise LdmError(
                f"{path} gives {self._count} PNG image(s) to measure, and {needed}: sample more "
                "with `ldm sample --n`"
            )
        height, width = self._load(0).shape[:2]
        if height != width:
            raise LdmError(f"{self.name(0)} is {width}×{height}: samples must be square")
        self.resolution = height

    @property
    def what(self) -> str:
        """What the images are, in words."""
        return f"{len(self)} images of {self.path}"

    @property
    def result_path(self) -> Path:
        """Where a measurement of the samples is written: in the folder, or beside the archive."""
        if self.path.is_dir():
            return self.path / "fid.json"
        return self.path.with_name(f"{self.path.name}.fid.json")

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """Every image once over all processes, `k` its place in the order of names.

        Raises:
            LdmError: (while iterating) an image is damaged, or of another size than the first.
        """
        return evaluation_batches(
            self, self.resolution, batch_size, rank=rank, world=world, workers=workers
        )

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return self._images.name(index)

    def load(self, index: int) -> np.ndarray:
        """An image as RGB uint8 (R, R, 3).

        Raises:
            LdmError: it is damaged, or of another size than the first.
        """
        image = self._load(index)
        height, width = image.shape[:2]
        if (height, width) != (self.resolution, self.resolution):
            raise LdmError(
                f"{self.name(index)} is {width}×{height} and {self.name(0)} "
                f"{self.resolution}×{self.resolution}: samples of several sizes do not mix"
            )
        return image

    def _load(self, index: int) -> np.ndarray:
        try:
            return self._images.load(index)
        except CorruptImage as error:
            name = Path(self.name(index))  # of a file, or of what lies in one
            file = next((path for path in (name, *name.parents) if path.is_file()), name)
            raise LdmError(
                f"{name} is damaged ({error}): delete {file} and sample again"
            ) from error


class _Pngs:
    """The PNGs of a folder, by their relative paths."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self.path, self._names = path, names

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self.path}/{self._names[index]}"

    def load(self, index: int) -> np.ndarray:
        try:
            return decode((self.path / self._names[index]).read_bytes(), ".png")
        except OSError as error:
            raise CorruptImage(error.strerror or str(error)) from error


def is_lossy(name: str) -> bool:
    """Whether the image of a name is compressed with loss, as far as its ending tells."""
    return Path(name).suffix.lower() in LOSSY


def newest_samples() -> Path:
    """The folder under `runs/` in which sampling began last, where a command's path was left out.

    Raises:
        LdmError: there is none.
    """
    # as deep as those of a demo's run lie, and no deeper: among the images there is none
    marks = [mark for depth in range(1, 5) for mark in RUNS.glob("*/" * depth + MARK)]
    if not marks:
        raise LdmError(f"no samples under {RUNS}/: give their folder, or `ldm sample` first")
    return max(marks, key=lambda mark: mark.stat().st_mtime).parent


def read_mark(folder: Path, advice: str) -> dict[str, Any] | None:
    """What a folder's `samples.json` says, its parts of the kinds that they should be; None where
    there is none.

    Raises:
        LdmError: it cannot be read, or is damaged; `advice` is what to do then.
    """
    mark = folder / MARK
    if not mark.is_file():
        return None
    try:
        told = json.loads(mark.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LdmError(f"{mark} is damaged: {advice}") from error
    if not isinstance(told, dict) or not all(
        isinstance(told[key], kind) for key, kind in KINDS.items() if key in told
    ):
        raise LdmError(f"{mark} is damaged: {advice}")
    return told


def _open(path: Path, made_with: dict[str, Any] | None) -> Source | None:
    """The images in the form in which they are kept; None where there are none yet."""
    if made_with is None and (path.suffix in ARCHIVES or any(path.glob("*.tar"))):
        images = open_images(path)
        _refuse_lossy(path, map(images.name, range(len(images))))
        return images
    files = (made_with or {}).get("files", "png")
    if files == "zip":
        return ZipSource(path / ZIP) if (path / ZIP).is_file() else None
    if files == "shards":
        shards = sorted(path.glob(SHARDS))
        return ShardSource(shards) if shards else None
    return _Pngs(path, _list_images(path, numbered=made_with is not None))


def _list_images(path: Path, numbered: bool) -> list[str]:
    """Relative paths of the images, sorted."""
    files = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    _refuse_lossy(path, map(str, files))
    if numbered:
        return [file.as_posix() for file in files if NUMBERED.fullmatch(file.as_posix())]
    inner = [str(path / file.parent) for file in files if file.name == MARK]
    if inner:
        raise LdmError(f"{path} holds folders of samples, give one of them: {', '.join(inner)}")
    sheets = (GRID, NEIGHBOURS)
    return [f.as_posix() for f in files if f.suffix.lower() == ".png" and f.name not in sheets]


def _is_archive(path: Path) -> bool:
    return path.suffix in ARCHIVES and (path.is_file() or "{" in str(path))


def _refuse_lossy(path: Path, names: Iterable[str]) -> None:
    lossy = next(filter(is_lossy, names), None)
    if lossy:
        raise LdmError(
            f"{path} holds compressed images ({lossy.removeprefix(f'{path}/')}): compression "
            "changes every number; write samples as PNG"
        )


ELSEWHERE = "give --out another folder"


def default_folder(model: Path, settings: Mapping[str, Any]) -> Path:
    """`samples/seed0-steps18` beside a model, and what else tells these samples from others.

    Args:
        settings: what `samples.json` is going to say.
    """
    how = {name: settings[name] for name in Sampling.model_fields}
    words = [f"seed{settings['seed']}", told_apart(validate(Sampling, how))]
    if settings["weaker"]:
        words.append(f"weaker{settings['weaker']['sha256'][:8]}")
    if settings["labels"] is not None:
        shown = [str(label) for label in settings["labels"]]
        words.append("class" + "_".join([*shown[:8], *(["and_more"] if len(shown) > 8 else [])]))
    if settings["files"] != "png":
        words.append(settings["files"])
    if model.is_dir():
        return model / "samples" / "-".join(words)
    if which := model.stem.removeprefix("ckpt").strip("-"):  # ckpt-ema0.05.pt lies beside ckpt.pt
        words.append(which)
    return model.parent / "samples" / "-".join(words)


def claim_folder(out: Path, settings: Mapping[str, Any], n: int, held: ExitStack) -> int:
    """Make a folder these settings' own, and clear what a kill left half-written in it.

    Args:
        settings: what `samples.json` says of the samples, besides their number.
        n: how many there are to be.
        held: is given the folder's lock to hold.

    Returns:
        How many samples the folder says it is going to hold, n or more.

    Raises:
        LdmError: it holds something else, or samples of another model or setting; another process
            is at work in it; or it cannot be made or written.
    """
    try:
        if not (out / MARK).is_file() and out.is_dir() and any(map(_shows, out.iterdir())):
            raise LdmError(f"{out} is not empty and holds no {MARK}: {ELSEWHERE}")
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock(out))
        found = read_mark(out, ELSEWHERE)
        if found is not None:
            _refuse_other(out, found, settings)
        for half in [*out.glob(".*.partial"), *out.glob("*/.*.partial")]:
            half.unlink(missing_ok=True)
    except OSError as error:
        raise LdmError(f"could not write to {out} ({error.strerror}): {ELSEWHERE}") from error
    if n > (announced := (found or {}).get("n", 0)):
        write_json(out / MARK, {"format": 1, "n": n} | dict(settings) | provenance())
    return max(n, announced)


def write_labels(path: Path, labels: Sequence[int], names: Sequence[str]) -> None:
    """Write the class of each image, in order, and what the classes are called."""
    text = json.dumps({"classes": list(names), "labels": list(labels)}, ensure_ascii=False)
    write_atomically(path, lambda file: file.write(text.encode()))


def _shows(path: Path) -> bool:
    return not path.name.startswith(".")


def _refuse_other(out: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a folder whose samples were made with something else, which is named."""
    before, now = _identity(_completed(found, settings)), _identity(settings)
    if other := [key for key in now if before.get(key) != now[key]]:
        raise LdmError(f"{out} holds samples made with another {', '.join(other)}: {ELSEWHERE}")


def _completed(found: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A `samples.json` with what an older version did not write down: of settings, the defaults; of
    models, as much as is known now."""
    usual = to_tree(Sampling()) | {"weaker": None, "labels": None, "files": "png"}
    models = {
        key: (settings[key] or {}) | found[key] for key in ("model", "weaker") if found.get(key)
    }
    return usual | dict(found) | models


def _identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What two images must share to lie in one folder: paths aside, and what data there was."""
    shared = (*Sampling.model_fields, "seed", "labels", "files", "precision", "resolution")
    models = {
        key: [(settings.get(key) or {}).get(name) for name in ("sha256", "identity")]
        for key in ("model", "weaker")
    }
    return {key: settings.get(key) for key in shared} | models
