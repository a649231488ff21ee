"""Models in and out: other people's as a `ckpt.pt` of ours, ours as others open them."""

from hashlib import file_digest
from pathlib import Path
from typing import Any, Literal, get_args

from autoencoders.hub import find_pretrained, save_pretrained
from autoencoders.loading import assemble, read_autoencoder
from autoencoders.sdvae.export import SCALING_FACTOR, write_compvis, write_diffusers
from ldm.checkpoint import ModelFile, save_model
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
    """Write a model file of ours, and its `.safetensors` twin, of any autoencoder that can be read.

    It says where its weights come from, and nothing of how they were trained.

    Args:
        source: what `load_autoencoder` takes, or a Hub repository.
        out: the `.pt` to write.
        force: write over a file that is there.

    Raises:
        UsageError: `out` is no `.pt`.
        LdmError: the source cannot be read, or `out` is there already.
    """
    if out.suffix != ".pt":
        raise UsageError(f"{out}: the file to write must end in .pt, such as {out.stem}.pt")
    paths = [out, out.with_suffix(".safetensors")]
    _refuse_to_overwrite(paths, force)
    path = find_pretrained(source, revision, subfolder)
    found = read_autoencoder(path)
    ae = assemble(found, path)
    origin: dict[str, Any] = {
        "source": source,
        "format": found.format,
        "sha256": {file.name: _sha256(file) for file in found.files},
    }
    said = {key: found.provenance[key] for key in ("scaling_factor",) if key in found.provenance}
    model = ModelFile(
        "autoencoder", to_tree(ae.config), ae.state_dict(),
        provenance=provenance() | {"imported": origin | said},
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
    """Write an autoencoder in a format of others.

    Args:
        out: a folder for diffusers and hub, a `.safetensors` or `.ckpt` for compvis.
        model: what `load_autoencoder` takes; the newest run if left out.
        scaling_factor: 1 ÷ the standard deviation of its latents, which diffusers writes down. Left
            out: what an imported model came with, else SD-VAE's.
        force: write over files that are there.

    Raises:
        UsageError: `out` is not of the format's kind, or a scaling factor is not above 0.
        LdmError: the model cannot be read or expressed, or `out` is there already.
    """
    if form not in get_args(ExportFormat):
        raise UsageError(f"--format {form}: there are {', '.join(get_args(ExportFormat))}")
    if scaling_factor is not None and not scaling_factor > 0:
        raise UsageError(f"--scaling-factor {scaling_factor}: it must be above 0")
    is_file = out.suffix in (".safetensors", ".ckpt", ".pt")
    if is_file != (form == "compvis"):
        kind = "a .safetensors or .ckpt file" if form == "compvis" else "a folder"
        raise UsageError(f"{out}: --format {form} writes {kind}")
    _refuse_to_overwrite([out] if is_file else sorted(out.glob("*")), force)
    path = model or newest_run("autoencoder")
    found = read_autoencoder(path)
    ae = assemble(found, path)
    if form == "hub":
        return save_pretrained(ae, out)
    if form == "compvis":
        return write_compvis(out, ae)
    said = found.provenance | found.provenance.get("imported", {})
    return write_diffusers(out, ae, scaling_factor or said.get("scaling_factor", SCALING_FACTOR))


def _refuse_to_overwrite(paths: list[Path], force: bool) -> None:
    there = next((path for path in paths if path.exists()), None)
    if there and not force:
        raise LdmError(f"{there} is there already: give another name, or --force to write over it")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
