"""The lock of a folder, and folders whose filling a kill or a removal interrupts."""

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from ldm import files
from ldm.config import Config
from ldm.errors import LdmError
from ldm.files import clear_partials, lock, write_atomically, write_together
from ldm.run_folder import new_or_unfinished
from tests.kills import contents, killed_at
from tests.small import ROOT

HOLD = """
import sys
from pathlib import Path
from ldm.files import lock
with lock(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout.readline() == b"locked\n"
        yield process
        process.kill()


def test_another_process_holds_the_lock(tmp_path, holder):
    refusal = pytest.raises(LdmError, match=r"^another process is at work in .*out: .* --out ano")
    with refusal, lock(tmp_path / "out"):
        pass
    holder.kill()
    holder.wait()
    with lock(tmp_path / "out", wait=True):
        pass


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_lock_leaves_what_it_points_to(tmp_path, link):
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / "out").mkdir()
    link(tmp_path / "out" / ".lock", tmp_path / "thesis")
    with pytest.raises(LdmError, match=r"could not write in .*\.lock"), lock(tmp_path / "out"):
        pass
    assert (tmp_path / "thesis").read_text() == "mine"


def test_a_lock_does_not_create_what_it_points_to(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "new")
    with pytest.raises(LdmError, match=r"could not write in .*\.lock"), lock(tmp_path):
        pass
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_lock_that_is_no_file_is_one_line(tmp_path, make):
    make(tmp_path / ".lock")
    with pytest.raises(LdmError, match=r"could not write in .*\.lock"), lock(tmp_path):
        pass


def test_a_lock_keeps_its_content(tmp_path):
    (tmp_path / ".lock").write_text("notes")
    with lock(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "notes"


@pytest.mark.parametrize("again", [False, True])
def test_a_removed_folder_does_not_come_back(tmp_path, again):
    out = tmp_path / "out"
    with lock(out):
        shutil.rmtree(out)
        if again:  # by another process
            with lock(out):
                pass
        with pytest.raises(LdmError, match=r"out was removed or replaced"):
            write_atomically(out / "state" / "8" / "state.pt", b"x")
    assert out.exists() == again and not (out / "state").exists()
    write_atomically(out / "state" / "8" / "state.pt", b"x")  # once it is not at work there


# ---------------------------------------------------------------------------- half-written files
def test_a_file_that_is_being_written_stays(tmp_path):
    def write(file):
        file.write(b"x")
        clear_partials([tmp_path])

    (tmp_path / ".old.0123456789abcdef.partial").touch()
    (tmp_path / ".theirs.partial").touch()
    write_atomically(tmp_path / "file", write)
    assert contents(tmp_path) == {"file": b"x", ".theirs.partial": b""}


@pytest.mark.parametrize("age", [0, 90_000])
def test_without_locks_half_written_files_of_today_stay(tmp_path, monkeypatch, age):
    def flock(descriptor, operation):
        """As of NFS, which locks what is open for writing, or of Lustre, which locks nothing."""
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        raise OSError(errno.EBADF if is_folder else errno.ENOSYS, "no")

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / ".ckpt.pt.0123456789abcdef.partial"
    path.touch()
    os.utime(path, (time.time() - age,) * 2)
    clear_partials([tmp_path])
    assert path.exists() == (not age)


def test_half_written_files_are_locked_as_nfs_requires(tmp_path, monkeypatch):
    flock = fcntl.flock

    def strict(descriptor, operation):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "not open for writing")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", strict)
    write_atomically(tmp_path / "file", lambda file: clear_partials([tmp_path]))
    (tmp_path / ".file.0123456789abcdef.partial").touch()
    clear_partials([tmp_path])
    assert contents(tmp_path) == {"file": b""}


def test_a_file_is_not_cleared_before_it_is_locked(tmp_path, monkeypatch):
    def others(*_):
        """Another process at the worst moment."""
        clearing.start()
        clearing.join(0.2)
        return original(*_)

    clearing = threading.Thread(target=clear_partials, args=([tmp_path],))
    original = files.lock_open
    names = iter([original, others])
    monkeypatch.setattr(files, "lock_open", lambda *_: next(names, original)(*_))
    write_atomically(tmp_path / "file", b"x")
    clearing.join()
    assert contents(tmp_path) == {"file": b"x"}


def test_a_folder_that_others_lock_for_long_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # as `flock FOLDER ldm …` does
    write_together({tmp_path / name: b"x" for name in "ab"})
    os.close(descriptor)
    assert contents(tmp_path) == {"a": b"x", "b": b"x"}


def test_a_file_system_without_lasting_numbers_has_locks(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.samestat", lambda *_: False)
    with lock(tmp_path):
        write_atomically(tmp_path / "file", b"x")
    assert (tmp_path / "file").exists()


def test_half_written_files_follow_no_link(tmp_path, monkeypatch):
    (tmp_path / "thesis").write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 2 * count)
    (tmp_path / f".file.{'0' * 16}.partial").symlink_to(tmp_path / "thesis")
    with pytest.raises(LdmError, match="File exists"):
        write_atomically(tmp_path / "file", b"x")
    assert (tmp_path / "thesis").read_text() == "mine"


OUTSIDE = b'{"partials": ["../.a.0123456789abcdef.partial", 3]}'


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"partials": []}', b"[" * 9999, OUTSIDE]
)
def test_a_damaged_list_of_a_set_blocks_nothing(tmp_path, content):
    (tmp_path / ".set").write_bytes(content)
    write_atomically(tmp_path / "file", b"x")
    assert contents(tmp_path) == {"file": b"x"}


def test_a_set_is_old_or_new_or_lacks_its_description(tmp_path):
    def write(content):
        write_together({tmp_path / name: content for name in ("a", "b", "description")})

    whole = dict.fromkeys(("a", "b", "description"), b"new")
    number = 0
    while True:
        write(b"old")
        number += 1
        killed = killed_at(number, lambda: write(b"new"))
        there = {name: data for name, data in contents(tmp_path).items() if name in whole}
        if "description" in there:
            assert len(set(there.values())) == 1 and len(there) == 3
        if not killed:
            break
        clear_partials([tmp_path])
        after = contents(tmp_path)
        assert after in (whole, dict.fromkeys(whole, b"old"))
    assert number > 9 and there == whole


# ------------------------------------------------------------------------------- beginning a run
class Recipe(Config):
    lr: float = 1e-3
    """Learning rate."""


def begin(folder: Path, lr: float = 1e-3) -> None:
    with ExitStack() as held:
        new_or_unfinished("autoencoder", "tiny", Recipe(lr=lr), folder, held)


def test_a_run_that_is_killed_while_it_begins_can_begin(tmp_path):
    begin(tmp_path / "whole")
    number = 1
    while killed_at(number, partial(begin, out := tmp_path / f"out-{number}")):
        if out.exists() and not (out / "run.json").exists():  # then with any settings
            begin(copied := shutil.copytree(out, tmp_path / f"other-{number}"), lr=1e-4)
            assert "lr: 0.0001" in (copied / "config.yaml").read_text()
        begin(out)
        assert contents(out) == contents(tmp_path / "whole")
        number += 1
    assert number > 5


@pytest.mark.parametrize("name", ["config.yaml", "state/8/state.pt", "pictures/recon-00000008.png",
                                  "metrics.jsonl", "tensorboard/events.out.tfevents.1.x", ".a/b",
                                  "state/16/.state.pt.0123456789abcdef.partial"])  # fmt: skip
def test_what_is_left_of_a_removed_run_does_not_block(tmp_path, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("lr: 7")
    begin(tmp_path / "out")
    assert not (tmp_path / "out" / "state" / "8").exists()
    kept = [path.read_text() for path in tmp_path.rglob(Path(name).name) if path.is_file()]
    assert "lr: 7" in kept or ".partial" in name  # no file of others is lost


def test_states_of_another_configuration_are_kept(tmp_path):
    begin(out := tmp_path / "out")
    (out / "run.json").unlink()
    (out / "state" / "8").mkdir(parents=True)
    (out / "state" / "8" / "state.pt").write_bytes(b"mine")
    with pytest.raises(LdmError, match=r"started with another configuration \(lr\)"):
        begin(out, lr=1e-4)
    begin(out)
    assert (out / "state" / "8" / "state.pt").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["ckpt.pt", "state/notes.txt", "pictures/me.jpg", "config.yaml/a"])
def test_a_folder_of_other_files_is_left_alone(tmp_path, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(LdmError, match="is not empty and holds no run"):
        begin(tmp_path / "out")
    assert contents(tmp_path / "out") == {name: b"mine"}
    assert not (tmp_path / "out" / ".lock").exists()
