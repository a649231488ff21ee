"""Models in and out: those of diffusers, CompVis and DiT as a `ckpt.pt` of ours, ours as theirs.

A latent diffusion model of theirs is a network of discrete time, the noise levels it was trained
with, a KL or VQ autoencoder, and the scaling of latents between the two: z = (latents − mean) ·
scale ÷ std, in most by the scale alone.
"""

import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from autoencoders.autoencoder import Autoencoder, assemble
from autoencoders.diffusers_parts import write_other
from autoencoders.pretrained import (
    AutoencoderFile,
    describe_source,
    find_license,
    find_pretrained,
    read_autoencoder,
)
from autoencoders.sdvae import formats as sdvae
from diffusion import DiT, DiTConfig, dit_formats, formats
from diffusion.discrete import DiscreteConfig, DiscreteDenoiser, find_schedule
from diffusion.flow import FlowConfig
from diffusion.unet import UNet, UNetConfig
from ldm.checkpoint import ModelFile, load_model, refuse_damaged, save_model
from ldm.config import (
    Resolution,
    format_size,
    height_width,
    plain_size,
    read_resolution,
    size_word,
    to_tree,
    validate,
)
from ldm.data import DataConfig
from ldm.errors import LdmError, UsageError, check_at_least, try_call
from ldm.files import check_writable, refuse_to_overwrite, sha256_of
from ldm.foreign import find_prefix, read_described, read_weights, weights_files
from ldm.run_folder import newest_run, provenance
from pipelines.recipes import DiffusionRecipe, latent_shape
from pipelines.sampling.model import LatentModel

ANOTHER = "give OUT another name"
UNSCALED = (
    "it has no scaling factor of its latents: 1, as for CompVis' VQ models, unless --scale-factor "
    "is given"
)
UNKNOWN_SCALE = (
    "its autoencoder has no scaling factor: 0.18215, SD-VAE's, unless --scale-factor is given; for "
    "a LightningDiT, whose latents are standardised by channel, write latents_mean, latents_std "
    "and scaling_factor 1 into its config.json"
)
ExportFormat = Literal["diffusers", "compvis", "hub"]
SCHEDULER = "scheduler/scheduler_config.json"
KINDS = {"ldm": "UNet", "dit": "DiT"}
"""Networks of others, by our `network.type`."""


# --------------------------------------------------------------------------------- autoencoders
def import_autoencoder(
    source: str,
    out: Path,
    subfolder: str | None = None,
    revision: str | None = None,
    force: bool = False,
) -> list[Path]:
    """Convert any autoencoder that `load_autoencoder` or the Hub has to a model file of ours and
    its `.safetensors` twin, and return both paths.

    The file records where its weights come from, not how they were trained.
    """
    paths = _import_paths(source, out, force)
    path = find_pretrained(source, revision, subfolder)
    found = read_autoencoder(path)
    ae = assemble(found, path)
    settings = ae.settings
    scaled = {"scaling_factor": sdvae.SCALING_FACTOR, **settings}
    sdvae.latent_statistics(scaled, None, ae.config.latent_channels, path)
    sdvae.check_settings(settings, path)
    details = {"subfolder": (subfolder or "").strip("/"), "revision": revision}
    origin = {
        **describe_source(source, found, path),
        "sha256": {file.name: sha256_of(file) for file in found.files},
        **{key: value for key, value in details.items() if value},
    }
    known = provenance() | {"imported": origin}
    save_model(out, ModelFile("autoencoder", to_tree(ae.config), ae.state_dict(), provenance=known))
    return paths


def export_autoencoder(
    out: Path,
    form: ExportFormat,
    model: Path | None = None,
    scaling_factor: float | None = None,
    force: bool = False,
) -> list[Path]:
    """Write an autoencoder (default: of the newest run) in the format of another toolkit, and
    return the files.

    Args:
        out: a folder for diffusers and hub, a `.safetensors` or `.ckpt` for compvis.
        scaling_factor: 1 ÷ the standard deviation of its latents, which diffusers stores. Default:
            that of an imported model, else SD-VAE's.
    """
    if form not in get_args(ExportFormat):
        raise UsageError(f"--format {form}: must be one of {', '.join(get_args(ExportFormat))}")
    if scaling_factor is not None and not 0 < scaling_factor < math.inf:
        raise UsageError(f"--scaling-factor {scaling_factor}: must be above 0 and finite")
    _check_out(out, form, model, force)
    path = model or newest_run("autoencoder")
    found = read_autoencoder(path)
    _refuse_own_folder(out, found.files)
    ae, imported = assemble(found, path), found.provenance.get("imported")
    if form == "hub":
        return ae.save_pretrained(out, imported)
    if form == "compvis":
        return sdvae.write_compvis(out, ae)
    if ae.config.encoder.type == "diffusers":
        return write_other(out, ae, scaling_factor)
    return sdvae.write_diffusers(out, ae, scaling_factor, imported)


# ------------------------------------------------------------------------- diffusion models in
class ForeignModel(NamedTuple):
    """A latent diffusion model of another toolkit, its weights by our names."""

    format: Literal["compvis", "diffusers", "dit"]
    network: UNetConfig | DiTConfig
    weights: dict[str, Tensor]
    files: tuple[Path, ...]
    """The files that hold weights."""
    autoencoder: AutoencoderFile
    denoiser: DiscreteConfig | FlowConfig
    settings: dict[str, Any]
    """Of its latents, by diffusers' names: scaling_factor, latents_mean, …"""
    size: Resolution | None = None
    """Size of the latents it was trained on, if known."""
    notes: tuple[str, ...] = ()
    """Assumptions made, a line each."""


def import_diffusion(
    source: str,
    out: Path,
    resolution: Resolution | None = None,
    head_width: int | None = None,
    heads: int | None = None,
    scale_factor: float | None = None,
    force: bool = False,
    autoencoder: str | None = None,
    denoiser: str | None = None,
) -> tuple[list[Path], list[str]]:
    """Convert a latent diffusion model to a model file of ours and its `.safetensors` twin.

    Args:
        source: a CompVis or DiT checkpoint, or the folder of a diffusers pipeline.
        resolution: size of its images, in pixels. Default: the source's, else 256.
        head_width, heads: of a checkpoint's attention, one of them. Default: heads 32 wide; of a
            DiT, those of the published one of its width.
        scale_factor: factor that multiplies its latents. Default: the source's.
        autoencoder: of a DiT's checkpoint, which holds none: a path or a repository of the Hub.
        denoiser: type of a DiT's checkpoint; see `dit_formats.find_denoiser`.

    Returns:
        The files written, and lines to print: a summary of the model, and the assumptions made.
    """
    paths, path = _import_paths(source, out, force), Path(source)
    check_at_least(1, resolution=resolution, head_width=head_width, heads=heads)
    if scale_factor is not None and not 0 < scale_factor < math.inf:
        raise UsageError(f"--scale-factor {scale_factor}: must be above 0 and finite")
    found = _read_model(path, head_width, heads, autoencoder, denoiser)
    ae, network, levels = assemble(found.autoencoder, path), found.network, found.denoiser
    recipe = _make_recipe(found, resolution, ae, path)
    shape, size = latent_shape(recipe, ae), format_size(recipe.resolution)
    where = found.autoencoder.files[0].parent / "config.json" if path.is_dir() else path
    scale, mean, std = sdvae.latent_statistics(found.settings, scale_factor, shape[0], where)
    statistics = {
        # their z = (latents − mean) · scale ÷ std is the codec's, of σ_data = 1
        "mean": mean, "std": [value / scale for value in std],
        "sigma_data": DiscreteDenoiser.sigma_data,
        "classes": [str(number) for number in range(network.classes)],
    }  # fmt: skip
    came_with = {"imported": {**found.settings, "scaling_factor": scale}}
    inner = ModelFile("autoencoder", to_tree(ae.config), ae.state_dict(), provenance=came_with)
    root = path if path.is_dir() else path.parent
    sums = {file.relative_to(root).as_posix(): sha256_of(file) for file in found.files}
    imported = {"source": source, "format": found.format, "scale_factor": scale, "sha256": sums}
    known = {"autoencoder": autoencoder, "license": find_license(path)}
    imported |= {key: value for key, value in known.items() if value}
    origin = provenance() | {"imported": imported, "autoencoder_sha256": inner.sha256}
    model = ModelFile("diffusion", to_tree(recipe), found.weights, statistics, origin, inner)
    save_model(out, model)
    parameters = sum(tensor.numel() for tensor in found.weights.values())
    return paths, [
        f"{KINDS[network.type]} of {parameters:,} parameters, {network.classes or 'no'} classes; "
        f"latents {' × '.join(map(str, shape))}, times {scale:.5g}; images {size}",
        levels.summary,
        *found.notes,
    ]


def _read_model(
    path: Path, head_width: int | None, heads: int | None, ae: str | None, denoiser: str | None
) -> ForeignModel:
    if head_width and heads:
        raise UsageError("--head-width and --heads exclude each other: give one of them")
    if not path.exists():
        raise LdmError(f"no model at {path}: --diffusion takes a file or a folder on this machine")
    if path.is_file() and dit_formats.holds_dit(read_weights(path)):
        if head_width:
            raise UsageError("--head-width is for a UNet: give --heads")
        return read_dit(path, heads, ae, denoiser)
    if ae or denoiser:
        raise UsageError(f"{path} is no checkpoint of a DiT: leave out --ae and --denoiser")
    if path.is_file():
        return read_checkpoint(path, head_width, heads)
    if head_width or heads:
        raise UsageError(f"{path} says its heads: leave out --head-width and --heads")
    return read_folder(path)


def _make_recipe(
    found: ForeignModel, resolution: Resolution | None, ae: Autoencoder, path: Path
) -> DiffusionRecipe:
    network, n_z, f = found.network, ae.config.latent_channels, ae.downsampling
    if network.latent_channels != n_z:
        raise LdmError(
            f"{path} does not fit together: its {KINDS[network.type]} is for latents of "
            f"{network.latent_channels} channels, its autoencoder's have {n_z}"
        )
    size = resolution or 256  # that of CompVis's models
    if found.size and not resolution:
        height, width = height_width(found.size)
        size = height * f, width * f
    multiple = f * network.factor
    if any(side % multiple for side in height_width(size)):
        raise UsageError(
            f"resolution {size_word(read_resolution(size))}: must be a multiple of {multiple}, by "
            f"which its autoencoder and {KINDS[network.type]} divide"
        )
    data = DataConfig(source="unknown")  # not the default, the photographs
    parts = {"network": network, "denoiser": found.denoiser, "data": data}
    return validate(DiffusionRecipe, {"resolution": size, **parts})


# ------------------------------------------------------------------------------------ CompVis
def read_checkpoint(
    path: Path, head_width: int | None = None, heads: int | None = None
) -> ForeignModel:
    """Read a CompVis checkpoint of a whole latent diffusion model; averaged weights come first."""
    tensors = read_weights(path)
    network, weights = formats.read_compvis(path, head_width, heads)
    prefix = find_prefix(tensors, sdvae.COMPVIS_PREFIXES, sdvae.COMPVIS_FIRST)
    if prefix != "first_stage_model.":
        raise LdmError(
            f"{path} holds a UNet without its autoencoder (first_stage_model.…): give the "
            "checkpoint of the whole model"
        )
    names = {"betas", "alphas_cumprod", "scale_factor"} & tensors.keys()
    tables = {name: tensors[name] for name in names}
    refuse_damaged(tables, path)
    betas, alpha_bars = tables.get("betas"), tables.get("alphas_cumprod")
    denoiser, notes = DiscreteConfig(), []
    if betas is None and alpha_bars is None:
        notes.append("it has no table of noise levels: those of CompVis' models are assumed")
    else:
        try:
            denoiser = find_schedule(betas, alpha_bars)
        except LdmError as error:
            raise LdmError(f"{path} cannot be used: {error}") from error
    if not (head_width or heads):
        notes.append(
            f"attention heads are assumed to be {network.head_width} channels wide: compare "
            "num_head_channels or num_heads in its yaml, and give --head-width or --heads"
        )
    autoencoder = read_autoencoder(path)
    if "codes" in autoencoder.tree and "scale_factor" not in tables:
        notes.append(UNSCALED)
    settings = sdvae.pick_settings(autoencoder.provenance.get("imported"))
    return ForeignModel(
        "compvis", network, weights, (path,), autoencoder, denoiser, settings, notes=tuple(notes)
    )


# ---------------------------------------------------------------------------------------- DiT
def read_dit(
    path: Path, heads: int | None = None, ae: str | None = None, denoiser: str | None = None
) -> ForeignModel:
    """Read a checkpoint of DiT's code, or of its successors, beside its autoencoder."""
    network, weights, notes = dit_formats.read_checkpoint(path, heads)
    levels, assumed = dit_formats.find_denoiser(denoiser, network)
    if ae is None:
        raise UsageError(
            f"{path} holds a DiT without its autoencoder: give that, such as --ae "
            "stabilityai/sd-vae-ft-ema"
        )
    autoencoder = read_autoencoder(find_pretrained(ae))
    given = sdvae.pick_settings(autoencoder.provenance.get("imported"))
    settings = {"scaling_factor": sdvae.SCALING_FACTOR, **given}
    if not given:
        assumed = [*assumed, UNKNOWN_SCALE]
    size = _read_size([side * network.patch for side in height_width(network.grid or 1)])
    return ForeignModel(
        "dit", network, weights, (path,), autoencoder, levels, settings, size,
        notes=(*notes, *assumed),
    )  # fmt: skip


# ---------------------------------------------------------------------------------- diffusers
def read_folder(folder: Path) -> ForeignModel:
    """Read the folder of a diffusers pipeline: `unet/` or `transformer/`, `scheduler/`, and an
    autoencoder in `vae/` or, as their `LDMPipeline` calls it, `vqvae/`."""
    is_dit = (folder / "transformer").is_dir()
    unet, scheduler = (folder / n for n in ("transformer" if is_dit else "unet", SCHEDULER))
    vae = next((at for at in (folder / "vae", folder / "vqvae") if at.is_dir()), folder / "vae")
    for path in (unet / "config.json", vae / "config.json", scheduler):
        if not path.is_file():
            raise LdmError(
                f"{path} is missing: --diffusion takes the folder of a diffusers pipeline, with "
                "unet/ or transformer/, vae/ and scheduler/, or a CompVis or DiT checkpoint"
            )
    network: UNetConfig | DiTConfig
    if is_dit:
        network, weights, notes = dit_formats.read_diffusers(unet)
    else:
        (network, weights), notes = formats.read_diffusers(unet), []
    denoiser, autoencoder = formats.read_scheduler(scheduler), read_autoencoder(vae)
    given = sdvae.pick_settings(autoencoder.provenance.get("imported"))
    is_vq = read_described(vae / "config.json").get("_class_name") == "VQModel"
    settings = {"scaling_factor": 1.0 if is_vq else sdvae.SCALING_FACTOR, **given}
    size = read_described(unet / "config.json").get("sample_size")
    sdvae.check_settings({"sample_size": size}, unet / "config.json")
    sdvae.check_settings(settings, vae / "config.json")
    files = (*weights_files(unet), *autoencoder.files)
    return ForeignModel(
        "diffusers", network, weights, files, autoencoder, denoiser, settings,
        _read_size(size),
        notes=(*notes, *([UNSCALED] if is_vq and "scaling_factor" not in given else [])),
    )  # fmt: skip


def _read_size(given: Any) -> Resolution | None:
    with suppress(ValueError):
        return read_resolution(given)
    return None  # not known


# ------------------------------------------------------------------------ diffusion models out
def export_network(
    out: Path,
    model: Path | None = None,
    force: bool = False,
    form: Literal["unet", "transformer"] = "unet",
) -> list[Path]:
    """Write a stage-two network (default: of the newest run) as a folder for diffusers'
    `UNet2DModel.from_pretrained`, or `DiTTransformer2DModel`'s, with an `ldm.json` that describes
    its inputs and its answer, and return the files."""
    _check_out(out, form, model, force)
    path = model or newest_run("diffusion")
    _refuse_own_folder(out, [path])
    found = LatentModel.from_pretrained(path, "cpu")
    network, described = found.denoiser.network, _describe(found)
    sample_size = plain_size(read_resolution(found.latent_shape[1:]))
    if form == "unet" and isinstance(network, UNet):
        return formats.write_diffusers(out, network, sample_size, ldm=described)
    if form == "transformer" and isinstance(network, DiT):
        return dit_formats.write_diffusers(out, network, sample_size, ldm=described)
    theirs, ours = {"unet": ("UNet2DModel", "ldm")}.get(form, ("DiTTransformer2DModel", "dit"))
    raise LdmError(
        f"{path} has a network of type {found.recipe.network.type}, which no diffusers {theirs} "
        f"can express: --format {form} writes type {ours}"
    )


def _describe(model: LatentModel) -> dict[str, Any]:
    """All that sampling with the network alone needs."""
    config, classes, network = model.recipe.denoiser, model.classes, model.recipe.network
    is_dit = isinstance(network, DiTConfig)
    return {
        "denoiser": {
            "equation": "D(x; sigma) = c_skip x + c_out F(c_in x, timestep)",
            **model.denoiser.words,
            "sigma_min": model.denoiser.sigma_min,
            "sigma_max": model.denoiser.sigma_max,
            "config": to_tree(config),
            **dit_formats.frequencies(network),
        },
        "latents": {
            "equation": "x = (latents - mean) sigma_data / std + sigma noise",
            **model.codec.statistics(),
            "shape": list(model.latent_shape),
        },
        "classes": {
            "names": list(classes.names),
            # diffusers' UNet2DModel wants a class where it has some, its DiT each time
            "class_of_none": classes.count if is_dit else classes.count or None,
        },
        "images": {
            "resolution": plain_size(model.recipe.resolution),
            "autoencoder_sha256": model.autoencoder_sha256,
        },
        "sha256": model.sha256,
        **provenance(),
    }


# -------------------------------------------------------------------------------------- paths
def _import_paths(source: str, out: Path, force: bool) -> list[Path]:
    """The files that an import writes, `out` and its `.safetensors` twin, if it may."""
    if out.suffix != ".pt":
        raise UsageError(f"{out}: the file to write must end in .pt, such as {out.stem}.pt")
    paths = [out, out.with_suffix(".safetensors")]
    same = next((path for path in paths if path.resolve() == Path(source).resolve()), None)
    if same:
        raise UsageError(f"{same} is the model to import: give OUT.pt another name")
    refuse_to_overwrite(paths, out.parent, force)
    check_writable(*paths, advice=ANOTHER)
    return paths


def _check_out(out: Path, form: str, model: Path | None, force: bool) -> None:
    """Refuse to export to a path of another kind, over a run or a model of ours, forced or not, and
    over other files unless forced."""
    is_run = any((out / name).exists() for name in ("run.json", "ckpt.pt"))
    if is_run or isinstance(try_call(load_model, out, None), ModelFile):
        if model is None:  # `out` may be meant as the model
            raise UsageError(f"{out} is a model, and OUT is missing: ldm export {out} OUT")
        raise UsageError(f"{out} is a run or a model of yours: give OUT another name")
    is_file = out.suffix in (".safetensors", ".ckpt")
    if is_file != (form == "compvis") or out.suffix == ".pt":
        kind = "a .safetensors or .ckpt file" if form == "compvis" else "a folder"
        raise UsageError(f"{out}: --format {form} writes {kind}")
    refuse_to_overwrite([out] if is_file else out.glob("*"), out.parent if is_file else out, force)
    check_writable(out if is_file else out / "config.json", advice=ANOTHER)


def _refuse_own_folder(out: Path, files: Iterable[Path]) -> None:
    """Refuse to export a model of these files over it."""
    if any(out.resolve() in (file.resolve(), file.resolve().parent) for file in files):
        raise UsageError(f"{out} is the folder of the model to export: give OUT another name")
