"""Pipelines saved as the Hub has them: loaded with the same bits, pushed, fetched, refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from autoencoders import Autoencoder, build_autoencoder
from ldm.checkpoint import load_model, save_model
from ldm.errors import LdmError, UsageError
from ldm.run_folder import provenance
from pipelines import LatentDiffusionPipeline
from pipelines.exchange import import_diffusion
from pipelines.sample import sample_images
from tests.pipelines.exchange.foreign_models import SIZE as THEIR_SIZE
from tests.pipelines.exchange.foreign_models import write_compvis, write_diffusers
from tests.pipelines.report.run_folders import stage_two
from tests.pipelines.untrained import CLASSES, load, make_model

FILES = ["README.md", "config.json", "model.safetensors", "samples.png"]
MODELS = {
    "plain": {},
    "classes": {"classes": CLASSES},
    "edm2": {
        "settings": (
            "network={type: edm2, channels: 16, multipliers: [1, 2], blocks: 1, head_width: 16}",
        )
    },
    "dit": {
        "classes": CLASSES,
        "settings": ("network={type: dit, width: 32, depth: 2, heads: 2, grid: 2, norm: rms}",),
    },
    "discrete": {"settings": ("denoiser={type: discrete, beta_start: 0.00085, beta_end: 0.012}",)},
    "flow": {
        "settings": ("denoiser={type: flow, distribution: uniform, shift: 2, reversed: true}",),
        "sigma_data": 1.0,
    },
    "statistics": {"std": 1 / 0.18215, "mean": 0.1, "sigma_data": 1.0},
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def loaded(name, *arguments, **options):
    return LatentDiffusionPipeline.from_pretrained(name, "cpu", "fp32", *arguments, **options)


def same(one, other, **options):
    """Both draw the same bits, of the same classes."""
    assert one.classes == other.classes and one.recipe.network == other.recipe.network
    assert torch.equal(one(2, seed=1, steps=3, **options), other(2, seed=1, steps=3, **options))


def refusal(call):
    with pytest.raises(LdmError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------- round trips
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_pipeline_draws_the_same_bits(name):
    pipe = load(make_model(Path("run"), 0, **MODELS[name]))
    written = pipe.save_pretrained("saved", samples=2)
    assert sorted(path.name for path in Path("saved").iterdir()) == FILES
    assert sorted(path.name for path in written) == FILES
    again = loaded("saved")
    assert again.identifiers == pipe.identifiers
    same(again, pipe)
    if pipe.classes.count:
        assert again.classes.names == CLASSES
        same(again, pipe, labels="emu", guidance=2)
    images = pipe(2, seed=3, steps=2)
    assert torch.equal(again.encode(images), pipe.encode(images))


@pytest.mark.parametrize("kind", ["compvis", "diffusers"])
def test_an_imported_model_round_trips(kind, tmp_path):
    Path("theirs").mkdir()
    if kind == "compvis":
        source = write_compvis(Path("theirs/model.ckpt"))
    else:
        source = write_diffusers(Path("theirs/pipeline"), classes=3)
        (source / "README.md").write_text("---\nlicense: openrail++\n---\n# Theirs\n")
    import_diffusion(str(source.resolve()), Path("out.pt"), THEIR_SIZE)
    pipe = loaded("out.pt")
    pipe.save_pretrained("saved", samples=0)
    same(loaded("saved"), pipe)
    assert loaded("saved").codec.autoencoder.settings == pipe.codec.autoencoder.settings
    card = Path("saved/README.md").read_text("utf-8")
    assert f"Imported from `{source.name}`" in card and "Trained on" not in card
    assert ('license: "openrail++"\n---' in card) == (kind == "diffusers")
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in Path("saved").iterdir())


def test_what_was_saved_saves_the_same_files_again():
    load(make_model(Path("run"), 0, CLASSES)).save_pretrained("one", samples=2)
    loaded("one").save_pretrained("two", samples=2)
    for name in FILES:
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()


def test_weights_are_the_files_float32_whatever_the_precision():
    run = make_model(Path("run"), 0)
    weights = load_model(run, "diffusion").weights
    pipe = LatentDiffusionPipeline.from_pretrained(run, "cpu", "bf16")
    pipe.save_pretrained("saved", samples=0)
    saved = load_file("saved/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights.items())
    same(loaded("saved"), load(run))


def test_the_layout_in_memory_leaves_no_trace():
    pipe = load(make_model(Path("run"), 0))
    pipe.save_pretrained("one", samples=0)
    for module in (pipe.denoiser, pipe.codec):  # as on a GPU
        module.to(memory_format=torch.channels_last)
    pipe.save_pretrained("two", samples=0)
    for name in ("config.json", "model.safetensors"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()


def test_device_and_precision_are_those_that_are_given():
    load(make_model(Path("run"), 0)).save_pretrained("saved", samples=0)
    pipe = LatentDiffusionPipeline.from_pretrained("saved", device="cpu", precision="bf16")
    assert (pipe.device.type, pipe.precision) == ("cpu", "bf16")
    with pytest.raises(LdmError, match="cuda:77"):
        LatentDiffusionPipeline.from_pretrained("saved", device="cuda:77")


# ------------------------------------------------------------------------------ what is written
def test_no_file_names_a_path_or_a_command_of_this_machine(tmp_path, monkeypatch):
    secret = "token=hf_secret"
    monkeypatch.setattr("sys.argv", ["ldm", "train-diffusion", "x", secret])
    data, ae = tmp_path / "private" / "faces", tmp_path / "private" / "runs" / "ae" / "ckpt.pt"
    run = stage_two(Path("private/run"), f"data.source={str(data)!r}", model=False)
    settings = (
        f"data.source={str(data)!r}",
        f"autoencoder={str(ae)!r}",
        "cache=/private/cache",
        "data={crop: center, labels: true, label_file: /private/labels.csv}",
    )
    file = load_model(make_model(run, 0, settings=settings), "diffusion")
    known = provenance()
    assert secret in known["command"]
    save_model(run / "ckpt.pt", replace(file, provenance=file.provenance | known))
    load(run).save_pretrained("saved", samples=1)
    for path in Path("saved").iterdir():
        content = path.read_bytes()
        for word in (str(tmp_path), "private", secret, "train-diffusion", str(Path.home())):
            assert word.encode() not in content, (path, word)
    config = json.loads(Path("saved/config.json").read_text("utf-8"))["config"]
    assert config["data"]["source"] == "faces" and config["autoencoder"] in ("ae", "none")
    assert config["cache"] == "cache" and config["data"]["label_file"] == "labels.csv"
    assert "Trained on `faces`" in Path("saved/README.md").read_text("utf-8")


def test_the_safetensors_file_is_enough_for_itself():
    pipe = load(make_model(Path("run"), 0, CLASSES))
    pipe.save_pretrained("saved", samples=0)
    Path("saved/model.safetensors").rename("alone.safetensors")
    same(loaded("alone.safetensors"), pipe)


def test_samples_are_those_of_seed_0():
    from PIL import Image

    from ldm.images import grid, to_pil

    pipe = load(make_model(Path("run"), 0))
    pipe.save_pretrained("saved", samples=4)
    expected = to_pil(grid(pipe(4, seed=0), 2))
    assert Image.open("saved/samples.png").tobytes() == expected.tobytes()
    pipe.save_pretrained("none", samples=0)
    assert not Path("none/samples.png").exists()
    assert "samples.png" not in Path("none/README.md").read_text("utf-8")
    for wrong in (-1, 1.5):
        with pytest.raises(UsageError, match="samples="):
            pipe.save_pretrained("wrong", samples=wrong)


def test_a_card_that_is_there_stays():
    pipe = load(make_model(Path("run"), 0))
    Path("saved").mkdir()
    Path("saved/README.md").write_text("my own words")
    written = pipe.save_pretrained("saved", samples=0)
    assert [path.name for path in written] == ["config.json", "model.safetensors"]
    assert Path("saved/README.md").read_text() == "my own words"


def test_a_run_is_not_saved_over(monkeypatch):
    pipe = load(make_model(Path("run"), 0))
    monkeypatch.setattr(type(pipe), "__call__", lambda *_a, **_k: pytest.fail("drawn for nothing"))
    with pytest.raises(UsageError, match=r"run holds a ckpt.pt, which loads first: give another"):
        pipe.save_pretrained("run")
    Path("file").write_text("x")
    assert "could not write" in refusal(lambda: pipe.save_pretrained("file/saved"))
    with pytest.raises(UsageError, match="it must be owner/name"):
        pipe.save_pretrained("saved", repo_id='x")\nimport os')
    assert not Path("saved").exists()


# ------------------------------------------------------------------------------------- the Hub
def test_push_and_fetch_round_trip(asked):
    pipe = load(make_model(Path("run"), 0, CLASSES))
    url = pipe.push_to_hub(
        "me/x", samples=1, commit_message="Mine", private=True, token="secret", revision="v1"
    )
    assert url == "https://huggingface.co/me/x"
    assert asked["create"] == ("me/x", "secret", True, True)
    assert asked["upload"] == ("me/x", "secret", FILES) and asked["commit"] == ("Mine", "v1")
    for path in Path("hub/me/x").iterdir():
        assert b"secret" not in path.read_bytes()
    fetched = loaded("me/x", revision="v1", token="other", cache_dir="kept")
    assert asked["download"] == ("me/x", "v1", ["config.json", "model.safetensors"])
    assert asked["access"] == ("other", "kept")
    same(fetched, pipe)
    assert fetched.folder is None
    card = Path("hub/me/x/README.md").read_text("utf-8")
    assert 'from_pretrained("me/x", revision="v1")' in card


def test_the_cards_lines_sample_as_they_stand(asked):
    load(make_model(Path("run"), 0, CLASSES)).push_to_hub("me/x", samples=0)
    card = Path("hub/me/x/README.md").read_text("utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(lines.split("\n\n")) == 2 and lines.strip().count("\n") == 4
    exec(lines, {})
    from PIL import Image

    assert asked["download"][0] == "me/x"
    assert Image.open("sample.png").size == (32, 32)


def test_a_repository_is_read_without_its_pickle(asked):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("code of the file was run",))

    pipe = load(make_model(Path("run"), 0))
    pipe.push_to_hub("me/x", samples=0)
    folder = Path("snapshots/me/x")  # whose owner may have had all files fetched before
    folder.mkdir(parents=True)
    torch.save({"weights": Bomb()}, folder / "ckpt.pt")
    same(loaded("me/x"), pipe)
    assert "loading it would run code" in refusal(lambda: loaded(folder))


def test_a_pipeline_that_was_fetched_before_loads_offline(monkeypatch, tmp_path):
    """The real client, told to stay offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pipe = load(make_model(Path("run"), 0))
    repository, commit = Path("cache/models--me--x"), 40 * "a"
    pipe.save_pretrained(repository / "snapshots" / commit, samples=0)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    for revision in (None, "main", commit):
        same(loaded("me/x", cache_dir=tmp_path / "cache", revision=revision), pipe)
    said = refusal(lambda: loaded("me/x", cache_dir="cache", revision="v2"))
    assert "could not be fetched from the Hugging Face Hub" in said
    said = refusal(lambda: pipe.push_to_hub("me/x", samples=0, token="hf_secret"))
    assert "could not push to me/x on the Hugging Face Hub" in said and "secret" not in said


def test_what_is_here_comes_before_the_hub(asked):
    pipe = load(make_model(Path("run"), 0))
    pipe.save_pretrained("me/x", samples=0)
    same(loaded("me/x"), pipe)
    Path("me/empty").mkdir()
    assert "me/empty holds no ckpt.pt" in refusal(lambda: loaded("me/empty"))
    for name in ("nowhere", Path("me/y"), "runs/gone"):
        said = refusal(lambda name=name: loaded(name))
        assert said.startswith(f"no model at {name}: it is no file or folder here, nor the name of")
    with pytest.raises(UsageError, match="only a repository of the Hub has a revision"):
        loaded("me/x", revision="main")
    assert "download" not in asked


def test_a_repository_of_something_else_is_one_line(asked):
    Path("hub/me/x").mkdir(parents=True)
    Path("hub/me/x/model_index.json").write_text("{}")
    assert "me/x on the Hugging Face Hub holds no config.json" in refusal(lambda: loaded("me/x"))
    build_autoencoder("tiny", decoder={"channels": 8}).push_to_hub("me/ae")
    said = refusal(lambda: loaded("me/ae"))
    assert "describes no latent diffusion model, but a model_type 'autoencoder'" in said
    load(make_model(Path("run"), 0)).push_to_hub("me/ldm", samples=0)
    said = refusal(lambda: Autoencoder.from_pretrained("me/ldm"))
    assert "describes no autoencoder, but a model_type 'latent-diffusion'" in said


def test_ldm_sample_takes_a_repository(asked):
    pipe = load(make_model(Path("run"), 0))
    pipe.push_to_hub("me/x", samples=0)
    out = sample_images("me/x", 2, device="cpu", precision="fp32", steps=2)
    assert out == Path("runs/me--x/samples/seed0-steps2")
    manifest = json.loads((out / "samples.json").read_text("utf-8"))
    assert manifest["model"] == {"path": "me/x", **pipe.identifiers}
    guided = pipe(1, steps=2, guidance=2, guide="me/x")
    assert torch.allclose(guided, pipe(1, steps=2), atol=1e-4)  # away from itself: nowhere


# ---------------------------------------------------------------------------------- the harmed
def test_missing_and_garbled_files_are_one_line():
    folder = Path("saved")
    load(make_model(Path("run"), 0)).save_pretrained(folder, samples=0)
    config, weights = folder / "config.json", folder / "model.safetensors"
    described, tensors = json.loads(config.read_text("utf-8")), weights.read_bytes()

    def said(**change):
        config.write_text(json.dumps(described | change), "utf-8")
        text = refusal(lambda: loaded(folder))
        assert str(folder) in text
        return text

    assert "no latent diffusion model, but a model_type 'unet'" in said(model_type="unet")
    assert "has format 99, this version reads up to 1: upgrade" in said(format=99)
    other = described["config"] | {"resolution": 64}
    assert "is not the model that config.json beside it describes" in said(config=other)
    assert "is not the model that config.json beside it describes" in said(sha256="0" * 64)
    for content in (tensors[:-100], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        weights.write_bytes(content)
        assert "model.safetensors is " in said()
    weights.unlink()
    assert "holds no model.safetensors: copy or fetch it again" in said()
    for content in ("{", "[]", "null", "[" * 5000, '{"a": 1' + "0" * 5000 + "}"):
        config.write_text(content)
        assert "config.json is damaged" in refusal(lambda: loaded(folder))
    config.unlink()
    assert "holds no ckpt.pt" in refusal(lambda: loaded(folder))
