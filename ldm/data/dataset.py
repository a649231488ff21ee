"""Data sets by their configuration: opening one, recognising its files, and splitting it.

A split takes the training images of a source, or the held-out ones: the last by name. Labelled
images are sorted by class, so that these would be whole classes: of them, every n-th is held out.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from accelerate import Accelerator, PartialState
from pydantic import Field

from ldm.config import (
    Config,
    Resolution,
    Width,
    format_size,
    height_width,
    read_resolution,
    size_word,
    to_tree,
)
from ldm.data.hf import find_tables, is_hub, is_saved, open_hub, open_tables
from ldm.data.photos import PhotoSource
from ldm.data.remote import RemoteSource, is_remote, open_remote, read_remote_manifest
from ldm.data.shards import SIDECAR, find_shards, open_shards, read_manifest
from ldm.data.sources import (
    UTF8,
    FolderSource,
    Indices,
    LeftOut,
    Small,
    Source,
    Split,
    ZipSource,
    tell,
    walk,
)
from ldm.data.transforms import CorruptImage, covers, is_image
from ldm.data.workers import load_in_workers
from ldm.distributed import from_main
from ldm.errors import LdmError, UsageError, check_at_least, listed
from ldm.files import find_compression, sha256_of, write_json
from ldm.images import LARGEST, Pixels, PixelType, RangeSetting
from ldm.logbook import show_progress
from ldm.records import read_tree, schema

PHOTOS = "photos"
HASHED_AT_ONCE = 8  # files; one at a time is limited by the processor


class DataConfig(Config):
    """Images, and their preprocessing for training."""

    source: str = PHOTOS
    """photos (built in; their right thirds are held out), or a path: a folder of images, a .zip, a
    folder of .tar shards, one .tar, or several as a/{000..009}.tar, a folder of .parquet; or a data
    set of the Hugging Face Hub, hf:OWNER/NAME[@REVISION][:[CONFIG/]SPLIT] (see `ldm.data.hf`); or
    shards elsewhere: s3://…, gs://…, https://…, hf://…, pipe:… (see `ldm.data.remote`)."""
    crop: Literal["center", "random"] = "center"
    """center: the central square, or the largest part of an H×W resolution's proportions, downsized
    to it; random: a window of the resolution at native size. The built-in photographs are always
    cropped at random for training."""
    flip: bool = False
    """Mirror each training image with probability 1/2."""
    small: Small = "error"
    """Images with a side below the resolution: error stops and counts them; skip takes the next
    image instead; enlarge resizes them (Lanczos), as ADM does with ImageNet's."""
    channels: Width | None = None
    """Channels of the images; null: those of the autoencoder, image_channels, else three."""
    range: RangeSetting = "type"
    """Pixel values that become −1 and 1: the least and the largest of the files' type, 8 or 16
    bits (with a trained autoencoder: its own); two numbers, beyond which values are clipped; or
    measured, the least and the largest in the training images, of 10,000 at most. Floating-point
    pixels need numbers or measured."""
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
    streams: Annotated[int, Field(ge=1, le=4096)] = 16
    """Shards elsewhere: streams of them that are read side by side, by all GPUs together."""
    window: Annotated[int, Field(ge=1)] = 2
    """Shards elsewhere: consecutive ones of a stream whose images are shuffled together."""
    cache_gb: Annotated[float, Field(gt=0)] = 50.0
    """GB of shards from elsewhere that are kept in `$LDM_CACHE/shards`, for all runs together."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 4
    """Loader processes per GPU; 0 loads in the training process, as the photographs always do."""

    def of(self, model: Any) -> Self:
        """Return these settings for an autoencoder's config: its channels, its range of pixels."""
        if self.channels not in (None, model.image_channels):
            raise UsageError(
                f"data.channels is {self.channels}, and image_channels {model.image_channels}: "
                "omit data.channels"
            )
        given = self.range if isinstance(self.range, tuple) else model.pixels.range or self.range
        channels = None if model.image_channels == 3 else model.image_channels
        return self.model_copy(update={"channels": channels, "range": given})


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
        return _as_configured(PhotoSource(split, resolution, config.labels), config)
    path, elsewhere = Path(config.source).expanduser(), is_remote(config.source)
    is_path = not elsewhere and not is_hub(config.source)
    if is_path and not path.exists() and "{" not in config.source:
        wanted = 256 if resolution == 1 else resolution
        raise LdmError(
            f"data.source: {config.source} does not exist: create it with "
            f"`ldm data prepare SRC {path} --size {size_word(wanted)}`, "
            f"or use the built-in photographs, data.source={PHOTOS}"
        )
    columns = config.image_column, config.label_column
    images = open_images(config.source, config.labels, config.label_file, *columns, config.cache_gb)
    images = _as_configured(images, config)
    manifest = read_manifest(path) if path.is_dir() else None
    if isinstance(images, RemoteSource):
        images.arrange(config.streams, config.window)
        manifest = images.manifest
    size = read_resolution((manifest or {}).get("size", resolution))
    if not covers(*height_width(size), resolution) and config.small == "error":
        raise LdmError(
            f"{config.source} was prepared at {format_size(size)}, smaller than the "
            f"{format_size(resolution)} requested: prepare it with --size {size_word(resolution)}, "
            "or lower the resolution"
        )
    held_out = images.held_out if config.held_out is None else config.held_out
    if split != "all" and held_out and images.held_out and held_out < images.held_out:
        # fewer of those that the data set holds out, of which none may be trained on
        train, last = len(images) - images.held_out, len(images) - held_out
        images = images.part(np.r_[0:train, last : len(images)])
        return take_split(images, split, held_out)
    evenly = (
        config.labels and not elsewhere and (images.held_out is None or held_out != images.held_out)
    )
    return take_split(images, split, held_out, evenly)


def _as_configured(images: Source, config: DataConfig) -> Source:
    images.small, images.channels = config.small, config.channels or 3
    images.range = config.range if isinstance(config.range, tuple) else None
    images.keep = "uint16" if config.range == "type" else "float32"
    return images


def holds_out(config: DataConfig) -> bool:
    """True if images are held out for validation, so that `open_source` can open "val"."""
    if config.source == PHOTOS or config.held_out is not None:
        return config.held_out != 0
    if is_hub(config.source):
        return True
    path, elsewhere = Path(config.source).expanduser(), is_remote(config.source)
    manifest = read_remote_manifest(config.source) if elsewhere else read_manifest(path)
    return manifest is None or manifest["splits"]["val"]["count"] > 0


def open_images(
    source: str | Path,
    labels: bool = False,
    label_file: str = "",
    image_column: str = "",
    label_column: str = "",
    cache_gb: float = 50.0,
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
    if is_remote(str(source)):
        if label_file:
            raise UsageError(
                "data.label_file is for local data: put classes into the shards, as .cls members"
            )
        return open_remote(str(source), labels, cache_gb)
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
    if not path.is_dir():
        if (suffix := path.suffix.lower()) in (".zip", ".tar"):
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
        "shards": shards,
        "tables": [table.name for table in tables],
    }
    kind = max(found, key=lambda kind: len(found[kind]))  # the first of equal ones
    for other, names in found.items():
        if names and other != kind:
            tell(f"{path}: read as {kind}; its {other} ({listed(names, 1)}) are left out")
    return kind


# ------------------------------------------------------------------------------------- split
# FFHQ and CelebA-HQ as split by Rombach et al. 2022: 60,000 + 10,000 and 25,000 + 5,000
USUAL_HELD_OUT = {70_000: 10_000, 30_000: 5_000}


def held_out_count(count: int, requested: int | None) -> int:
    """Number of images held out of `count`: as requested, else the default of `DataConfig`."""
    usual = USUAL_HELD_OUT.get(count, min(max(count // 20, 1), 10_000))
    held_out = usual if requested is None else requested
    if held_out >= count:
        raise UsageError(
            f"holding out {held_out} of {count} images leaves none to train on: "
            "lower held_out (0 holds out none)"
        )
    return held_out


class Others(Sequence[int]):
    """0 … count−1 without `ends`, which ascend; they are computed."""

    def __init__(self, count: int, ends: np.ndarray) -> None:
        self._count = count - len(ends)
        self._before = ends - np.arange(len(ends))  # others below each end

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        j = range(self._count)[i]  # or an IndexError
        if isinstance(j, range):
            return [self[k] for k in j]
        return j + int(np.searchsorted(self._before, j, "right"))


def split_indices(count: int, held_out: int, evenly: bool) -> tuple[Indices, Indices]:
    """Ascending indices of the training images and of the held-out images among `count`.

    Held out are the last; or, `evenly`, the last of each of `held_out` runs of equal length.
    """
    if not evenly:
        return range(count - held_out), range(count - held_out, count)
    ends = np.arange(1, held_out + 1) * count // held_out - 1
    return Others(count, ends), ends


def take_split(source: Source, split: Split, held_out: int | None, evenly: bool = False) -> Source:
    """Select the training images, the held-out images, or all images of a source.

    `held_out` is a number of images, see `held_out_count`; `evenly` is as in `split_indices`.
    """
    if split == "all":
        return source
    train, val = split_indices(len(source), held_out_count(len(source), held_out), evenly)
    if split == "val" and not len(val):
        raise UsageError("no images are held out for validation: set data.held_out to 1 or more")
    return source.part(train if split == "train" else val)


# --------------------------------------------------------------------------------- identity
IDENTITY = "data.json"
"""File of a run's folder with the identity of its images, and of their pixels unless plain."""
MEASURED = 10_000
"""Images at most, evenly spread, of which the range is measured."""


def check_data(
    ranks: Accelerator | PartialState,
    folder: Path,
    source: Source,
    config: DataConfig,
    *others: Source | None,
) -> Pixels:
    """Keep the identity of a run's images in its folder; refuse to resume with other images.

    Returns:
        The type and range of their pixels: found once, kept in the folder too, and set in the
        source and in `others` of the same images.
    """
    known = schema(sha256=str, pixels=(Pixels | None, None))

    def check() -> Pixels:
        now: dict[str, Any] = {"sha256": source.identity()}
        before = read_tree(folder / IDENTITY, known, "delete it to go on unchecked")
        found = before.pop("pixels", None) if before else to_tree(find_pixels(source, config))
        pixels = Pixels.model_validate(found or {})
        if before and before != now:
            if config.changed == "error":
                raise LdmError(
                    f"the list of images in {config.source} is not that with which {folder} was "
                    "started: restore it, or set data.changed=ok to go on with this one"
                )
            tell(f"{folder} goes on with another list of images")
        write_json(folder / IDENTITY, now | ({} if pixels.is_plain else {"pixels": found}))
        return pixels

    pixels = from_main(ranks, check)
    for each in filter(None, (source, *others)):
        each.range = pixels.range
    return pixels


def find_pixels(source: Source, config: DataConfig) -> Pixels:
    """Find the type and range of a source's pixels: the type of its first good image.

    Raises:
        LdmError: they are floating-point, and `config` gives no range; or an image has another
            number of channels.
    """
    if (kind := find_type(source)) is None:
        return Pixels()
    if config.range != "measured":
        pixels = Pixels(type=kind, range=None if config.range == "type" else config.range)
        _ = pixels.bounds  # floats need a range
        return pixels
    found, spread = [], _spread(source)
    with show_progress("measuring pixels", len(spread)) as advance:
        work = partial(_extent, source)
        for each in load_in_workers(work, spread, config.workers, "lower data.workers"):
            found += [each] if each else []
            advance(1)
    low, high = min(low for _, low, _ in found), max(high for *_, high in found)
    what = f"{config.source}: pixels from {low:g} to {high:g}"
    if low == high or max(-low, high) > LARGEST:
        why = "are all the same" if low == high else "look like a mark for missing data"
        raise LdmError(f"{what} {why}: set data.range=[low,high]")
    tell(f"{what}, measured on {len(found):,} images")
    return Pixels(type=kind, range=(low, high))


def find_type(source: Source) -> PixelType | None:
    """Return the type of the first good image's pixels, of some evenly spread; None without any."""
    whole = source.with_keep("float32")
    for i in _spread(source)[:100]:  # training stops where so many are corrupt
        if found := _extent(whole, i):
            return (_extent(source, i) or found)[0]  # 32-bit pixels that fit 16 bits pass for these
    return None


def _spread(source: Source) -> list[int]:
    last = len(source) - 1
    return np.linspace(0, last, min(MEASURED, last + 1)).round().astype(int).tolist()


def _extent(source: Source, index: int) -> tuple[PixelType, float, float] | None:
    """The type of an image's pixels, the least and the largest; None if it is corrupt."""
    try:
        image = source.load_named(index)
    except CorruptImage:
        return None
    kind: Any = str(image.dtype)
    return kind, float(image.min()), float(image.max())


def content_identity(source: Source, count: int) -> str:
    """SHA-256 over the first `count` images: the bytes of their files, and their places in these.

    File names are not part of it: a copy of a data set has the same identity. Every file is read;
    but of shards elsewhere it is their names, sizes and hashes in a manifest.
    """
    if isinstance(source, RemoteSource):
        return sha256(f"{source.identity()}{source.span[:count]}".encode()).hexdigest()
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


def _digest(file: Path) -> bytes:
    try:
        return bytes.fromhex(sha256_of(file))
    except OSError as error:
        raise LdmError(
            f"could not read {file} ({error.strerror}): do not change the data meanwhile"
        ) from error
