"""Recipes of both stages: accepted, refused, sized; and the autoencoder of a stage two."""

import json
from pathlib import Path

import pytest
import torch

from autoencoders import build_autoencoder
from ldm.config import load_preset, resolve
from ldm.data import open_source
from ldm.errors import LdmError, UsageError
from ldm.run_folder import describe_run
from pipelines.recipes import DiffusionRecipe, find_stage_one, fit, latent_shape, read_recipe
from tests.small import autoencoder_recipe, diffusion_recipe


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("accumulate=3", "multiple of accumulate"),
        ("phases=[]", "phases is empty"),
        ("phases.0.steps=0", r"'phases.0.steps': .*greater than 0"),
        ("phases.0.resolution=36", "resolution 36 must be a multiple of 8"),
        ("discriminator.multipliers=[1, 2, 2, 2, 2, 2]", "multiples of 64"),
        (
            "discriminator={type: stylegan, resolution: 64}",
            "one resolution, discriminator.resolution=64, not 32",
        ),
        ("discriminator={type: patchgan, layers: 5}", "at least 96 pixels a side"),
        ("discriminator.type=transformer", "'discriminator'"),
        ("latent_channels=0", "'latent_channels'"),
        ("encoder={type: dwt}", "set latent_channels=12"),
        ("encoder.depth=2", "the encoder downsamples 4×"),
        ("loss={l1: 0, lpips: 0}", "one of l1, l2, lpips, esrgan must be above 0"),
        ("encoder.wavelet=db20", "too small for a transform of depth 3 by the wavelet 'db20'"),
        ("encoder.wavelet=harr", "did you mean 'haar'"),
        ("encoder.levels=[2, 5]", "'encoder.levels'"),
        ("best_by=fid", "'best_by'"),
        ("clip_norm=0", "'clip_norm'"),
        ("lr=-1", "'lr'"),
        ("run.log_every_steps=0", "'run.log_every_steps'"),
        ("run.keep_states=0", "'run.keep_states'"),
        ("validate_images=0", "'validate_images'"),
    ],
)
def test_invalid_autoencoder_recipe_is_refused(setting, message):
    with pytest.raises(UsageError, match=message) as caught:
        autoencoder_recipe(setting)
    assert "\n" not in str(caught.value)


def test_cutmix_needs_a_per_pixel_discriminator():
    with pytest.raises(
        UsageError, match=r"CutMix needs per-pixel logits, discriminator\.type=unet"
    ):
        autoencoder_recipe("adversarial.cutmix=1", "discriminator={type: patchgan, layers: 2}")


def test_unused_discriminator_is_not_checked():
    recipe = autoencoder_recipe("adversarial.weight=0", "discriminator={type: stylegan}")
    assert recipe.discriminator.resolution == 128


# ------------------------------------------------------------------------------ stage two
@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return build_autoencoder(autoencoder_recipe().model)


def fitted(autoencoder, *settings):
    recipe = diffusion_recipe("none", *settings)
    source = open_source(recipe.data, "train", recipe.resolution)
    return fit(recipe, autoencoder, len(source.classes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["batch_size=4", "accumulate=3"], "batch_size must be a multiple of accumulate"),
        (
            ["lr_schedule=inverse_sqrt"],
            "lr_schedule=inverse_sqrt and lr_decay_images need each other",
        ),
        (["lr_decay_images=5"], "lr_schedule=inverse_sqrt and lr_decay_images need each other"),
        (["ema_stds=[0.05]"], "ema_stds needs two or more different widths"),
        (["ema_stds=[0.05, 0.05]"], "ema_stds needs two or more different widths"),
        (["ema_stds=[0.05, 0.5]"], "ema_stds: .* must be above 0 and at most 0.28868"),
        (["cache=x", "augment.probability=0.1"], "augment needs latents encoded on the fly"),
        (
            ["augment.probability=0.1", "data.flip=true"],
            "augment mirrors images itself: set data.flip=false",
        ),
        (["cache=x", "data={source: y, crop: random}"], "random crops cannot be cached"),
        (["cache=x", "data={source: photos, crop: center}"], "random crops cannot be cached"),
        (["label_dropout=1.5"], "label_dropout"),
    ],
)
def test_contradicting_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        diffusion_recipe("none", *settings)


@pytest.mark.parametrize("network", [None, [1], "edm2", {"type": "edm3"}])
def test_a_damaged_network_is_one_line(network):
    with pytest.raises(UsageError, match="network"):
        read_recipe({"network": network})


def test_fit_sizes_the_network(autoencoder):
    recipe = fitted(autoencoder, "data={labels: true, flip: false}", "augment.probability=0.1")
    network = recipe.network
    assert (network.latent_channels, network.classes, network.augment_parameters) == (4, 8, 9)
    assert latent_shape(recipe, autoencoder) == (4, 4, 4)
    plain = fitted(autoencoder).network
    assert (plain.classes, plain.augment_parameters) == (0, 0)


def test_a_flow_has_times_that_the_network_can_resolve():
    edm2 = "network={type: edm2, channels: 64}"
    assert recipe("denoiser.type=flow").trained.time_scale == 1000
    assert recipe("denoiser={type: flow, time_scale: 1}", edm2).trained.time_scale == 1
    with pytest.raises(UsageError, match=r"denoiser\.time_scale: .* times of about 1: set 1"):
        recipe("denoiser.type=flow", edm2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["network.latent_channels=8"], "network.latent_channels=8 must be 4 here"),
        (["network.classes=3"], "network.classes=3 must be 0 here"),
        (["network.augment_parameters=2"], "augment_parameters=2 must be 0 here"),
        (["resolution=40"], "resolution=40 must be a multiple of 16"),
        (["denoiser.type=discrete"], "discrete is for imported models: use type=edm or flow"),
    ],
)
def test_network_that_does_not_fit_is_refused(autoencoder, settings, message):
    with pytest.raises(UsageError, match=message):
        fitted(autoencoder, *settings)


# -------------------------------------------------------------------------- its autoencoder
@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def finished(name: str, preset: str) -> Path:
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"kind": "autoencoder", "preset": preset}))
    (folder / "ckpt.pt").touch()
    (folder / "result.json").touch()
    return folder


def recipe(*settings: str) -> DiffusionRecipe:
    return resolve(DiffusionRecipe, load_preset("diffusion", "tiny"), settings)


def begun(folder: Path, preset: str, *settings: str) -> Path:
    describe_run(folder, "diffusion", preset, recipe(*settings))
    return folder


def found(given: str = "", preset: str = "tiny", out: Path | None = None, *settings: str) -> str:
    return str(find_stage_one(recipe(f"autoencoder={given!r}", *settings), preset, out))


def test_autoencoder_is_a_path_a_preset_or_the_newest(empty_folder):
    dwt, tiny = finished("1", "dwt"), finished("2", "tiny")
    assert found() == f"{tiny}/ckpt.pt"
    assert found("dwt") == f"{dwt}/ckpt.pt"
    assert found(f"{dwt}") == found(f"{dwt}/ckpt.pt") == f"{dwt}/ckpt.pt"
    assert found("other.pt") == "other.pt"  # loading it raises the error
    Path("dwt").mkdir()
    assert found("dwt") == "dwt"


def test_home_is_expanded(empty_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.pt").touch()
    assert found("~/mine.pt") == str(tmp_path / "mine.pt")


def test_untrained_preset_is_an_error_with_its_command(empty_folder):
    with pytest.raises(LdmError, match=r"no dwt run .*`ldm train-ae dwt` first"):
        found("dwt")


def test_unfinished_run_keeps_its_autoencoder(empty_folder):
    finished("1", "tiny")
    newest = finished("2", "tiny")
    begun(Path("runs/a"), "tiny", "autoencoder=runs/1/ckpt.pt", "steps=7")
    assert found("", "tiny", None, "steps=7") == "runs/1/ckpt.pt"
    assert found("tiny", "tiny", None, "steps=7") == "runs/1/ckpt.pt"
    dwt = finished("3", "dwt")
    assert found("dwt", "tiny", None, "steps=7") == f"{dwt}/ckpt.pt"  # not that run's
    assert found("", "tiny", None, "steps=8") == f"{dwt}/ckpt.pt"
    # of equal settings, but another row of the paper
    assert found("", "other", None, "steps=7") == f"{dwt}/ckpt.pt"
    assert found(f"{newest}", "tiny", None, "steps=7") == f"{newest}/ckpt.pt"


def test_run_in_a_given_folder_is_found(empty_folder):
    newest = finished("2", "tiny")
    begun(Path("mine"), "tiny", "autoencoder=x.pt")
    assert found("", "tiny", Path("mine")) == "x.pt"
    assert found("", "tiny", Path("new")) == f"{newest}/ckpt.pt"
