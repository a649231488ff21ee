"""Images of another height than width, through both stages: H and W are never mixed up."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoders import build_autoencoder
from diffusion import DiTConfig, build_network
from diffusion.edm2 import EDM2Config
from ldm.checkpoint import load_model
from ldm.config import to_tree
from ldm.data import DataConfig, batches, evaluation_batches, open_source
from ldm.data.prepare import prepare
from ldm.errors import LdmError, UsageError
from ldm.images import to_uint8
from ldm.logbook import read_rows
from ldm.run import Run
from pipelines.fid import measure_fid
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.measuring.reference import ImageReference
from pipelines.recipes import fit
from pipelines.sample import sample_images
from pipelines.sampling.sample_folder import SampleFolder
from pipelines.train_autoencoder import train_autoencoder
from pipelines.train_diffusion import train_diffusion
from tests.pipelines.kill import Killed, kill
from tests.pipelines.untrained import load, make_model, said
from tests.small import autoencoder_recipe, diffusion_recipe, sdvae

SIZE, TRANSPOSED = (96, 64), (64, 96)
SMALL, SMALL_TRANSPOSED = (48, 32), (32, 48)  # of what is sampled, which takes a moment
PHASES = "phases=[{resolution: 64, steps: 1}, {resolution: [96, 64], steps: 3}]"
EVERY = "run={precision: fp32, log_every_steps: 1, validate_every_steps: 4, save_every_steps: 2}"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve portraits of 120×80, and their transposes."""
    root = tmp_path_factory.mktemp("images")
    coarse = np.random.default_rng(0).integers(0, 256, (12, 12, 8, 3), np.uint8)
    for name, axes in (("portraits", (0, 1, 2)), ("landscapes", (1, 0, 2))):
        (root / name).mkdir()
        for i, pixels in enumerate(coarse.repeat(10, 1).repeat(10, 2)):
            Image.fromarray(pixels.transpose(axes)).save(root / name / f"{i:02d}.png")
    return root


def data(images, name="portraits", **how) -> DataConfig:
    return DataConfig(source=str(images / name), held_out=4, workers=0, **how)


@pytest.fixture(scope="module")
def portraits(tmp_path_factory):
    """A model of random weights that was made for 48×32."""
    return make_model(tmp_path_factory.mktemp("model"), 0, settings=("resolution=[48, 32]",))


# --------------------------------------------------------------------------------------- data
@pytest.mark.parametrize("crop", ["center", "random"])
def test_batches_are_height_by_width(images, crop):
    for name, size in (("portraits", SIZE), ("landscapes", TRANSPOSED)):
        config = data(images, name, crop=crop, flip=True)
        source = open_source(config, "train", size)
        [batch] = batches(source, config, size, seed=0, start=0, stop=4, batch_size=4)
        assert batch.images.shape == (4, 3, *size)
        [batch] = evaluation_batches(source, size, 8)
        assert batch.images.shape == (8, 3, *size)


@pytest.mark.parametrize("small", ["error", "skip", "enlarge"])
def test_an_image_with_one_side_too_short_is_small(tmp_path, small, caplog):
    for i, (height, width) in enumerate([(96, 64), (64, 96), (96, 63), (95, 64)]):
        Image.fromarray(np.full((height, width, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    config = DataConfig(source=str(tmp_path), held_out=0, workers=0, small=small)
    source = open_source(config, "train", SIZE)
    if small == "error":
        with pytest.raises(LdmError, match=r"1.png is 64×96 \(height×width\), smaller than the 96"):
            next(evaluation_batches(source, SIZE, 4))
        return
    found = [k for batch in evaluation_batches(source, SIZE, 4) for k in batch.k.tolist()]
    assert ("(too small: 64×96 (height×width))" in caplog.text) == (small == "skip")
    assert found == ([0] if small == "skip" else [0, 1, 2, 3])


# ------------------------------------------------------------------------------------- recipes
def test_a_square_recipe_is_dumped_as_ever():
    square, pair = (autoencoder_recipe(f"phases=[{{resolution: {r}, steps: 4}}]")
                    for r in ("64", "[64, 64]"))  # fmt: skip
    assert square == pair and to_tree(pair)["phases"] == [{"resolution": 64, "steps": 4}]
    assert to_tree(diffusion_recipe("x", "resolution=[64, 64]"))["resolution"] == 64
    assert to_tree(diffusion_recipe("x", "resolution=[96, 64]"))["resolution"] == [96, 64]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ([PHASES.replace("96", "100")], "resolution 100x64 must be a multiple of 8"),
        (
            [PHASES.replace("96", "104")],
            "halves images 4 times, so their sides must be multiples of 16: ",
        ),
        (
            ["discriminator={type: stylegan, resolution: 64, channels: 4}", PHASES],
            "takes square images, not 96×64: .*use discriminator.type=unet or patchgan",
        ),
    ],
)
def test_a_size_that_the_networks_cannot_take_is_refused(settings, text):
    if "104" in settings[0]:  # divides by the encoder's 8, not by a discriminator's 16
        settings = [*settings, "discriminator.multipliers=[1, 2, 2, 2]"]
    with pytest.raises(UsageError, match=text) as error:
        autoencoder_recipe(*settings)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------- models
@pytest.mark.parametrize(("kind", "f"), [("litevae", 8), ("sdvae", 2)])
def test_autoencoders_encode_and_decode_height_by_width(kind, f):
    ae = sdvae() if kind == "sdvae" else build_autoencoder(autoencoder_recipe().model).eval()
    images = torch.rand(1, 3, *SIZE) * 2 - 1
    with torch.no_grad():
        latents = ae.encode(images).mode()
        assert latents.shape[2:] == (96 // f, 64 // f)
        assert latents.shape[1:] == ae.config.latent_shape(SIZE)
        assert ae.decode(latents).shape == images.shape


NETWORKS = {
    "unet": diffusion_recipe("x").network,
    "edm2": EDM2Config(channels=8, multipliers=(1, 2), attention_factors=(2,), head_width=8),
    "dit": DiTConfig(width=32, depth=1, heads=2, grid=4),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_take_height_by_width(kind):
    network = build_network(NETWORKS[kind]).eval()
    for height, width in ((12, 8), (8, 12)):
        z = torch.randn(2, 4, height, width)
        with torch.no_grad():
            assert network(z, torch.ones(2)).shape == z.shape
    with pytest.raises(LdmError, match="latents of 12×7 do not fit"):
        network(torch.randn(2, 4, 12, 7), torch.ones(2))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            ["resolution=[96, 80]", "network.patch=4"],
            "^resolution=96x80 must be a multiple of 32: ",
        ),
        (["resolution=[96, 64]", "network.grid=6"], r"^network.grid=6 must be \(6, 4\) here: omit"),
    ],
)
def test_a_dit_is_fitted_to_the_grid_of_its_latents(settings, told):
    recipe = diffusion_recipe("x", "network={type: dit}", "resolution=[96, 64]")
    ae = build_autoencoder(autoencoder_recipe().model)
    fitted = fit(recipe, ae, 0)
    assert fitted.network.grid == (6, 4) and fit(fitted, ae, 0) == fitted
    assert fit(recipe.model_copy(update={"resolution": 64}), ae, 0).network.grid == 4
    with pytest.raises(UsageError, match=told) as caught:
        fit(diffusion_recipe("x", "network={type: dit}", *settings), ae, 0)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------ sampling
def test_samples_have_the_training_size_or_the_requested_one(portraits):
    pipe = load(portraits)
    assert pipe.latent_shape == (4, 6, 4)
    own = pipe(n=2, seed=1, steps=1)
    assert own.shape == (2, 3, *SMALL)
    assert torch.equal(pipe(n=2, seed=1, steps=1, size=SMALL), own)
    other = pipe(n=2, seed=1, steps=1, size=SMALL_TRANSPOSED)
    assert other.shape == (2, 3, *SMALL_TRANSPOSED)
    # image i does not depend on the batch
    alone = pipe(n=2, seed=1, steps=1, size=SMALL_TRANSPOSED, batch_size=1)
    assert (alone - other).abs().max() < 1 / 255


@pytest.mark.slow
def test_images_of_another_size_are_edited(portraits):
    pipe = load(portraits)
    other = pipe(n=2, steps=1, size=SMALL_TRANSPOSED)
    assert pipe.interpolate(0, 1, 2, steps=2, size=64).shape == (2, 3, 64, 64)
    edited = pipe.edit(other, 0.5, steps=2, size=SMALL_TRANSPOSED)
    assert edited.shape == other.shape
    mask = torch.zeros(1, 1, *SMALL_TRANSPOSED)
    mask[..., :16] = 1
    painted = pipe.inpaint(other, mask, steps=2, size=SMALL_TRANSPOSED)
    assert torch.equal(painted[..., 16:], other[..., 16:])
    with pytest.raises(UsageError, match=r"images are \(2, 3, 32, 48\), not \(B, 3, 48, 32\)"):
        pipe.edit(other)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        ((96, 60), "--size 96x60: both sides must be multiples of 16: the autoencoder divides by"),
        ((0, 64), "'size': must be a number of pixels"),
        ("x96", "'size': must be a number of pixels"),
        ((96, 64, 3), "'size': must be a number of pixels"),
        ((32768, 64), "--size 32768x64: must be at most 16,384"),
    ],
)
def test_sizes_that_cannot_be_sampled_are_refused(portraits, size, text):
    assert text in said(lambda: load(portraits)(steps=2, size=size))


@pytest.mark.slow
def test_a_sample_folder_keeps_its_size(portraits, tmp_path, capsys):
    how = {"steps": 2, "device": "cpu", "precision": "fp32"}
    out = sample_images(portraits, 2, None, **how)
    assert out.name == "seed0-steps2" and "note" not in capsys.readouterr().out
    manifest = json.loads((out / "samples.json").read_text())
    assert manifest["resolution"] == [48, 32]
    assert SampleFolder(out).resolution == SMALL
    assert sample_images(portraits, 3, out, size=SMALL, **how) == out  # the same settings

    other = sample_images(portraits, 2, None, size=SMALL_TRANSPOSED, files="shards", **how)
    note = capsys.readouterr().out.replace("\n", " ")
    assert "sampling at 32×48 (height×width), not at 48×32" in note
    assert other.name == "seed0-steps2-32x48-shards"
    assert json.loads((other / "manifest.json").read_text())["size"] == [32, 48]
    assert SampleFolder(other).load(1).shape == (*SMALL_TRANSPOSED, 3)
    pictures = load(portraits)(n=2, steps=2, size=SMALL_TRANSPOSED)
    assert np.array_equal(SampleFolder(other).load(1), to_uint8(pictures)[1].permute(1, 2, 0))
    for size in (SMALL, None):
        with pytest.raises(LdmError, match=r"samples with other settings \(resolution\)"):
            sample_images(portraits, 2, other, size=size, files="shards", **how)


def test_square_samples_are_named_and_described_as_ever(tmp_path):
    model = make_model(tmp_path, 0)
    out = sample_images(model, 1, None, steps=2, device="cpu", precision="fp32", size=(32, 32))
    manifest = json.loads((out / "samples.json").read_text())
    assert out.name == "seed0-steps2" and manifest["resolution"] == 32
    # the identity of a model does not depend on this version
    pair = make_model(tmp_path / "pair", 0, settings=("resolution=[32, 32]",))
    assert load(pair).identifiers == load(model).identifiers


# ----------------------------------------------------------------------------------- measuring
@pytest.mark.slow
def test_fid_is_of_images_of_one_height_and_width(portraits, images, weights, tmp_path):
    how = {"steps": 1, "device": "cpu", "precision": "fp32"}
    samples = sample_images(portraits, 6, tmp_path / "samples", **how)
    given = {"weights": weights, "device": "cpu", "force": True, "out": tmp_path / "fid.json"}
    found = measure_fid(samples, data(images), "train", **given)
    assert found["resolution"] == [48, 32]
    assert list(found["swd"]) == ["48x32", "24x16", "mean"]
    assert found["reference"]["filter"] == "lanczos"  # 120×80 was downsized
    other = sample_images(portraits, 6, tmp_path / "other", size=SMALL_TRANSPOSED, **how)
    prepare(images / "portraits", tmp_path / "prepared", SMALL, workers=0, held_out=0)
    with pytest.raises(LdmError, match="prepared at 48×32 and the samples are 32×48"):
        measure_fid(other, DataConfig(source=str(tmp_path / "prepared")), **given)
    native = prepare(images / "portraits", tmp_path / "native", (120, 80), workers=0, held_out=0)
    assert native["filter"] == "none"
    same = ImageReference(DataConfig(source=str(tmp_path / "native")), "all", (120, 80), 6)
    assert same.filter is None and same.about["prepared"]["size"] == [120, 80]


# ------------------------------------------------------------------------------------ training
def train_one(folder, source, size):
    phases = PHASES.replace("[96, 64]", str(list(size)))
    where = f"data={{source: {str(source)!r}, held_out: 4, workers: 0, crop: center}}"
    recipe = autoencoder_recipe(phases, where, "adversarial.cutmix=1", EVERY)
    return train_autoencoder(recipe, folder=folder)


def train_two(folder, one, source, size, *settings):
    where = f"data={{source: {str(source)!r}, held_out: 4, workers: 0, crop: center}}"
    sized = f"resolution={list(size)}"
    recipe = diffusion_recipe(one / "ckpt.pt", sized, where, "steps=4", EVERY, *settings)
    return train_diffusion(recipe, folder=folder)


def killed_once(monkeypatch, train, folder, *rest):
    """Train; the process is killed after the first saved state, and begun again."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, Run, "save", 8)
        train(folder, *rest)
    assert not (folder / "result.json").exists()
    return train(folder, *rest)


@pytest.mark.slow
def test_both_stages_train_on_portraits_and_their_transposes(images, tmp_path):
    for name, size in (("portraits", SIZE), ("landscapes", TRANSPOSED)):
        one = train_one(tmp_path / name / "ae", images / name, size)
        two = train_two(tmp_path / name / "ldm", one, images / name, size)
        rows = [row for row in read_rows(one / "metrics.jsonl") if "lr" in row]
        assert rows[0]["resolution"] == 64  # the phase before
        assert (rows[-1]["height"], rows[-1]["width"]) == size
        with Image.open(max((one / "pictures").glob("recon-*.png"))) as sheet:
            # originals, reconstructions and latents of four images, two pixels between them
            assert sheet.size == (4 * size[1] + 3 * 2, 3 * size[0] + 2 * 2)
        pipe = LatentDiffusionPipeline.from_pretrained(two, "cpu")
        assert pipe.latent_shape == (4, size[0] // 8, size[1] // 8)
        assert pipe(n=1, steps=1).shape == (1, 3, *size)


@pytest.mark.slow
def test_killed_runs_on_portraits_resume_bit_exactly(images, tmp_path, monkeypatch):
    source = images / "portraits"
    one = train_one(tmp_path / "ae", source, SIZE)
    again = killed_once(monkeypatch, train_one, tmp_path / "again", source, SIZE)
    assert load_model(again, "autoencoder").sha256 == load_model(one, "autoencoder").sha256
    two = train_two(tmp_path / "ldm", one, source, SIZE)
    again = killed_once(monkeypatch, train_two, tmp_path / "ldm-again", one, source, SIZE)
    assert load_model(again, "diffusion").sha256 == load_model(two, "diffusion").sha256


@pytest.mark.slow
def test_cached_latents_of_portraits_are_those_encoded_on_the_fly(images, tmp_path):
    source, cache = images / "portraits", f"cache={str(tmp_path / 'latents')!r}"
    one = train_one(tmp_path / "ae", source, SIZE)
    runs = [train_two(tmp_path / name, one, source, SIZE, *more)
            for name, more in (("fly", ()), ("cached", (cache,)))]  # fmt: skip
    losses = [[row["loss"] for row in read_rows(run / "metrics.jsonl")] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert json.loads((tmp_path / "latents/cache.json").read_text())["resolution"] == [96, 64]
    block = np.load(tmp_path / "latents/latents-00000.npy")  # mirrored, too
    assert block.shape == (8, 2, 2, 4, 12, 8)
    with pytest.raises(LdmError, match=r"other latents \(resolution"):
        train_two(tmp_path / "other", one, source, TRANSPOSED, cache, "data.small=enlarge")
