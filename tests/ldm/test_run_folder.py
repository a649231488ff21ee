"""Run folders: finding, locking, saving and restoring."""

import errno
import fcntl
import json
import pickle
import shlex
from datetime import datetime

import pytest
import torch
import yaml

from ldm.checkpoint import ModelFile, save_model
from ldm.config import Config
from ldm.errors import LdmError
from ldm.files import lock
from ldm.run import RunConfig
from ldm.run_folder import (
    clear_leftovers,
    differences,
    is_finished,
    latest_state,
    load_state,
    new_or_unfinished,
    newest_run,
    provenance,
    restore,
    save_state,
)
from tests.small import file_size_limit


class Recipe(Config):
    lr: float = 1e-3
    """Learning rate."""
    run: RunConfig = RunConfig()
    """The run."""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_new_run_is_named_and_described():
    folder = new_or_unfinished("autoencoder", "tiny", Recipe(), None)
    assert folder.parent.name == "runs" and folder.name.endswith("-tiny")
    assert yaml.safe_load((folder / "config.yaml").read_text())["lr"] == 1e-3
    described = json.loads((folder / "run.json").read_text())
    assert described["kind"] == "autoencoder" and described["versions"]["torch"]


def test_the_same_command_finds_the_unfinished_run():
    first = new_or_unfinished("autoencoder", "tiny", Recipe(), None)
    assert new_or_unfinished("autoencoder", "tiny", Recipe(), None) == first
    for other in ({"log_every_steps": 7}, {"compile": False}, {"compile": True}):
        watched = Recipe(run=RunConfig(**other))
        assert new_or_unfinished("autoencoder", "tiny", watched, None) == first


def test_a_new_run_for_other_settings_another_stage_or_a_finished_run(tmp_path):
    first = new_or_unfinished("autoencoder", "tiny", Recipe(), tmp_path / "runs" / "first")
    assert new_or_unfinished("autoencoder", "tiny", Recipe(lr=1e-4), None) != first
    assert new_or_unfinished("diffusion", "tiny", Recipe(), None) != first
    (first / "result.json").write_text("{}")
    assert is_finished(first)
    assert new_or_unfinished("autoencoder", "tiny", Recipe(), None) != first


def test_a_folder_of_another_configuration_is_refused_by_its_keys(tmp_path):
    folder = new_or_unfinished("autoencoder", "tiny", Recipe(), tmp_path / "mine")
    assert differences(folder, Recipe(lr=1e-4)) == ["lr"]
    with pytest.raises(LdmError, match=r"another configuration \(lr\)"):
        new_or_unfinished("autoencoder", "tiny", Recipe(lr=1e-4), folder)
    with pytest.raises(LdmError, match="run of kind autoencoder, not diffusion"):
        new_or_unfinished("diffusion", "tiny", Recipe(), folder)


def test_the_newest_run_that_fits(tmp_path):
    with pytest.raises(LdmError, match="`ldm train-ae` first"):
        newest_run("autoencoder")
    for name in ("a", "b"):
        folder = new_or_unfinished("autoencoder", "x", Recipe(), tmp_path / "runs" / name)
    (tmp_path / "runs" / "a" / "ckpt.pt").touch()
    assert newest_run("autoencoder").name == "a"
    (folder / "ckpt.pt").touch()
    assert newest_run("autoencoder").name == "b"


def test_runs_started_in_the_same_second_get_different_folders(monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 1, 2, 3, 4, 5).astimezone(tz)

    monkeypatch.setattr("ldm.run_folder.datetime", Clock)
    rates = (1e-3, 1e-4, 1e-5)
    folders = [new_or_unfinished("autoencoder", "tiny", Recipe(lr=lr), None) for lr in rates]
    name = "20240102-030405-tiny"
    assert [folder.name for folder in folders] == [name, f"{name}-2", f"{name}-3"]
    for folder, lr in zip(folders, rates, strict=True):
        assert yaml.safe_load((folder / "config.yaml").read_text())["lr"] == lr


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(LdmError, match=r"could not make runs/.* \(Not a directory\)"):
        new_or_unfinished("autoencoder", "tiny", Recipe(), None)


def test_a_folder_of_other_files_is_refused(tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / ".DS_Store").touch()
    assert new_or_unfinished("autoencoder", "tiny", Recipe(), folder) == folder
    for name in ("run.json", "config.yaml"):
        (folder / name).unlink()
    (folder / "chapter1.tex").touch()
    with pytest.raises(LdmError, match="thesis is not empty and holds no run: give --out another"):
        new_or_unfinished("autoencoder", "tiny", Recipe(), folder)
    assert not (folder / "config.yaml").exists()


FOREIGN = [b"[]", b"null", b"{", '{"kind": "é"}'.encode("latin-1")]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_damaged_run_json_is_skipped_by_a_scan_and_named(tmp_path, content, capsys):
    foreign = tmp_path / "runs" / "x"
    foreign.mkdir(parents=True)
    (foreign / "run.json").write_bytes(content)
    (foreign / "ckpt.pt").touch()
    assert new_or_unfinished("autoencoder", "tiny", Recipe(), None) != foreign
    with pytest.raises(LdmError, match="no autoencoder run"):
        newest_run("autoencoder")
    assert capsys.readouterr().err.count("skipped: runs/x/run.json is damaged") == 1
    with pytest.raises(LdmError, match=r"run\.json is damaged"):
        new_or_unfinished("autoencoder", "tiny", Recipe(), foreign)


@pytest.mark.parametrize(
    "content", [b"[1]", b"", b"{", "a: é".encode("latin-1"), b"1-2: 2024-99-99"]
)
def test_a_damaged_config_yaml_is_named(content):
    first = new_or_unfinished("autoencoder", "tiny", Recipe(), None)
    (first / "config.yaml").write_bytes(content)
    with pytest.raises(LdmError, match=r"config\.yaml is damaged"):
        differences(first, Recipe())
    assert new_or_unfinished("autoencoder", "tiny", Recipe(), None) != first


def test_validate_images_may_change_on_resume(tmp_path):
    class Watched(Config):
        validate_images: int = 8
        """Images."""

    folder = new_or_unfinished("autoencoder", "tiny", Watched(), None)
    assert differences(folder, Watched(validate_images=9)) == []


def test_runs_are_not_searched_among_samples(tmp_path):
    for place in ("a/samples/seed0", "demo/autoencoder"):
        folder = tmp_path / "runs" / place
        new_or_unfinished("autoencoder", "x", Recipe(), folder)
        (folder / "ckpt.pt").touch()
    assert newest_run("autoencoder").as_posix() == "runs/demo/autoencoder"
    (folder / "ckpt.pt").unlink()
    with pytest.raises(LdmError, match="no autoencoder run"):
        newest_run("autoencoder")


def test_a_locked_folder_is_refused(tmp_path):
    with (
        lock(tmp_path),
        pytest.raises(LdmError, match="another process is at work in"),
        lock(tmp_path),
    ):
        pass
    with lock(tmp_path):
        pass


@pytest.mark.parametrize(
    ("number", "held"),
    [(errno.EAGAIN, True), (errno.EACCES, True), (errno.ENOLCK, False), (errno.ENOTSUP, False)],
)
def test_a_file_system_without_locks_is_tolerated(tmp_path, monkeypatch, number, held):
    def flock(*_):
        raise OSError(number, "no")

    monkeypatch.setattr(fcntl, "flock", flock)
    if held:
        with pytest.raises(LdmError, match="another process is at work"), lock(tmp_path):
            pass
    else:
        with lock(tmp_path):
            pass


def test_clear_leftovers_removes_partial_files_only(tmp_path):
    kept = ["state/8/state.pt", "pictures/a.png", "ckpt.pt", "samples/.x.partial", "a.partial"]
    left = [
        "state/.writing-16/state.pt", "state/24/.state.pt.7.partial", ".ckpt.pt.7.partial",
        "pictures/.b.png.7.partial",
    ]  # fmt: skip
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    clear_leftovers(tmp_path)
    files = {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert files == set(kept)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["8"]
    clear_leftovers(tmp_path / "none")


def test_the_recorded_command_is_quoted(monkeypatch):
    words = ["train-ae", "tiny", "phases=[{resolution: 64, steps: 9}]"]
    monkeypatch.setattr("sys.argv", ["/somewhere/ldm", *words])
    assert shlex.split(provenance()["command"]) == ["ldm", *words]


# ------------------------------------------------------------------------------------ saved states
def test_the_newest_states_are_kept(tmp_path):
    assert latest_state(tmp_path) is None
    for seen in (8, 64, 128):
        save_state(tmp_path, seen, {"seen": seen, "t": torch.ones(2)}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["128", "64"]
    assert load_state(latest_state(tmp_path))["seen"] == 128


@pytest.mark.parametrize(
    "saved",
    [{"other": torch.zeros(1)}, {"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, None],
)
def test_a_state_of_another_version_is_refused(saved):
    tree = {} if saved is None else {"discriminator": saved}
    with pytest.raises(
        LdmError, match=r"the saved state of discriminator does not fit: .* --out another"
    ):
        restore({"discriminator": torch.nn.Linear(2, 1)}, tree)


def test_out_of_memory_is_not_reported_as_another_version():
    class Full:
        def load_state_dict(self, state):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        restore({"optimizer": Full()}, {"optimizer": {}})


def test_a_state_is_restored_part_by_part():
    saved, fresh = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    restore({"discriminator": fresh}, {"discriminator": saved.state_dict(), "seen": 8})
    assert torch.equal(fresh.weight, saved.weight)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_moments_take_the_layout_of_their_parameters(layout):
    def trained(steps, memory_format, state=None):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            conv = torch.nn.Conv2d(4, 6, 3).to(memory_format=memory_format)
        optimizer = torch.optim.Adam(conv.parameters(), lr=0.1, fused=True)
        if state is not None:
            restore({"conv": conv, "optimizer": optimizer}, state)
        images = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
        for _ in range(steps):
            optimizer.zero_grad()
            conv(images).square().sum().backward()
            optimizer.step()
        return conv, {"conv": conv.state_dict(), "optimizer": optimizer.state_dict()}

    other = {torch.channels_last: torch.contiguous_format}.get(layout, torch.channels_last)
    _, saved = trained(2, other)
    whole, _ = trained(4, layout)
    resumed, state = trained(2, layout, saved)
    torch.testing.assert_close(resumed.weight, whole.weight)
    moments = state["optimizer"]["state"][0]
    assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == resumed.weight.stride()


def test_restore_reads_the_former_names_of_parts():
    saved, fresh = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    restore({"discriminator": fresh}, {"critic": saved.state_dict()})
    assert torch.equal(fresh.weight, saved.weight)


def test_a_partial_state_is_ignored(tmp_path):
    save_state(tmp_path, 8, {"seen": 8})
    (tmp_path / ".writing-16").mkdir()
    (tmp_path / "16").mkdir()
    assert latest_state(tmp_path).name == "8"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", pickle.dumps(print)])
def test_a_damaged_state_names_the_remedy(tmp_path, content):
    save_state(tmp_path, 8, {"seen": 8})
    save_state(tmp_path, 16, {"seen": 16})
    (tmp_path / "16" / "state.pt").write_bytes(content)
    with pytest.raises(LdmError) as caught:
        load_state(latest_state(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}/16 is damaged: delete that folder to resume from the state before it"
    )


def test_a_full_disk_leaves_the_last_good_files(tmp_path):
    save_state(tmp_path / "state", 8, {"seen": 8})
    save_model(tmp_path / "ckpt.pt", ModelFile("autoencoder", {}, {"a": torch.ones(1)}))
    before = (tmp_path / "ckpt.pt").read_bytes()
    big = torch.randn(100_000)
    for write in (
        lambda: save_state(tmp_path / "state", 16, {"big": big}),
        lambda: save_model(tmp_path / "ckpt.pt", ModelFile("autoencoder", {}, {"w": big})),
    ):
        with (
            pytest.raises(LdmError, match=r"\(File too large\): free disk space"),
            file_size_limit(65536),
        ):
            write()
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert load_state(latest_state(tmp_path / "state")) == {"seen": 8}
    left = {p.name for p in tmp_path.rglob("*")}
    assert left == {"state", "8", "state.pt", "ckpt.pt", "ckpt.safetensors"}


def test_an_unreadable_file_is_not_reported_as_damaged(tmp_path, monkeypatch):
    def load(*_, **__):
        raise PermissionError(13, "Permission denied")

    save_state(tmp_path, 8, {})
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(LdmError, match=r"could not read .*state\.pt \(Permission denied\)$"):
        load_state(tmp_path / "8")
