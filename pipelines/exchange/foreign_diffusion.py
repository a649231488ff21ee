"""Latent diffusion models of others, read: CompVis' checkpoints and diffusers' pipelines.

They are a UNet of discrete time, the noise levels it was trained with, a KL autoencoder, and what
is done to latents between the two: z = (latents − mean) · scale ÷ std, in most by the scale alone.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoencoders.loading import AutoencoderFile, read_autoencoder
from autoencoders.sdvae.compvis import find_prefix
from autoencoders.sdvae.export import SCALING_FACTOR
from diffusion.compvis import read_compvis
from diffusion.discrete import DiscreteConfig
from diffusion.unet import UNetConfig
from diffusion.weights import PICKLED_FILE, WEIGHTS_FILE, read_diffusers
from ldm.checkpoint import Damaged, is_safetensors, refuse_overstated, shown
from ldm.config import validate
from ldm.errors import LdmError
from ldm.foreign import read_foreign
from pipelines.exchange.noise_table import find_schedule

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
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                buffers = {name: file.get_tensor(name) for name in wanted if name in names}
        except (SafetensorError, OSError) as error:
            raise Damaged(f"{path} is truncated or damaged: copy or write it again") from error
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
    try:
        tree = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LdmError(f"could not read {path} ({error})") from error
    if not isinstance(tree, dict):
        raise LdmError(f"{path} describes nothing: it is not an object of JSON")
    return tree


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    )
