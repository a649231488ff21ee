"""Checkpoints of other toolkits: pickles, read without running any of the code that they name.

A checkpoint of a training framework holds, beside its weights, objects of classes that are not here
(callbacks, configurations, counters). Here tensors and plain containers are read as what they are,
and everything else becomes an `Inert`: no module is imported, no function of the file's choosing is
called. The readers are written out rather than left to `torch.load`, which, where it may unpickle
freely, also opens TorchScript and tar archives, and which believes what a file says of its lengths.
"""

import pickle
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ldm.checkpoint import Damaged
from ldm.errors import LdmError

# how torch.save's older format begins: its magic number, then its version
LEGACY = (0x1950A86A20F9469CFC6C, 1001)

# (key, dtype, number of values) → the values, 1-D
Storages = Callable[[str, torch.dtype, int], Tensor]


def read_foreign(path: Path) -> Any:
    """The tree in a file that `torch.save` wrote, whatever it holds.

    The tensors of a newer (zip) file lie in a private mapping of it: they are read when they are
    used, and those that are to outlive the file want a clone. Kinds of tensors that `DTYPES` does
    not have are an `Inert` like all else.

    Raises:
        LdmError: it is not there or may not be read.
        Damaged: it is truncated or damaged, or no such file.
    """
    try:
        return _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except (FileNotFoundError, PermissionError) as error:
        raise LdmError(f"could not read {path} ({error.strerror})") from error
    except Exception as error:  # damage makes a reader raise nearly anything
        raise Damaged(
            f"{path} is truncated or damaged, or no checkpoint of torch.save's: copy or write it "
            "again"
        ) from error


# ------------------------------------------------------------------------------- stand-ins
def _ignore(*_args: Any, **_kwargs: Any) -> None:
    """Takes anything, does nothing."""


class Inert:
    """In the place of anything a file names: class, function or object. It can be called, filled
    and given a state, as a pickle may ask, and nothing comes of it."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> "Inert":
        return object.__new__(cls)

    __init__ = __setstate__ = __setitem__ = append = extend = add = _ignore

    def __call__(self, *_args: Any, **_kwargs: Any) -> "Inert":
        return self


class _Dict(dict):
    """An OrderedDict's items, without the attributes it may carry."""

    __slots__ = ()
    __setstate__ = _ignore


class _Type(Inert):
    """Names the type of a storage."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _View(Inert):
    """Makes a tensor of a storage."""

    def __call__(self, flat: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> Any:
        # raises where it would look past the storage's end
        return flat.as_strided(size, stride, offset) if isinstance(flat, Tensor) else Inert()


class _Parameter(Inert):
    """Leaves a tensor as it is."""

    def __call__(self, tensor: Tensor, *_: Any) -> Tensor:
        return tensor


DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
    "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Finds what tensors and plain containers are made of, and stand-ins for all else."""

    def __init__(self, file: IO[bytes], storages: Storages) -> None:
        super().__init__(file, encoding="latin1")
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "collections", "OrderedDict":
                return _Dict
            case "torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor":
                return _View()
            case "torch._utils", "_rebuild_parameter":
                return _Parameter()
            case "torch", _ if name.removesuffix("Storage") in DTYPES:
                return _Type(DTYPES[name.removesuffix("Storage")])
        return Inert

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", kind, str(key), _, int(count), *view) if view in ([], [None]):
                if count < 0:
                    raise pickle.UnpicklingError("a storage of less than nothing")
                known = isinstance(kind, _Type)
                return self.storages(key, kind.dtype, count) if known else Inert()
        raise pickle.UnpicklingError("a storage of an unknown kind")


# --------------------------------------------------------------------------------- formats
def _read_zip(path: Path) -> Any:
    """torch.save's format since 1.6: `data.pkl`, and a stored (not packed) entry per storage."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        (main,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = main.removesuffix("data.pkl")
        if (
            f"{root}byteorder" in archive.namelist()
            and archive.read(f"{root}byteorder") != b"little"
        ):
            raise ValueError("written on a big-endian machine")
        mapped = mmap(file.fileno(), 0, access=ACCESS_COPY)

        def storages(key: str, dtype: torch.dtype, count: int) -> Tensor:
            entry = archive.getinfo(f"{root}data/{key}")
            if (
                entry.compress_type != zipfile.ZIP_STORED
                or entry.file_size < count * dtype.itemsize
            ):
                raise ValueError("a storage is packed, or shorter than it says")
            # the entry's own header: 30 bytes, its name, an extra field that aligns the data
            name, extra = struct.unpack_from("<HH", mapped, entry.header_offset + 26)
            start = entry.header_offset + 30 + name + extra
            if not count:
                return _zeros(0, dtype)
            return torch.frombuffer(mapped, dtype=dtype, count=count, offset=start)

        return _Unpickler(BytesIO(archive.read(main)), storages).load()


def _read_legacy(path: Path) -> Any:
    """torch.save's format before 1.6: five pickles, then every storage's values in a row."""
    kept: dict[str, Tensor] = {}
    left = path.stat().st_size

    def storages(key: str, dtype: torch.dtype, count: int) -> Tensor:
        nonlocal left
        if key not in kept:
            left -= count * dtype.itemsize
            if left < 0:
                raise ValueError("storages larger than the file")
            kept[key] = _zeros(count, dtype)
        return kept[key]

    with path.open("rb") as file:
        magic, version, system, tree, keys = (_Unpickler(file, storages).load() for _ in range(5))
        if (magic, version) != LEGACY or not system["little_endian"]:
            raise ValueError("another format")
        if set(keys) != set(kept):
            raise ValueError("storages without values, or values without a storage")
        for key in keys:
            flat = kept[key]
            (count,) = struct.unpack("<q", file.read(8))
            if count != len(flat):
                raise ValueError("a storage of another length than it says")
            if count:
                values = bytearray(file.read(count * flat.itemsize))
                flat.copy_(torch.frombuffer(values, dtype=flat.dtype, count=count))
    return tree


def _zeros(count: int, dtype: torch.dtype) -> Tensor:
    """A storage that cannot grow, as torch's own would where a pickle gives a tensor a state."""
    return torch.frombuffer(bytearray(max(count, 1) * dtype.itemsize), dtype=dtype)[:count]
