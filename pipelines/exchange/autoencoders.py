"""Autoencoders in and out: other toolkits' to a `ckpt.pt` of ours, ours to their formats."""

import math
import re
from contextlib import suppress
from hashlib import file_digest
from pathlib import Path
from typing import Any, Literal, get_args

from autoencoders.autoencoder import assemble
from autoencoders.pretrained import AutoencoderFile, find_pretrained, read_autoencoder
from autoencoders.sdvae.formats import pick_settings, write_compvis, write_diffusers
from ldm.checkpoint import Kind, ModelFile, load_model, save_model
from ldm.config import to_tree
from ldm.errors import LdmError, UsageError
from ldm.run_folder import newest_run, provenance

ExportFormat = Literal["diffusers", "compvis", "hub"]


def import_autoencoder(
    source: str,
    out: Path,
    subfolder: str | None = None,
    revision: str | None = None,
    force: bool = False,
) -> list[Path]:
    """Convert any autoencoder that can be read to a model file of ours and its `.safetensors` twin.

    The file records where its weights come from, not how they were trained.

    Args:
        source: a path for `load_autoencoder`, or a Hub repository.
        out: the `.pt` to write.
        subfolder: folder of the autoencoder inside the source.
        revision: branch, tag or commit of a Hub repository.
        force: overwrite existing files.

    Returns:
        The files written.

    Raises:
        UsageError: `out` is no `.pt` or is the source, or a revision was given for a local path.
        LdmError: the source cannot be read, or `out` exists.
    """
    paths = import_paths(source, out, force)
    path = find_pretrained(source, revision, subfolder)
    found = read_autoencoder(path)
    ae = assemble(found, path)
    origin: dict[str, Any] = {
        "source": source,
        "format": found.format,
        "sha256": {file.name: file_sha256(file) for file in found.files},
    }
    subfolder = (subfolder or "").strip("/")
    requested = {"subfolder": subfolder, "revision": revision, "commit": _commit(path)}
    origin |= {key: value for key, value in requested.items() if value}
    before = _imported(found)
    origin |= pick_settings(before)
    if "source" in before:  # it was imported once already
        origin["imported"] = before
    model = ModelFile(
        "autoencoder", to_tree(ae.config), ae.state_dict(),
        provenance=provenance() | {"imported": origin},
    )  # fmt: skip
    save_model(out, model)
    return paths


def export_autoencoder(
    out: Path,
    form: ExportFormat,
    model: Path | None = None,
    scaling_factor: float | None = None,
    force: bool = False,
) -> list[Path]:
    """Write an autoencoder in the format of another toolkit.

    Args:
        out: a folder for diffusers and hub, a `.safetensors` or `.ckpt` for compvis.
        model: a path for `load_autoencoder`. Default: the newest run.
        scaling_factor: 1 ÷ the standard deviation of its latents, which diffusers stores. Default:
            that of an imported model, else SD-VAE's.
        force: overwrite existing files, but never a run or a model of ours.

    Returns:
        The files written.

    Raises:
        UsageError: `out` is not of the format's kind, or is a model or the folder of a run, or the
            scaling factor is not above 0.
        LdmError: the model cannot be read or expressed, or `out` exists.
    """
    if form not in get_args(ExportFormat):
        raise UsageError(f"--format {form}: must be one of {', '.join(get_args(ExportFormat))}")
    if scaling_factor is not None and not 0 < scaling_factor < math.inf:
        raise UsageError(f"--scaling-factor {scaling_factor}: must be above 0 and finite")
    refuse_our_own(out, is_named=model is not None)
    is_file = out.suffix in (".safetensors", ".ckpt")
    if is_file != (form == "compvis") or out.suffix == ".pt":
        kind = "a .safetensors or .ckpt file" if form == "compvis" else "a folder"
        raise UsageError(f"{out}: --format {form} writes {kind}")
    refuse_to_overwrite([out] if is_file else sorted(out.glob("*")), force)
    path = model or newest_run("autoencoder")
    found = read_autoencoder(path)
    if any(out.resolve() in (file.resolve(), file.resolve().parent) for file in found.files):
        raise UsageError(f"{out} is the folder of the model to export: give OUT another name")
    ae = assemble(found, path)
    if form == "hub":
        return ae.save_pretrained(out, _imported(found))
    if form == "compvis":
        return write_compvis(out, ae)
    return write_diffusers(out, ae, scaling_factor, _imported(found))


def _imported(found: AutoencoderFile) -> dict[str, Any]:
    """The settings that a model was imported with; empty where it was trained here."""
    imported = found.provenance.get("imported")
    return imported if isinstance(imported, dict) else {}


def import_paths(source: str, out: Path, force: bool) -> list[Path]:
    """The files that an import writes, `out` and its `.safetensors` twin, if it may."""
    if out.suffix != ".pt":
        raise UsageError(f"{out}: the file to write must end in .pt, such as {out.stem}.pt")
    paths = [out, out.with_suffix(".safetensors")]
    same = next((path for path in paths if path.resolve() == Path(source).resolve()), None)
    if same:
        raise UsageError(f"{same} is the model to import: give OUT.pt another name")
    refuse_to_overwrite(paths, force)
    return paths


def refuse_our_own(out: Path, is_named: bool) -> None:
    """Refuse to export over a run's folder or a model file of ours, forced or not.

    Args:
        is_named: whether the model to export was given; if not, `out` may be meant as the model.
    """
    if _is_ours(out):
        if not is_named:
            raise UsageError(f"{out} is a model, and OUT is missing: ldm export {out} OUT")
        raise UsageError(f"{out} is a run or a model of yours: give OUT another name")


def refuse_to_overwrite(paths: list[Path], force: bool) -> None:
    """Refuse to overwrite files, unless forced."""
    there = next((path for path in paths if path.exists()), None)
    if there and not force:
        raise LdmError(f"{there} exists: give another name, or --force to overwrite it")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _is_ours(path: Path) -> bool:
    """Return whether a path is a run's folder or a model file of ours."""
    if path.is_dir():
        return any((path / name).exists() for name in ("run.json", "ckpt.pt"))
    for kind in get_args(Kind):
        with suppress(LdmError):
            load_model(path, kind)
            return True
    return False


def _commit(path: Path) -> str | None:
    """The commit in the path of a Hub's cache folder (…/snapshots/<commit>); None: no such path."""
    found = re.search(r"/snapshots/([0-9a-f]{40})(/|$)", path.absolute().as_posix())
    return found[1] if found else None
