import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

from ldm.checkpoint import (
    FORMAT,
    ModelFile,
    fingerprint,
    latest_state,
    load_model,
    load_state,
    save_model,
    save_state,
    write_atomically,
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


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.97])
def test_truncated(tmp_path, suffix, part):
    save_model(tmp_path / "ckpt.pt", model())
    path = tmp_path / f"ckpt{suffix}"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    assert "damaged" in message(path)


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


def test_a_half_written_state_is_not_taken(tmp_path):
    save_state(tmp_path, 8, {"seen": 8})
    (tmp_path / ".writing-16").mkdir()
    (tmp_path / "16").mkdir()
    assert latest_state(tmp_path).name == "8"


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
    assert len(lines) == 2 and all("make room" in line for line in lines)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert load_state(latest_state(tmp_path / "state")) == {"seen": 8}
    left = {p.name for p in tmp_path.rglob("*")}
    assert left == {"state", "8", "state.pt", "ckpt.pt", "ckpt.safetensors"}


def test_write_atomically_keeps_what_stood_there_when_the_writer_fails(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"first"))

    def fail(file):
        file.write(b"sec")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_safetensors_of_others_is_told(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "x.safetensors", {"ldm": json.dumps(None)})
    assert "is not a model file" in message(tmp_path / "x.safetensors")
