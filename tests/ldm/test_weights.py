"""Weights are found, or fetched once and completely; a failure leaves nothing."""

import hashlib
import socket
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from ldm.errors import LdmError
from ldm.hub import cache_folder, find_or_fetch, from_home

CONTENT = bytes(range(256)) * 4
HASH = hashlib.sha256(CONTENT).hexdigest()
NOWHERE = "file:///nowhere/w.pt"


@pytest.fixture
def published(tmp_path) -> str:
    """The address of a file that can be fetched without a network."""
    path = tmp_path / "server" / "w.pt"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path.as_uri()


@pytest.fixture
def breaking_off():
    """The address of a server that announces the whole file, sends half of it, and hangs up."""

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[: len(CONTENT) // 2])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/w.pt"
    server.shutdown()
    server.server_close()


def failure(url: str, folders: list[Path], hash_prefix: str | None = HASH) -> str:
    """The one line that a fetch which cannot succeed ends with."""
    with pytest.raises(LdmError) as error:
        find_or_fetch("w.pt", url, hash_prefix, folders, "give it with --weights PATH")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("LDM_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "ldm"


def test_the_first_folder_that_has_it(tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders[1:]:
        folder.mkdir()
        (folder / "w.pt").write_text(folder.name)
    assert find_or_fetch("w.pt", NOWHERE, HASH, folders, "") == folders[1] / "w.pt"


def test_fetched_once_into_the_first_folder(tmp_path, published):
    folders = [tmp_path / "a" / "b", tmp_path / "c"]
    path = find_or_fetch("w.pt", published, HASH[:8], folders, "")
    assert path == folders[0] / "w.pt"
    assert path.read_bytes() == CONTENT
    assert [file.name for file in folders[0].iterdir()] == ["w.pt"]
    assert find_or_fetch("w.pt", NOWHERE, HASH, folders, "") == path


def test_concurrent_downloads_all_get_the_complete_file(tmp_path, published):
    def fetch(_: int) -> bytes:
        return find_or_fetch("w.pt", published, HASH, [tmp_path / "a"], "").read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(fetch, range(16))) == {CONTENT}
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["w.pt"]
    assert socket.getdefaulttimeout() is None, "other sockets of the process have no limit"


def test_it_cannot_be_reached(tmp_path):
    text = failure(NOWHERE, [tmp_path / "a", tmp_path / "b"])
    assert text.startswith(f"w.pt is not on this machine and could not be fetched from {NOWHERE} (")
    assert text.endswith(
        f"put the file at {tmp_path / 'a' / 'w.pt'}, or give it with --weights PATH"
    )
    assert not list((tmp_path / "a").iterdir())


def test_another_file_at_the_address_is_not_kept(tmp_path, published):
    text = failure(published, [tmp_path / "a"], hash_prefix="0123abcd")
    assert f"its SHA-256 is {HASH}, not 0123abcd" in text
    assert not list((tmp_path / "a").iterdir())


def test_a_download_that_breaks_off_is_not_kept(tmp_path, breaking_off):
    text = failure(breaking_off, [tmp_path / "a"])
    assert "could not be fetched" in text and "it ended after 512 of 1024 bytes" in text
    assert not list((tmp_path / "a").iterdir())


def test_the_cache_cannot_be_written(tmp_path, published):
    (tmp_path / "a").write_text("a file where the folder should be")
    assert f"could not write {tmp_path / 'a' / 'w.pt'}" in failure(published, [tmp_path / "a"])


def test_from_home_shortens_paths(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "me")
    assert from_home(tmp_path / "me" / ".cache" / "w.pt") == "~/.cache/w.pt"
    assert from_home(tmp_path / "meadow" / "w.pt") == str(tmp_path / "meadow" / "w.pt")
