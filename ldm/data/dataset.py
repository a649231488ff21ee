"""Data sets by their configuration: opening one, and recognising its files."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from accelerate import Accelerator, PartialState
from pydantic import Field

from ldm.config import Config, Resolution, format_size, height_width, read_resolution, size_word
from ldm.data.hf import find_tables, is_hub, is_saved, open_hub, open_tables
from ldm.data.photos import PhotoSource
from ldm.data.shards import (
    SIDECAR,
    find_compression,
    find_shards,
    open_shards,
    read_manifest,
)
from ldm.data.sources import (
    UTF8,
    FolderSource,
    LeftOut,
    Part,
    Small,
    Source,
    Split,
    ZipSource,
    take_split,
    tell,
    walk,
)
from ldm.data.transforms import covers, is_image
from ldm.distributed import from_main
from ldm.errors import LdmError, UsageError, check_at_least, listed
from ldm.files import sha256_of, write_json
from ldm.logbook import show_progress
from ldm.records import read_tree, schema

PHOTOS = "photos"
HASHED_AT_ONCE = 8  # files; one at a time is limited by the processor


class DataConfig(Config):
    """Images, and their preprocessing for training."""

    source: str = PHOTOS
    """photos (built in; their right thirds are held out), or a path: a folder of images, a .zip, a
    folder of .tar shards, one .tar, or several as a/{000..009}.tar, a folder of .parquet; or a data
    set of the Hugging Face Hub, hf:OWNER/NAME[@REVISION][:[CONFIG/]SPLIT] (see `ldm.data.hf`)."""
    crop: Literal["center", "random"] = "center"
    """center: the central square, or the largest part of an H×W resolution's proportions, downsized
    to it; random: a window of the resolution at native size. The built-in photographs are always
    cropped at random for training."""
    flip: bool = False
    """Mirror each training image with probability 1/2."""
    small: Small = "error"
    """Images with a side below the resolution: error stops and counts them; skip takes the next
    image instead; enlarge resizes them (Lanczos), as ADM does with ImageNet's."""
    labels: bool = False
    """Read class labels: of `label_file`, EDM's dataset.json, `.cls` or `.json` members of shards,
    a table's column, or the top-level folder of an image. Folders that hold every image are
    skipped: x/cat/1.png and x/dog/2.png are of cat and dog."""
    held_out: Annotated[int, Field(ge=0)] | None = None
    """Images held out for validation, the last by name; with labels every n-th by name, so that
    every class is represented. Default: those that the data set itself holds out (its manifest,
    its folder val, a table's split for validation), else 10,000 of FFHQ's 70,000, 5,000 of
    CelebA-HQ's 30,000, else one in twenty, up to 10,000. Fewer than the data set's own are the last
    of these, and the others are not trained on."""
    label_file: str = ""
    """CSV file with the class of each image, by its path or its file's name; for labels=true."""
    image_column: str = ""
    """Column of images in a table; by default the only one."""
    label_column: str = ""
    """Column of classes in a table; by default the only one."""
    changed: Literal["error", "ok"] = "error"
    """ok: resume a run although the list of images has changed since it began."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 4
    """Loader processes per GPU; 0 loads in the training process, as the photographs always do."""


def open_source(config: DataConfig, split: Split, resolution: Resolution) -> Source:
    """Open one split of a data set: "train", "val", or "all".

    `resolution` is the size of the images that will be cut, in pixels; 1 if it is not known yet.
    The tiles of the built-in photographs depend on it.
    """
    check_at_least(1, resolution=resolution)
    if config.source == PHOTOS:
        if config.held_out is not None:
            raise UsageError(
                "data.held_out is for folders and archives: the built-in photographs hold out "
                "their right thirds; omit it"
            )
        for key in ("label_file", "image_column", "label_column"):
            if getattr(config, key):
                raise UsageError(f"data.{key} does not apply to the built-in photographs: omit it")
        return PhotoSource(split, resolution, config.labels)
    path = Path(config.source).expanduser()
    if not is_hub(config.source) and not path.exists() and "{" not in config.source:
        wanted = 256 if resolution == 1 else resolution
        raise LdmError(
            f"data.source: {config.source} does not exist: create it with "
            f"`ldm data prepare SRC {path} --size {size_word(wanted)}`, "
            f"or use the built-in photographs, data.source={PHOTOS}"
        )
    images = open_images(
        config.source, config.labels, config.label_file, config.image_column, config.label_column
    )
    images.small = config.small
    manifest = read_manifest(path) if path.is_dir() else None
    size = read_resolution((manifest or {}).get("size", resolution))
    if not covers(*height_width(size), resolution) and config.small == "error":
        raise LdmError(
            f"{path} was prepared at {format_size(size)}, smaller than the "
            f"{format_size(resolution)} requested: prepare it with --size {size_word(resolution)}, "
            "or lower the resolution"
        )
    held_out = images.held_out if config.held_out is None else config.held_out
    if split != "all" and held_out and images.held_out and held_out < images.held_out:
        # fewer of those that the data set holds out, of which none may be trained on
        train, last = len(images) - images.held_out, len(images) - held_out
        images = Part(images, np.r_[0:train, last : len(images)])
        return take_split(images, split, held_out)
    evenly = config.labels and (images.held_out is None or held_out != images.held_out)
    return take_split(images, split, held_out, evenly)


def holds_out(config: DataConfig) -> bool:
    """True if images are held out for validation, so that `open_source` can open "val"."""
    if config.source == PHOTOS or config.held_out is not None:
        return config.held_out != 0
    if is_hub(config.source):
        return True
    manifest = read_manifest(Path(config.source).expanduser())
    return manifest is None or manifest["splits"]["val"]["count"] > 0


def open_images(
    source: str | Path,
    labels: bool = False,
    label_file: str = "",
    image_column: str = "",
    label_column: str = "",
) -> Source:
    """Open all images of a `DataConfig.source`: a folder, a .zip, .tar shards, or a table.

    The other arguments are as in `DataConfig`.
    """
    columns = image_column, label_column
    if label_file and not labels:
        raise UsageError("data.label_file: classes are read with data.labels=true: set it too")
    if is_hub(str(source)):
        _refuse_label_file(source, label_file)
        return open_hub(str(source), labels, *columns)
    path = Path(source).expanduser()
    kind = find_kind(path)
    if kind == "tables":
        _refuse_label_file(source, label_file)
        return open_tables(path, labels, *columns)
    if any(columns):
        raise UsageError(f"{path} is no table: omit data.image_column and data.label_column")
    if kind == "images":
        return FolderSource(path, labels, label_file)
    if kind == "shards":
        return open_shards(path, labels, label_file)
    return ZipSource(path, labels, label_file)


def _refuse_label_file(source: str | Path, label_file: str) -> None:
    if label_file:
        raise UsageError(f"{source} is a table: choose its column by data.label_column")


Kind = Literal["images", "shards", "tables", "zip"]


def find_kind(path: Path) -> Kind:
    """Decide what the files at a path are: everything that reads images asks here.

    A folder with shards, tables and images is what it has more files of.
    """
    suffix = path.suffix.lower()
    if not path.is_dir():
        if suffix in (".zip", ".tar"):
            return "zip" if suffix == ".zip" else "shards"
        if program := find_compression(path):
            raise LdmError(f"{path} is compressed: unpack it by {program} first")
        raise LdmError(f"{path} is not a folder of images or tables, a .zip or a .tar")
    if is_saved(path):
        return "tables"
    if read_manifest(path) or any(path.glob(f"*{SIDECAR}")):
        return "shards"
    shards, tables = find_shards(path), find_tables(path)
    if not shards and not tables:
        return "images"
    images = list(islice(filter(is_image, walk(path, LeftOut())), len(shards) + len(tables)))
    found: dict[Kind, list[str]] = {
        "images": images,
        "shards": [shard.name for shard in shards],
        "tables": [table.name for table in tables],
    }
    kind = max(found, key=lambda kind: len(found[kind]))  # the first of equal ones
    for other, names in found.items():
        if names and other != kind:
            tell(f"{path}: read as {kind}; its {other} ({listed(names, 1)}) are left out")
    return kind


# --------------------------------------------------------------------------------- identity
IDENTITY = "data.json"
"""File of a run's folder with the identity of its images."""


def check_data(
    ranks: Accelerator | PartialState, folder: Path, source: Source, config: DataConfig
) -> None:
    """Keep the identity of a run's images in its folder; refuse to resume with other images."""

    def check() -> None:
        now = {"sha256": source.identity()}
        before = read_tree(folder / IDENTITY, schema(sha256=str), "delete it to go on unchecked")
        if before and before != now:
            if config.changed == "error":
                raise LdmError(
                    f"the list of images in {config.source} is not that with which {folder} was "
                    "started: restore it, or set data.changed=ok to go on with this one"
                )
            tell(f"{folder} goes on with another list of images")
        write_json(folder / IDENTITY, now)

    from_main(ranks, check)


def content_identity(source: Source, count: int) -> str:
    """SHA-256 over the first `count` images: the bytes of their files, and their places in these.

    File names are not part of it: a copy of a data set has the same identity. Every file is read.
    """
    files: dict[Path, int] = {}  # in the order of their first image → number
    chosen = sha256()
    for index in range(count):
        file = source.file(index)
        number = files.setdefault(file, len(files))
        name = source.name(index).removeprefix(str(file)).removeprefix(source.root)
        chosen.update(f"{number}{name}\0".encode(*UTF8))
    progress = show_progress("hashing the data", len(files), unit="files")
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool, progress as advance:
        for digest in pool.map(_digest, files):
            chosen.update(digest)
            advance(1)
    return chosen.hexdigest()


def listing_identity(data: str) -> str | None:
    """SHA-256 over the relative names of all images of a data set and the sizes of their files.

    It is quick, and blind to a file that changed and kept its name and size. None if the data set,
    a `DataConfig.source`, cannot be read; the built-in photographs are always themselves.
    """
    if data == PHOTOS:
        return PHOTOS
    path, listing = Path(data).expanduser(), sha256()
    try:
        images = open_images(data)
    except LdmError:
        return None
    size_of = cache(_size)  # of an archive once for all of its images
    for index in range(len(images)):
        name = images.name(index).removeprefix(f"{path}/")
        listing.update(f"{name}\0{size_of(images.file(index))}\0".encode(*UTF8))
    return listing.hexdigest()


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1


def _digest(file: Path) -> bytes:
    try:
        return bytes.fromhex(sha256_of(file))
    except OSError as error:
        raise LdmError(
            f"could not read {file} ({error.strerror}): do not change the data meanwhile"
        ) from error
