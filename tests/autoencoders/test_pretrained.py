"""Files and folders of every format, told apart by content, and the Hub's client as it is called.

Nothing goes online.
"""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from autoencoders import Autoencoder, build_autoencoder, load_autoencoder
from autoencoders.pretrained import find_pretrained, read_autoencoder
from autoencoders.sdvae.formats import to_compvis, to_diffusers, write_compvis, write_diffusers
from ldm.checkpoint import ModelFile, save_model
from ldm.config import to_tree
from ldm.errors import LdmError, UsageError
from tests import small
from tests.fake_hub import fake_hub


@pytest.fixture
def sdvae():
    return small.sdvae()


@pytest.fixture
def tiny():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield build_autoencoder("tiny", decoder={"channels": 8}).eval()


def write(path, ae, kind="autoencoder"):
    origin = {"recipe": {"seed": 3}}
    save_model(path, ModelFile(kind, to_tree(ae.config), ae.state_dict(), provenance=origin))


def same(ae, other):
    state = other.state_dict()
    assert ae.config == other.config and not ae.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in ae.state_dict().items())


@pytest.mark.parametrize("name", ["ckpt.pt", "ckpt.safetensors", ""])
def test_our_files_and_folders_load(tmp_path, tiny, name):
    write(tmp_path / "ckpt.pt", tiny)
    same(load_autoencoder(tmp_path / name), tiny)
    read = read_autoencoder(tmp_path / name)
    assert read.format == "ldm" and read.provenance["recipe"] == {"seed": 3}
    assert read.files == (tmp_path / (name or "ckpt.pt"),)


def test_every_format_gives_the_same_model(tmp_path, sdvae):
    write(tmp_path / "ckpt.pt", sdvae)
    write_diffusers(tmp_path / "diffusers", sdvae, 0.3)
    sdvae.save_pretrained(tmp_path / "hub")
    # endings that say nothing: a CompVis file may be called .pt, and ours .ckpt
    write_compvis(tmp_path / "theirs.pt", sdvae)
    write_compvis(tmp_path / "theirs.safetensors", sdvae)
    (tmp_path / "ours.ckpt").write_bytes((tmp_path / "ckpt.pt").read_bytes())
    for name, form in (
        ("ckpt.pt", "ldm"), ("ours.ckpt", "ldm"), ("diffusers", "diffusers"), ("hub", "hub"),
        ("theirs.pt", "compvis"), ("theirs.safetensors", "compvis"),
    ):  # fmt: skip
        same(load_autoencoder(tmp_path / name), sdvae)
        read = read_autoencoder(tmp_path / name)
        assert read.format == form
        assert all(file.is_file() for file in read.files)
    assert read_autoencoder(tmp_path / "diffusers").provenance["imported"]["scaling_factor"] == 0.3


def test_variants_and_shards_of_diffusers_load(tmp_path, sdvae):
    config, whole = write_diffusers(tmp_path, sdvae)
    weights = load_file(whole)
    whole.unlink()
    half = {name: tensor.half() for name, tensor in weights.items()}
    save_file(half, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    loaded = load_autoencoder(tmp_path)
    assert torch.equal(loaded.encoder.conv_in.weight, sdvae.encoder.conv_in.weight.half().float())
    names = sorted(weights)
    for i, part in enumerate((names[:9], names[9:]), start=1):
        shard = {name: weights[name] for name in part}
        save_file(shard, tmp_path / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors")
    same(load_autoencoder(tmp_path), sdvae)
    assert len(read_autoencoder(tmp_path).files) == 2
    assert config.is_file()


def test_run_wins_over_a_config_beside_it(tmp_path, tiny, sdvae):
    write(tmp_path / "ckpt.pt", tiny)
    sdvae.save_pretrained(tmp_path)
    same(load_autoencoder(tmp_path), tiny)
    assert read_autoencoder(tmp_path).provenance["recipe"] == {"seed": 3}


def test_format_is_found_whatever_the_ending(tmp_path, sdvae, tiny):
    write_compvis(tmp_path / "a.safetensors", sdvae)
    (tmp_path / "a.safetensors").rename(tmp_path / "a.ckpt")
    same(load_autoencoder(tmp_path / "a.ckpt"), sdvae)
    write(tmp_path / "ckpt.pt", tiny)
    (tmp_path / "ckpt.safetensors").rename(tmp_path / "b.ckpt")
    same(load_autoencoder(tmp_path / "b.ckpt"), tiny)


# ------------------------------------------------------------------------------- refusals
def refusal(path):
    with pytest.raises(LdmError) as caught:
        load_autoencoder(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_missing_checkpoint_is_refused(tmp_path):
    assert "no checkpoint at" in refusal(tmp_path / "none.ckpt")
    assert "holds no ckpt.pt" in refusal(tmp_path)


def test_model_of_stage_two_is_refused(tmp_path, tiny):
    write(tmp_path / "ckpt.pt", tiny, "diffusion")
    for name in ("ckpt.pt", "ckpt.safetensors"):
        assert "is a stage-two diffusion model" in refusal(tmp_path / name)


@pytest.mark.parametrize("tree", [{"state_dict": {"x": torch.zeros(1)}}, [1, 2], {"state_dict": 3}])
def test_other_checkpoints_are_refused(tmp_path, tree):
    torch.save(tree, tmp_path / "a.ckpt")
    assert "is not a model file of this toolkit" in refusal(tmp_path / "a.ckpt")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code of the file was run",))


def test_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"state_dict": Bomb(), "b": Bomb()}, tmp_path / "a.ckpt")
    assert "loading it would run code" in refusal(tmp_path / "a.ckpt")


def test_weights_of_another_architecture_are_refused(tmp_path, tiny, sdvae):
    write(tmp_path / "a.pt", tiny)
    config = to_tree(sdvae.config)
    save_model(tmp_path / "a.pt", ModelFile("autoencoder", config, tiny.state_dict()))
    assert "encoder.conv_in.weight is none in the file, (32, 3, 3, 3) in" in refusal(
        tmp_path / "a.pt"
    )


def test_weights_without_config_are_refused(tmp_path, sdvae):
    write_diffusers(tmp_path / "a", sdvae)
    file = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    assert f"without a config: give its folder, {tmp_path / 'a'}" in refusal(file)
    (tmp_path / "a" / "config.json").unlink()
    assert "give the folder of the model, with its config.json" in refusal(file)


def test_pickle_with_diffusers_names_is_refused(tmp_path, sdvae):
    theirs = to_diffusers(sdvae.state_dict())
    path = tmp_path / "diffusion_pytorch_model.bin"
    for prefix in ("", "vae."):
        torch.save({f"{prefix}{name}": tensor for name, tensor in theirs.items()}, path)
        said = refusal(path)
        assert "holds weights of diffusers, without a config: save the model as a folder" in said


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_unknown_prefix_is_named(tmp_path, sdvae, name):
    weights = {f"vae.{name}": t.contiguous() for name, t in to_compvis(sdvae.state_dict()).items()}
    path = tmp_path / name
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    assert "under the unknown prefix 'vae.': save its state_dict" in refusal(path)


def test_path_of_a_config_is_refused(tmp_path, sdvae):
    config, _ = write_diffusers(tmp_path, sdvae)
    assert f"is a config without weights: give its folder, {tmp_path}" in refusal(config)


def test_whole_diffusers_pipeline_is_refused(tmp_path, sdvae):
    write_diffusers(tmp_path / "vae", sdvae)
    (tmp_path / "model_index.json").write_text("{}")
    said = refusal(tmp_path)
    assert "is a whole diffusers pipeline: give the folder of its autoencoder, mostly " in said
    assert f"{tmp_path}/vae (or --subfolder vae)" in said
    same(load_autoencoder(tmp_path / "vae"), sdvae)


@pytest.mark.parametrize("zipped", [True, False])
def test_overstated_tensor_is_damage(tmp_path, sdvae, zipped):
    weights = to_compvis(sdvae.state_dict())
    weights["encoder.extra"] = torch.zeros(1).expand(2**23, 2**23)
    torch.save(weights, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    assert "tensor encoder.extra is (8388608, 8388608), more than the file holds" in refusal(
        tmp_path / "a.ckpt"
    )


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_truncated_file_is_damaged(tmp_path, sdvae, name):
    write_compvis(tmp_path / name, sdvae)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    assert "damaged" in refusal(tmp_path / name)


def test_unreadable_hub_folders_are_refused(tmp_path, tiny):
    tiny.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text("utf-8"))

    def said(**change):
        (tmp_path / "config.json").write_text(json.dumps(described | change), "utf-8")
        return refusal(tmp_path)

    assert "no autoencoder, but a model_type 'unet'" in said(model_type="unet")
    assert "has format 99, this version reads up to 1: upgrade" in said(format=99)
    assert "is not one of this version: unknown key 'flow'" in said(
        config=described["config"] | {"flow": 1}
    )
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated or damaged" in said()
    file.unlink()
    assert "holds no model.safetensors" in said()
    (tmp_path / "config.json").write_text("{")
    assert "config.json is damaged (not JSON" in refusal(tmp_path)


# ------------------------------------------------------------------------------- the Hub
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
    monkeypatch.chdir(tmp_path)
    return fake_hub(tmp_path / "hub", monkeypatch)


def test_push_and_fetch_round_trips(hub, ae):
    assert ae.push_to_hub("me/my-vae.v1", private=True, token="t") == (
        "https://huggingface.co/me/my-vae.v1"
    )
    assert hub["create"] == ("me/my-vae.v1", "t", True, True)
    assert hub["upload"] == ("me/my-vae.v1", "t", ["README.md", "config.json", "model.safetensors"])
    same(Autoencoder.from_pretrained("me/my-vae.v1", revision="main"), ae)
    repo_id, revision, patterns = hub["download"]
    assert (repo_id, revision) == ("me/my-vae.v1", "main")
    assert patterns == [
        "config.json", "model.safetensors", "diffusion_pytorch_model*.safetensors", "README.md",
    ]  # fmt: skip


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
    small.fill_disk_after_one_file(monkeypatch)
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
