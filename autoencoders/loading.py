"""Read trained autoencoders, ours or other toolkits', from files and folders known by content."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from autoencoders.hub import LIBRARY, WEIGHTS_FILE, read_pretrained
from autoencoders.sdvae.formats import (
    COMPVIS_FIRST,
    COMPVIS_PREFIXES,
    DIFFUSERS_FIRST,
    from_compvis,
    pick_compvis,
    pick_settings,
    read_diffusers,
    tree_from_compvis,
)
from ldm.checkpoint import is_safetensors, load_model, open_safetensors, refuse_overstated
from ldm.errors import LdmError
from ldm.foreign import find_prefix, read_described, read_weights, weights_files


class AutoencoderFile(NamedTuple):
    """An autoencoder as read from disk: its config, its weights and where it comes from."""

    tree: dict[str, Any]
    """Of an `AutoencoderConfig`, not yet validated."""
    weights: dict[str, Tensor]
    """By our names."""
    format: Literal["ldm", "hub", "diffusers", "compvis"]
    """Ours, ours by the Hub's conventions, diffusers' `AutoencoderKL`, or CompVis's."""
    files: tuple[Path, ...]
    """The files that hold the weights."""
    provenance: dict[str, Any]
    """Ours: how it was trained, or where it was `imported` from. A folder's config.json: its usage
    settings, under `imported`."""


def read_autoencoder(path: str | Path) -> AutoencoderFile:
    """Read any format of `load_autoencoder` without building the model.

    Raises:
        LdmError: it cannot be read, or is none of the known formats.
    """
    path = Path(path)
    if not (path / "ckpt.pt").is_file():  # a run, whatever else lies beside it
        if (path / "config.json").is_file():
            return _read_folder(path)
        if (path / "model_index.json").is_file():
            raise LdmError(
                f"{path} is a whole diffusers pipeline: give the folder of its autoencoder, "
                f"mostly {path / 'vae'} (or --subfolder vae)"
            )
    if path.is_file() and (found := _read_compvis(path)):
        return found
    model = load_model(path, "autoencoder")
    file = path / "ckpt.pt" if path.is_dir() else path
    return AutoencoderFile(model.config, model.weights, "ldm", (file,), model.provenance)


def _read_folder(folder: Path) -> AutoencoderFile:
    described = read_described(folder / "config.json")
    if described.get("library_name") == LIBRARY:
        tree, weights = read_pretrained(folder, described)
        settings = {"imported": pick_settings(described.get("imported"))}
        return AutoencoderFile(tree, weights, "hub", (folder / WEIGHTS_FILE,), settings)
    tree, weights = read_diffusers(folder, described)
    settings = {"imported": pick_settings(described)}
    return AutoencoderFile(tree, weights, "diffusers", tuple(weights_files(folder)), settings)


def _read_compvis(path: Path) -> AutoencoderFile | None:
    """A CompVis checkpoint; None where the file may be ours."""
    if path.suffix == ".json":
        raise LdmError(f"{path} is a config without weights: give its folder, {path.parent}")
    if is_safetensors(path):
        with open_safetensors(path) as file:
            if "ldm" in (file.metadata() or {}):
                return None
    weights = read_weights(path)
    prefix = find_prefix(weights, COMPVIS_PREFIXES, COMPVIS_FIRST)
    if prefix is None:
        _refuse_other_names(weights, path)
        return None
    try:
        theirs = pick_compvis(weights, prefix)
        tree = tree_from_compvis(theirs)
    except LdmError as error:
        raise LdmError(f"{path} cannot be read: {error}") from error
    refuse_overstated(theirs, path)
    # cloned: they are to outlive the file that they lie in
    ours = {name: tensor.clone() for name, tensor in from_compvis(theirs).items()}
    return AutoencoderFile(tree, ours, "compvis", (path,), {})


def _refuse_other_names(names: Iterable[str], path: Path) -> None:
    """Refuse weights that lack a config, or have an unknown prefix."""
    folder = ": give the folder of the model, with its config.json"
    if (path.parent / "config.json").is_file():
        folder = f": give its folder, {path.parent}"
    for name in names:
        if name.endswith(DIFFUSERS_FIRST):
            if not is_safetensors(path):
                folder = ": save the model as a folder by diffusers' save_pretrained, and give that"
            raise LdmError(f"{path} holds weights of diffusers, without a config{folder}")
        if name.endswith(f".{COMPVIS_FIRST}"):
            raise LdmError(
                f"{path} holds an autoencoder's weights under the unknown prefix "
                f"{name.removesuffix(COMPVIS_FIRST)!r}: save its state_dict without that prefix"
            )
    if is_safetensors(path):
        raise LdmError(f"{path} holds weights without a config{folder}")
