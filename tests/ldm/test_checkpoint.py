import json
import pickle
import random
import re
import struct

import pytest
import torch

from ldm.checkpoint import (
    FORMAT,
    Damaged,
    ModelFile,
    build_with,
    fingerprint,
    load_model,
    read_safetensors,
    save_model,
)
from ldm.errors import LdmError


def model(kind="autoencoder", inner=None) -> ModelFile:
    weights = {"a.weight": torch.randn(3, 4), "b": torch.arange(3), "c": torch.tensor(1.5)}
    return ModelFile(kind, {"x": [1, 2], "y": None}, weights, {"mean": [0.5]}, {"by": "me"}, inner)


def message(path, kind="autoencoder") -> str:
    with pytest.raises(LdmError) as caught:
        load_model(path, kind)
    assert "\n" not in str(caught.value) and str(path.name) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_both_containers_hold_everything(tmp_path, suffix):
    saved = model("diffusion", model())
    save_model(tmp_path / "ckpt.pt", saved)
    loaded = load_model(tmp_path / f"ckpt{suffix}", "diffusion")
    for ours, theirs in ((loaded, saved), (loaded.autoencoder, saved.autoencoder)):
        assert ours.sha256 == theirs.sha256
        assert (ours.kind, ours.config, ours.statistics, ours.provenance) == (
            theirs.kind, theirs.config, theirs.statistics, theirs.provenance,
        )  # fmt: skip
    assert load_model(tmp_path, "diffusion").sha256 == saved.sha256  # a run folder


def test_the_file_is_plain_under_weights_only(tmp_path):
    save_model(tmp_path / "ckpt.pt", model())
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["format"] == FORMAT


def test_fingerprint_is_of_the_content():
    weights = model().weights
    same = {name: weights[name].clone() for name in reversed(list(weights))}
    assert fingerprint(same) == fingerprint(weights)
    for change in ({"d": torch.zeros(1)}, {"b": torch.arange(3).int()}, {"c": torch.tensor(1.6)}):
        assert fingerprint(weights | change) != fingerprint(weights)


def test_missing(tmp_path):
    assert "no checkpoint" in message(tmp_path / "none.pt")
    assert "holds no ckpt.pt" in message(tmp_path)


def test_the_other_stage(tmp_path):
    save_model(tmp_path / "ckpt.pt", model("diffusion"))
    text = message(tmp_path / "ckpt.pt", "autoencoder")
    assert "is a stage-two diffusion model; a stage-one autoencoder is needed" in text


def test_a_newer_format(tmp_path):
    torch.save({"format": FORMAT + 1, "kind": "autoencoder"}, tmp_path / "ckpt.pt")
    assert "upgrade ldm" in message(tmp_path / "ckpt.pt")


def test_no_file_of_ours(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "ckpt.pt")
    assert "is not a model file" in message(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    ("change", "told"),
    [({"weights": None}, "lacks a section"), ({"weights": {"w": 1}}, "one is invalid"),
     ({"config": []}, "lacks a section"), ({"format": "new"}, "is not a model file"),
     ({"kind": ["autoencoder"]}, "is not a model file"), ({"kind": {}}, "is not a model file"),
     ({"autoencoder": [1]}, "one is invalid"),
     ({"autoencoder": {"weights": {}}}, "one is invalid")],
)  # fmt: skip
def test_a_file_of_the_wrong_shape(tmp_path, change, told):
    save_model(tmp_path / "ckpt.pt", model())
    tree = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    torch.save(tree | change, tmp_path / "ckpt.pt")
    assert told in message(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.97])
def test_truncated(tmp_path, suffix, part):
    save_model(tmp_path / "ckpt.pt", model())
    path = tmp_path / f"ckpt{suffix}"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    assert "damaged" in message(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_any_damage_is_one_line_or_a_model(tmp_path, suffix):
    """Bytes changed at random in the pickle or the header: nothing but LdmError may come."""
    save_model(tmp_path / "ckpt.pt", model())
    path, rng = tmp_path / f"ckpt{suffix}", random.Random(0)
    whole = path.read_bytes()
    told = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(min(len(whole), 700))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load_model(path, "autoencoder")
        except LdmError as error:
            told += "\n" not in str(error)
    assert told > 100


def test_a_value_that_was_changed_is_told(tmp_path):
    """Weights that torch.load would take as they are."""
    path = tmp_path / "ckpt.pt"
    save_model(path, model())
    whole, value = bytearray(path.read_bytes()), struct.pack("<f", 1.5)
    at = whole.index(value)
    whole[at : at + 4] = struct.pack("<f", 1.25)
    path.write_bytes(whole)
    assert torch.load(path)["weights"]["c"] == 1.25
    assert re.search(r"damaged: the checksum of \S+/data/2 is wrong", message(path))


@pytest.mark.parametrize("raised", [IndexError, TypeError, struct.error, AssertionError, OSError])
def test_whatever_the_reader_raises_is_damage(tmp_path, monkeypatch, raised):
    def load(*_, **__):
        raise raised("inside")

    (tmp_path / "ckpt.pt").touch()
    monkeypatch.setattr(torch, "load", load)
    assert "is truncated or damaged" in message(tmp_path / "ckpt.pt")


class Bomb:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (open, (self.mark, "w"))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, how):
    mark, path = tmp_path / "ran", tmp_path / "ckpt.pt"
    if how == "torch":
        torch.save({"format": 1, "kind": "autoencoder", "weights": Bomb(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(mark)))
    assert "would run code" in message(path)
    assert not mark.exists()


def test_names_of_tensors_do_not_reach_the_terminal_raw(tmp_path):
    with pytest.raises(LdmError) as caught:
        build_with(lambda: torch.nn.Identity(), {"x\n\x1b[2J": torch.zeros(1)}, tmp_path)
    assert str(caught.value).isprintable() and r"\n\x1b[2J" in str(caught.value)


def test_a_tensor_larger_than_what_the_file_holds_of_it(tmp_path):
    """Half precision, so that making it what the model has would copy it."""
    weights = {"weight": torch.zeros(1, dtype=torch.float16).expand(2**20, 2**20)}
    build = lambda: torch.nn.Linear(2**20, 2**20, bias=False)  # noqa: E731
    with pytest.raises(Damaged, match=r"tensor weight is \(1048576, 1048576\), more than the file"):
        build_with(build, weights, tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "float8_e5m2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_damage(tmp_path, dtype, value):
    weight = torch.tensor([[1.0, 2], [3, value]]).to(getattr(torch, dtype))
    with pytest.raises(Damaged, match="tensor weight has values that are NaN or infinite: copy"):
        build_with(lambda: torch.nn.Linear(2, 2, bias=False), {"weight": weight}, tmp_path)


def test_safetensors_are_known_by_any_name(tmp_path):
    saved = model()
    save_model(tmp_path / "ckpt.pt", saved)
    (tmp_path / "ckpt.safetensors").rename(tmp_path / "a.ckpt")
    assert load_model(tmp_path / "a.ckpt", "autoencoder").sha256 == saved.sha256


def test_a_format_that_is_no_number(tmp_path):
    torch.save({"format": "a\nb", "kind": "autoencoder"}, tmp_path / "ckpt.pt")
    assert "is not a model file" in message(tmp_path / "ckpt.pt")


def test_safetensors_of_others_is_told(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "x.safetensors", {"ldm": json.dumps(None)})
    assert "is not a model file" in message(tmp_path / "x.safetensors")


def test_safetensors_that_are_missing_or_truncated_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(LdmError, match=r"could not read .*x.safetensors"):
        read_safetensors(path)
    save_model(tmp_path / "x.pt", model())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Damaged, match="is truncated or damaged: copy or write it again"):
        read_safetensors(path)
