"""From a table of noise levels, as checkpoints of discrete time hold them, to their schedule.

Latent diffusion models of others, read: CompVis' checkpoints and diffusers' pipelines.

They are a UNet of discrete time, the noise levels it was trained with, a KL autoencoder, and what
is done to latents between the two: z = (latents − mean) · scale ÷ std, in most by the scale alone.

Latent diffusion models in and out: CompVis' and diffusers' as a `ckpt.pt` of ours, our network
as diffusers' `UNet2DModel`.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoencoders.autoencoder import assemble
from autoencoders.loading import AutoencoderFile, read_autoencoder
from autoencoders.sdvae.formats import SCALING_FACTOR, find_prefix
from diffusion.build import build_network
from diffusion.discrete import DiscreteConfig, DiscreteDenoiser, log_sigmas
from diffusion.edm import EDMConfig
from diffusion.formats import (
    PICKLED_FILE,
    WEIGHTS_FILE,
    read_compvis,
    read_diffusers,
    write_diffusers,
)
from diffusion.unet import UNetConfig
from ldm.checkpoint import (
    ModelFile,
    build_with,
    is_safetensors,
    open_safetensors,
    refuse_overstated,
    save_model,
    shown,
)
from ldm.config import to_tree, validate
from ldm.data import DataConfig
from ldm.errors import LdmError, UsageError
from ldm.files import read_json, write_json
from ldm.run_folder import newest_run, provenance
from ldm.safe_pickle import read_foreign
from pipelines.exchange.autoencoders import (
    file_sha256,
    import_paths,
    refuse_our_own,
    refuse_to_overwrite,
)
from pipelines.recipes import DiffusionRecipe, latent_shape
from pipelines.sampling.model import LatentModel


def find_schedule(betas: Tensor | None = None, alpha_bars: Tensor | None = None) -> DiscreteConfig:
    """The schedule that a table of noise levels was made from (Ho et al. 2020, arXiv 2006.11239).

    Args:
        betas: β_t, floating (T,).
        alpha_bars: ᾱ_t = Π (1 − β_s), floating (T,). One of the two at least, and both must fit.

    Returns:
        Number of time steps, first and last β, and their spacing; the prediction is left at ε.

    Raises:
        LdmError: they are no such tables, or of a schedule that `DiscreteConfig` cannot say.
    """
    tables = [table for table in (betas, alpha_bars) if table is not None]
    if any(t.ndim != 1 or not t.is_floating_point() or len(t) < 2 for t in tables):
        raise LdmError("its noise levels are no table of two numbers or more")
    steps = len(tables[0])
    if betas is not None:
        ends = betas[[0, -1]].double()
    else:
        # Ho et al. 2020, above Equation 4: ᾱ_t = ᾱ_{t−1} (1 − β_t), and ᾱ_0 = 1 − β_0
        below = torch.cat([alpha_bars.new_ones(1), alpha_bars])[[0, -2]].double()
        ends = 1 - alpha_bars[[0, -1]].double() / below
    first, last = ends.tolist()
    # people write a β in few digits, and a table in low precision blurs the others
    for digits in (3, 5, 7):
        for schedule in ("scaled_linear", "linear"):
            tree = {
                "timesteps": steps,
                "beta_start": float(f"{first:.{digits}g}"),
                "beta_end": float(f"{last:.{digits}g}"),
                "schedule": schedule,
            }
            try:
                config = validate(DiscreteConfig, tree)
            except UsageError:  # such as a last β of 1
                continue
            if _fits(config, betas, alpha_bars):
                return config
    raise LdmError(
        f"its {steps} noise levels, β from {first:.4g} to {last:.4g}, are of another schedule than "
        "those known here, evenly spaced in √β (scaled_linear) or β (linear)"
    )


def _fits(config: DiscreteConfig, betas: Tensor | None, alpha_bars: Tensor | None) -> bool:
    # σ² = (1 − ᾱ) / ᾱ (Karras et al. 2022, arXiv 2206.00364, Appendix C.3.4), so ln ᾱ = −ln(1 + σ²)
    log_alpha_bars = -torch.nn.functional.softplus(2 * log_sigmas(config))
    if alpha_bars is not None and not _close(alpha_bars, log_alpha_bars.exp(), 1):
        return False
    # Ho et al. 2020, above Equation 4: β_t = 1 − ᾱ_t / ᾱ_{t−1}
    expected = -torch.expm1(log_alpha_bars.diff(prepend=log_alpha_bars.new_zeros(1)))
    return betas is None or _close(betas, expected, 0)


def _close(table: Tensor, expected: Tensor, largest: float) -> bool:
    """Whether a table is the expected one but for its dtype's rounding, of numbers of up to 1 where
    they came from a subtraction or a product."""
    rounding = 4 * torch.finfo(table.dtype).eps
    if table.shape != expected.shape:
        return False
    near = max(1e-4, rounding)
    return torch.allclose(table.double(), expected, rtol=near, atol=largest * rounding)


HEAD_WIDTH = 32
"""Channels of an attention head where nobody says it: those of most of CompVis' models."""

FIRST_STAGE = "first_stage_model."
SCHEDULER = "scheduler/scheduler_config.json"
# what diffusers' schedulers mean where a config of theirs leaves it out
SCHEDULER_DEFAULTS = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02,
    "prediction_type": "epsilon",
}  # fmt: skip
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
SCHEDULES = ("linear", "scaled_linear")


class ForeignModel(NamedTuple):
    """A latent diffusion model of others, as it was read."""

    format: str
    """compvis or diffusers."""
    network: UNetConfig
    weights: dict[str, Tensor]
    """The network's, by our names."""
    files: tuple[Path, ...]
    """Those that hold weights."""
    autoencoder: AutoencoderFile
    denoiser: DiscreteConfig
    scale: float
    """What latents are multiplied by."""
    mean: list[float]
    """Of the latents, per channel."""
    std: list[float]
    """What they are divided by besides, per channel."""
    side: int | None = None
    """Of the latents it was trained on, where it is said."""
    notes: tuple[str, ...] = ()
    """What had to be assumed, a line each."""


# ---------------------------------------------------------------------------- CompVis' files
def read_checkpoint(
    path: Path,
    head_width: int | None = None,
    heads: int | None = None,
    scale_factor: float | None = None,
) -> ForeignModel:
    """A CompVis checkpoint of a whole latent diffusion model, its UNet averaged where it can be.

    Args:
        path: a `.ckpt`, `.pt` or `.safetensors`.
        head_width: channels of an attention head; 32 where `heads` is left out, too.
        heads: heads of every attention.
        scale_factor: what its latents are multiplied by; None: what the checkpoint says.

    Raises:
        LdmError: it cannot be read, is no such model or one that ours cannot be, or does not say
            its scale.
    """
    names, buffers = _read_buffers(path)
    if any(name.startswith(f"{FIRST_STAGE}quantize.") for name in names):
        raise _quantised(path, "as in CompVis' models of FFHQ and CelebA-HQ")
    network, weights = read_compvis(path, head_width or HEAD_WIDTH, heads)
    if find_prefix(names) != FIRST_STAGE:
        raise LdmError(
            f"{path} holds a UNet without its autoencoder ({FIRST_STAGE}…): give the checkpoint of "
            "the whole model"
        )
    if scale_factor is None:
        if "scale_factor" not in buffers:
            raise LdmError(
                f"{path} does not say what its latents are multiplied by: give --scale-factor, the "
                "scale_factor of its yaml, 1 where there is none"
            )
        scale_factor = _scale(buffers["scale_factor"], path)
    denoiser, notes = DiscreteConfig(), []
    if "betas" in buffers or "alphas_cumprod" in buffers:
        try:
            denoiser = find_schedule(buffers.get("betas"), buffers.get("alphas_cumprod"))
        except LdmError as error:
            raise LdmError(f"{path} cannot be used: {error}") from error
    else:
        notes.append("it holds no table of its noise levels: these are those of CompVis' models")
    if not (head_width or heads):
        notes.append(
            f"no checkpoint tells its attention's heads, taken to be {HEAD_WIDTH} channels wide: "
            "see num_head_channels or num_heads in its yaml, and give --head-width or --heads"
        )
    found = read_autoencoder(path)
    n_z = network.latent_channels
    return ForeignModel(
        "compvis", network, weights, (path,), found, denoiser, scale_factor, [0.0] * n_z,
        [1.0] * n_z, notes=tuple(notes),
    )  # fmt: skip


def _read_buffers(path: Path) -> tuple[list[str], dict[str, Tensor]]:
    """The names of all tensors of a checkpoint, and those that tell of noise levels and scale."""
    wanted = ("betas", "alphas_cumprod", "scale_factor")
    if is_safetensors(path):
        with open_safetensors(path) as file:
            names = list(file.keys())
            buffers = {name: file.get_tensor(name) for name in wanted if name in names}
        return names, buffers
    tree: Any = read_foreign(path)
    tree = tree.get("state_dict", tree) if isinstance(tree, dict) else {}
    tensors = tree if isinstance(tree, dict) else {}
    buffers = {name: tensors[name] for name in wanted if isinstance(tensors.get(name), Tensor)}
    refuse_overstated(buffers, path)
    return [name for name in tensors if isinstance(name, str)], buffers


def _scale(given: Any, path: Path) -> float:
    """A scale that a file says.

    Raises:
        LdmError: it is no number above 0.
    """
    try:
        scale = float(given)
    except (TypeError, ValueError, RuntimeError):
        scale = math.nan
    if not 0 < scale < math.inf:
        said = shown(str(given.tolist() if isinstance(given, Tensor) else given))
        raise LdmError(f"{path} multiplies its latents by {said}, no scale: give --scale-factor")
    return scale


def _quantised(path: Path, where: str) -> LdmError:
    return LdmError(
        f"{path} has a vector-quantised autoencoder, {where}: only models on a KL autoencoder are "
        "read"
    )


# ------------------------------------------------------------------------- diffusers' folders
def read_folder(folder: Path, scale_factor: float | None = None) -> ForeignModel:
    """The folder of a diffusers pipeline: `unet/`, `scheduler/`, and an `AutoencoderKL` in `vae/`
    or, as their `LDMPipeline` calls it, `vqvae/`.

    Args:
        scale_factor: what its latents are multiplied by; None: what the autoencoder says.

    Raises:
        LdmError: a part is not there, cannot be read, or is one that ours cannot be.
    """
    unet = folder / "unet"
    vae = next((at for at in (folder / "vae", folder / "vqvae") if at.is_dir()), folder / "vae")
    for path in (unet / "config.json", vae / "config.json", folder / SCHEDULER):
        if not path.is_file():
            raise LdmError(
                f"{path} is not there: --diffusion takes the folder of a diffusers pipeline, with "
                "unet/, vae/ and scheduler/, or a CompVis checkpoint"
            )
    if _read_json(vae / "config.json").get("_class_name") == "VQModel":
        raise _quantised(vae, "as diffusers' LDMPipelines mostly have")
    network, weights = read_diffusers(unet)
    denoiser = _read_scheduler(folder / SCHEDULER)
    autoencoder = read_autoencoder(vae)
    said = autoencoder.provenance.get("imported", {})
    if scale_factor is None:
        scale_factor = _scale(said.get("scaling_factor", SCALING_FACTOR), vae / "config.json")
    n_z = network.latent_channels
    mean = said.get("latents_mean", [said.get("shift_factor", 0.0)] * n_z)
    std = said.get("latents_std", [1.0] * n_z)
    if not (_are_numbers(mean, n_z) and _are_numbers(std, n_z) and min(std) > 0):
        raise LdmError(
            f"{vae}/config.json: latents_mean, latents_std or shift_factor are no statistics of "
            f"{n_z} channels"
        )
    side = _read_json(unet / "config.json").get("sample_size")
    file = next(at for name in (WEIGHTS_FILE, PICKLED_FILE) if (at := unet / name).is_file())
    return ForeignModel(
        "diffusers", network, weights, (file, *autoencoder.files), autoencoder, denoiser,
        scale_factor, mean, std, side if isinstance(side, int) and side > 0 else None,
    )  # fmt: skip


def _read_scheduler(path: Path) -> DiscreteConfig:
    """The noise levels and the prediction of a diffusers scheduler.

    Raises:
        LdmError: they are none that our denoiser can be told.
    """
    described = SCHEDULER_DEFAULTS | _read_json(path)
    try:
        if described["prediction_type"] not in PREDICTIONS:
            raise _unknown(described, "prediction_type", PREDICTIONS)
        if described.get("rescale_betas_zero_snr"):
            raise LdmError("rescale_betas_zero_snr is not known here")
        if described.get("trained_betas"):
            config = find_schedule(torch.tensor(described["trained_betas"], dtype=torch.float64))
        elif described.get("beta_schedule") not in SCHEDULES:
            raise _unknown(described, "beta_schedule", SCHEDULES)
        else:
            tree = {key: described[key] for key in ("beta_start", "beta_end")}
            tree |= {"timesteps": described["num_train_timesteps"]}
            config = validate(DiscreteConfig, tree | {"schedule": described["beta_schedule"]})
    except (LdmError, TypeError, ValueError) as error:
        raise LdmError(f"{path} cannot be used: {error}") from error
    return config.model_copy(update={"prediction": PREDICTIONS[described["prediction_type"]]})


def _unknown(described: dict[str, Any], key: str, known: Iterable[str]) -> LdmError:
    said = f"is {described[key]!r}" if key in described else "is not said"
    return LdmError(f"{key} {said}, only {' and '.join(known)} are known")


def _read_json(path: Path) -> dict[str, Any]:
    tree = read_json(path)
    if tree is None:
        raise LdmError(f"{path} is not a JSON object: copy or write it again")
    return tree


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    )


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
