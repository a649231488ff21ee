import pickle

import pytest
import torch

from ldm.checkpoint import ModelFile, save_model
from ldm.errors import LdmError
from ldm.run_folder import latest_state, load_state, restore, save_state
from tests.small import file_size_limit


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
    tree = {} if saved is None else {"discriminator": saved}
    with pytest.raises(
        LdmError, match=r"the saved state of discriminator does not fit: .* --out another"
    ):
        restore({"discriminator": torch.nn.Linear(2, 1)}, tree)


def test_a_full_gpu_is_not_another_version():
    class Full:
        def load_state_dict(self, state):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        restore({"optimizer": Full()}, {"optimizer": {}})


def test_a_state_is_restored_part_by_part():
    saved, fresh = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    restore({"discriminator": fresh}, {"discriminator": saved.state_dict(), "seen": 8})
    assert torch.equal(fresh.weight, saved.weight)


def test_restore_reads_the_former_names_of_parts():
    saved, fresh = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    restore({"discriminator": fresh}, {"critic": saved.state_dict()})
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


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def load(*_, **__):
        raise PermissionError(13, "Permission denied")

    save_state(tmp_path, 8, {})
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(LdmError, match=r"could not read .*state\.pt \(Permission denied\)$"):
        load_state(tmp_path / "8")
