"""Which images a data set holds, known again by its files.

By their content, where a number depends on every byte and reading all files is worth it; by their
names and sizes, where it is asked often and a changed file that kept both may go unseen.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest, sha256
from pathlib import Path

from ldm.data.dataset import PHOTOS, open_images
from ldm.data.source import Source
from ldm.errors import LdmError
from ldm.logbook import progress_bar

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
