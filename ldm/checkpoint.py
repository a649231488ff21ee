"""Model files: tensors and plain values, which load under `weights_only=True`.

They are written atomically, see `ldm.files`; loading them runs no code.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, TypeVar
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor, nn

from ldm.errors import LdmError, refuse_newer, try_call
from ldm.files import lfs_pointer, write_together
from ldm.records import check_bounds

FORMAT = 1
INNER = "autoencoder/"  # prefix of stage one's tensors in a `.safetensors`
ModuleT = TypeVar("ModuleT", bound=nn.Module)
Kind = Literal["autoencoder", "diffusion"]
STAGE = {"autoencoder": "a stage-one autoencoder", "diffusion": "a stage-two diffusion model"}
KNOWN_DTYPE = re.compile(r"torch\.(bool|u?int(8|16|32|64)|b?float(8_.*|16|32|64))")
LARGEST = 2_000_000  # values and characters of a file's config, statistics and provenance


class Damaged(LdmError):
    """A file that is truncated, altered, or of no format that can be read."""


@dataclass(frozen=True)
class ModelFile:
    """A model: its weights, the config that builds it, and its origin."""

    kind: Kind
    config: dict[str, Any]
    weights: dict[str, Tensor]
    statistics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    autoencoder: "ModelFile | None" = None
    """Stage one of a stage-two model, so that one file is enough for sampling."""

    @property
    def sha256(self) -> str:
        """Hash of the names, types, shapes and bytes of the weights, in either file format."""
        return fingerprint(self.weights)

    @property
    def content_sha256(self) -> str:
        """Hash of the whole model, which both of its files hold."""
        plain = json.dumps([self.kind, self.config, self.statistics, self.provenance])
        inner = self.autoencoder.content_sha256 if self.autoencoder else None
        return sha256(f"{plain} {self.sha256} {inner}".encode()).hexdigest()


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of named tensors, independent of their order and device."""
    return fingerprint_each(weights, weights.__getitem__)


def fingerprint_each(names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """Compute the `fingerprint` of tensors that are read one at a time."""
    digest = sha256()
    for name in sorted(names):
        tensor = read(name).detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------ model files
def save_model(path: Path, model: ModelFile) -> None:
    """Write `ckpt.pt` and its `.safetensors` twin, both or none."""
    tree = _to_tree(model)
    # the twin last: it may be missing after a crash, and is then written again on resume
    write = partial(torch.save, tree)
    write_together({path: write, path.with_suffix(".safetensors"): _to_twin(tree)})


def to_twin(model: ModelFile) -> bytes:
    """Return the content of a `.safetensors` that holds a whole model, stage one included."""
    return _to_twin(_to_tree(model))


def repair_pair(path: Path) -> None:
    """Write a model's `.pt` and its twin again if one is missing or damaged, or if they differ."""
    pair = [try_call(load_model, each, None) for each in (path, path.with_suffix(".safetensors"))]
    whole = [model for model in pair if isinstance(model, ModelFile)]
    if len(whole) == 1 or len({model.content_sha256 for model in whole}) > 1:
        save_model(path, whole[0])


def load_model(path: str | Path, kind: Kind | None) -> ModelFile:
    """Read a model from a `.pt`, a `.safetensors` of any name, or the `ckpt.pt` of a run folder.

    With `kind` None, both stages will do.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "ckpt.pt").is_file():
            raise LdmError(f"{path} holds no ckpt.pt: its run has not written a model yet")
        path = path / "ckpt.pt"
    if not path.is_file():
        raise LdmError(f"no checkpoint at {path}")
    tree = _read_twin(path) if is_safetensors(path) else read_tensors(path)
    is_ours = isinstance(tree, dict) and isinstance(tree.get("format"), int)
    if not is_ours or tree.get("kind") not in tuple(STAGE):
        raise LdmError(f"{path} is not a model file of this toolkit (ckpt.pt of a run)")
    refuse_newer(path, tree["format"], FORMAT)
    if kind is not None and tree["kind"] != kind:
        raise LdmError(f"{path} is {STAGE[tree['kind']]}; {STAGE[kind]} is needed here")
    return _from_tree(tree, path)


def build_with(
    build: Callable[[], ModuleT], weights: Mapping[str, Any], path: str | Path
) -> ModuleT:
    """Build a module and give it the tensors of a file, whose names and shapes must agree."""
    with torch.device("meta"):  # no memory, no random numbers: every tensor comes from the file
        module = build()
    expected = module.state_dict()
    refuse_unusual(weights, path)
    if difference := first_difference(weights, expected):
        raise LdmError(f"{path} does not fit its own config: {difference}")
    refuse_damaged(weights, path)
    typed = {name: weights[name].to(tensor.dtype) for name, tensor in expected.items()}
    module.load_state_dict(typed, assign=True)
    return module


def first_difference(given: Mapping[str, Any], expected: Mapping[str, Tensor]) -> str | None:
    """Describe the first tensor of a file whose name, shape or kind of number is not the model's.

    Any floating point will do for another one.
    """
    for name in [*expected, *(name for name in given if name not in expected)]:
        found, needed = (
            tuple(tensors[name].shape)
            if isinstance(tensors.get(name), Tensor)
            else ("of another type" if name in tensors else "none")
            for tensors in (given, expected)
        )
        if found != needed:
            return f"tensor {name} is {found} in the file, {needed} in the model"
        if given[name].is_floating_point() != expected[name].is_floating_point():
            kinds = f"of {given[name].dtype} in the file, {expected[name].dtype} in the model"
            return f"tensor {name} is {kinds}"
    return None


def refuse_damaged(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise `Damaged` for a tensor that is no plain one, or one with a NaN or an infinity."""
    refuse_unusual(weights, path)
    for name, tensor in weights.items():
        if not _is_finite(tensor):
            raise Damaged(
                f"{path} is damaged: tensor {name} has values that are NaN or infinite: "
                "copy, fetch or train it again"
            )


def refuse_unusual(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise `Damaged` for a sparse, nested, quantised, complex or meta tensor, and for one larger
    than its storage (a stride of 0), a copy of which may need any amount of memory."""
    for name, tensor in weights.items():
        fault = None
        if tensor.is_nested or tensor.layout != torch.strided or tensor.is_neg():
            fault = "neither dense nor plain"
        elif tensor.is_meta or not KNOWN_DTYPE.fullmatch(str(tensor.dtype)):
            fault = f"of {'no values' if tensor.is_meta else tensor.dtype}"
        elif tensor.nbytes > tensor.untyped_storage().nbytes():
            fault = f"{tuple(tensor.shape)}, more than the file holds"
        if fault:
            raise Damaged(f"{path} is damaged: tensor {name} is {fault}: fetch it again")


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    # both ends are NaN if a value is; 25 times as fast as isfinite
    low, high = (tensor.float() if tensor.itemsize == 1 else tensor).aminmax()
    return bool(low.isfinite() and high.isfinite())


def is_safetensors(path: Path) -> bool:
    """Recognise a `.safetensors` file by its ending or its content.

    It begins with the length of a header in 8 bytes, and the header, a JSON object.
    """
    if path.suffix == ".safetensors":
        return True
    try:
        with path.open("rb") as file:
            start = file.read(9)
        size = path.stat().st_size
    except OSError:  # the reader reports it
        return False
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


@contextmanager
def open_safetensors(path: Path, advice: str = "copy or write it again") -> Iterator[Any]:
    """Open a `.safetensors` file as `safetensors.safe_open` does; its errors become LdmErrors, and
    `advice` is the end of the one for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (FileNotFoundError, PermissionError) as error:
        raise LdmError(f"could not read {path} ({error.strerror or error})") from error
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        message = lfs_pointer(path) or f"{path} is truncated or damaged: {advice}"
        raise Damaged(message) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a `.safetensors` file."""
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def to_safetensors(weights: Mapping[str, Tensor], **metadata: str) -> bytes:
    """Return the content of a `.safetensors` file."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    return save(plain, metadata or None)


def read_tensors(path: Path, mmap: bool = False) -> Any:
    """Call `torch.load` with `weights_only=True` and verify checksums; errors become LdmErrors.

    Args:
        mmap: map the tensors into memory instead of reading them: all processes share one copy,
            which the system drops when memory is short. Do not keep such tensors: they change with
            the file.
    """
    changed = tree = None
    try:
        with path.open("rb") as file:
            if file.read(2) == b"PK":  # PyTorch's old format has no checksums
                with ZipFile(file) as archive:
                    check_entries(archive, path.stat().st_size)
                    changed = archive.testzip()  # torch.load does not verify them
        if changed is None:
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (FileNotFoundError, PermissionError) as error:
        raise LdmError(f"could not read {path} ({error.strerror})") from error
    except UnpicklingError as error:
        message = (
            f"{path} refused: it is damaged, or loading it would run code; a model file holds "
            "tensors and plain values only"
        )
        raise Damaged(lfs_pointer(path) or message) from error
    except Exception as error:  # damaged files raise errors of nearly any type
        message = f"{path} is truncated or damaged: copy or write it again"
        raise Damaged(lfs_pointer(path) or message) from error
    if changed is not None:
        raise Damaged(
            f"{path} is damaged: the checksum of {changed} is wrong: copy or write it again"
        )
    return tree


def check_entries(archive: ZipFile, size: int) -> None:
    """Raise a ValueError for a zip file of this size that `torch.save` would not have written: with
    compressed entries, which may grow to any size, or with some that overlap or have one name."""
    entries = archive.infolist()
    lengths = [entry.file_size for entry in entries]
    if (
        any(entry.compress_type != ZIP_STORED for entry in entries)
        or lengths != [entry.compress_size for entry in entries]
        or sum(lengths) > size
        or len({entry.filename for entry in entries}) < len(entries)
    ):
        raise ValueError("entries are compressed, or overlap")


def _to_tree(model: ModelFile) -> dict[str, Any]:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.weights.items()}
    return {
        "format": FORMAT,
        "sha256": model.content_sha256,
        **{entry.name: getattr(model, entry.name) for entry in fields(model)},
        "weights": weights,
        "autoencoder": model.autoencoder and _to_tree(model.autoencoder),
    }


def _to_twin(tree: dict[str, Any]) -> bytes:
    plain, tensors = {**tree}, {**tree["weights"]}
    del plain["weights"]
    if inner := tree["autoencoder"]:
        tensors |= {f"{INNER}{name}": tensor for name, tensor in inner["weights"].items()}
        plain["autoencoder"] = {key: value for key, value in inner.items() if key != "weights"}
    # the only entry, for several would be written in any order
    return to_safetensors(tensors, ldm=json.dumps(plain))


def _from_tree(tree: dict[str, Any], path: Path) -> ModelFile:
    sections = ("config", "weights", "statistics", "provenance")
    parts: dict[str, Any] = {key: tree.get(key) for key in sections}
    inner = tree.get("autoencoder")
    if (
        not all(isinstance(part, dict) for part in parts.values())
        or not all(isinstance(tensor, Tensor) for tensor in parts["weights"].values())
        or tree.keys() - {"format", "sha256", "kind", "autoencoder", *sections}
        or (inner and not (isinstance(inner, dict) and inner.get("kind") == "autoencoder"))
        or (inner and tree["kind"] == "autoencoder")  # or itself
    ):
        raise LdmError(f"{path} lacks a section, or one is invalid: copy or write it again")
    refuse_unusual(parts["weights"], path)
    within = _from_tree(inner, path) if inner else None
    model = ModelFile(tree["kind"], **parts, autoencoder=within)
    try:
        check_bounds([model.config, model.statistics, model.provenance], LARGEST)
        found = model.content_sha256
    except (TypeError, ValueError) as error:
        raise Damaged(
            f"{path} holds more than tensors and plain values ({error}): copy or write it again"
        ) from error
    if tree.get("sha256", found) != found:  # files of earlier versions have none
        raise Damaged(
            f"{path} was altered: it is not what was written (SHA-256 differs): copy it again"
        )
    return model


def _read_twin(path: Path) -> Any:
    with open_safetensors(path) as file:
        tree = json.loads((file.metadata() or {}).get("ldm", "null"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if isinstance(tree, dict):
        tree["weights"] = {k: v for k, v in tensors.items() if not k.startswith(INNER)}
        if isinstance(tree.get("autoencoder"), dict):
            tree["autoencoder"]["weights"] = {
                k.removeprefix(INNER): v for k, v in tensors.items() if k.startswith(INNER)
            }
    return tree
