"""Model files: tensors and plain values, which load under `weights_only=True`.

They are written atomically, see `ldm.files`; loading them runs no code.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, TypeVar
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.files import write_atomically

FORMAT = 1
INNER = "autoencoder/"  # prefix of stage one's tensors in a `.safetensors`
ModuleT = TypeVar("ModuleT", bound=nn.Module)
Kind = Literal["autoencoder", "diffusion"]
STAGE = {"autoencoder": "a stage-one autoencoder", "diffusion": "a stage-two diffusion model"}


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


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of named tensors, independent of their order and device."""
    digest = sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------ model files
def save_model(path: Path, model: ModelFile) -> None:
    """Write `ckpt.pt` and its `.safetensors` twin, each atomically."""
    tree = _to_tree(model)
    write_atomically(path, lambda file: torch.save(tree, file))
    tensors = tree.pop("weights")
    if inner := tree["autoencoder"]:
        tensors |= {f"{INNER}{name}": tensor for name, tensor in inner.pop("weights").items()}
    twin = to_safetensors(tensors, ldm=json.dumps(tree))
    write_atomically(path.with_suffix(".safetensors"), twin)


def load_model(path: str | Path, kind: Kind) -> ModelFile:
    """Read a model from a `.pt`, a `.safetensors` of any name, or the `ckpt.pt` of a run folder."""
    path = Path(path)
    if path.is_dir():
        if not (path / "ckpt.pt").is_file():
            raise LdmError(f"{path} holds no ckpt.pt: its run has not written a model yet")
        path = path / "ckpt.pt"
    if not path.is_file():
        raise LdmError(f"no checkpoint at {path}")
    tree = _read_twin(path) if is_safetensors(path) else read_tensors(path)
    if not isinstance(tree, dict) or tree.get("kind") not in tuple(STAGE):
        raise LdmError(f"{path} is not a model file of this toolkit (ckpt.pt of a run)")
    if not isinstance(tree.get("format"), int) or tree["format"] > FORMAT:
        raise LdmError(
            f"{path} has format {shown(tree.get('format'))}, this version reads up to {FORMAT}: "
            "upgrade ldm"
        )
    if tree["kind"] != kind:
        raise LdmError(f"{path} is {STAGE[tree['kind']]}; {STAGE[kind]} is needed here")
    return _from_tree(tree, path)


def build_with(
    build: Callable[[], ModuleT], weights: Mapping[str, Any], path: str | Path
) -> ModuleT:
    """Build a module and give it the tensors of a file, whose names and shapes must agree."""
    with torch.device("meta"):  # no memory, no random numbers: every tensor comes from the file
        module = build()
    expected = module.state_dict()
    if difference := first_difference(weights, expected):
        raise LdmError(f"{path} does not fit its own config: {difference}")
    refuse_damaged(weights, path)
    typed = {name: weights[name].to(tensor.dtype) for name, tensor in expected.items()}
    module.load_state_dict(typed, assign=True)
    return module


def first_difference(given: Mapping[str, Any], expected: Mapping[str, Tensor]) -> str | None:
    """Describe the first tensor of a file whose name or shape differs from the model's."""
    for name in [*expected, *(name for name in given if name not in expected)]:
        found, needed = (
            tuple(tensors[name].shape) if isinstance(tensors.get(name), Tensor) else "none"
            for tensors in (given, expected)
        )
        if found != needed:
            return f"tensor {shown(name)} is {found} in the file, {needed} in the model"
    return None


def refuse_damaged(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise `Damaged` for a tensor larger than its storage (a stride of 0), for a sparse one, or
    for one with a NaN or an infinity.

    A copy of an overstated tensor may need any amount of memory.
    """
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise Damaged(
                f"{path} is damaged: tensor {shown(name)} is {tuple(tensor.shape)}, more than the "
                "file holds"
            )
        if not _is_finite(tensor):
            raise Damaged(
                f"{path} is damaged: tensor {shown(name)} has values that are NaN or infinite: "
                "copy, fetch or train it again"
            )


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    # both ends are NaN if a value is; 25 times as fast as isfinite
    low, high = (tensor.float() if tensor.itemsize == 1 else tensor).aminmax()
    return bool(low.isfinite() and high.isfinite())


def shown(name: Any) -> str:
    """Make a name from a file safe to print: escape control characters and newlines."""
    return name if isinstance(name, str) and name.isprintable() else repr(name)


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
    except (SafetensorError, OSError, ValueError) as error:
        raise Damaged(f"{path} is truncated or damaged: {advice}") from error


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
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        changed = None
        if is_zipfile(path):  # PyTorch's old format has no checksums
            with ZipFile(path) as archive:
                changed = archive.testzip()  # torch.load does not verify them
    except (FileNotFoundError, PermissionError) as error:
        raise LdmError(f"could not read {path} ({error.strerror})") from error
    except UnpicklingError as error:
        raise Damaged(
            f"{path} refused: it is damaged, or loading it would run code; a model file holds "
            "tensors and plain values only"
        ) from error
    except Exception as error:  # damaged files raise errors of nearly any type
        raise Damaged(f"{path} is truncated or damaged: copy or write it again") from error
    if changed is not None:
        raise Damaged(
            f"{path} is damaged: the checksum of {shown(changed)} is wrong: copy or write it again"
        )
    return tree


def _to_tree(model: ModelFile) -> dict[str, Any]:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.weights.items()}
    return {
        "format": FORMAT,
        **{entry.name: getattr(model, entry.name) for entry in fields(model)},
        "weights": weights,
        "autoencoder": model.autoencoder and _to_tree(model.autoencoder),
    }


def _from_tree(tree: dict[str, Any], path: Path) -> ModelFile:
    sections = ("config", "weights", "statistics", "provenance")
    parts: dict[str, Any] = {key: tree.get(key) for key in sections}
    inner = tree.get("autoencoder")
    if (
        not all(isinstance(part, dict) for part in parts.values())
        or not all(isinstance(tensor, Tensor) for tensor in parts["weights"].values())
        or (inner and not (isinstance(inner, dict) and inner.get("kind") == "autoencoder"))
    ):
        raise LdmError(f"{path} lacks a section, or one is invalid: copy or write it again")
    return ModelFile(tree["kind"], **parts, autoencoder=_from_tree(inner, path) if inner else None)


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
