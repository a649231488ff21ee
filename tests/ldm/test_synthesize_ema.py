"""A run's model averaged afterwards: which weights it gets, and what all else stays."""

import shutil

import pytest
import torch

from autoencoders import build_autoencoder
from diffusion import UNet
from ldm.checkpoint import ModelFile, load_model, save_model
from ldm.config import to_tree
from ldm.ema import PowerEma, list_snapshots, save_snapshot, synthesize_ema
from ldm.errors import LdmError, UsageError
from tests.small import autoencoder_recipe, diffusion_recipe

BATCH, STEPS, EVERY = 4, 120, 10


def make_run(folder, tracked_std: float = 0.07):
    """A run's ckpt.pt and snapshots, of a network whose weights walk at random, and its average of
    another width, tracked on the way: (folder, weights)."""
    torch.manual_seed(0)
    recipe = diffusion_recipe("none")
    autoencoder = build_autoencoder(autoencoder_recipe().model)
    network = UNet(recipe.network)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    kept = {std: PowerEma(network, std) for std in (0.05, 0.1)}
    tracked = PowerEma(network, tracked_std)
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.001)
        for ema in (*kept.values(), tracked):
            ema.update(step * BATCH, BATCH)
        if step % EVERY == 0:
            for std, ema in kept.items():
                save_snapshot(folder / "ema", step * BATCH, std, ema.ema_model.state_dict())
    inner = ModelFile("autoencoder", to_tree(autoencoder.config), autoencoder.state_dict())
    statistics = {"mean": [0.0] * 4, "std": [1.0] * 4, "sigma_data": 0.5}
    origin = {"autoencoder_sha256": inner.sha256, "images_seen": STEPS * BATCH}
    model = ModelFile("diffusion", to_tree(recipe), network.state_dict(), statistics, origin, inner)
    save_model(folder / "ckpt.pt", model)
    return folder, tracked.ema_model.state_dict()


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("once") / "run")


@pytest.fixture
def run(made_once, tmp_path):
    folder, tracked = made_once
    return shutil.copytree(folder, tmp_path / "run"), tracked


def test_the_weights_are_the_tracked_averages_and_all_else_is_the_models(run, capsys):
    folder, tracked = run
    path = synthesize_ema(folder, 0.07)
    assert path == folder / "ckpt-ema0.07.pt"
    made, model = load_model(path, "diffusion"), load_model(folder, "diffusion")
    assert made.weights.keys() == model.weights.keys() == tracked.keys()
    for name, weight in made.weights.items():
        assert weight.dtype == model.weights[name].dtype
        torch.testing.assert_close(weight, tracked[name], rtol=1e-4, atol=2e-5)
    moved = sum((model.weights[n] - tracked[n]).norm() ** 2 for n in tracked) ** 0.5
    off = sum((made.weights[n] - tracked[n]).norm() ** 2 for n in tracked) ** 0.5
    assert off < 2e-3 * moved
    assert made.config == model.config and made.statistics == model.statistics
    assert made.autoencoder.sha256 == model.autoencoder.sha256
    residual = made.provenance.pop("ema_residual")
    assert 0 < residual < 0.02 and f"exact to {residual:.1%}" in capsys.readouterr().out
    assert made.provenance == model.provenance | {"ema_std": 0.07, "ema_images": STEPS * BATCH}
    assert load_model(path.with_suffix(".safetensors"), "diffusion").sha256 == made.sha256


def test_an_earlier_time_has_a_name_of_its_own(run):
    folder, _ = run
    path = synthesize_ema(folder, 0.05, at=240)
    assert path == folder / "ckpt-ema0.05-240.pt"
    made = load_model(path, "diffusion")
    assert made.provenance["ema_images"] == 240 and made.provenance["ema_residual"] < 1e-6


def test_made_again_it_is_the_same_and_one_made_before_is_replaced(run):
    folder, _ = run
    first = load_model(synthesize_ema(folder, 0.07), "diffusion")
    assert load_model(synthesize_ema(folder, 0.07), "diffusion").sha256 == first.sha256
    for snapshot in list_snapshots(folder / "ema"):
        if snapshot.images_seen == STEPS * BATCH:
            snapshot.path.unlink()
    again = load_model(synthesize_ema(folder, 0.07), "diffusion")
    assert again.provenance["ema_images"] == (STEPS - EVERY) * BATCH
    assert again.sha256 != first.sha256


def test_out_is_never_written_over_what_is_there(run, tmp_path):
    folder, _ = run
    out = tmp_path / "elsewhere" / "mine.pt"
    assert synthesize_ema(folder, 0.07, out=out) == out
    before = (folder / "ckpt.pt").read_bytes()
    for there in (out, folder / "ckpt.pt"):
        with pytest.raises(LdmError, match="already exists: give --out another name"):
            synthesize_ema(folder, 0.06, out=there)
    out.unlink()
    with pytest.raises(LdmError, match=r"mine\.safetensors already exists"):
        synthesize_ema(folder, 0.06, out=out)
    with pytest.raises(UsageError, match=r"must end in \.pt"):
        synthesize_ema(folder, 0.06, out=tmp_path / "mine.safetensors")
    assert (folder / "ckpt.pt").read_bytes() == before


def test_runs_that_cannot_be_averaged(run, tmp_path):
    folder, _ = run
    before = sorted(folder.iterdir())
    with pytest.raises(LdmError, match="no run folder at"):
        synthesize_ema(tmp_path / "nowhere", 0.07)
    (tmp_path / "bare").mkdir()
    with pytest.raises(LdmError, match="no snapshots of averages"):
        synthesize_ema(tmp_path / "bare", 0.07)
    with pytest.raises(LdmError, match=r"cannot be made .*\(24, of std 0\.05, 0\.1\)"):
        synthesize_ema(folder, 0.01)
    with pytest.raises(LdmError, match="no snapshot at 5 images"):
        synthesize_ema(folder, 0.07, at=5)
    with pytest.raises(UsageError, match="width of an average"):
        synthesize_ema(folder, 7.0)
    assert sorted(folder.iterdir()) == before
    (folder / "ckpt.pt").unlink()
    with pytest.raises(LdmError, match=r"holds no ckpt\.pt"):
        synthesize_ema(folder, 0.07)


@pytest.mark.parametrize("more_in", ["snapshots", "ckpt.pt"])
def test_snapshots_of_another_network(run, more_in):
    folder, tracked = run
    if more_in == "snapshots":
        for snapshot in list_snapshots(folder / "ema"):
            save_snapshot(
                folder / "ema", snapshot.images_seen, snapshot.std, tracked | {"z": torch.ones(2)}
            )
    else:
        model = load_model(folder, "diffusion")
        model.weights["z"] = torch.ones(2)
        save_model(folder / "ckpt.pt", model)
    with pytest.raises(LdmError, match=r"not of the network in .*ckpt\.pt: tensor z differs"):
        synthesize_ema(folder, 0.07)
    assert not (folder / "ckpt-ema0.07.pt").exists()
