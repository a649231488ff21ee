"""The Hub's conventions on disk, and its client as far as it is called; nothing goes online."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors import safe_open

from autoencoders import Autoencoder, build_autoencoder
from autoencoders.hub import find_pretrained
from autoencoders.sdvae.formats import write_diffusers
from ldm.errors import LdmError, UsageError
from tests.small import fill_disk_after_one_file


@pytest.fixture(params=["tiny", "smc", "sdvae"])
def ae(request):
    settings = {
        "tiny": {"decoder": {"channels": 8}},
        "smc": {"decoder": {"channels": 8, "norm": "smc"}, "latent_channels": 7},
        "sdvae": {"encoder": {"type": "sdvae", "channels": 8}, "decoder": {"channels": 8}},
    }[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield build_autoencoder("sdvae" if request.param == "sdvae" else "tiny", **settings).eval()


def same(ae, other):
    state = other.state_dict()
    assert ae.config == other.config and not ae.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in ae.state_dict().items())


def test_save_and_load_round_trips(tmp_path, ae):
    written = ae.save_pretrained(tmp_path / "model")
    assert [path.name for path in written] == ["config.json", "model.safetensors", "README.md"]
    same(Autoencoder.from_pretrained(tmp_path / "model"), ae)
    same(Autoencoder.from_pretrained(str(tmp_path), subfolder="model"), ae)
    described = json.loads(written[0].read_text("utf-8"))
    assert described["library_name"] == "ldm" and described["model_type"] == "autoencoder"
    with safe_open(written[1], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    card = written[2].read_text("utf-8")
    front = card.split("---")[1]
    assert "library_name: ldm" in front and ae.config.encoder.type in front
    assert f"latents ({ae.config.latent_channels}, H/{ae.downsampling}" in card


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub in a folder: what is asked of it is written down."""
    asked = {}

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None):
        asked["download"] = (repo_id, revision, allow_patterns)
        return str(tmp_path / "hub" / repo_id)

    def create_repo(repo_id, *, token=None, private=False, exist_ok=False):
        asked["create"] = (repo_id, token, private, exist_ok)
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(*, repo_id, folder_path, token=None, commit_message=None):
        from pathlib import Path
        from shutil import copytree

        asked["upload"] = (repo_id, token, sorted(p.name for p in Path(folder_path).iterdir()))
        copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)

    def file_exists(repo_id, filename, *, token=None):
        return (tmp_path / "hub" / repo_id / filename).exists()

    for function in (snapshot_download, create_repo, upload_folder, file_exists):
        monkeypatch.setattr(huggingface_hub, function.__name__, function)
    monkeypatch.chdir(tmp_path)
    return asked


def test_push_and_fetch_round_trips(hub, ae):
    assert ae.push_to_hub("me/my-vae.v1", private=True, token="t") == (
        "https://huggingface.co/me/my-vae.v1"
    )
    assert hub["create"] == ("me/my-vae.v1", "t", True, True)
    assert hub["upload"] == ("me/my-vae.v1", "t", ["README.md", "config.json", "model.safetensors"])
    same(Autoencoder.from_pretrained("me/my-vae.v1", revision="main"), ae)
    repo_id, revision, patterns = hub["download"]
    assert (repo_id, revision) == ("me/my-vae.v1", "main")
    assert patterns == ["config.json", "model.safetensors", "diffusion_pytorch_model*.safetensors"]


def test_existing_model_card_is_kept(hub, tmp_path, ae):
    cards = tmp_path / "model" / "README.md", tmp_path / "hub" / "me" / "x" / "README.md"
    for card in cards:
        card.parent.mkdir(parents=True)
        card.write_text("my own words")
    written = ae.save_pretrained(tmp_path / "model")
    assert [path.name for path in written] == ["config.json", "model.safetensors"]
    ae.push_to_hub("me/x")
    assert hub["upload"][2] == ["config.json", "model.safetensors"]
    assert [card.read_text() for card in cards] == ["my own words"] * 2
    same(Autoencoder.from_pretrained("me/x"), ae)


def test_a_failure_midway_leaves_the_folder_as_it_was(tmp_path, monkeypatch, ae):
    ae.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fill_disk_after_one_file(monkeypatch)
    other = build_autoencoder("tiny", decoder={"channels": 16})
    with pytest.raises(LdmError, match="earlier files are intact"):
        other.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_subfolder_of_a_diffusers_pipeline_loads(hub, tmp_path):
    ae = build_autoencoder(
        "sdvae", conv1x1=True,
        encoder={"type": "sdvae", "channels": 32, "multipliers": [1]},
        decoder={"channels": 32, "multipliers": [1]},
    )  # fmt: skip
    write_diffusers(tmp_path / "hub" / "them" / "sd" / "vae", ae)
    for subfolder in ("vae", "vae/"):
        same(Autoencoder.from_pretrained("them/sd", subfolder=subfolder), ae)
    assert hub["download"][2][0] == "vae/config.json"
    with pytest.raises(LdmError, match=r"holds no \./config\.json: .* vae, as its subfolder"):
        Autoencoder.from_pretrained("them/sd")


def test_fakes_have_the_signatures_of_the_client():
    """The fakes have the client's signatures."""
    from inspect import signature

    download = signature(huggingface_hub.snapshot_download).parameters
    assert {"repo_id", "revision", "allow_patterns"} <= download.keys()
    create = signature(huggingface_hub.create_repo).parameters
    assert {"repo_id", "token", "private", "exist_ok"} <= create.keys()
    upload = signature(huggingface_hub.upload_folder).parameters
    assert {"repo_id", "folder_path", "token", "commit_message"} <= upload.keys()
    exists = signature(huggingface_hub.file_exists).parameters
    assert {"repo_id", "filename", "token"} <= exists.keys()


@pytest.mark.parametrize("name", ["nowhere", "a/b.pt", "a/b.safetensors", "a/b/c", "/a/b", "./a/b"])
def test_name_that_is_no_repository_is_refused(hub, name):
    with pytest.raises(
        LdmError, match="it is no file or folder here, nor the name of a repository"
    ):
        find_pretrained(name)
    assert not hub


@pytest.mark.parametrize("error", [ConnectionError("offline\nand more"), ValueError("bad name")])
def test_failures_of_the_network_are_one_line(tmp_path, monkeypatch, ae, error):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.chdir(tmp_path)
    for name in ("snapshot_download", "create_repo"):
        monkeypatch.setattr(huggingface_hub, name, fail)
    for call in (lambda: Autoencoder.from_pretrained("me/x"), lambda: ae.push_to_hub("me/x")):
        with pytest.raises(LdmError) as caught:
            call()
        text = str(caught.value)
        assert "\n" not in text and "me/x" in text
        assert f"({type(error).__name__}: {str(error).splitlines()[0]})" in text


@pytest.mark.parametrize(("status", "asked"), [(401, True), (403, True), (404, False)])
def test_refused_access_advises_to_log_in(tmp_path, monkeypatch, status, asked):
    class GatedRepoError(OSError):
        response = SimpleNamespace(status_code=status)

    def fail(*_args, **_kwargs):
        raise GatedRepoError(f"{status} Client Error. (Request ID: 1)\n\nCannot access it.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(LdmError, match=rf"\(GatedRepoError: {status} Client Error") as caught:
        Autoencoder.from_pretrained("me/x")
    assert ("log in with `hf auth login`" in str(caught.value)) == asked


def test_revision_of_a_local_path_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is on this machine: only a repository of the Hub has"):
        find_pretrained(tmp_path, revision="main")


def test_the_client_offline_says_so_in_one_line(tmp_path, monkeypatch):
    """The real client, told to stay offline, with nothing in its cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        LdmError, match=r"could not be fetched from the Hugging Face Hub \("
    ) as caught:
        Autoencoder.from_pretrained("me/not-here")
    assert "\n" not in str(caught.value)
