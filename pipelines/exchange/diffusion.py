"""Latent diffusion models in and out: CompVis's and diffusers' to a `ckpt.pt` of ours, our network
to diffusers' `UNet2DModel`.

Such a model is a UNet of discrete time, the noise levels it was trained with, a KL autoencoder, and
the scaling of latents between the two: z = (latents − mean) · scale ÷ std, in most by the scale
alone.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoencoders.autoencoder import assemble
from autoencoders.pretrained import AutoencoderFile, read_autoencoder
from autoencoders.sdvae.formats import COMPVIS_FIRST, COMPVIS_PREFIXES, SCALING_FACTOR
from diffusion.discrete import DiscreteConfig, DiscreteDenoiser, find_schedule
from diffusion.formats import read_compvis, read_diffusers, write_diffusers
from diffusion.unet import UNet, UNetConfig
from ldm.checkpoint import ModelFile, build_with, refuse_overstated, save_model, shown
from ldm.config import to_tree, validate
from ldm.data import DataConfig
from ldm.errors import LdmError, UsageError, check_at_least
from ldm.files import write_json
from ldm.foreign import find_prefix, read_described, read_weights, weights_files
from ldm.run_folder import newest_run, provenance
from pipelines.exchange.autoencoders import (
    file_sha256,
    import_paths,
    refuse_our_own,
    refuse_to_overwrite,
)
from pipelines.recipes import DiffusionRecipe, latent_shape
from pipelines.sampling.model import LatentModel

RESOLUTION = 256
"""Side of images in pixels unless known: that of CompVis's models."""
HEAD_WIDTH = 32
"""Channels of an attention head unless given: those of most of CompVis's models."""

FIRST_STAGE = "first_stage_model."
SCHEDULER = "scheduler/scheduler_config.json"
# the defaults of diffusers' schedulers
SCHEDULER_DEFAULTS = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02,
    "prediction_type": "epsilon",
}  # fmt: skip
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
SCHEDULES = ("linear", "scaled_linear")


class ForeignModel(NamedTuple):
    """A latent diffusion model of another toolkit."""

    format: str
    """compvis or diffusers."""
    network: UNetConfig
    weights: dict[str, Tensor]
    """The network's, by our names."""
    files: tuple[Path, ...]
    """The files that hold weights."""
    autoencoder: AutoencoderFile
    denoiser: DiscreteConfig
    scale: float
    """Factor that multiplies latents."""
    mean: list[float]
    """Mean of the latents, per channel."""
    std: list[float]
    """Divisor of the latents besides the scale, per channel."""
    side: int | None = None
    """Side of the latents it was trained on, if known."""
    notes: tuple[str, ...] = ()
    """Assumptions made, a line each."""


# ------------------------------------------------------------------------------------ CompVis
def read_checkpoint(
    path: Path,
    head_width: int | None = None,
    heads: int | None = None,
    scale_factor: float | None = None,
) -> ForeignModel:
    """Read a CompVis checkpoint of a whole latent diffusion model; averaged weights come first.

    Args:
        path: a `.ckpt`, `.pt` or `.safetensors`.
        head_width: channels of an attention head; 32 if `heads` is left out, too.
        heads: heads of every attention.
        scale_factor: factor that multiplies latents; None: the checkpoint's.
    """
    tensors = read_weights(path)
    if any(name.startswith(f"{FIRST_STAGE}quantize.") for name in tensors):
        raise _quantised(path, "as CompVis' models of FFHQ and CelebA-HQ")
    network, weights = read_compvis(path, head_width or HEAD_WIDTH, heads)
    if find_prefix(tensors, COMPVIS_PREFIXES, COMPVIS_FIRST) != FIRST_STAGE:
        raise LdmError(
            f"{path} holds a UNet without its autoencoder ({FIRST_STAGE}…): give the checkpoint of "
            "the whole model"
        )
    wanted = ("betas", "alphas_cumprod", "scale_factor")
    buffers = {name: tensors[name] for name in wanted if name in tensors}
    refuse_overstated(buffers, path)
    if scale_factor is None:
        if "scale_factor" not in buffers:
            raise LdmError(
                f"{path} has no scale for its latents: give --scale-factor, the scale_factor of "
                "its yaml, or 1 if there is none"
            )
        scale_factor = _scale(buffers["scale_factor"], path)
    denoiser, notes = DiscreteConfig(), []
    if "betas" in buffers or "alphas_cumprod" in buffers:
        try:
            denoiser = find_schedule(buffers.get("betas"), buffers.get("alphas_cumprod"))
        except LdmError as error:
            raise LdmError(f"{path} cannot be used: {error}") from error
    else:
        notes.append("it has no table of noise levels: those of CompVis' models are assumed")
    if not (head_width or heads):
        notes.append(
            f"attention heads are assumed to be {HEAD_WIDTH} channels wide: compare "
            "num_head_channels or num_heads in its yaml, and give --head-width or --heads"
        )
    n_z = network.latent_channels
    return ForeignModel(
        "compvis", network, weights, (path,), read_autoencoder(path), denoiser, scale_factor,
        [0.0] * n_z, [1.0] * n_z, notes=tuple(notes),
    )  # fmt: skip


# ---------------------------------------------------------------------------------- diffusers
def read_folder(folder: Path, scale_factor: float | None = None) -> ForeignModel:
    """Read the folder of a diffusers pipeline: `unet/`, `scheduler/`, and an `AutoencoderKL` in
    `vae/` or, as their `LDMPipeline` calls it, `vqvae/`.

    Args:
        scale_factor: factor that multiplies latents; None: the autoencoder's.
    """
    unet = folder / "unet"
    vae = next((at for at in (folder / "vae", folder / "vqvae") if at.is_dir()), folder / "vae")
    for path in (unet / "config.json", vae / "config.json", folder / SCHEDULER):
        if not path.is_file():
            raise LdmError(
                f"{path} is missing: --diffusion takes the folder of a diffusers pipeline, with "
                "unet/, vae/ and scheduler/, or a CompVis checkpoint"
            )
    if read_described(vae / "config.json").get("_class_name") == "VQModel":
        raise _quantised(vae, "as most of diffusers' LDMPipelines")
    network, weights = read_diffusers(unet)
    denoiser = _read_scheduler(folder / SCHEDULER)
    autoencoder = read_autoencoder(vae)
    settings = autoencoder.provenance.get("imported", {})
    if scale_factor is None:
        scale_factor = _scale(settings.get("scaling_factor", SCALING_FACTOR), vae / "config.json")
    n_z = network.latent_channels
    mean = settings.get("latents_mean", [settings.get("shift_factor", 0.0)] * n_z)
    std = settings.get("latents_std", [1.0] * n_z)
    if not (_are_numbers(mean, n_z) and _are_numbers(std, n_z) and min(std) > 0):
        raise LdmError(
            f"{vae}/config.json: latents_mean, latents_std or shift_factor are not {n_z} numbers"
        )
    side = read_described(unet / "config.json").get("sample_size")
    return ForeignModel(
        "diffusers", network, weights,
        (*weights_files(unet, pickled=True), *autoencoder.files), autoencoder, denoiser,
        scale_factor, mean, std, side if isinstance(side, int) and side > 0 else None,
    )  # fmt: skip


def _read_scheduler(path: Path) -> DiscreteConfig:
    """The noise levels and the prediction of a diffusers scheduler."""
    described: dict[str, Any] = SCHEDULER_DEFAULTS | read_described(path)
    try:
        _check_known(described, "prediction_type", tuple(PREDICTIONS))
        if described.get("rescale_betas_zero_snr"):
            raise LdmError("rescale_betas_zero_snr is not supported")
        if described.get("trained_betas"):
            config = find_schedule(torch.tensor(described["trained_betas"], dtype=torch.float64))
        else:
            _check_known(described, "beta_schedule", SCHEDULES)
            tree = {key: described[key] for key in ("beta_start", "beta_end")}
            tree |= {"timesteps": described["num_train_timesteps"]}
            config = validate(DiscreteConfig, tree | {"schedule": described["beta_schedule"]})
    except (LdmError, TypeError, ValueError) as error:
        raise LdmError(f"{path} cannot be used: {error}") from error
    return config.model_copy(update={"prediction": PREDICTIONS[described["prediction_type"]]})


def _check_known(described: dict[str, Any], key: str, known: tuple[str, ...]) -> None:
    if described.get(key) not in known:
        given = f"is {described[key]!r}" if key in described else "is missing"
        raise LdmError(f"{key} {given}, only {' and '.join(known)} are supported")


# ------------------------------------------------------------------------------------ of both
def _scale(given: Any, path: Path) -> float:
    try:
        scale = float(given)
    except (TypeError, ValueError, RuntimeError):
        scale = math.nan
    if not 0 < scale < math.inf:
        value = shown(str(given.tolist() if isinstance(given, Tensor) else given))
        raise LdmError(f"{path} scales its latents by {value}, not above 0: give --scale-factor")
    return scale


def _quantised(path: Path, like: str) -> LdmError:
    return LdmError(
        f"{path} has a vector-quantised autoencoder, {like}: only KL autoencoders are supported"
    )


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    )


# -------------------------------------------------------------------------------------- in
def import_diffusion(
    source: str,
    out: Path,
    resolution: int | None = None,
    head_width: int | None = None,
    heads: int | None = None,
    scale_factor: float | None = None,
    force: bool = False,
) -> tuple[list[Path], list[str]]:
    """Convert a latent diffusion model to a model file of ours and its `.safetensors` twin.

    Args:
        source: a CompVis checkpoint with its first stage, or the folder of a diffusers pipeline
            (`unet/`, `vae/`, `scheduler/`).
        out: the `.pt` to write.
        resolution: side of its images, in pixels. Default: the folder's, else 256.
        head_width: for a checkpoint, channels of an attention head. Default: 32, without `heads`.
        heads: for a checkpoint, heads of every attention.
        scale_factor: factor that multiplies its latents. Default: the source's.
        force: overwrite existing files.

    Returns:
        The files written, and lines to print: a summary of the model, and the assumptions made.

    Raises:
        UsageError: `out` is no `.pt` or is the source, or an option has no meaning.
        LdmError: the source cannot be read, has parts that we lack, or has no scale; or `out`
            exists.
    """
    paths = import_paths(source, out, force)
    path = Path(source)
    found = _read(path, resolution, head_width, heads, scale_factor)
    ae = assemble(found.autoencoder, path)
    n_z, f = ae.config.latent_channels, ae.downsampling
    if found.network.latent_channels != n_z:
        raise LdmError(
            f"{path} does not fit together: its UNet is for latents of "
            f"{found.network.latent_channels} channels, its autoencoder's have {n_z}"
        )
    network = build_with(lambda: UNet(found.network), found.weights, path)
    recipe = _make_recipe(found, resolution, f, f * network.factor)
    statistics = {
        # their z = (latents − mean) · scale ÷ std is the codec's, of σ_data = 1
        "mean": found.mean, "std": [value / found.scale for value in found.std],
        "sigma_data": DiscreteDenoiser.sigma_data,
        "classes": [str(number) for number in range(found.network.classes)],
    }  # fmt: skip
    inner = ModelFile("autoencoder", to_tree(ae.config), ae.state_dict())
    imported = _describe_source(source, path, found)
    origin = provenance() | {"imported": imported, "autoencoder_sha256": inner.sha256}
    weights = network.state_dict()
    save_model(out, ModelFile("diffusion", to_tree(recipe), weights, statistics, origin, inner))
    return paths, _summary(found, recipe, latent_shape(recipe, ae))


def _make_recipe(
    found: ForeignModel, resolution: int | None, downsampling: int, multiple: int
) -> DiffusionRecipe:
    recipe = DiffusionRecipe(
        resolution=resolution or (found.side * downsampling if found.side else RESOLUTION),
        network=found.network, denoiser=found.denoiser,
        data=DataConfig(source="unknown"),  # so that nobody measures it against the photographs
    )  # fmt: skip
    if recipe.resolution % multiple:
        raise UsageError(
            f"resolution {recipe.resolution}: must be a multiple of {multiple}, by which its "
            "autoencoder and UNet divide"
        )
    return recipe


def _describe_source(source: str, path: Path, found: ForeignModel) -> dict[str, Any]:
    root = path if path.is_dir() else path.parent
    sums = {file.relative_to(root).as_posix(): file_sha256(file) for file in found.files}
    return {"source": source, "format": found.format, "scale_factor": found.scale, "sha256": sums}


def _read(
    path: Path, resolution: int | None, head_width: int | None, heads: int | None,
    scale_factor: float | None,
) -> ForeignModel:  # fmt: skip
    check_at_least(1, resolution=resolution, head_width=head_width, heads=heads)
    if head_width and heads:
        raise UsageError("--head-width and --heads exclude each other: give one of them")
    if scale_factor is not None and not 0 < scale_factor < math.inf:
        raise UsageError(f"--scale-factor {scale_factor}: must be above 0 and finite")
    if path.is_dir():
        if head_width or heads:
            raise UsageError(f"{path} says its heads: leave out --head-width and --heads")
        return read_folder(path, scale_factor)
    if path.is_file():
        return read_checkpoint(path, head_width, heads, scale_factor)
    raise LdmError(f"no model at {path}: --diffusion takes a file or a folder on this machine")


def _summary(
    found: ForeignModel, recipe: DiffusionRecipe, shape: tuple[int, int, int]
) -> list[str]:
    parameters = sum(tensor.numel() for tensor in found.weights.values())
    levels, side = found.denoiser, recipe.resolution
    return [
        f"UNet of {parameters:,} parameters, {found.network.classes or 'no'} classes; latents "
        f"{' × '.join(map(str, shape))}, times {found.scale:.5g}; images {side}×{side}",
        f"it predicts {levels.prediction}; {levels.timesteps} noise levels, β {levels.beta_start:g}"
        f" to {levels.beta_end:g} ({levels.schedule})",
        *found.notes,
    ]


# ------------------------------------------------------------------------------------ out
NOTE = "ldm.json"
"""The file beside diffusers' own that says how to use an exported network."""

DISCRETE_INPUT = {
    "c_in": "1 / sqrt(sigma^2 + 1)",
    "timestep": "t between 0 and timesteps - 1 of which sqrt((1 - alpha_bar_t) / alpha_bar_t) = "
    "sigma, interpolated in ln(sigma)",
}
# D(x; σ) of a network F, as that file writes it
TERMS = {
    "edm": {  # Karras et al. 2022, Table 1, column "Ours"
        "c_skip": "sigma_data^2 / (sigma^2 + sigma_data^2)",
        "c_out": "sigma sigma_data / sqrt(sigma^2 + sigma_data^2)",
        "c_in": "1 / sqrt(sigma^2 + sigma_data^2)",
        "timestep": "ln(sigma) / 4",
    },
    # Karras et al. 2022, Table 1, column "VP"
    "epsilon": {"c_skip": "1", "c_out": "-sigma", **DISCRETE_INPUT},
    "v": {  # Salimans and Ho 2022, Section 4
        "c_skip": "1 / (sigma^2 + 1)",
        "c_out": "-sigma / sqrt(sigma^2 + 1)",
        **DISCRETE_INPUT,
    },
}


def export_network(out: Path, model: Path | None = None, force: bool = False) -> list[Path]:
    """Write a stage-two network as a folder for diffusers' `UNet2DModel.from_pretrained`, with an
    `ldm.json` that describes its inputs and its answer.

    Args:
        out: the folder.
        model: a `ckpt.pt`, its twin, or a run folder. Default: the newest stage-two run.
        force: overwrite existing files.

    Raises:
        UsageError: `out` is a file's name, a model, or the folder of the model.
        LdmError: the model cannot be read or expressed, or `out` exists.
    """
    refuse_our_own(out, is_named=model is not None)
    if out.suffix in (".pt", ".ckpt", ".safetensors"):
        raise UsageError(f"{out}: --format unet writes a folder")
    refuse_to_overwrite(sorted(out.glob("*")), force)
    path = model or newest_run("diffusion")
    if out.resolve() == path.resolve().parent:
        raise UsageError(f"{out} is the folder of the model to export: give OUT another name")
    found = LatentModel.from_pretrained(path, "cpu")
    recipe, network = found.recipe, found.denoiser.network
    if not isinstance(network, UNet):
        raise LdmError(
            f"{path} has a network of type {recipe.network.type}, which no diffusers UNet2DModel "
            "can express: only type ldm can be exported"
        )
    written = write_diffusers(out, network, found.latent_shape[1])
    try:
        write_json(out / NOTE, _describe(found, recipe))
    except LdmError:
        for file in written:  # nobody could use them without
            file.unlink()
        raise
    return [*written, out / NOTE]


def _describe(model: LatentModel, recipe: DiffusionRecipe) -> dict[str, Any]:
    """All that sampling with the network alone needs."""
    config, classes = recipe.denoiser, model.classes
    return {
        "denoiser": {
            "equation": "D(x; sigma) = c_skip x + c_out F(c_in x, timestep)",
            **TERMS[config.prediction if isinstance(config, DiscreteConfig) else "edm"],
            "sigma_min": model.denoiser.sigma_min,
            "sigma_max": model.denoiser.sigma_max,
            "config": to_tree(config),
        },
        "latents": {
            "equation": "x = (latents - mean) sigma_data / std + sigma noise",
            **model.codec.statistics(),
            "shape": list(model.latent_shape),
        },
        "classes": {
            "names": list(classes.names),
            # diffusers' UNet2DModel wants a class each time
            "class_of_none": classes.count if classes.count else None,
        },
        "images": {
            "resolution": recipe.resolution,
            "autoencoder_sha256": model.autoencoder_sha256,
        },
        "sha256": model.sha256,
        **provenance(),
    }
