"""Third-party checkpoints: pickles, read without running the code that they name.

Beside its weights, a checkpoint of a training framework holds objects of classes that may not be
installed: callbacks, configurations, counters. Tensors and plain containers are read; anything else
becomes an `Inert`. No module is imported, and no function that a file names is called.

`torch.load` cannot replace this. With `weights_only=True` it refuses a file that names a function
of `os` or holds a subclass of list or dict, even with placeholders in `safe_globals`, and it cannot
list the classes of the format before 1.6. With `weights_only=False` it also opens TorchScript.
"""

import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from io import BytesIO
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ldm.checkpoint import Damaged, check_entries
from ldm.errors import LdmError
from ldm.files import lfs_pointer

# start of torch.save's older format: magic number, version
LEGACY = (0x1950A86A20F9469CFC6C, 1001)

# (key, dtype, number of values) → 1-D tensor
Storages = Callable[[str, torch.dtype, int], Tensor]


def read_foreign(path: Path) -> Any:
    """Read the tree in a file that `torch.save` wrote.

    The tensors of a zip file are views of a private memory map: clone those that must outlive the
    file. Tensors of types that are not in `DTYPES` or `FLOAT8` become an `Inert`.
    """
    try:
        return _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except (FileNotFoundError, PermissionError) as error:
        raise LdmError(f"could not read {path} ({error.strerror})") from error
    except Exception as error:  # damaged files raise errors of nearly any type
        message = (
            f"{path} is truncated or damaged, or not written by torch.save: copy or write it again"
        )
        raise Damaged(lfs_pointer(path) or message) from error


# ---------------------------------------------------------------------------- placeholders
def _ignore(*_args: Any, **_kwargs: Any) -> None:
    """Accept any arguments and do nothing."""


class Inert:
    """Placeholder for any class, function or object of a file.

    A pickle may call it, fill it and set its state, without effect.
    """

    __init__ = __setstate__ = __setitem__ = append = extend = add = _ignore

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        return self


class _Dict(dict):
    """The items of an OrderedDict without its attributes."""

    __slots__ = ()
    __setstate__ = _ignore


def _view(flat: Any, offset: int, size: Any, stride: Any, *_: Any) -> Any:
    # raises for a view past the storage's end
    return flat.as_strided(size, stride, offset) if isinstance(flat, Tensor) else Inert()


def _typed_view(
    flat: Any, offset: int, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Any:
    known = isinstance(flat, Tensor) and isinstance(dtype, torch.dtype)
    return _view(flat.view(dtype), offset, size, stride) if known else Inert()


DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
    "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    "Untyped": torch.uint8,  # bytes; the tensor names its type
}  # fmt: skip
FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")


class _Unpickler(pickle.Unpickler):
    """Unpickler of tensors and plain containers, with placeholders for anything else."""

    def __init__(self, file: IO[bytes], storages: Storages) -> None:
        super().__init__(file, encoding="latin1")
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        # new functions each time: a pickle may set their attributes
        match module, name:
            case "collections", "OrderedDict":
                return _Dict
            case "torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor":
                return lambda *args: _view(*args)
            case "torch._utils", "_rebuild_tensor_v3":
                return lambda *args: _typed_view(*args)
            case "torch._utils", "_rebuild_parameter":
                return lambda tensor, *_: tensor
            case "torch", _ if name in FLOAT8:
                return getattr(torch, name)
            case "torch" | "torch.storage", _ if name.removesuffix("Storage") in DTYPES:
                return DTYPES[name.removesuffix("Storage")]
        return Inert

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", kind, str(key), _, int(count), *view) if view in ([], [None]):
                if count < 0:
                    raise pickle.UnpicklingError("a storage of negative length")
                known = isinstance(kind, torch.dtype)
                return self.storages(key, kind, count) if known else Inert()
        raise pickle.UnpicklingError("a storage of an unknown kind")


# --------------------------------------------------------------------------------- formats
def _read_zip(path: Path) -> Any:
    """Read the format since 1.6: `data.pkl`, and an uncompressed entry per storage."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        check_entries(archive, path.stat().st_size)
        (main,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = main.removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("written on a big-endian machine")
        mapped, checked = mmap(file.fileno(), 0, access=ACCESS_COPY), set()

        def storages(key: str, dtype: torch.dtype, count: int) -> Tensor:
            entry = archive.getinfo(f"{root}data/{key}")
            if entry.file_size < count * dtype.itemsize:
                raise ValueError("a storage is shorter than declared")
            # the entry's own header: 30 bytes, its name, an extra field that aligns the data
            name, extra = struct.unpack_from("<HH", mapped, entry.header_offset + 26)
            start = entry.header_offset + 30 + name + extra
            if (
                key not in checked
                and zlib.crc32(memoryview(mapped)[start : start + entry.file_size]) != entry.CRC
            ):
                raise ValueError("the checksum of a storage is wrong")
            checked.add(key)
            if not count:
                return _zeros(0, dtype)
            return torch.frombuffer(mapped, dtype=dtype, count=count, offset=start)

        return _Unpickler(BytesIO(archive.read(main)), storages).load()


def _read_legacy(path: Path) -> Any:
    """Read the format before 1.6: five pickles, then the values of all storages."""
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
                raise ValueError("a storage of another length than declared")
            if count:
                values = bytearray(file.read(count * flat.itemsize))
                flat.copy_(torch.frombuffer(values, dtype=flat.dtype, count=count))
    return tree


def _zeros(count: int, dtype: torch.dtype) -> Tensor:
    """Create a storage that cannot be resized; a pickle may set the state of a tensor."""
    return torch.frombuffer(bytearray(max(count, 1) * dtype.itemsize), dtype=dtype)[:count]
