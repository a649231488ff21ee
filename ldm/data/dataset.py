"""Opening a data set: what `data.source` names, and which split of it.

Which images a data set holds, known again by its files.

By their content, where a number depends on every byte and reading all files is worth it; by their
names and sizes, where it is asked often and a changed file that kept both may go unseen.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ldm.config import Config
from ldm.data.photos import open_photos
from ldm.data.shards import ShardSource, open_shards, read_manifest
from ldm.data.sources import FolderSource, Source, ZipSource
from ldm.data.split import Split, take_split
from ldm.errors import LdmError, UsageError
from ldm.logbook import progress_bar

PHOTOS = "photos"


class DataConfig(Config):
    """Which images, and what is done to them before training sees them."""

    source: str = PHOTOS
    """The word photos (built in; their right thirds are held out), or a path: a folder of images, a
    .zip, a folder of .tar shards, one .tar, or several as a/{000..009}.tar."""

    crop: Literal["center", "random"] = "center"
    """center: the central square, brought down to the resolution; random: a window at native size.
    The built-in photographs are always cropped at random for training."""

    flip: bool = False
    """Mirror each training image with probability 1/2."""

    labels: bool = False
    """Read class labels: the first folder an image lies in, `.cls` in shards, or which photograph.
    A folder that holds all images is no class: of x/cat/1.png and x/dog/2.png, cat and dog are."""

    held_out: Annotated[int, Field(ge=0)] | None = None
    """Images held out for validation, the last by name; with labels every so many-th by name, since
    the last would be whole classes. Left out: what the manifest says, else 10,000 of FFHQ's 70,000,
    5,000 of CelebA-HQ's 30,000, else one in twenty, up to 10,000."""

    workers: Annotated[int, Field(ge=0)] = 4
    """Loader processes per GPU; 0 loads in the training process, as the photographs always do."""


def open_source(config: DataConfig, split: Split, resolution: int) -> Source:
    """The images of one split ("train", "val", or "all" of them).

    Args:
        resolution: side R of the images that will be cut, in pixels; it decides the tiles of the
            built-in photographs.

    Raises:
        LdmError: there is nothing at the path, or nothing that can be used.
        UsageError: the split leaves nothing to train on, or does not apply; labels are asked for
            and an image has none.
    """
    if config.source == PHOTOS:
        if config.held_out is not None:
            raise UsageError(
                "data.held_out is for folders and archives: the built-in photographs hold out "
                "their right thirds; leave it out"
            )
        return open_photos(split, resolution, config.labels)
    path = Path(config.source).expanduser()
    if not path.exists() and "{" not in config.source:
        size = resolution if resolution > 1 else "256"  # 1: who asks does not know it yet
        raise LdmError(
            f"data.source: {config.source} is not there: make it with "
            f"`ldm data prepare SRC {path} --size {size}`, "
            f"or take the built-in photographs, data.source={PHOTOS}"
        )
    images = open_images(path, config.labels)
    manifest = read_manifest(path) if path.is_dir() else None
    if manifest and manifest.get("size", resolution) < resolution:
        size = manifest["size"]
        raise LdmError(
            f"{path} was prepared at {size}×{size}, and {resolution}×{resolution} is asked for: "
            f"prepare it with --size {resolution}, or ask for a lower resolution"
        )
    by_manifest = images.held_out if isinstance(images, ShardSource) else None
    held_out = by_manifest if config.held_out is None else config.held_out
    # preparation has put those it holds out last, whichever they were
    evenly = config.labels and (by_manifest is None or held_out != by_manifest)
    return take_split(images, split, held_out, evenly)


def holds_out(config: DataConfig) -> bool:
    """Whether images are held out for validation, so that `open_source` can open "val".

    Raises:
        LdmError: the manifest of prepared shards is damaged, or of a newer format.
    """
    if config.source == PHOTOS:
        return True
    if config.held_out is not None:
        return config.held_out > 0
    manifest = read_manifest(Path(config.source).expanduser())
    return manifest is None or manifest["splits"]["val"]["count"] > 0


def open_images(path: Path, labels: bool = False) -> FolderSource | ZipSource | ShardSource:
    """All images at a path that is there: a folder, a .zip, or .tar shards.

    Raises:
        LdmError: it is none of these, damaged, or empty.
        UsageError: labels are asked for and an image has none.
    """
    if path.is_dir():
        has_shards = any(path.glob("*.tar"))
        return open_shards(path, labels) if has_shards else FolderSource(path, labels)
    if path.suffix == ".tar":
        return open_shards(path, labels)
    if path.suffix == ".zip":
        return ZipSource(path, labels)
    raise LdmError(f"{path} is neither a folder of images, nor a .zip, nor a .tar of them")


READERS = 8  # files hashed at once: one is bound by the processor
UTF8 = ("utf-8", "surrogateescape")  # names need not be of any encoding


def content_identity(source: Source, count: int) -> str:
    """SHA-256 over the content of every file with one of a source's first images, in order, and
    over which of their images it is.

    Names of files and dates are not in it: a data set that was moved or copied is the same, one
    with a changed byte is another. What it costs is to read all files.

    Args:
        count: how many images.

    Raises:
        LdmError: a file cannot be read, or is not there any more.
    """
    files: dict[str, int] = {}  # in the order of their first image → place
    chosen = sha256()
    for file, inside in _places(source, count):
        place = files.setdefault(file, len(files))
        chosen.update(f"{place}{inside}\0".encode(*UTF8))
    with ThreadPoolExecutor(READERS) as pool, progress_bar("files") as bar:
        task = bar.add_task("is it the same data?", total=len(files), speed="", note="")
        for digest in pool.map(_digest, files):
            chosen.update(digest)
            bar.update(task, advance=1)
    return chosen.hexdigest()


def listing_identity(data: str) -> str | None:
    """SHA-256 over the names, within the data set, and the sizes in bytes of all files of a data
    set in order; None where it cannot be read now.

    Args:
        data: as `DataConfig.source`. The built-in photographs are never others.
    """
    if data == PHOTOS:
        return PHOTOS
    path, listing = Path(data).expanduser(), sha256()
    try:
        images = open_images(path)
    except LdmError:
        return None
    last, size = None, -1
    for name in map(images.name, range(len(images))):
        # the next image may lie in the same archive
        if last is None or not name.startswith(f"{last}/"):
            last, size = _sized(name)
        listing.update(f"{name.removeprefix(f'{path}/')}\0{size}\0".encode(*UTF8))
    return listing.hexdigest()


def _places(source: Source, count: int) -> Iterator[tuple[str, str]]:
    """Of a source's first images the file that each lies in, and where inside, "" if it is one."""
    file = None
    for name in map(source.name, range(count)):
        # the next image may lie in the same archive
        if file is None or not name.startswith(f"{file}/"):
            file = _file_of(name)
        yield file, name.removeprefix(file)


def _file_of(name: str) -> str:
    """The file that an image of a source lies in: its own, or an archive."""
    path = Path(name)
    found = next((str(part) for part in (path, *path.parents) if part.is_file()), None)
    if found is None:
        raise LdmError(f"{name} is not there any more: is the data being changed?")
    return found


def _sized(name: str) -> tuple[str, int]:
    """The file that an image lies in, and its size in bytes, −1 where it cannot be seen."""
    try:
        file = _file_of(name)
        return file, Path(file).stat().st_size
    except (LdmError, OSError):
        return name, -1


def _digest(file: str) -> bytes:
    try:
        with Path(file).open("rb") as opened:
            return file_digest(opened, "sha256").digest()
    except OSError as error:
        raise LdmError(f"could not read {file} ({error.strerror})") from error
