"""Reading of trained autoencoders: files and folders, ours or other people's, told by content."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from autoencoders.hub import WEIGHTS_FILE, is_ours, read_pretrained
from autoencoders.sdvae.formats import FIRST_COMPVIS as FIRST
from autoencoders.sdvae.formats import FIRST_WEIGHTS as DIFFUSERS_FIRST
from autoencoders.sdvae.formats import (
    find_prefix,
    from_compvis,
    pick,
    pick_said,
    read_diffusers,
    tree_from_compvis,
    weights_files,
)
from ldm.checkpoint import (
    is_safetensors,
    load_model,
    open_safetensors,
    refuse_overstated,
)
from ldm.errors import LdmError
from ldm.files import read_json
from ldm.safe_pickle import read_foreign


class AutoencoderFile(NamedTuple):
    """An autoencoder as it was read: all that building it needs, and where it comes from."""

    tree: dict[str, Any]
    """Of an `AutoencoderConfig`, not yet validated."""
    weights: dict[str, Tensor]
    """By our names."""
    format: Literal["ldm", "hub", "diffusers", "compvis"]
    """Ours, ours by the Hub's conventions, diffusers' `AutoencoderKL`, or CompVis's."""
    files: tuple[Path, ...]
    """Those that hold the weights."""
    provenance: dict[str, Any]
    """What the source says of itself: ours of its training and whence it was `imported`, a folder's
    config.json, under `imported`, of its use."""


def read_autoencoder(path: str | Path) -> AutoencoderFile:
    """Read what `load_autoencoder` does, without building it.

    Raises:
        LdmError: it cannot be read, or is none of the known formats.
    """
    path = Path(path)
    if not (path / "ckpt.pt").is_file():  # a run's, whatever else was put beside it
        if (path / "config.json").is_file():
            return _read_folder(path)
        if (path / "model_index.json").is_file():
            raise LdmError(
                f"{path} is a whole pipeline of diffusers: give the folder of its autoencoder, "
                f"mostly {path / 'vae'} (or --subfolder vae)"
            )
    if path.is_file():
        theirs = (_read_compvis if is_safetensors(path) else _read_pickle)(path)
        if theirs is not None:
            return theirs
    model = load_model(path, "autoencoder")
    file = path / "ckpt.pt" if path.is_dir() else path
    return AutoencoderFile(model.config, model.weights, "ldm", (file,), model.provenance)


def _read_folder(folder: Path) -> AutoencoderFile:
    described = read_json(folder / "config.json")
    if described is None:
        raise LdmError(f"{folder}/config.json describes no SD-VAE to load here: not a JSON object")
    if is_ours(described):
        parts = read_pretrained(folder, described)
        said = pick_said(described.get("imported"))
        return AutoencoderFile(*parts, "hub", (folder / WEIGHTS_FILE,), {"imported": said})
    parts = read_diffusers(folder)
    said = {"imported": pick_said(described)}
    return AutoencoderFile(*parts, "diffusers", tuple(weights_files(folder)), said)


def _read_compvis(path: Path) -> AutoencoderFile | None:
    """A CompVis checkpoint; None where the file says that it is ours."""
    with open_safetensors(path) as file:
        if "ldm" in (file.metadata() or {}):
            return None
        names = list(file.keys())
        prefix = find_prefix(names)
        if prefix is None:
            _refuse_other_names(names, path)
            raise LdmError(f"{path} holds weights without a config{_beside(path)}")
        weights = {name: file.get_tensor(name) for name in names if name.startswith(prefix)}
    return _of_compvis(weights, prefix, path)


def _read_pickle(path: Path) -> AutoencoderFile | None:
    """A CompVis checkpoint; None where the file is none."""
    if path.suffix == ".json":
        raise LdmError(f"{path} is a config without weights: give its folder, {path.parent}")
    tree = read_foreign(path)
    weights = tree.get("state_dict", tree) if isinstance(tree, dict) else {}
    names = [name for name in weights if isinstance(name, str)] if isinstance(weights, dict) else []
    prefix = find_prefix(names)
    if prefix is None:
        return _refuse_other_names(names, path)
    return _of_compvis({name: weights[name] for name in names}, prefix, path)


def _of_compvis(weights: dict[str, Any], prefix: str, path: Path) -> AutoencoderFile:
    try:
        theirs = pick(weights, prefix)
        tree = tree_from_compvis(theirs)
    except LdmError as error:
        raise LdmError(f"{path} cannot be read: {error}") from error
    refuse_overstated(theirs, path)
    # cloned: they are to outlive the file that they lie in
    ours = {name: tensor.clone() for name, tensor in from_compvis(theirs).items()}
    return AutoencoderFile(tree, ours, "compvis", (path,), {})


def _refuse_other_names(names: Sequence[str], path: Path) -> None:
    """Say what weights without a config are, where their names tell.

    Raises:
        LdmError: they are diffusers', or CompVis's under another prefix than theirs.
    """
    for name in names:
        if name.endswith(DIFFUSERS_FIRST):
            how = _beside(path)
            if not is_safetensors(path):
                how = ": diffusers' save_pretrained turns its model into a folder to give here"
            raise LdmError(f"{path} holds weights of diffusers, without a config{how}")
        if name.endswith(f".{FIRST}"):
            raise LdmError(
                f"{path} holds an autoencoder's weights under {name.removesuffix(FIRST)!r}, which "
                "CompVis's names have not: save its state_dict without that prefix"
            )


def _beside(path: Path) -> str:
    """What to give in the place of a file of weights without its config."""
    if (path.parent / "config.json").is_file():
        return f": give its folder, {path.parent}"
    return ": give the folder of the model, with its config.json"
