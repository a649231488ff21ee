"""Damaged files, and those made to harm: refused in one line, or read as they were written."""

import json
import random
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import VQModel
from pydantic import BaseModel
from safetensors.torch import save_file
from torch import nn

from autoencoders import AutoencoderConfig, load_autoencoder
from autoencoders.discriminators import DiscriminatorConfig
from autoencoders.sdvae.formats import to_compvis, write_diffusers
from diffusion import DenoiserConfig, NetworkConfig
from ldm.checkpoint import (
    Damaged,
    ModelFile,
    build_with,
    fingerprint,
    load_model,
    read_tensors,
    repair_pair,
    save_model,
)
from ldm.config import to_tree
from ldm.data import Source
from ldm.data.shards import index_shard
from ldm.data.sources import ZipSource
from ldm.data.transforms import CorruptImage, decode
from ldm.ema import combine, list_snapshots, save_snapshot
from ldm.errors import LdmError
from ldm.files import write_atomically
from ldm.run_folder import load_state, save_state
from ldm.safe_pickle import read_foreign
from pipelines import latents
from pipelines.exchange import export_autoencoder, import_autoencoder, import_diffusion
from tests.small import sdvae

MUTATIONS = 60
LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
"""Text that Git keeps in the place of a large file it has not fetched."""


def model(kind="autoencoder", inner=None, seed=0) -> ModelFile:
    drawn = torch.Generator().manual_seed(seed)
    weights = {f"layer.{i}": torch.randn(8, i + 1, generator=drawn) for i in range(5)}
    weights |= {"half": torch.ones(3, 5).half(), "count": torch.arange(4), "zero": torch.zeros(20)}
    return ModelFile(kind, {"x": [1, 2.5], "y": None}, weights, {"mean": [0.5]}, {"by": "ö"}, inner)


def mutations(whole: bytes, seed: str) -> Iterator[bytes]:
    """Damage: bytes changed, a part cut off or out, zeroed, or written over another or between."""
    rng = random.Random(seed)
    for number in range(MUTATIONS):
        one, other = sorted(rng.randrange(len(whole)) for _ in range(2))
        end = min(len(whole), one + rng.choice([1, 4, 30, 200]))
        data = bytearray(whole)
        match number % 6:
            case 0 | 1:
                for _ in range(1 + number % 3):
                    data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
            case 2:
                data = data[:other] if number % 4 else data[:one] + data[end:]
            case 3:
                data[one:end] = bytes(end - one)
            case 4:
                data[other : other + end - one] = whole[one:end]
            case 5:
                data[other:other] = whole[one:end]
        yield bytes(data)


def check_damage(path: Path, read: Callable[[], object]) -> int:
    """Check what `read` makes of the damaged file, and count how often that is an error."""
    whole, value, refused = path.read_bytes(), read(), 0
    for data in mutations(whole, path.name):
        path.write_bytes(data)
        try:
            assert read() == value
        except LdmError as error:
            assert str(error).isprintable()
            refused += 1
    path.write_bytes(whole)
    assert read() == value
    return refused


@pytest.mark.parametrize("name", ["ckpt.pt", "ckpt.safetensors", "best.pt", "best.safetensors"])
def test_models(tmp_path, name):
    kind, inner = ("diffusion", model(seed=1)) if "ckpt" in name else ("autoencoder", None)
    save_model((tmp_path / name).with_suffix(".pt"), model(kind, inner))
    refused = check_damage(
        tmp_path / name, lambda: load_model(tmp_path / name, kind).content_sha256
    )
    assert refused > MUTATIONS // 3  # most of a small .pt is padding


def test_states(tmp_path):
    tree = {"images_seen": 64, "net": model().weights, "opt": {"state": {0: {"step": 3}}}}
    state = save_state(tmp_path, 64, tree)

    def read():
        tree = load_state(state)
        return fingerprint(tree["net"]), tree["images_seen"], tree["opt"]

    assert check_damage(state / "state.pt", read) > MUTATIONS // 3


def test_checkpoints_of_others(tmp_path):
    torch.save({"state_dict": model().weights, "loop": looped()}, tmp_path / "x.ckpt")

    def read() -> str:
        return fingerprint(read_foreign(tmp_path / "x.ckpt")["state_dict"])

    assert check_damage(tmp_path / "x.ckpt", read) > MUTATIONS // 3


def test_a_folder_of_the_hub(tmp_path):
    sdvae().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"

    def read() -> str:
        return fingerprint(load_autoencoder(tmp_path).state_dict())

    assert check_damage(file, read) > MUTATIONS // 2


def test_snapshots_of_averages(tmp_path):
    weights = model().weights
    save_snapshot(tmp_path, 64, 0.1, weights)
    (snapshot,) = list_snapshots(tmp_path)

    def read() -> str:
        return fingerprint(combine({snapshot: 1.0}, weights))

    assert check_damage(snapshot.path, read) > MUTATIONS // 2


class Numbers(Source):
    """A source of images of which only names and labels are asked."""

    def __len__(self) -> int:
        return 9

    def label(self, index: int) -> int:
        return index

    def name(self, index: int) -> str:
        return f"{index}.png"

    def load(self, index: int) -> np.ndarray:
        raise AssertionError("no pixels are asked for")


@pytest.fixture
def block(tmp_path, monkeypatch) -> Path:
    """The second of three files of cached latents, of images 4 to 7, one of which is corrupt."""
    monkeypatch.setattr(latents, "BLOCK", 4)
    drawn = np.random.default_rng(0).normal(size=(9, 2, 2, 4, 2, 3)).astype(np.float32)
    drawn[5] = np.nan
    for part in latents._parts(Numbers()):
        write = partial(latents._write_block, drawn[part.start : part.stop])
        write_atomically(latents._block(tmp_path, part), write)
    return tmp_path / "latents-00001.npy"


def read_cache(folder: Path) -> list[tuple[bytes, int]]:
    cache = latents.LatentCache(folder, Numbers(), (2, 2, 4, 2, 3))
    return [(row.tobytes(), index) for row, index in (cache.load(0, k) for k in range(36))]


def test_cached_latents(block):
    assert check_damage(block, lambda: read_cache(block.parent)) > MUTATIONS // 2


def test_cached_latents_of_a_version_without_checksums(block):
    whole = read_cache(block.parent)
    np.save(block, np.load(block))
    assert read_cache(block.parent) == whole


# --------------------------------------------------------------------------- pairs of files
@pytest.mark.parametrize(
    "harm", ["twin missing", "twin stale", "twin cut", ".pt missing", ".pt cut"]
)
def test_a_pair_is_made_whole_again(tmp_path, harm):
    path, twin = tmp_path / "best.pt", tmp_path / "best.safetensors"
    save_model(path, model(seed=1))
    stale = twin.read_bytes()
    save_model(path, model())
    whole = twin.read_bytes()
    harmed, how = (path if ".pt" in harm else twin), harm.split()[1]
    if how == "missing":
        harmed.unlink()
    else:
        harmed.write_bytes(stale if how == "stale" else harmed.read_bytes()[:-99])
    repair_pair(path)
    assert twin.read_bytes() == whole
    assert load_model(path, None).content_sha256 == model().content_sha256


def test_a_whole_pair_stays_and_none_is_made_of_nothing(tmp_path):
    save_model(tmp_path / "ckpt.pt", model())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    repair_pair(tmp_path / "ckpt.pt")
    repair_pair(tmp_path / "best.pt")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_full_disk_leaves_the_pair_before(tmp_path, monkeypatch):
    path = tmp_path / "best.pt"
    save_model(path, model(seed=1))
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(LdmError, match="No space left"):
        save_model(path, model())
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


# -------------------------------------------------------------------------- made to harm
def itself() -> dict:
    tree = {"format": 1, "kind": "autoencoder", "config": {}, "weights": {}}
    tree |= {"statistics": {}, "provenance": {}}
    return tree | {"autoencoder": tree}


def in_config(value: object) -> dict:
    return itself() | {"autoencoder": None, "config": {"a": value}}


def looped() -> list:
    loop: list = []
    loop.append(loop)
    return loop


def doubled(times: int = 60) -> list:
    value: list = ["x"]
    for _ in range(times):
        value = [value, value]
    return value


def deep() -> list:
    value: list = []
    for _ in range(300):
        value = [value]
    return value


@pytest.mark.parametrize("make", [looped, doubled, deep, lambda: {1, 2}, lambda: torch.ones(1)])
def test_plain_values_that_have_no_end_or_are_not_plain(tmp_path, make):
    path = tmp_path / "x.pt"
    torch.save(in_config(make()), path)
    with pytest.raises(Damaged) as caught:
        load_model(path, "autoencoder")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["autoencoder", "diffusion"])
def test_a_model_inside_itself(tmp_path, kind):
    tree = itself() | {"kind": kind}
    tree["autoencoder"] = tree
    torch.save(tree, tmp_path / "x.pt")
    with pytest.raises(LdmError, match="one is invalid"):
        load_model(tmp_path / "x.pt", kind)


def test_a_header_without_an_end(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors", {"ldm": "[" * 9999 + "]" * 9999})
    with pytest.raises(Damaged):
        load_model(tmp_path / "x.safetensors", "autoencoder")


def test_a_twin_whose_hash_goes_by_another_name(tmp_path):
    save_model(tmp_path / "x.pt", model())
    twin = tmp_path / "x.safetensors"
    twin.write_bytes(twin.read_bytes().replace(b"sha256", b"sha257"))
    with pytest.raises(LdmError, match="one is invalid"):
        load_model(twin, "autoencoder")


@pytest.mark.parametrize("read", [read_tensors, read_foreign])
@pytest.mark.parametrize("how", ["compressed", "overlapping", "understated"])
def test_entries_that_are_larger_than_the_file(tmp_path, read, how):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(2**20)}, path)
    with zipfile.ZipFile(path) as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    kind = zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as new:
        for name, data in entries.items():
            new.writestr(name, data)
        if how == "overlapping":
            new.filelist += [new.filelist[-1]] * 3
        if how == "understated":
            next(e for e in new.filelist if e.filename.endswith("data/0")).file_size = 100
    with pytest.raises(Damaged, match="damaged"):
        read(path)


# ------------------------------------------------------------------------ unusual tensors
UNUSUAL = {
    "complex": lambda: torch.zeros(2, 2, dtype=torch.complex64),
    "sparse": lambda: torch.zeros(2, 2).to_sparse(),
    "csr": lambda: torch.eye(2).to_sparse_csr(),
    "meta": lambda: torch.zeros(2, 2, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(2, 2), 1.0, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(2)]),
    "integer": lambda: torch.zeros(2, 2, dtype=torch.int64),
    "bool": lambda: torch.zeros(2, 2, dtype=torch.bool),
    "stride 0": lambda: torch.zeros(1).expand(2, 2),
    "NaN": lambda: torch.full((2, 2), torch.nan),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("through", ["memory", "file"])
def test_no_model_is_built_of_unusual_tensors(tmp_path, kind, through):
    weights = {"weight": UNUSUAL[kind]()}
    with pytest.raises(LdmError) as caught:
        if through == "file":
            tree = itself() | {"autoencoder": None, "weights": weights}
            write_atomically(tmp_path / "x.pt", lambda file: torch.save(tree, file))
            weights = load_model(tmp_path / "x.pt", "autoencoder").weights
        build_with(lambda: nn.Linear(2, 2, bias=False), weights, tmp_path / "x.pt")
    assert "x.pt" in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_no_unusual_tensor_is_imported(tmp_path, kind):
    weights = to_compvis(sdvae().state_dict())
    weights["quant_conv.bias"] = UNUSUAL[kind]()
    torch.save({"state_dict": weights}, tmp_path / "x.ckpt")
    with pytest.raises(LdmError) as caught:
        import_autoencoder(str(tmp_path / "x.ckpt"), tmp_path / "out.pt")
    assert "x.ckpt" in str(caught.value) and str(caught.value).isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


@pytest.mark.parametrize("form", ["diffusers", "compvis", "hub"])
def test_no_nan_is_exported(tmp_path, form):
    ae = sdvae()
    weights = ae.state_dict()
    weights["decoder.conv_out.bias"][0] = torch.nan
    save_model(tmp_path / "x.pt", ModelFile("autoencoder", to_tree(ae.config), weights))
    with pytest.raises(LdmError, match="NaN or infinite"):
        export_autoencoder(tmp_path / "out.ckpt" if form == "compvis" else tmp_path / "out", form,
                           model=tmp_path / "x.pt")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_numbers_and_text_survive_both_files(tmp_path):
    """Values that JSON could round or rename have one hash in both."""
    config = {"a": 0.1 + 0.2, "b": float("inf"), "c": "ö\n", "d": 10**30, "e": (1, 2)}
    save_model(tmp_path / "x.pt", ModelFile("autoencoder", config, model().weights))
    loaded = [load_model(tmp_path / f"x{end}", None) for end in (".pt", ".safetensors")]
    assert loaded[0].content_sha256 == loaded[1].content_sha256
    assert json.dumps(loaded[0].config) == json.dumps(loaded[1].config)


# ------------------------------------------------------------------------- sizes in configs
def sizes_of(config: type[BaseModel], above: str = "") -> Iterator[tuple[str, bool]]:
    """Every field of whole numbers or of a tuple, and whether the schema bounds it."""
    schema = config.model_json_schema()

    def walk(part: dict, name: str) -> Iterator[tuple[str, bool]]:
        if "$ref" in part:
            part = schema["$defs"][part["$ref"].rpartition("/")[2]]
        for key, inside in part.get("properties", {}).items():
            yield from walk(inside, f"{name}.{key}")
        for inside in [*part.get("anyOf", ()), *part.get("oneOf", ())]:
            yield from walk(inside, name)
        if part.get("type") == "integer":
            yield name, "maximum" in part
        if part.get("type") == "array":
            yield name, "maxItems" in part
            yield from walk(part.get("items", {}), f"{name}.0")

    yield from walk(schema, config.__name__)


class Parts(BaseModel):
    """All that builds networks from a file's config."""

    autoencoder: AutoencoderConfig
    network: NetworkConfig
    denoiser: DenoiserConfig
    discriminator: DiscriminatorConfig


def test_every_size_of_a_model_has_an_upper_bound():
    sizes = list(sizes_of(Parts))
    assert len(sizes) > 50 and ("Parts.autoencoder.decoder.blocks", True) in sizes
    assert [name for name, is_bounded in sizes if not is_bounded] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("decoder.blocks", 10_000_000), ("decoder.channels", 2**40), ("latent_channels", 2**40),
     ("decoder.multipliers", [1] * 4000)],
)  # fmt: skip
def test_a_model_file_that_asks_for_any_memory(tmp_path, key, value):
    tree = to_tree(AutoencoderConfig())
    *above, last = key.split(".")
    (tree[above[0]] if above else tree)[last] = value
    save_model(tmp_path / "x.pt", ModelFile("autoencoder", tree, model().weights))
    with pytest.raises(LdmError, match=key.replace(".", r"\.")):
        load_autoencoder(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "change",
    [{"layers_per_block": 10_000_000}, {"block_out_channels": [2**40] * 4},
     {"block_out_channels": [32] * 4000}, {"latent_channels": 2**40}],
)  # fmt: skip
def test_a_foreign_config_that_asks_for_any_memory(tmp_path, change):
    described = {"_class_name": "AutoencoderKL", "latent_channels": 4, "layers_per_block": 2}
    described |= {"block_out_channels": [32, 64], "library_name": "diffusers"}
    (tmp_path / "config.json").write_text(json.dumps(described | change))
    save_file({"w": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(LdmError) as caught:
        load_autoencoder(tmp_path)
    assert str(caught.value).isprintable()


# ------------------------------------------------------------------------------ Git LFS pointers
def lfs_refusal(path, read):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(LFS)
    with pytest.raises(LdmError) as caught:
        read()
    said = str(caught.value)
    assert f"{path} is a Git LFS pointer, not the " in said and "\n" not in said
    assert "run `git lfs pull`, or download the file" in said


@pytest.mark.parametrize("name", ["ckpt.pt", "run/ckpt.pt", "a.safetensors", "a.ckpt", "a.bin"])
def test_a_pointer_in_place_of_weights_is_named(tmp_path, name):
    path = tmp_path / name
    folder = path.parent if name.startswith("run/") else path
    lfs_refusal(path, lambda: load_autoencoder(folder))
    lfs_refusal(path, lambda: load_model(folder, "diffusion"))
    lfs_refusal(path, lambda: import_diffusion(str(path), tmp_path / "out.pt"))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("kind", ["diffusers", "vq", "hub"])
def test_a_pointer_in_a_folder_is_named(tmp_path, kind, suffix):
    if kind == "vq":
        VQModel(norm_num_groups=4, block_out_channels=(8,)).save_pretrained(tmp_path / "vae")
    elif kind == "diffusers":
        write_diffusers(tmp_path / "vae", sdvae())
    else:
        sdvae().save_pretrained(tmp_path / "vae")
    (path,) = (tmp_path / "vae").glob("*.safetensors")
    if suffix == ".bin" and kind != "hub":
        path.unlink()
        path = path.with_suffix(suffix)
    lfs_refusal(path, lambda: load_autoencoder(tmp_path / "vae"))


def test_a_pointer_in_place_of_images_is_named(tmp_path):
    lfs_refusal(tmp_path / "a.zip", lambda: ZipSource(tmp_path / "a.zip"))
    lfs_refusal(tmp_path / "a.tar", lambda: index_shard(tmp_path / "a.tar"))
    with pytest.raises(CorruptImage, match="a Git LFS pointer: run `git lfs pull`"):
        decode(LFS, ".png")
