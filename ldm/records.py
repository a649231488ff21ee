"""Files that we read back: JSON, arrays and what they hold, checked before any of it is used.

A file is read up to a stated size, as a regular file, and compared with a schema. A damaged one is
an `LdmError` of one line that names the file and the entry. Unknown keys are kept, as those of
other versions; keys that a schema gives a default may be missing.
"""

import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar, cast
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from ldm.errors import LdmError, brief, try_call
from ldm.files import HeaderReader, open_regular, read_bytes

LIMIT = 2**26
"""Bytes of a JSON file, and bytes by which arrays may be larger than their compressed file."""
HEADER = 2**16
"""Bytes of an array's header."""
LEVELS = 64
"""Sections within sections, in JSON and YAML."""
_CONTAINERS = (dict, list, tuple)
BITS = 512
"""Of an integer, in JSON and YAML: as a float it is finite."""
RESTORE = "restore it or delete it"

Count = Annotated[int, Field(ge=0, le=2**53)]
FileName = Annotated[str, Field(pattern=r"^(\.{3,}|\.{0,2}[^./\\\x00][^/\\\x00]*)$")]
"""Name of a file in the same folder."""


class Schema(BaseModel):
    """Base of the schemas: strict about types, with finite numbers, open to other keys."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)


def schema(**entries: Any) -> type[Schema]:
    """A schema of entries and their types; (type, default) where an entry may be missing."""
    fields = {k: kind if isinstance(kind, tuple) else (kind, ...) for k, kind in entries.items()}
    return create_model("Record", __base__=Schema, **fields)  # type: ignore[no-any-return,call-overload]


SchemaT = TypeVar("SchemaT", bound=BaseModel)
T = TypeVar("T")


# ------------------------------------------------------------------------------------- JSON
def read_tree(
    path: Path, schema: type[BaseModel] = Schema, advice: str = RESTORE, **how: Any
) -> dict[str, Any] | None:
    """Read the JSON object in a file by `read_json(**how)` and check it; None if there is none."""
    tree = read_json(path, advice, **how)
    if tree is not None:
        checked(schema, tree, path, advice)
    return cast(dict[str, Any] | None, tree)


def read_json(
    path: Path,
    advice: str = RESTORE,
    limit: int = LIMIT,
    parse: Callable[[bytes], Any] | None = None,
) -> Any:
    """Read the JSON in a file; None if there is no file. `advice` ends the error of a damaged one.

    Args:
        limit: most bytes of the file.
        parse: reads another format; a ValueError says what is wrong. None: `parse_json`.

    Raises:
        LdmError: the file is damaged, larger than `limit`, or no regular file.
    """
    try:
        data = read_bytes(path, limit)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a path may hold a NUL
        raise LdmError(f"could not read {path} ({brief(error)}): {advice}") from error
    try:
        if (tree := (parse or parse_json)(data)) is None:
            raise ValueError("it holds null")
    except ValueError as error:
        raise LdmError(f"{path} is damaged ({error}): {advice}") from error
    return tree


def parse_json(text: bytes | str) -> Any:
    """Parse JSON of bounded depth and numbers; a ValueError says what is wrong."""
    try:
        tree = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {LEVELS} levels") from error
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    except ValueError as error:  # syntax, or an integer of thousands of digits
        raise ValueError(f"not JSON: {str(error).partition(';')[0]}") from error
    check_bounds(tree)
    return tree


def check_bounds(tree: Any, most: float = math.inf) -> None:
    """Raise a ValueError for a tree that is too deep, or without an end, that holds an integer of
    too many digits, or more than `most` values and characters."""
    layer, size = [tree], 0
    for _ in range(LEVELS):
        nested = []
        for value in layer:  # once, without unions of types, for a log has millions of values
            if isinstance(value, str):
                size += len(value)
            elif isinstance(value, int):
                if value.bit_length() > BITS:
                    raise ValueError("a number is too large")
            elif isinstance(value, _CONTAINERS):
                size += len(value)
                nested.append(value)
        if size > most:
            raise ValueError("too many values")
        layer = [*chain.from_iterable(nested)]  # of a dict, its keys
        layer += chain.from_iterable(v.values() for v in nested if isinstance(v, dict))
        if not layer:
            return
    raise ValueError(f"nested deeper than {LEVELS} levels")


def checked(
    schema: type[SchemaT], tree: Any, path: object, advice: str = RESTORE, entry: str = ""
) -> SchemaT:
    """Validate a tree read from a file; an LdmError names the file and the entry."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(filter(None, (entry, *map(str, first["loc"]))))
        wrong = first["msg"].partition(" or instance of ")[0]
        wrong = wrong[:1].lower() + wrong[1:]
        raise LdmError(
            f"{path} is damaged: {f'{where}: ' if where else ''}{wrong}: {advice}"
        ) from error


# ----------------------------------------------------------------------------------- arrays
def read_arrays(path: Path, advice: str = RESTORE) -> dict[str, NDArray[Any]]:
    """Read the arrays of a `.npz` by their names; an LdmError if it is absent or damaged."""
    try:
        with open_regular(path) as file, ZipFile(file) as pack:
            members = pack.infolist()
            size = file.seek(0, io.SEEK_END)
            if sum(member.file_size for member in members) > size + LIMIT:
                raise ValueError("its arrays are larger than the file")
            return {m.filename.removesuffix(".npy"): parse_array(pack.read(m)) for m in members}
    except OSError as error:
        raise LdmError(f"could not read {path} ({brief(error)}): {advice}") from error
    except Exception as error:  # zipfile and NumPy raise nearly anything
        raise LdmError(f"{path} is damaged ({brief(error)}): {advice}") from error


class ArrayFile:
    """The arrays of a `.npz` of any size, described by their headers and read when asked for.

    Nothing is unpickled, and no memory is taken for an array whose header does not fit its bytes.

    Attributes:
        headers: shape and type of each array, by its name.
    """

    def __init__(self, path: Path, advice: str = RESTORE) -> None:
        self.path, self._advice = path, advice
        self.headers: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        self._starts: dict[str, int] = {}
        with self._opened() as pack:
            for member in pack.infolist():
                name = member.filename.removesuffix(".npy")
                with pack.open(member) as file:
                    start = io.BytesIO(file.read(HEADER))
                shape, is_fortran, kind = _read_header(start, member.file_size)
                if is_fortran and len(shape) > 1:
                    raise ValueError(f"{name} is in Fortran's order: write it in C's")
                self.headers[name], self._starts[name] = (shape, kind), start.tell()

    def read(self, name: str) -> NDArray[Any]:
        """Read an array as a whole: look at its header first."""
        return np.stack([*self.rows(name)])

    def rows(self, name: str) -> Iterator[NDArray[Any]]:
        """Read an array one element of its first axis after the other."""
        shape, kind = self.headers[name]
        with self._opened() as pack, pack.open(f"{name}.npy") as file:
            file.read(self._starts[name])
            for _ in range(shape[0]):
                data = file.read(math.prod(shape[1:]) * kind.itemsize)
                yield np.frombuffer(data, kind).reshape(shape[1:])

    @contextmanager
    def _opened(self) -> Iterator[ZipFile]:
        try:
            with HeaderReader(self.path, LIMIT) as file, ZipFile(file) as pack:
                if any(m.compress_type not in (ZIP_STORED, ZIP_DEFLATED) for m in pack.infolist()):
                    raise ValueError("compressed by another method than deflate")
                yield pack
        except Exception as error:  # zipfile and NumPy raise nearly anything
            raise LdmError(
                f"{self.path} is damaged or no .npz of arrays ({brief(error)}): {self._advice}"
            ) from error


def _read_header(file: BinaryIO, size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of a `.npy` of `size` bytes; a ValueError unless it fits them."""
    is_first = npy.read_magic(file) == (1, 0)
    read_header = npy.read_array_header_1_0 if is_first else npy.read_array_header_2_0
    shape, is_fortran, kind = read_header(file)
    held = size - file.tell()
    if min(shape, default=0) < 0 or kind.hasobject or math.prod(shape) * kind.itemsize != held:
        raise ValueError(f"its data do not fit a {kind} array of shape {shape}")
    return shape, is_fortran, kind


def parse_array(data: bytes) -> NDArray[Any]:
    """Read the array in the bytes of a `.npy`; a ValueError unless its header fits them."""
    _read_header(io.BytesIO(data), len(data))
    return np.load(io.BytesIO(data), allow_pickle=False)


# ------------------------------------------------------------------------------------ scans
_named: set[str] = set()
SHOWN = 3


def read_each(paths: Iterable[Path], read: Callable[[Path], T]) -> dict[Path, T]:
    """Read what can be read of several files or folders; name the others on standard error, each
    once."""
    results = {path: try_call(read, path) for path in paths}
    errors = dict.fromkeys(str(r) for r in results.values() if isinstance(r, LdmError))
    new = [text for text in errors if text not in _named]
    _named.update(new)
    for text in new[:SHOWN]:
        print(f"note: skipped: {text}", file=sys.stderr)
    if len(new) > SHOWN:
        print(f"note: and {len(new) - SHOWN} more that cannot be read", file=sys.stderr)
    return {path: r for path, r in results.items() if not isinstance(r, LdmError)}


# ------------------------------------------------------------------------------- numbers of results
NUMBERS = {
    "rfid": ("rFID", 3, 1.0),
    "fid": ("FID", 3, 1.0),
    "sfid": ("sFID", 3, 1.0),
    "is": ("IS", 2, 1.0),
    "fd_dinov2": ("FD-DINOv2", 2, 1.0),
    "kid": ("KID ×10³", 3, 1e3),
    "lpips": ("LPIPS", 4, 1.0),
    "psnr": ("PSNR, dB", 2, 1.0),
    "ssim": ("SSIM", 4, 1.0),
    "precision": ("precision", 3, 1.0),
    "recall": ("recall", 3, 1.0),
    "swd": ("SWD ×10³", 2, 1.0),  # the files hold ×10³ already
    "loss": ("loss", 4, 1.0),
}
"""Names of numbers in result files: title, digits and scale where they are shown."""
SAMPLES = ("samples/*/fid*.json", "samples/*.fid*.json", "fid/*.json")
"""FIDs of a folder of samples, of an archive of samples, and of a model's own samples."""
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def read_numbers(tree: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the numbers in the content of a `fid.json` or of an evaluation, and standard
    deviations of some: FID's over the bootstrap, KID's over subsets."""
    numbers, details = (section(tree, key) or tree for key in ("numbers", "details"))
    interval = section(tree, "fid_interval")
    return known_numbers(numbers), known_numbers(
        {"fid": interval.get("std"), "kid": details.get("kid_std")}
    )


def known_numbers(tree: Mapping[str, Any]) -> dict[str, float]:
    """Return those of a file's values that are `NUMBERS`."""
    found = {}
    for name in NUMBERS:
        value = tree.get(name)
        value = value.get("mean") if isinstance(value, dict) else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    return found


def section(tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a section of a file's content; an empty one where it has none."""
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def show_number(name: str, numbers: Mapping[str, float], spread: Mapping[str, float]) -> str:
    """Format one of `NUMBERS`, as "12.500 ± 0.250"; an empty text if it is not there."""
    if name not in numbers:
        return ""
    _, digits, scale = NUMBERS[name]
    values = [each[name] for each in (numbers, spread) if name in each]
    return "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}".join(_format(scale * v, digits) for v in values)


def _format(value: float, digits: int) -> str:
    """Format with a fixed number of decimals, or as a power of ten above seven integer digits."""
    plain = f"{value:.{digits}f}"
    if not math.isfinite(value) or len(plain.partition(".")[0].lstrip("-")) <= 7:
        return plain
    mantissa, _, power = f"{value:.2e}".partition("e+")
    return f"{mantissa}×10{str(int(power)).translate(SUPERSCRIPTS)}"
