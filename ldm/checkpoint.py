"""Model files, which people pass on.

They hold plain Python values and tensors and load under `weights_only=True`: no code in them is
run. They are written whole or not at all; see `ldm.files`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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
ModuleT = TypeVar("ModuleT", bound=nn.Module)
Kind = Literal["autoencoder", "diffusion"]
STAGE = {"autoencoder": "a stage-one autoencoder", "diffusion": "a stage-two diffusion model"}


class Damaged(LdmError):
    """A file that is there, and is not what was written."""


@dataclass(frozen=True)
class ModelFile:
    """A model to use: its weights, the config that builds it, and where it comes from."""

    kind: Kind
    config: dict[str, Any]
    weights: dict[str, Tensor]
    statistics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    autoencoder: "ModelFile | None" = None
    """A stage-two file carries its stage one, so that one file samples."""

    @property
    def sha256(self) -> str:
        """Identity of the weights: their names, types, shapes and bytes, whatever the container."""
        return fingerprint(self.weights)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over named tensors, independent of their order and device."""
    digest = sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(
            tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        )
    return digest.hexdigest()


# ------------------------------------------------------------------------------ model files
def save_model(path: Path, model: ModelFile) -> None:
    """Write `ckpt.pt` and its `.safetensors` twin, each whole or not at all."""
    from safetensors.torch import save

    tree = _to_tree(model)
    write_atomically(path, lambda file: torch.save(tree, file))
    tensors, meta = _split_tensors(tree)
    payload = save(tensors, metadata={"ldm": json.dumps(meta)})
    write_atomically(path.with_suffix(".safetensors"), lambda file: file.write(payload))


def load_model(path: str | Path, kind: Kind) -> ModelFile:
    """Read a model from a `.pt`, a `.safetensors` (by any name), or a run folder (its `ckpt.pt`).

    Raises:
        LdmError: it is not there, truncated, of the other stage, of a newer format, no file of
            ours, or a pickle that would run code (which is refused, not run).
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "ckpt.pt").is_file():
            raise LdmError(f"{path} holds no ckpt.pt: has the run in it been finished or stopped?")
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
    """The module that `build` makes, with the tensors of a file.

    Raises:
        LdmError: the file's tensors are not the module's: the first that differs, both shapes.
        Damaged: a tensor has more values than the file holds of it.
    """
    with torch.device("meta"):  # no memory, no random numbers: every tensor comes from the file
        module = build()
    expected = module.state_dict()
    for name in [*expected, *(name for name in weights if name not in expected)]:
        needed, given = (
            tuple(tensors[name].shape) if isinstance(tensors.get(name), Tensor) else "none"
            for tensors in (expected, weights)
        )
        if needed != given:
            raise LdmError(
                f"{path} does not fit its own config: tensor {shown(name)} is {given} in the "
                f"file, {needed} in the model"
            )
    refuse_overstated(weights, path)
    typed = {name: weights[name].to(tensor.dtype) for name, tensor in expected.items()}
    module.load_state_dict(typed, assign=True)
    return module


def refuse_overstated(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse tensors that a copy would make larger than what the file holds of them.

    Raises:
        Damaged: there is one, such as with a stride of 0, or it is sparse.
    """
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise Damaged(
                f"{path} is damaged: tensor {shown(name)} is {tuple(tensor.shape)}, more than the "
                "file holds of it"
            )


def shown(name: Any) -> str:
    """What a file calls something, safe to print: control characters and newlines escaped."""
    return name if isinstance(name, str) and name.isprintable() else repr(name)


def is_safetensors(path: Path) -> bool:
    """Whether a file is a `.safetensors`, by its ending or, whatever its ending, by its start: the
    header's length in 8 bytes, then the header, a JSON object."""
    if path.suffix == ".safetensors":
        return True
    try:
        with path.open("rb") as file:
            start = file.read(9)
        size = path.stat().st_size
    except OSError:  # told by whoever reads it next
        return False
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


@contextmanager
def open_safetensors(path: Path, advice: str = "copy or write it again") -> Iterator[Any]:
    """Open a `.safetensors` file as `safetensors.safe_open` does, to read it inside the `with`.

    Args:
        advice: the end of the error message for a damaged file.

    Raises:
        LdmError: it is not there or may not be read.
        Damaged: it is truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (FileNotFoundError, PermissionError) as error:
        raise LdmError(f"could not read {path} ({error.strerror or error})") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise Damaged(f"{path} is truncated or damaged: {advice}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` file; errors as in `open_safetensors`."""
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_tensors(path: Path) -> Any:
    """`torch.load` under `weights_only=True`, its many failures told as one line.

    Raises:
        LdmError: it is not there or may not be read.
        Damaged: it is truncated or damaged, or a pickle that would run code.
    """
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
        changed = _first_changed(path)
    except (FileNotFoundError, PermissionError) as error:
        raise LdmError(f"could not read {path} ({error.strerror})") from error
    except UnpicklingError as error:
        raise Damaged(
            f"{path} refused: loading it would run code, or it is damaged; a model file holds "
            "tensors and plain values only"
        ) from error
    except Exception as error:  # damage makes the reader raise nearly anything
        raise Damaged(f"{path} is truncated or damaged: copy or write it again") from error
    if changed is not None:
        raise Damaged(
            f"{path} is damaged: the checksum of {shown(changed)} is wrong: copy or write it again"
        )
    return tree


def _first_changed(path: Path) -> str | None:
    """The first entry whose bytes are not those that were written, which `torch.load` takes."""
    if not is_zipfile(path):  # PyTorch's old format keeps no checksums
        return None
    with ZipFile(path) as archive:
        return archive.testzip()


def _to_tree(model: ModelFile) -> dict[str, Any]:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.weights.items()}
    return {
        "format": FORMAT,
        "kind": model.kind,
        "config": model.config,
        "weights": weights,
        "statistics": model.statistics,
        "provenance": model.provenance,
        "autoencoder": _to_tree(model.autoencoder) if model.autoencoder else None,
    }


def _from_tree(tree: dict[str, Any], path: Path) -> ModelFile:
    parts = {key: tree.get(key) for key in ("config", "weights", "statistics", "provenance")}
    if not all(isinstance(part, dict) for part in parts.values()):
        raise LdmError(f"{path} lacks a part of a model file: copy or write it again")
    if not all(isinstance(tensor, Tensor) for tensor in parts["weights"].values()):
        raise LdmError(f"{path} holds weights that are no tensors: copy or write it again")
    inner = tree.get("autoencoder")
    if inner and not (isinstance(inner, dict) and inner.get("kind") == "autoencoder"):
        raise LdmError(f"{path} carries an autoencoder that is none: copy or write it again")
    return ModelFile(tree["kind"], **parts, autoencoder=_from_tree(inner, path) if inner else None)


def _split_tensors(tree: dict[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict]:
    """The tree as safetensors wants it: flat named tensors, and the rest as JSON."""
    tensors = {f"{prefix}{name}": tensor for name, tensor in tree["weights"].items()}
    meta = {key: value for key, value in tree.items() if key not in ("weights", "autoencoder")}
    meta["autoencoder"] = None
    if tree["autoencoder"]:
        inner, meta["autoencoder"] = _split_tensors(tree["autoencoder"], "autoencoder/")
        tensors |= inner
    return tensors, meta


def _read_twin(path: Path) -> Any:
    with open_safetensors(path) as file:
        tree = json.loads((file.metadata() or {}).get("ldm", "null"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if isinstance(tree, dict):
        inner = "autoencoder/"
        tree["weights"] = {k: v for k, v in tensors.items() if not k.startswith(inner)}
        if isinstance(tree.get("autoencoder"), dict):
            tree["autoencoder"]["weights"] = {
                k.removeprefix(inner): v for k, v in tensors.items() if k.startswith(inner)
            }
    return tree
