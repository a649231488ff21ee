"""Every check says in one line what is missing and what to do; nothing is fetched."""

import hashlib
from http.client import BadStatusLine, RemoteDisconnected
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoders import Autoencoder
from ldm.checkpoint import ModelFile, save_model
from ldm.config import to_tree
from ldm.data import DataConfig, open_source
from ldm.errors import LdmError
from ldm.metrics import inception
from ldm.metrics.inception import WEIGHTS, weight_folders
from ldm.run import RunConfig
from ldm.run_folder import describe_run
from pipelines.doctor import checks
from tests.small import autoencoder_recipe, diffusion_recipe

CPU = torch.device("cpu")
VGG16 = "vgg16-397923af.pth"


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No network, no runs, and a home without weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    ours = weight_folders()[:1]
    for module in (checks, inception):
        monkeypatch.setattr(module, "weight_folders", lambda: ours)
    monkeypatch.setattr(checks, "urlopen", no_network)


def no_network(*_, **__):
    raise OSError("no network in a test")


def only(problems):
    (problem,) = problems
    assert "\n" not in problem.text
    return problem


def save_images(folder, side, count=4):
    folder.mkdir()
    for number in range(count):
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(folder / f"{number}.png")


# ------------------------------------------------------------------------------------- data
def test_missing_data_are_told_as_training_tells_them(tmp_path):
    config = DataConfig(source=str(tmp_path / "nowhere"))
    source, problems = checks.check_data(config, [64, 32], validates=True)
    with pytest.raises(LdmError) as told:
        open_source(config, "train", 64)
    assert source is None and only(problems) == checks.Problem("error", str(told.value))


def test_data_that_are_there(tmp_path):
    save_images(tmp_path / "images", 64)
    config = DataConfig(source=str(tmp_path / "images"))
    source, problems = checks.check_data(config, [64, 32], validates=True)
    assert len(source) == 3 and problems == []  # one is held out
    source, problems = checks.check_data(DataConfig(), [64], validates=True)
    assert len(source) == 8 and problems == []


def test_images_that_are_too_small(tmp_path):
    save_images(tmp_path / "images", 48)
    config = DataConfig(source=str(tmp_path / "images"))
    problem = only(checks.check_data(config, [64], validates=True)[1])
    assert problem.level == "error" and "smaller than the 64×64" in problem.text


def test_an_image_that_cannot_be_read_does_not_stop_a_run(tmp_path):
    save_images(tmp_path / "images", 64)
    (tmp_path / "images" / "0.png").write_bytes(b"no picture")
    config = DataConfig(source=str(tmp_path / "images"))
    source, problems = checks.check_data(config, [64], validates=True)
    assert len(source) == 3 and only(problems).level == "warning"


def test_nothing_left_to_train_on(tmp_path):
    save_images(tmp_path / "images", 64)
    config = DataConfig(source=str(tmp_path / "images"), held_out=4)
    problem = only(checks.check_data(config, [64], validates=True)[1])
    assert problem.level == "error" and "leaves none to train on" in problem.text


# ------------------------------------------------------------------------ published weights
@pytest.mark.parametrize(
    ("settings", "network", "instead"),
    [
        (("loss.lpips=1",), "VGG-16", "loss.lpips=0"),
        (("loss.lpips=1", "loss.lpips_network=squeeze"), "SqueezeNet 1.1", "loss.lpips=0"),
        (("loss.esrgan=1",), "VGG-19", "loss.esrgan=0"),
        (("best_by=lpips",), "VGG-16", "best_by=psnr"),
    ],
)
def test_weights_that_nobody_serves_stop_a_run(tmp_path, settings, network, instead):
    problems = checks.check_perceptual(autoencoder_recipe(*settings))
    problem = only([p for p in problems if p.level == "error"])
    assert problem.text.startswith(f"{network}'s weights") and instead in problem.text
    assert str(tmp_path / "torch" / "hub" / "checkpoints") in problem.text


def test_weights_that_are_served_are_only_announced(monkeypatch):
    asked = []
    monkeypatch.setattr(checks, "ask_size", lambda url: asked.append(url) or 528 * 2**20)
    problem = only(checks.check_perceptual(autoencoder_recipe("loss.lpips=1")))
    assert problem.level == "warning" and "first download 528 MiB" in problem.text
    assert asked == [f"https://download.pytorch.org/models/{VGG16}"]


def test_weights_that_are_there(tmp_path):
    at = tmp_path / "torch" / "hub" / "checkpoints" / VGG16
    at.parent.mkdir(parents=True)
    at.write_bytes(b"")
    assert checks.check_perceptual(autoencoder_recipe("loss.lpips=1")) == []


def test_weights_that_would_only_be_welcome():
    problem = only(checks.check_perceptual(autoencoder_recipe()))
    assert problem.level == "note" and "held-out LPIPS" in problem.text


def test_inception_is_for_fid_alone(tmp_path, monkeypatch):
    problem = only(checks.check_inception())
    assert problem.level == "note" and WEIGHTS in problem.text and "ldm fid" in problem.text
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / WEIGHTS).write_bytes(b"")
    assert len(checks.check_inception()) == 1, "another file of its name"
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(b"").hexdigest())
    assert checks.check_inception() == []


class Answer:
    def __init__(self, **headers):
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_asking_for_a_size_fetches_nothing(monkeypatch):
    asked = []
    answer = Answer(Content_Length="1234")
    monkeypatch.setattr(checks, "urlopen", lambda r, timeout: asked.append(r) or answer)
    assert checks.ask_size("https://x.invalid/w.pth") == 1234
    assert [request.get_method() for request in asked] == ["HEAD"]


@pytest.mark.parametrize(
    "answer",
    [Answer(), Answer(Content_Length="0"), Answer(Content_Length="many"), OSError("no network"),
     RemoteDisconnected("hung up"), BadStatusLine("what?")],
)  # fmt: skip
def test_a_server_that_says_no_size(monkeypatch, answer):
    def reply(*_, **__):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(checks, "urlopen", reply)
    assert checks.ask_size("https://x.invalid/w.pth") is None


def test_a_server_is_not_waited_for_longer_than_that(monkeypatch):
    over = Event()

    def slow(*_, **__):  # as where a name cannot be looked up, which no timeout ends
        over.wait(2)
        return Answer(Content_Length="1234")

    monkeypatch.setattr(checks, "urlopen", slow)
    monkeypatch.setattr(checks, "TIMEOUT", 0.01)
    assert checks.ask_size("https://x.invalid/w.pth") is None
    over.set()


# -------------------------------------------------------------------------------- stage one
def save_run(folder, preset, bias=0.0):
    recipe = autoencoder_recipe()
    describe_run(folder, "autoencoder", preset, recipe)
    ae = Autoencoder(recipe.model)
    with torch.no_grad():
        ae.decoder.conv_out.bias.fill_(bias)
    save_model(folder / "ckpt.pt", ModelFile("autoencoder", to_tree(recipe.model), ae.state_dict()))
    return recipe.model


def test_the_newest_run_or_a_presets_or_a_path(tmp_path):
    config = save_run(tmp_path / "runs" / "a", "tiny")
    for named in ("", "tiny", "runs/a", "runs/a/ckpt.pt"):
        asked = diffusion_recipe(named)
        autoencoder, where, problems = checks.check_autoencoder(asked, "ffhq256")
        assert autoencoder.config == config and problems == []
        assert not autoencoder.decoder.conv_out.weight.is_meta
        assert where == "runs/a/ckpt.pt"


def test_a_path_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_run(tmp_path / "mine", "tiny")
    asked = diffusion_recipe("~/mine")
    assert checks.check_autoencoder(asked, "tiny")[1] == str(tmp_path / "mine" / "ckpt.pt")


def test_the_run_that_would_go_on_keeps_its_stage_one(tmp_path):
    save_run(tmp_path / "runs" / "a", "tiny")
    describe_run(tmp_path / "runs" / "b", "diffusion", "tiny", diffusion_recipe("runs/a/ckpt.pt"))
    save_run(tmp_path / "runs" / "c", "tiny")
    assert checks.check_autoencoder(diffusion_recipe(""), "tiny")[1] == "runs/a/ckpt.pt"
    assert checks.check_autoencoder(diffusion_recipe(""), "other")[1] == "runs/c/ckpt.pt"


@pytest.mark.parametrize(
    ("named", "preset", "channels", "assumed", "told"),
    [
        ("", "ffhq256", 32, "litevae-b", "`ldm train-ae` first"),
        ("", "tiny", 16, "tiny", "`ldm train-ae` first"),
        ("litevae-s", "tiny", 16, "litevae-s", "`ldm train-ae litevae-s` first"),
        ("gone.pt", "ffhq256", 32, "litevae-b", "no checkpoint at gone.pt"),
    ],
)
def test_without_stage_one_another_is_assumed(named, preset, channels, assumed, told):
    autoencoder, where, problems = checks.check_autoencoder(diffusion_recipe(named), preset)
    assert autoencoder.decoder.conv_out.weight.is_meta
    assert where == f"none yet; {assumed} is assumed"
    assert autoencoder.config.encoder.extractor.channels == channels
    problem = only(problems)
    assert problem.level == "error" and told in problem.text


def test_a_row_of_the_paper_is_assumed_too():
    recipe = diffusion_recipe("t11-ffhq-dwt")
    autoencoder, where, _ = checks.check_autoencoder(recipe, "t13-ffhq-dwt")
    assert autoencoder.config.encoder.type == "dwt" and "t11-ffhq-dwt" in where


# ------------------------------------------------------------------------------ the machine
def test_a_cpu_is_enough_for_little_work(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checks.check_machine(RunConfig(precision="fp32"), CPU, work=1e3) == []
    problem = only(checks.check_machine(RunConfig(precision="fp32"), CPU, work=1e9))
    assert problem.level == "warning" and "no CUDA GPU" in problem.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    problem = only(checks.check_machine(RunConfig(precision="fp32"), CPU, work=1e3))
    assert "omit run.device" in problem.text


def test_emulated_bf16_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for there in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda there=there: there)
        problems = checks.check_machine(RunConfig(precision="bf16"), CPU, work=0)
        assert len(problems) == (not there)


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    problem = only(checks.check_compiler(RunConfig(compile=True), CPU))
    assert problem.level == "error" and "C++ compiler" in problem.text
    assert checks.check_compiler(RunConfig(), torch.device("cuda")) == []


def test_space():
    assert checks.check_space("disk", 10, 10, "free some", "error") == []
    problem = only(checks.check_space("disk", 3 * 2**30, 2**30, "free some", "error"))
    assert problem == checks.Problem("error", "disk: 3.0 GiB needed, 1.0 GiB free: free some")
