import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.errors import LdmError
from ldm.files import (
    check_writable,
    finish_set,
    open_regular,
    read_bytes,
    write_atomically,
    write_together,
)


def test_write_atomically_keeps_the_previous_file_on_failure(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"first"))

    def fail(file):
        file.write(b"sec")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "eval").touch()
    with pytest.raises(LdmError, match=r"could not write .*eval/a.json"):
        write_atomically(tmp_path / "eval" / "a.json", lambda file: file.write(b"x"))
    with pytest.raises(LdmError, match=r"could not write .*deeper"):
        write_atomically(tmp_path / "eval" / "deeper" / "a", lambda file: file.write(b"x"))


def test_a_name_too_long(tmp_path):
    with pytest.raises(LdmError, match=r"could not write .* too long"):
        write_atomically(tmp_path / ("a" * 250), lambda file: file.write(b"x"))


def test_only_a_failed_write_is_called_one(tmp_path):
    """Content may come from a function that raises an error of its own."""

    def fail(file):
        raise RuntimeError("in a loader worker: a bug")

    with pytest.raises(RuntimeError, match="in a loader worker"):
        write_atomically(tmp_path / "file", fail)
    assert not list(tmp_path.iterdir())


def test_write_together_replaces_all_or_none(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("weights", "config")]

    def write(what, last=None):
        write_together(
            {
                paths[0]: lambda file: file.write(what),
                paths[1]: last or (lambda file: file.write(what)),
            }
        )

    def full(_file):
        raise OSError(28, "No space left on device")

    write(b"old")
    with pytest.raises(LdmError, match=r"config \(No space left on device\): .* are intact"):
        write(b"new", full)
    assert [path.read_bytes() for path in paths] == [b"old", b"old"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)

    paths[0].unlink()
    paths[0].mkdir()
    with pytest.raises(LdmError, match=r"weights \(Is a directory\)"):
        write(b"new")
    assert paths[1].read_bytes() == b"old"
    paths[0].rmdir()

    # an interruption between the two renames: the new one has no old description
    rename = type(tmp_path).replace

    def die(path, target):
        if target == paths[1]:
            raise KeyboardInterrupt
        rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(tmp_path), "replace", die)
        write(b"new")
    assert paths[0].read_bytes() == b"new" and not paths[1].exists()
    assert finish_set(tmp_path) and not finish_set(tmp_path)
    assert paths[1].read_bytes() == b"new" and sorted(tmp_path.iterdir()) == sorted(paths)


def test_a_path_that_cannot_be_written_is_refused_and_nothing_is_created(tmp_path):
    check_writable(tmp_path / "new" / "deep" / "x.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    told = r"could not write .*x\.json \(.*/file is a file\): give --out another file"
    for below in ("x.json", "deep/x.json"):
        with pytest.raises(LdmError, match=told):
            check_writable(tmp_path / "x.json", tmp_path / "file" / below)
    with pytest.raises(LdmError, match=r"is a folder: .*such as .*/result.json"):
        check_writable(tmp_path)
    with pytest.raises(LdmError, match=r"could not write /proc/none/x \(.*\): elsewhere"):
        check_writable(Path("/proc/none/x"), advice="elsewhere")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(OSError, match="not a regular file"):
            read_bytes(tmp_path / name, 100)


def test_reads_have_a_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_bytes(tmp_path / "file", 4)


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_links_are_not_written_through(tmp_path, link):
    (tmp_path / "other").write_bytes(b"theirs")
    link(tmp_path / "log", tmp_path / "other")
    with pytest.raises(OSError):
        open_regular(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, "ab")
    assert (tmp_path / "other").read_bytes() == b"theirs"


EXIT = """
import time, torch
from functools import partial
from ldm.files import BackgroundWriter

def job(tensors):
    time.sleep(0.2)  # until it alone holds them

writer = BackgroundWriter(on_failure=print)
writer.submit(partial(job, [torch.zeros(1) for _ in range(1_000_000)]))
writer.wait()
"""


def test_python_may_exit_once_a_writer_is_done():
    """A thread that still lets go of tensors, which takes a while, would abort it."""
    done = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
