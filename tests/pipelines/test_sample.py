import json

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoders import build_autoencoder
from diffusion import EDM, UNet
from ldm.checkpoint import ModelFile, save_model
from ldm.config import to_tree
from ldm.errors import LdmError, UsageError
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.sample import image_path, sample_images
from tests.small import autoencoder_recipe, diffusion_recipe


def make_model(folder, seed: int):
    """A stage-two file of random weights: what is tested is not what it draws."""
    torch.manual_seed(seed)
    recipe = diffusion_recipe("none")
    autoencoder = build_autoencoder(autoencoder_recipe().model)
    network = UNet(recipe.network)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    inner = ModelFile("autoencoder", to_tree(autoencoder.config), autoencoder.state_dict())
    statistics = {"mean": [0.0] * 4, "std": [1.0] * 4, "sigma_data": 0.5}
    origin = {"autoencoder_sha256": inner.sha256}
    model = ModelFile("diffusion", to_tree(recipe), network.state_dict(), statistics, origin, inner)
    save_model(folder / "ckpt.pt", model)
    assert isinstance(LatentDiffusionPipeline.from_pretrained(folder).denoiser, EDM)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), 0)


def draw(model, out, n=6, **settings):
    settings = {"steps": 2, "batch_size": 4, "precision": "fp32", "device": "cpu"} | settings
    return sample_images(model, n, out, **settings)


def pixels(path):
    return np.array(Image.open(path))


def test_pngs_a_manifest_and_a_grid(model, tmp_path):
    out = draw(model, None)
    assert out == model / "samples" / "seed0-steps2"
    images = sorted(out.rglob("img*.png"))
    assert [p.name for p in images] == [f"img{i:08d}.png" for i in range(6)]
    assert pixels(images[0]).shape == (32, 32, 3)
    told = json.loads((out / "samples.json").read_text())
    assert told["n"] == 6 and told["seed"] == 0 and told["steps"] == 2
    assert len(told["model"]["sha256"]) == 64 and told["data"]["source"] == "photos"
    assert pixels(out / "grid.png").shape == (2 * 34 + 32, 34 + 32, 3)
    assert not [p for p in out.rglob("*") if "partial" in p.name]


def test_a_thousand_images_a_folder(tmp_path):
    assert image_path(tmp_path, 49_999) == tmp_path / "00049" / "img00049999.png"


def test_only_what_is_missing_is_made(model, tmp_path):
    out = draw(model, tmp_path / "out")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("img*.png")}
    lost = image_path(out, 3)
    lost_pixels = pixels(lost).astype(int)
    lost.unlink()
    draw(model, out, n=8)
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("img*.png")}
    assert len(after) == 8
    assert abs(pixels(lost) - lost_pixels).max() <= 1  # its batch is another one
    assert all(after[p] == before[p] for p in before if p != lost)
    assert json.loads((out / "samples.json").read_text())["n"] == 8


def test_batch_size_does_not_matter(model, tmp_path):
    a, b = draw(model, tmp_path / "a", batch_size=1), draw(model, tmp_path / "b", batch_size=7)
    for i in range(6):
        difference = pixels(image_path(a, i)).astype(int) - pixels(image_path(b, i))
        assert abs(difference).max() <= 1


@pytest.mark.parametrize(
    ("changed", "told"), [({"seed": 1}, "another seed"), ({"steps": 3}, "another steps")]
)
def test_a_folder_of_other_settings_is_refused(model, tmp_path, changed, told):
    draw(model, tmp_path / "out", n=1)
    with pytest.raises(LdmError, match=told):
        draw(model, tmp_path / "out", **changed)


def test_a_folder_of_another_model_is_refused(model, tmp_path):
    draw(model, tmp_path / "out", n=1)
    other = make_model(tmp_path / "other", 1)
    with pytest.raises(LdmError, match="another model"):
        draw(other, tmp_path / "out")


def test_a_folder_of_something_else_is_refused(model, tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(LdmError, match=r"holds no samples\.json"):
        draw(model, tmp_path)
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(LdmError, match="damaged"):
        draw(model, tmp_path)


@pytest.mark.parametrize("bad", [{"n": 0}, {"n": -3}, {"steps": 0}, {"batch_size": 0}])
def test_counts_below_one(model, tmp_path, bad):
    with pytest.raises(UsageError, match="must be at least 1"):
        draw(model, tmp_path / "out", **bad)
    assert not (tmp_path / "out").exists()


def test_a_write_that_fails_is_told(model, tmp_path, monkeypatch):
    """A disk that is full while pictures are written by other threads."""
    out = draw(model, tmp_path / "out", n=1)
    (out / "00000" / "img00000002.png").mkdir()
    with pytest.raises(LdmError, match="could not write"):
        draw(model, out, n=4)
