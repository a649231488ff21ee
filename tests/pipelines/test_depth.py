"""Both stages, sampling and measuring on images that are not 8-bit RGB."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoders import build_autoencoder, load_autoencoder
from ldm.checkpoint import ModelFile, load_model, save_model
from ldm.config import to_tree
from ldm.data import DataConfig
from ldm.data.shards import read_manifest
from ldm.errors import LdmError, UsageError
from ldm.images import Pixels
from pipelines.evaluate import evaluate_checkpoints
from pipelines.fid import measure_fid
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.neighbours import find_neighbours
from pipelines.recipes import load_recipe
from pipelines.sample import sample_images
from pipelines.sampling.sample_folder import SampleFolder
from pipelines.train_autoencoder import train_autoencoder
from pipelines.train_diffusion import check_range, train_diffusion
from tests.small import autoencoder_recipe, diffusion_recipe

ONE_PHASE = "phases=[{resolution: 32, steps: 4}]"
RUN = "run={precision: fp32, log_every_steps: 2, validate_every_steps: 4, save_every_steps: 2}"


def deep_images(folder: Path, count: int = 6) -> Path:
    """Grey 16-bit PNGs of waves, that use a sixteenth of the levels."""
    folder.mkdir()
    row, column = np.indices((32, 32))
    for i in range(count):
        wave = 2000 + 1900 * np.sin(row / (3 + i)) * np.cos(column / (4 + i))
        Image.fromarray(wave.round().astype(np.uint16)).save(folder / f"{i}.png")
    return folder


def layers(folder: Path, count: int = 6) -> Path:
    """Floating-point arrays of four channels, from −5 to 5."""
    folder.mkdir()
    for i in range(count):
        array = np.random.default_rng(i).random((4, 32, 32), np.float32) * 10 - 5
        np.save(folder / f"{i}.npy", array)
    return folder


def stage_one(data: Path, out: Path, *settings: str) -> Path:
    data_settings = [f"data.source={str(data)!r}", "data.workers=0", "data.crop=center"]
    return train_autoencoder(
        autoencoder_recipe(ONE_PHASE, RUN, *data_settings, *settings), folder=out
    )


IN_FLOAT32 = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def grey(tmp_path_factory) -> Path:
    """A folder with data, and both stages trained on it."""
    folder = tmp_path_factory.mktemp("grey")
    data = deep_images(folder / "data")
    ae = stage_one(data, folder / "ae", "image_channels=1", "data.range=measured")
    own = [f"data.source={str(data)!r}", "data.workers=0", "steps=2", "data.crop=center"]
    train_diffusion(diffusion_recipe(ae / "ckpt.pt", *own), folder=folder / "diffusion")
    return folder


@pytest.fixture(scope="module")
def samples(grey) -> Path:
    return sample_images(grey / "diffusion", 4, grey / "samples", steps=2, **IN_FLOAT32)


pytestmark = pytest.mark.slow


def test_a_model_carries_the_pixels_that_it_was_trained_on(grey):
    every = [np.array(Image.open(path)) for path in sorted((grey / "data").iterdir())]
    range = (float(min(i.min() for i in every[:-1])), float(max(i.max() for i in every[:-1])))
    ae = load_autoencoder(grey / "ae")
    assert ae.config.image_channels == 1
    assert ae.config.pixels == Pixels(type="uint16", range=range)
    inner = load_model(grey / "diffusion", "diffusion").autoencoder
    assert inner is not None and inner.config == to_tree(ae.config)


def test_samples_are_16_bit_pngs_in_the_range_of_the_data(grey, samples):
    low, high = load_autoencoder(grey / "ae").config.pixels.bounds
    for path in samples.rglob("img*.png"):
        assert path.read_bytes()[24:26] == b"\x10\x00"  # 16 bits, grey
        levels = np.asarray(Image.open(path))
        assert low <= levels.min() and levels.max() <= high and len(np.unique(levels)) > 256
    pipe = LatentDiffusionPipeline.from_pretrained(grey / "diffusion", "cpu", "fp32")
    drawn = pipe(4, 0, steps=2)
    folder = SampleFolder(samples)
    assert folder.channels == 1 and drawn.shape == (4, 1, 32, 32)
    expected = pipe.autoencoder_config.pixels.to_array(drawn[2])
    assert abs(folder.load(2).astype(int) - expected).max() <= 1


def test_pil_images_are_refused_where_they_would_lose_the_range(grey):
    pipe = LatentDiffusionPipeline.from_pretrained(grey / "diffusion", "cpu", "fp32")
    picture = Image.open(grey / "data" / "0.png")
    with pytest.raises(UsageError, match=r"model's pixels are uint16 from .*: give a tensor of"):
        pipe.edit([picture], steps=2)
    with pytest.raises(UsageError, match=r"PIL images have 8 bits.*: give output='tensor'"):
        pipe(1, steps=2, output="pil")
    pipe.save_pretrained(grey / "saved", samples=0)
    assert 'output="pil"' not in (grey / "saved" / "README.md").read_text()


@pytest.mark.parametrize("files", ["shards", "zip"])
def test_archives_of_samples_hold_the_same_files(grey, samples, files, tmp_path):
    out = sample_images(grey / "diffusion", 4, tmp_path / "out", steps=2, files=files, **IN_FLOAT32)
    for i in range(4):
        np.testing.assert_array_equal(SampleFolder(out).load(i), SampleFolder(samples).load(i))
    if files == "shards":
        manifest = read_manifest(out)
        assert manifest is not None
        assert (manifest["channels"], manifest["dtype"]) == (1, "uint16")


def test_the_same_command_resumes_with_the_range_that_was_measured(grey, tmp_path):
    data = deep_images(tmp_path / "data")
    settings = ["image_channels=1", "data.range=measured", "data.changed=ok"]
    run = stage_one(data, tmp_path / "ae", *settings)
    Image.fromarray(np.full((32, 32), 65535, np.uint16)).save(data / "0.png")
    (run / "result.json").unlink()  # as if stopped before it
    again = stage_one(data, tmp_path / "ae", *settings)
    assert (run / "result.json").is_file()
    assert load_autoencoder(again).config.pixels == load_autoencoder(grey / "ae").config.pixels


def test_measuring_says_that_channels_are_repeated(grey, samples, tmp_path):
    (evaluation,) = evaluate_checkpoints(
        [grey / "ae"], fid=False, device="cpu", out=tmp_path / "eval.json"
    )
    about = evaluation.about
    assert about["image_channels"] == 1 and about["pixels"]["type"] == "uint16"
    assert about["recon"] == "posterior's mode, float32, rounded to 16 bits"
    assert "LPIPS are of the channel repeated to three" in about["notes"][0]
    result = measure_fid(
        samples, features="tests.pipelines.test_depth:mean_colours", force=True, device="cpu",
        out=tmp_path / "fid.json",
    )  # fmt: skip
    assert result["samples"]["image_channels"] == 1 and np.isfinite(result["fid"])
    assert any("channel repeated to three" in note for note in result["warnings"])


def mean_colours(device):
    """An extractor for `measure_fid`: the mean of each colour."""

    def extract(images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        assert (images == images[:, :1]).all()
        return images.float().mean((2, 3))

    return extract


def test_neighbours_of_deep_samples(grey, samples):
    for space in ("pixels", "latents"):
        find_neighbours(samples, count=2, space=space, device="cpu")
        assert Image.open(samples / "neighbours.png").mode == "RGB"


def test_floats_of_four_channels_go_through_both_stages(tmp_path):
    data = layers(tmp_path / "data")
    ae = stage_one(data, tmp_path / "ae", "image_channels=4", "data.range=[-5, 5]")
    own = [f"data.source={str(data)!r}", "data.workers=0", "steps=2", "data.crop=center"]
    model = train_diffusion(diffusion_recipe(ae / "ckpt.pt", *own), folder=tmp_path / "diffusion")
    for files in ("png", "shards", "zip"):
        out = sample_images(
            model, 3, tmp_path / files, steps=2, files=files, device="cpu", precision="fp32"
        )
        first = SampleFolder(out).load(0)
        assert first.shape == (32, 32, 4) and first.dtype == np.float32
        assert abs(first).max() <= 5
    assert np.load(next((tmp_path / "png").rglob("img*.npy"))).shape == (32, 32, 4)
    with tarfile.open(tmp_path / "shards/train-00000.tar") as tar:
        member = tar.extractfile("00000000.npy")
        assert member is not None and np.load(io.BytesIO(member.read())).dtype == np.float32
    assert Image.open(tmp_path / "png/grid.png").mode == "RGB"
    with pytest.raises(LdmError, match=r"1 or 3 channels, and these have 4; without FID, SWD"):
        measure_fid(
            tmp_path / "png", features="tests.pipelines.test_depth:mean_colours", force=True,
            device="cpu", out=tmp_path / "fid.json",
        )  # fmt: skip


def test_floats_without_a_range_stop_before_the_first_step(tmp_path):
    data = layers(tmp_path / "data")
    with pytest.raises(LdmError, match="range of floating-point pixels is unknown"):
        stage_one(data, tmp_path / "ae", "image_channels=4")


def test_stage_two_takes_the_range_of_stage_one(grey):
    own = [f"data.source={str(grey / 'data')!r}", "data.range=[0, 9]"]
    recipe = diffusion_recipe(grey / "ae" / "ckpt.pt", *own)
    config = load_autoencoder(grey / "ae").config
    assert recipe.data.of(config).range == (0, 9)
    assert DataConfig().of(config).range == config.pixels.range


def test_stage_two_does_not_measure_a_range(grey, tmp_path):
    own = [f"data.source={str(grey / 'data')!r}", "data.workers=0", "data.range=measured"]
    recipe = diffusion_recipe(grey / "ae" / "ckpt.pt", *own)
    with pytest.raises(UsageError, match=r"data.range=measured is for stage one"):
        train_diffusion(recipe, folder=tmp_path / "run")
    with pytest.raises(UsageError, match=r"data.range=measured is for stage one"):
        check_range(recipe)  # as the doctor does


# ------------------------------------------------------------------------ weights of colour
@pytest.fixture(scope="module")
def colour(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("colour") / "colour.pt"
    recipe = autoencoder_recipe()
    torch.manual_seed(0)
    ae = build_autoencoder(recipe.model)
    save_model(path, ModelFile("autoencoder", to_tree(ae.config), ae.state_dict()))
    return path


def begun(colour: Path, data: Path, out: Path, *settings: str) -> Path:
    settings = (
        ONE_PHASE, RUN, "batch_size=4", "loss.lpips=0", f"init.source={str(colour)!r}",
        f"data.source={str(data)!r}", "data.workers=0", "lr=1e-12", *settings,
        "discriminator={channels: 4, multipliers: [1, 2, 2]}",
    )  # fmt: skip
    return train_autoencoder(load_recipe("recipes", "finetune", settings), folder=out)


def test_weights_of_colour_are_refused_with_the_way_out(colour, tmp_path):
    data = deep_images(tmp_path / "data")
    with pytest.raises(LdmError, match=r"this model of 1: set init.adapt=sum") as said:
        begun(colour, data, tmp_path / "run", "image_channels=1")
    assert "\n" not in str(said.value)
    with pytest.raises(LdmError, match="of 3 channels, this model of 4: set image_channels=3"):
        begun(colour, layers(tmp_path / "l"), tmp_path / "run4", "image_channels=4",
              "data.range=[-5, 5]")  # fmt: skip


def test_adapted_weights_begin_where_colour_ended(colour, tmp_path):
    data = deep_images(tmp_path / "data")
    run = begun(colour, data, tmp_path / "run", "image_channels=1", "init.adapt=sum")
    adapted, ae = load_autoencoder(run), load_autoencoder(colour)
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        ours = adapted(images, sample=False).recon
        theirs = ae(images.expand(-1, 3, -1, -1), sample=False).recon.mean(1, keepdim=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_teacher_of_colour_is_refused(colour, tmp_path):
    settings = [ONE_PHASE, RUN, "image_channels=1", f"teacher.source={str(colour)!r}",
                f"data.source={str(deep_images(tmp_path / 'data'))!r}", "loss.lpips=0"]  # fmt: skip
    with pytest.raises((LdmError, UsageError), match="set image_channels=3"):
        train_autoencoder(load_recipe("recipes", "distil-s", settings), folder=tmp_path / "run")
