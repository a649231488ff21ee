"""Other people's latent diffusion models, read: what is found in them, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion.discrete import DiscreteConfig
from ldm.errors import LdmError
from pipelines.exchange import read_checkpoint, read_folder
from tests.diffusion.compvis_unet import checkpoint
from tests.pipelines.exchange.foreign_models import (
    LEVELS,
    SCALE,
    UNET,
    compvis_tensors,
    write_compvis,
    write_diffusers,
)


@pytest.fixture
def folder(tmp_path):
    return write_diffusers(tmp_path / "pipeline")


def edited(changes, drop=()):
    """A checkpoint with tensors exchanged or added, and without those that begin so."""
    kept = {n: t for n, t in compvis_tensors().items() if not n.startswith(tuple(drop))}
    return kept | changes


# ---------------------------------------------------------------------------- CompVis' files
@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_all_settings_of_a_checkpoint_are_read(tmp_path, name):
    path = write_compvis(tmp_path / name)
    found = read_checkpoint(path)
    path.write_bytes(b"")  # everything has been taken out of the file
    assert (found.format, found.files) == ("compvis", (path,))
    assert found.network == UNET and found.denoiser == LEVELS
    assert found.settings == {"scaling_factor": SCALE}
    assert found.autoencoder.tree["latent_channels"] == 4
    averaged = checkpoint(UNET, seed=1)["input_blocks.0.0.weight"]
    assert torch.equal(found.weights["enter.0.weight"], averaged)
    (note,) = found.notes
    assert "assumed to be 32 channels wide: compare num_head_channels or num_heads" in note


def test_given_heads_need_no_note(tmp_path):
    path = write_compvis(tmp_path / "model.ckpt")
    wide, many = read_checkpoint(path, head_width=16), read_checkpoint(path, heads=4)
    assert (wide.network.heads, wide.network.head_width, many.network.heads) == (None, 16, 4)
    assert wide.notes == many.notes == ()


def test_noise_levels_default_to_those_of_compvis(tmp_path):
    state = edited({}, drop=["betas", "alphas_cumprod"])
    found = read_checkpoint(write_compvis(tmp_path / "model.ckpt", state), heads=4)
    assert found.denoiser == DiscreteConfig()
    assert found.notes == ("it has no table of noise levels: those of CompVis' models are assumed",)


TO_Q = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
CROSSED = {  # the tensor and its moving average
    f"model.diffusion_model.{TO_Q}": torch.zeros(1),
    f"model_ema.diffusion_model{TO_Q.replace('.', '')}": torch.ones(1),
}


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize(
    ("changes", "drop", "told"),
    [
        (CROSSED, [], "it has cross-attention"),
        ({}, ["model."], "holds no UNet of CompVis' latent diffusion"),
        ({}, ["first_stage_model."], "holds a UNet without its autoencoder (first_stage_model.…)"),
        ({"betas": torch.rand(20)}, [], "model cannot be used: its 20 noise levels, β from"),
        ({"alphas_cumprod": torch.rand(20)}, ["betas"], "are evenly spaced neither in √β"),
    ],
)  # fmt: skip
def test_other_checkpoints_are_refused_in_a_line(tmp_path, suffix, changes, drop, told):
    path = write_compvis(tmp_path / f"model{suffix}", edited(changes, drop))
    with pytest.raises(LdmError) as caught:
        read_checkpoint(path)
    said = str(caught.value).replace(suffix, "")
    assert told in said and str(path.with_suffix("")) in said and "\n" not in said


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize(
    "name", ["model_ema.diffusion_modelout2bias", "first_stage_model.quant_conv.bias", "betas"]
)
def test_a_number_that_is_not_finite_is_damage(tmp_path, suffix, name):
    tensors = compvis_tensors()
    tensors[name].flatten()[0] = float("nan")
    path = write_compvis(tmp_path / f"model{suffix}", tensors)
    with pytest.raises(LdmError, match=r"damaged: tensor .* has values that are NaN"):
        read_checkpoint(path)


def test_a_number_that_is_not_finite_is_damage_in_a_folder(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = float("inf")
    save_file(tensors, path)
    with pytest.raises(LdmError, match=r"damaged: tensor conv_in\.bias has values that are NaN"):
        read_folder(folder)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_weights_of_eight_bits_are_read(tmp_path, suffix):
    tensors = compvis_tensors()
    name = "model_ema.diffusion_modeltime_embed0weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    found = read_checkpoint(write_compvis(tmp_path / f"model{suffix}", tensors))
    assert torch.equal(found.weights["embed.linear_in.weight"], tensors[name].float())


def test_overstated_table_is_damage(tmp_path):
    tensors = edited({"betas": torch.zeros(1).expand(1000)})
    with pytest.raises(LdmError, match=r"damaged: tensor betas is \(1000,\), more than the file"):
        read_checkpoint(write_compvis(tmp_path / "model.ckpt", tensors))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_file_that_is_no_checkpoint_is_refused(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"no checkpoint")
    with pytest.raises(LdmError, match=f"{path} is truncated or damaged"):
        read_checkpoint(path)


# ------------------------------------------------------------------------- diffusers' folders
def edit(path, **changes):
    """Exchange what a config says; what is to be None is taken away."""
    tree = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


SCHEDULER = "scheduler/scheduler_config.json"


def test_all_settings_of_a_folder_are_read(folder):
    found = read_folder(folder)
    assert (found.format, found.denoiser) == ("diffusers", LEVELS)
    assert (found.settings["scaling_factor"], found.size, found.notes) == (SCALE, 8, ())
    assert (found.network.channels, found.network.head_width) == (64, 16)
    name = "diffusion_pytorch_model.safetensors"
    assert found.files == (folder / "unet" / name, folder / "vae" / name)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            {"prediction_type": "v_prediction", "beta_schedule": "linear"},
            LEVELS.model_copy(update={"prediction": "v", "schedule": "linear"}),
        ),
        (
            dict.fromkeys(("num_train_timesteps", "beta_start", "beta_end", "prediction_type"))
            | {"beta_schedule": "linear"},
            DiscreteConfig(beta_start=0.0001, beta_end=0.02, schedule="linear"),
        ),
        (
            {"trained_betas": torch.linspace(0.1, 0.4, 7).tolist(), "beta_schedule": "squared"},
            DiscreteConfig(timesteps=7, beta_start=0.1, beta_end=0.4, schedule="linear"),
        ),
    ],
)
def test_scheduler_config_sets_the_denoiser(folder, said, expected):
    edit(folder / SCHEDULER, **said)
    assert read_folder(folder).denoiser == expected


@pytest.mark.parametrize(
    ("given", "size"), [([8, 8], 8), ([12, 8], (12, 8)), (None, None), ([8, 8, 8], None)]
)
def test_size_of_a_folder_is_one_number_or_height_and_width(folder, given, size):
    edit(folder / "unet/config.json", sample_size=given)
    assert read_folder(folder).size == size


@pytest.mark.parametrize(
    ("file", "changes", "told"),
    [
        (SCHEDULER, {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is 'squaredcos_cap_v2', "
         "only 'linear' or 'scaled_linear' is supported"),
        (SCHEDULER, {"beta_schedule": None}, "it has no beta_schedule"),
        (SCHEDULER, {"prediction_type": "sample"}, "prediction_type is 'sample', only 'epsilon'"),
        (SCHEDULER, {"prediction_type": ["epsilon"]}, "type is ['epsilon'], only 'epsilon'"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True, only False"),
        (SCHEDULER, {"trained_betas": [0.1, 0.3, 0.2]}, "are evenly spaced neither"),
        (SCHEDULER, {"trained_betas": ["x"]}, "cannot be used: "),
        (SCHEDULER, {"beta_end": 0.001}, "cannot be used: 'beta_end'"),
        (SCHEDULER, {"num_train_timesteps": "many"}, "cannot be used: 'timesteps'"),
        *(
            (f"{part}/config.json", {"sample_size": value}, f"sample_size is {value!r}, not a")
            for part in ("unet", "vae")
            for value in (0, -1, 0.5, float("nan"), "8", [], {}, True)
        ),
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "only 'UNet2DModel' is"),
    ],
)  # fmt: skip
def test_other_folders_are_refused_in_a_line(folder, file, changes, told):
    edit(folder / file, **changes)
    with pytest.raises(LdmError) as caught:
        read_folder(folder)
    said = str(caught.value)
    assert told in said and str(folder) in said and "\n" not in said


@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", SCHEDULER])
@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_without_a_part_is_refused(folder, file, content):
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(LdmError) as caught:
        read_folder(folder)
    said = str(caught.value)
    assert file in said and "\n" not in said
    assert ("is missing: --diffusion takes the folder" in said) == (content is None)
