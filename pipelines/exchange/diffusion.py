"""Latent diffusion models in and out: CompVis' and diffusers' as a `ckpt.pt` of ours, our network
as diffusers' `UNet2DModel`."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from autoencoders.loading import assemble
from diffusion.build import build_network
from diffusion.discrete import DiscreteConfig, DiscreteDenoiser
from diffusion.edm import EDMConfig
from diffusion.weights import write_diffusers
from ldm.checkpoint import ModelFile, build_with, save_model
from ldm.config import to_tree
from ldm.data import DataConfig
from ldm.errors import LdmError, UsageError
from ldm.files import write_json
from ldm.run_folder import newest_run, provenance
from pipelines.exchange.autoencoders import (
    file_sha256,
    import_paths,
    refuse_our_own,
    refuse_to_overwrite,
)
from pipelines.exchange.foreign_diffusion import read_checkpoint, read_folder
from pipelines.sampling.latent_model import LatentModel
from pipelines.training.diffusion_recipe import DiffusionRecipe, latent_shape

RESOLUTION = 256
"""Side of images in pixels where nobody says it: that of CompVis' models."""


class Imported(NamedTuple):
    """What an import did."""

    paths: list[Path]
    """The files that it wrote."""
    notes: list[str]
    """Lines for the person who asked: what the model is, and what had to be assumed."""


# ------------------------------------------------------------------------------------- in
def import_diffusion(
    source: str,
    out: Path,
    resolution: int | None = None,
    head_width: int | None = None,
    heads: int | None = None,
    scale_factor: float | None = None,
    force: bool = False,
) -> Imported:
    """Write a model file of ours, and its `.safetensors` twin, of a latent diffusion model.

    Args:
        source: a CompVis checkpoint with its first stage, or the folder of a diffusers pipeline
            (`unet/`, `vae/`, `scheduler/`).
        out: the `.pt` to write.
        resolution: side of its images, in pixels. Left out: what a folder says, else 256.
        head_width: of a checkpoint, channels of an attention head; 32 if `heads` is left out, too.
        heads: of a checkpoint, heads of every attention.
        scale_factor: what its latents are multiplied by. Left out: what the source says.
        force: write over files that are there.

    Raises:
        UsageError: `out` is no `.pt` or is the source, or an option has no meaning.
        LdmError: the source cannot be read, has parts that we do not have, or leaves its scale
            open; or `out` is there already.
    """
    paths = import_paths(source, out, force)
    _check_options(resolution, head_width, heads, scale_factor)
    path = Path(source)
    if path.is_dir():
        if head_width or heads:
            raise UsageError(f"{path} says its heads: leave out --head-width and --heads")
        found = read_folder(path, scale_factor)
    elif path.is_file():
        found = read_checkpoint(path, head_width, heads, scale_factor)
    else:
        raise LdmError(f"no model at {path}: --diffusion takes a file or a folder on this machine")
    ae = assemble(found.autoencoder, path)
    n_z, f = ae.config.latent_channels, ae.downsampling
    if found.network.latent_channels != n_z:
        raise LdmError(
            f"{path} does not fit together: its UNet is for latents of "
            f"{found.network.latent_channels} channels, its autoencoder's have {n_z}"
        )
    network = build_with(lambda: build_network(found.network), found.weights, path)
    recipe = DiffusionRecipe(
        resolution=resolution or (found.side * f if found.side else RESOLUTION),
        network=found.network, denoiser=found.denoiser,
        data=DataConfig(source="unknown"),  # so that nobody measures it against the photographs
    )  # fmt: skip
    if recipe.resolution % (f * network.factor):
        raise UsageError(
            f"resolution {recipe.resolution}: it must be a multiple of {f * network.factor}, by "
            "which its autoencoder and UNet divide"
        )
    statistics = {
        # their z = (latents − mean) · scale ÷ std is the codec's, of σ_data = 1
        "mean": found.mean, "std": [value / found.scale for value in found.std],
        "sigma_data": DiscreteDenoiser.sigma_data,
        "classes": [str(number) for number in range(found.network.classes)],
    }  # fmt: skip
    inner = ModelFile("autoencoder", to_tree(ae.config), ae.state_dict())
    root = path if path.is_dir() else path.parent
    sums = {file.relative_to(root).as_posix(): file_sha256(file) for file in found.files}
    origin = {
        "source": source, "format": found.format, "scale_factor": found.scale, "sha256": sums,
    }  # fmt: skip
    told = provenance() | {"imported": origin, "autoencoder_sha256": inner.sha256}
    weights = network.state_dict()
    save_model(out, ModelFile("diffusion", to_tree(recipe), weights, statistics, told, inner))
    latents = " × ".join(map(str, latent_shape(recipe, ae)))
    parameters = sum(tensor.numel() for tensor in weights.values())
    levels = found.denoiser
    notes = [
        f"UNet of {parameters:,} parameters, {found.network.classes or 'no'} classes; latents "
        f"{latents}, times {found.scale:.5g}; images {recipe.resolution}×{recipe.resolution}",
        f"it predicts {levels.prediction}; {levels.timesteps} noise levels, β {levels.beta_start:g}"
        f" to {levels.beta_end:g} ({levels.schedule})",
        *found.notes,
    ]
    return Imported(paths, notes)


def _check_options(
    resolution: int | None, head_width: int | None, heads: int | None, scale_factor: float | None
) -> None:
    given = {"resolution": resolution, "head-width": head_width, "heads": heads}
    for name, value in given.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: it must be at least 1")
    if head_width and heads:
        raise UsageError("--head-width and --heads say the same: give one of them")
    if scale_factor is not None and not 0 < scale_factor < math.inf:
        raise UsageError(f"--scale-factor {scale_factor}: it must be above 0, and finite")


# ------------------------------------------------------------------------------------ out
NOTE = "ldm.json"
"""What an exported network's folder says beside diffusers' own config."""

# D(x; σ) of a network F, in the words of the file that goes with it
EDM_TERMS = {  # Karras et al. 2022, Table 1, column "Ours"
    "c_skip": "sigma_data^2 / (sigma^2 + sigma_data^2)",
    "c_out": "sigma sigma_data / sqrt(sigma^2 + sigma_data^2)",
    "c_in": "1 / sqrt(sigma^2 + sigma_data^2)",
    "timestep": "ln(sigma) / 4",
}
DISCRETE_TERMS = {
    "epsilon": {"c_skip": "1", "c_out": "-sigma"},  # Karras et al. 2022, Table 1, column "VP"
    "v": {  # Salimans and Ho 2022, Section 4
        "c_skip": "1 / (sigma^2 + 1)",
        "c_out": "-sigma / sqrt(sigma^2 + 1)",
    },
}


def export_network(out: Path, model: Path | None = None, force: bool = False) -> list[Path]:
    """Write a stage-two network as a folder for diffusers' `UNet2DModel.from_pretrained`, and an
    `ldm.json` beside it, which says what it expects and how its answer is to be read.

    Args:
        out: the folder.
        model: a `ckpt.pt`, its twin, or a run folder; the newest stage-two run if left out.
        force: write over files that are there.

    Raises:
        UsageError: `out` is a file's name, or a model, or where the model is.
        LdmError: the model cannot be read or expressed, or `out` is there already.
    """
    refuse_our_own(out, is_named=model is not None)
    if out.suffix in (".pt", ".ckpt", ".safetensors"):
        raise UsageError(f"{out}: --format unet writes a folder")
    refuse_to_overwrite(sorted(out.glob("*")), force)
    path = model or newest_run("diffusion")
    if out.resolve() == path.resolve().parent:
        raise UsageError(f"{out} is where the model to export is: give OUT another name")
    found = LatentModel.from_pretrained(path, "cpu")
    if found.recipe.network.type != "ldm":
        raise LdmError(
            f"{path} has a network of type {found.recipe.network.type}, which no diffusers "
            "UNet2DModel can express: only networks of type ldm go out"
        )
    written = write_diffusers(out, found.denoiser.network, found.latent_shape[1])
    try:
        write_json(out / NOTE, _describe(found))
    except LdmError:
        for file in written:  # nobody could use them without
            file.unlink()
        raise
    return [*written, out / NOTE]


def _describe(model: LatentModel) -> dict[str, Any]:
    """What somebody needs to sample with the network alone."""
    config = model.recipe.denoiser
    codec, classes = model.codec, model.classes
    return {
        "denoiser": {
            "equation": "D(x; sigma) = c_skip x + c_out F(c_in x, timestep)",
            **_terms(config),
            "sigma_min": model.denoiser.sigma_min,
            "sigma_max": model.denoiser.sigma_max,
            "config": to_tree(config),
        },
        "latents": {
            "equation": "x = (latents - mean) sigma_data / std + sigma noise",
            **codec.statistics(),
            "shape": list(model.latent_shape),
        },
        "classes": {
            "names": list(classes.names),
            # diffusers' UNet2DModel wants a class each time
            "class_of_none": classes.count if classes.count else None,
        },
        "images": {
            "resolution": model.recipe.resolution,
            "autoencoder_sha256": model.autoencoder_sha256,
        },
        "sha256": model.sha256,
        **provenance(),
    }


def _terms(config: EDMConfig | DiscreteConfig) -> dict[str, str]:
    if config.type == "edm":
        return EDM_TERMS
    time = (
        "t between 0 and timesteps - 1 of which sqrt((1 - alpha_bar_t) / alpha_bar_t) = sigma, "
        "interpolated in ln(sigma)"
    )
    return {**DISCRETE_TERMS[config.prediction], "c_in": "1 / sqrt(sigma^2 + 1)", "timestep": time}
