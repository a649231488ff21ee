import json
import pickle
import random
import struct
import subprocess
import sys
import textwrap

import pytest
import torch

from ldm.checkpoint import (
    FORMAT,
    Damaged,
    ModelFile,
    build_with,
    fingerprint,
    latest_state,
    load_model,
    load_state,
    restore,
    save_model,
    save_state,
    shown,
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
    [({"weights": None}, "lacks a part"), ({"weights": {"w": 1}}, "no tensors"),
     ({"config": []}, "lacks a part"), ({"format": "new"}, "has format new"),
     ({"kind": ["autoencoder"]}, "is not a model file"), ({"kind": {}}, "is not a model file"),
     ({"autoencoder": [1]}, "autoencoder that is none"),
     ({"autoencoder": {"weights": {}}}, "autoencoder that is none")],
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


@pytest.mark.parametrize("raised", [IndexError, TypeError, struct.error, AssertionError, OSError])
def test_whatever_the_reader_raises_is_damage(tmp_path, monkeypatch, raised):
    def load(*_, **__):
        raise raised("inside")

    (tmp_path / "ckpt.pt").touch()
    monkeypatch.setattr(torch, "load", load)
    assert "is truncated or damaged" in message(tmp_path / "ckpt.pt")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def load(*_, **__):
        raise PermissionError(13, "Permission denied")

    save_state(tmp_path, 8, {})
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(LdmError, match=r"could not read .*state\.pt \(Permission denied\)$"):
        load_state(tmp_path / "8")


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


def test_states_are_kept_newest_and_found(tmp_path):
    assert latest_state(tmp_path) is None
    for seen in (8, 64, 128):
        save_state(tmp_path, seen, {"seen": seen, "t": torch.ones(2)}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["128", "64"]
    assert load_state(latest_state(tmp_path))["seen"] == 128


@pytest.mark.parametrize(
    "saved",
    [{"other": torch.zeros(1)}, {"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, None],
)
def test_a_state_of_other_code_is_told(saved):
    tree = {} if saved is None else {"critic": saved}
    with pytest.raises(LdmError, match=r"the saved state of critic does not fit: .* --out another"):
        restore({"critic": torch.nn.Linear(2, 1)}, tree)


def test_a_state_is_restored_part_by_part():
    saved, fresh = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    restore({"critic": fresh}, {"critic": saved.state_dict(), "seen": 8})
    assert torch.equal(fresh.weight, saved.weight)


def test_a_half_written_state_is_not_taken(tmp_path):
    save_state(tmp_path, 8, {"seen": 8})
    (tmp_path / ".writing-16").mkdir()
    (tmp_path / "16").mkdir()
    assert latest_state(tmp_path).name == "8"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", pickle.dumps(print)])
def test_a_damaged_state_says_how_to_go_on(tmp_path, content):
    save_state(tmp_path, 8, {"seen": 8})
    save_state(tmp_path, 16, {"seen": 16})
    (tmp_path / "16" / "state.pt").write_bytes(content)
    with pytest.raises(LdmError) as caught:
        load_state(latest_state(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}/16 is damaged: delete that folder, and the state before it is used"
    )


def test_a_full_disk_leaves_the_last_good_files(tmp_path):
    """The process may write no file longer than 64 KiB: to it the disk is full."""
    save_state(tmp_path / "state", 8, {"seen": 8})
    save_model(tmp_path / "ckpt.pt", model())
    before = (tmp_path / "ckpt.pt").read_bytes()
    code = textwrap.dedent(f"""
        import resource, signal, sys, torch
        from pathlib import Path
        from ldm.checkpoint import ModelFile, save_model, save_state
        from ldm.errors import LdmError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        folder, big = Path({str(tmp_path)!r}), torch.randn(100_000)
        for write in (
            lambda: save_state(folder / "state", 16, {{"big": big}}),
            lambda: save_model(folder / "ckpt.pt", ModelFile("autoencoder", {{}}, {{"w": big}})),
        ):
            try:
                write()
            except LdmError as error:
                print(error)
            else:
                sys.exit("nothing was raised")
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 2 and all("(File too large): make room" in x for x in lines)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert load_state(latest_state(tmp_path / "state")) == {"seen": 8}
    left = {p.name for p in tmp_path.rglob("*")}
    assert left == {"state", "8", "state.pt", "ckpt.pt", "ckpt.safetensors"}


@pytest.mark.parametrize("name", ["encoder.weight", "größe"])
def test_what_can_be_printed_is_shown_as_it_is(name):
    assert shown(name) == name


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\u202eb", 3, ("a\n",)])
def test_what_cannot_is_shown_escaped(name):
    assert shown(name).isprintable() and shown(name) == repr(name)


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
    sparse = {"weight": torch.zeros(2, 2).to_sparse()}
    with pytest.raises(Damaged, match="more than the file holds"):
        build_with(lambda: torch.nn.Linear(2, 2, bias=False), sparse, tmp_path)


def test_safetensors_are_known_by_any_name(tmp_path):
    saved = model()
    save_model(tmp_path / "ckpt.pt", saved)
    (tmp_path / "ckpt.safetensors").rename(tmp_path / "a.ckpt")
    assert load_model(tmp_path / "a.ckpt", "autoencoder").sha256 == saved.sha256


def test_a_format_that_is_no_number_is_shown_escaped(tmp_path):
    torch.save({"format": "a\nb", "kind": "autoencoder"}, tmp_path / "ckpt.pt")
    assert r"has format 'a\nb'" in message(tmp_path / "ckpt.pt")


def test_safetensors_of_others_is_told(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "x.safetensors", {"ldm": json.dumps(None)})
    assert "is not a model file" in message(tmp_path / "x.safetensors")
