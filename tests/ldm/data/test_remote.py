import json
import pickle
import shutil
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
import pytest
from webdataset import TarWriter

from ldm.data import (
    DataConfig,
    batches,
    evaluation_batches,
    holds_out,
    open_source,
    remote,
    shard_cache,
)
from ldm.data.dataset import content_identity, open_images
from ldm.data.prepare import prepare
from ldm.data.shard_cache import MEMBER, Shard, ShardCache
from ldm.data.shard_index import INDEX
from ldm.errors import LdmError, UsageError
from ldm.hub import cache_folder
from tests.ldm.data.pictures import class_folder, encode, labels_of, noise


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_cache, "PAUSE", 0)
    remote.read_remote_manifest.cache_clear()


@pytest.fixture
def prepared(tmp_path):
    """40 training images in 5 shards, 6 held out, of three classes."""
    names = {f"{'abc'[n % 3]}/{n:02d}.png": noise(n) for n in range(46)}
    class_folder(tmp_path / "images", names)
    prepare(
        tmp_path / "images", tmp_path / "data", 16, held_out=6, shard_size=8, workers=0, labels=True
    )
    return tmp_path / "data"


def shards(folder, counts):
    folder.mkdir()
    for name, count in counts.items():
        with TarWriter(str(folder / f"{name}.tar"), encoder=False, mtime=0) as writer:
            for n in range(count):
                sample = {"__key__": f"{name}{n}", "png": encode(noise(n + ord(name)))}
                writer.write(sample | {"json": b'{"label": "%s"}' % ("yes", "no")[n % 2].encode()})
    return folder


def url(folder):
    return f"file://{folder}"


def same(one, other):
    assert len(one) == len(other)
    for index in range(len(one)):
        np.testing.assert_array_equal(one.load(index), other.load(index))
        assert one.label(index) == other.label(index)


class Web(SimpleHTTPRequestHandler):
    """Serves a folder; `faults` are met once, by the ends of paths."""

    folder, faults, seen = "", {}, Counter()

    def __init__(self, *args):
        super().__init__(*args, directory=self.folder)

    def log_message(self, *_):
        pass

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.seen[name] += 1
        fault = next(iter(self.faults.get(name, ())), None)
        if fault is None:
            return super().do_GET()
        self.faults[name].pop(0)
        if isinstance(fault, int):
            return self.send_error(fault)
        data = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        if fault != "short":  # without a length, a cut transfer looks like a whole one
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        if fault == "stall":
            self.wfile.flush()
            self.released.wait(30)


@pytest.fixture
def web(tmp_path):
    """Serve a folder over HTTP: a function of it, which returns its URL and the faults to come."""
    released = threading.Event()
    servers = []

    def serve(folder):
        state = {"folder": str(folder), "faults": {}, "seen": Counter(), "released": released}
        handler = type("Handler", (Web,), state)
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}", handler

    yield serve
    released.set()
    for server in servers:
        server.shutdown()
        server.server_close()


# ------------------------------------------------------------------------------------- source
def test_prepared_shards_elsewhere_are_those_at_hand(prepared):
    for split in ("train", "val", "all"):
        here, there = (
            open_source(DataConfig(source=source, labels=True), split, 16)
            for source in (str(prepared), url(prepared))
        )
        assert there.classes == here.classes == ("a", "b", "c")
        same(there, here)
    assert holds_out(DataConfig(source=url(prepared)))


def test_a_folder_of_foreign_shards_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "AHEAD", 0)  # or a thread may fetch what is removed below
    folder = shards(tmp_path / "data", {"b": 3, "a": 4, "c": 0})
    first = open_images(url(folder), labels=True)
    assert first.classes == ("no", "yes") and len(first) == 7
    assert first.name(0) == f"{url(folder)}/a.tar/a0.png"
    same(first, open_images(folder, labels=True))
    shutil.rmtree(cache_folder() / "shards")
    monkeypatch.setattr(ShardCache, "open", None)
    again = open_images(url(folder), labels=True)
    assert labels_of(again) == labels_of(first) and again.identity() == first.identity()


def test_patterns_lists_and_pipes(tmp_path):
    folder = shards(tmp_path / "data", {"a": 4, "b": 3})
    here = open_images(folder)
    (folder / "index.json").write_text(
        json.dumps(
            {"shardlist": [{"url": "a.tar", "nsamples": 4}, {"url": "b.tar", "nsamples": 3}]}
        )
    )
    for source in (
        f"{url(folder)}/{{a,b}}.tar",
        f"{url(folder)}/index.json",
        f"pipe:cat {folder}/{{a,b}}.tar",
    ):
        there = open_images(source)
        assert len(there) == 7
        for index in range(7):
            np.testing.assert_array_equal(there.load(index), here.load(index))


@pytest.mark.slow
def test_workers_fetch_shards_of_their_own(prepared):
    config = DataConfig(source=url(prepared), workers=2, streams=2, window=1)
    source = open_source(config, "train", 16)
    plain = config.model_copy(update={"workers": 0})
    for parallel, single in zip(
        batches(source, config, 16, 0, 0, 96, 8),
        batches(source, plain, 16, 0, 0, 96, 8),
        strict=True,
    ):
        assert parallel.images.equal(single.images) and parallel.k.equal(single.k)
    whole = open_source(plain, "all", 16)
    found = {
        int(k): image
        for b in evaluation_batches(whole, 16, 8, workers=2)
        for k, image in zip(b.k, b.images, strict=True)
    }
    assert len(found) == 46 and (found[45].permute(1, 2, 0).numpy() == whole.load(45)).all()


def test_a_source_elsewhere_travels_small(prepared):
    source = open_source(DataConfig(source=url(prepared)), "train", 16)
    source.load(0)
    assert len(pickle.dumps(source)) < 6000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).load(39), source.load(39))


def test_another_list_of_shards_has_another_identity(prepared):
    whole = open_images(url(prepared))
    before = whole.identity()
    parts = [open_source(DataConfig(source=url(prepared)), split, 16) for split in ("train", "val")]
    assert {part.identity() for part in parts} == {before}
    assert content_identity(parts[0], 6) != content_identity(parts[1], 6)
    manifest = json.loads((prepared / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    remote.read_remote_manifest.cache_clear()
    assert open_images(url(prepared)).identity() != before


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("file:///nowhere/at/all", r"file:///nowhere/at/all cannot be listed"),
        ("file:///nowhere/{0..3}.tar", r"file:///nowhere/0\.tar cannot be read .*check it"),
        ("file:///nowhere/index.json", r"index\.json does not exist"),
        ("nonsense://x/{0..3}.tar", r"nonsense://x/0\.tar cannot be read \(Protocol not known"),
        ("pipe:exit 3; cat {a,b}.tar", r"pipe:exit 3; cat a\.tar could not be fetched"),
    ],
)
def test_what_cannot_be_read_is_one_line(source, error):
    with pytest.raises(LdmError, match=error) as caught:
        open_images(source)
    assert "\n" not in str(caught.value)


def test_a_list_that_is_wrong_is_named(tmp_path):
    folder = shards(tmp_path / "data", {"a": 4})
    entries = [{"url": "a.tar", "nsamples": 5}]
    (folder / "index.json").write_text(json.dumps({"shardlist": entries}))
    source = open_images(f"{url(folder)}/index.json")
    with pytest.raises(LdmError, match=r"a\.tar holds 4 images, not 5 as listed"):
        source.load(0)
    (folder / "index.json").write_text(json.dumps({"shards": entries}))
    with pytest.raises(LdmError, match=r"index\.json is damaged: shardlist"):
        open_images(f"{url(folder)}/index.json")


@pytest.mark.parametrize(
    "name",
    ["pipe:touch {}; cat a.tar", "../a.tar", "/etc/passwd", "memory://a.tar", "simplecache::a.tar"],
)
def test_a_list_names_shards_beside_it_and_no_commands(tmp_path, name):
    folder = shards(tmp_path / "data", {"a": 4})
    made = tmp_path / "made"
    entries = [{"url": name.replace("{}", str(made)), "nsamples": 4}]
    (folder / "index.json").write_text(json.dumps({"shardlist": entries}))
    with pytest.raises(LdmError, match=r"index\.json lists .*, which is no shard beside it"):
        open_images(f"{url(folder)}/index.json").load(0)
    assert not made.exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"sha256": 5}, {"sha256": "xyz"}, {"bytes": -5}, {"bytes": "x"}, {"name": ".."},
        {"name": "../train-00000.tar"}, {"name": "train-00001.tar"}, {"count": 2**70},
    ],
)  # fmt: skip
def test_a_manifest_that_is_wrong_is_one_line(prepared, entry):
    path = prepared / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["shards"][0] |= entry
    path.write_text(json.dumps(manifest))
    with pytest.raises(LdmError, match=r"manifest\.json is damaged: ") as caught:
        open_images(url(prepared)).load(0)
    assert "\n" not in str(caught.value)


def test_options_that_are_not_for_shards_elsewhere_are_refused(prepared):
    with pytest.raises(UsageError, match=r"data\.label_file is for local data"):
        open_images(url(prepared), labels=True, label_file="x.csv")
    with pytest.raises(UsageError, match=r"fewer images cannot be held out than their manifest"):
        open_source(DataConfig(source=url(prepared), held_out=2), "train", 16)


def test_a_range_of_the_images_is_ordered_by_itself(tmp_path):
    folder = shards(tmp_path / "data", {"a": 5, "b": 5, "c": 5})
    source = open_images(url(folder)).part(range(3, 12))
    for epoch in range(3):
        found = [source.shuffled(0, k) for k in range(epoch * 9, epoch * 9 + 9)]
        assert sorted(found) == list(range(9))
    np.testing.assert_array_equal(source.load(0), noise(3 + ord("a")))
    np.testing.assert_array_equal(source.load(8), noise(1 + ord("c")))


# -------------------------------------------------------------------------------------- cache
def kept():
    return sorted((cache_folder() / "shards").glob(f"*/{MEMBER}"))


def test_the_cache_is_bounded_and_keeps_the_last_used(tmp_path):
    folder = shards(tmp_path / "data", {"a": 8, "b": 8, "c": 8, "d": 8})
    size = (folder / "a.tar").stat().st_size
    cache = ShardCache(int(3.9 * size), labels=False)
    paths = {name: cache.open(Shard(url(folder / f"{name}.tar"), size))[0] for name in "abc"}
    cache.open(Shard(url(folder / "a.tar"), size))  # used again
    paths["d"] = cache.open(Shard(url(folder / "d.tar"), size))[0]
    assert kept() == sorted(paths[name] for name in "acd")
    with pytest.raises(LdmError, match=r"d\.tar has 0\.0 GB, more than data\.cache_gb="):
        ShardCache(size - 1, labels=False).open(
            Shard(url(folder / "e.tar").replace("e", "d"), size)
        )


def test_a_shard_that_others_removed_is_fetched_again(tmp_path):
    source = open_images(url(shards(tmp_path / "data", {"a": 8})))
    first = source.load(0)
    (path,) = kept()
    path.unlink()
    np.testing.assert_array_equal(source.load(0), first)


def test_a_damaged_shard_in_the_cache_is_fetched_again(tmp_path):
    folder = shards(tmp_path / "data", {"a": 8})
    first = open_images(url(folder)).load(0)
    (path,) = kept()
    path.write_bytes(b"")
    np.testing.assert_array_equal(open_images(url(folder)).load(0), first)


def test_a_shard_that_was_replaced_is_another_one(tmp_path):
    folder = shards(tmp_path / "data", {"a": 8})
    before = open_images(url(folder))
    before.load(0)
    shutil.copy(shards(tmp_path / "other", {"b": 8}) / "b.tar", folder / "a.tar")
    after = open_images(url(folder))
    assert after.identity() != before.identity()
    np.testing.assert_array_equal(after.load(3), noise(3 + ord("b")))


def test_labels_that_cannot_be_read_spoil_no_cached_shard(tmp_path):
    (tmp_path / "data").mkdir()
    with TarWriter(str(tmp_path / "data" / "a.tar"), encoder=False) as writer:
        writer.write({"__key__": "a", "png": encode(noise(0)), "cls": b"x"})
    source = url(tmp_path / "data")
    open_images(source).load(0)
    with pytest.raises(LdmError, match=r"a\.tar/a\.cls holds b'x', not a class number"):
        open_images(source, labels=True)
    np.testing.assert_array_equal(open_images(source).load(0), noise(0))


def test_a_run_with_a_cache_that_is_too_small_goes_on(prepared, caplog):
    size = (prepared / "train-00000.tar").stat().st_size
    config = DataConfig(source=url(prepared), workers=0, cache_gb=1.6 * size / 1e9, streams=4)
    source = open_source(config, "train", 16)
    seen = [batch.k.tolist() for batch in batches(source, config, 16, 0, 0, 40, 8)]
    assert len(seen) == 5 and "if data.cache_gb is too small: set it to" in caplog.text


# ---------------------------------------------------------------------------------- transfers
@pytest.mark.parametrize("fault", [503, 429, "truncate", "short", "stall"])
def test_a_transfer_that_fails_is_tried_again(prepared, web, monkeypatch, fault):
    monkeypatch.setattr(shard_cache, "PATIENCE", 0.5)
    address, handler = web(prepared)
    handler.faults |= {"train-00002.tar": [fault, fault], "manifest.json": [503]}
    there = open_source(DataConfig(source=address, labels=True), "train", 16)
    same(there, open_source(DataConfig(source=str(prepared), labels=True), "train", 16))
    assert handler.seen["train-00002.tar"] == 3
    home = there._opened(2).path.parent
    assert sorted(path.name for path in home.iterdir()) == [".lock", MEMBER, INDEX]


@pytest.mark.parametrize("end", ["; echo never", " & echo never"])
def test_a_command_that_stalls_is_ended(tmp_path, monkeypatch, end):
    monkeypatch.setattr(shard_cache, "PATIENCE", 0.5)
    monkeypatch.setattr(shard_cache, "TRIES", 1)
    numbers = tmp_path / "numbers"
    command = f"pipe:sh -c 'echo $$; exec sleep 1000' | tee {numbers}{end}"
    with pytest.raises(LdmError, match=r"in 1 attempts, .*no byte for 0\.5 s"):
        shard_cache.fetch(command, tmp_path / "a.tar", 1000)
    with suppress(psutil.NoSuchProcess):
        sleeping = psutil.Process(int(numbers.read_text()))
        if sleeping.status() != psutil.STATUS_ZOMBIE:
            sleeping.wait(timeout=10)  # until the kernel has ended it


def test_other_bytes_than_the_manifests_are_not_taken(prepared, web):
    address, handler = web(prepared)
    source = open_source(DataConfig(source=address), "train", 16)
    data = bytearray((prepared / "train-00000.tar").read_bytes())
    data[700] ^= 1
    (prepared / "train-00000.tar").write_bytes(data)
    with pytest.raises(
        LdmError,
        match=r"train-00000\.tar could not be fetched in 5 attempts, .*\(SHA-256\): see to",
    ):
        source.load(0)
    assert handler.seen["train-00000.tar"] == 5


@pytest.mark.parametrize("status", [404, 403])
def test_what_is_refused_is_not_tried_again(prepared, web, status):
    address, handler = web(prepared)
    source = open_source(DataConfig(source=address), "train", 16)
    handler.faults["train-00000.tar"] = [status] * 5
    with pytest.raises(
        LdmError, match=r"train-00000\.tar cannot be read .*: check it, and your access"
    ):
        source.load(0)
    assert handler.seen["train-00000.tar"] == 1


def test_a_broken_shard_is_named_by_its_url(tmp_path, web):
    folder = shards(tmp_path / "data", {"a": 3})
    (folder / "a.tar").write_bytes((folder / "a.tar").read_bytes()[:1000])
    address, _ = web(folder)
    with pytest.raises(LdmError, match=rf"{address}/a\.tar is truncated or corrupt") as caught:
        open_images(f"{address}/a.tar")
    assert str(cache_folder()) not in str(caught.value)


@pytest.mark.slow
def test_each_shard_is_fetched_once_whatever_the_processes(prepared, web):
    address, handler = web(prepared)
    config = DataConfig(source=address, workers=2, streams=2, window=1)
    source = open_source(config, "train", 16)
    for rank in range(2):
        for _ in batches(source, config, 16, 0, 0, 160, 8, rank, 2):
            pass
    tars = {name: count for name, count in handler.seen.items() if name.startswith("train")}
    assert tars == {f"train-{n:05d}.tar": 1 for n in range(5)}


def test_shards_are_fetched_ahead_of_their_use(tmp_path, web):
    counts = {chr(ord("a") + n): 10 for n in range(12)}
    address, handler = web(shards(tmp_path / "data", counts))
    entries = [{"url": f"{name}.tar", "nsamples": 10} for name in counts]
    (tmp_path / "data" / "index.json").write_text(json.dumps({"shardlist": entries}))
    config = DataConfig(source=f"{address}/index.json", streams=2, window=1, held_out=0)
    source = open_source(config, "train", 16)
    source.fetch_first(0, 0, 0, 1)
    began = {name for name in handler.seen if name.endswith(".tar")}
    first, second = (source._order.window(0, k) for k in range(2))
    assert began == {f"{chr(ord('a') + s)}.tar" for s in first.shards + second.shards}
    source.fetch_ahead(0, 0)
    ahead = source._order.window(0, first.next).shards
    names, until = {f"{chr(ord('a') + s)}.tar" for s in ahead}, time.monotonic() + 10
    while time.monotonic() < until and not names <= handler.seen.keys():
        threading.Event().wait(0.1)
    assert names <= handler.seen.keys()


@pytest.mark.slow
def test_object_storage(prepared, monkeypatch):
    pytest.importorskip("s3fs")
    import fsspec
    from moto.server import ThreadedMotoServer

    for key, value in {
        "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        system = fsspec.filesystem("s3")
        system.mkdir("bucket")
        system.put(f"{prepared}/", "bucket/with/", recursive=True)
        system.put(f"{prepared}/*.tar", "bucket/without/")
        here = open_source(DataConfig(source=str(prepared), labels=True), "all", 16)
        same(open_source(DataConfig(source="s3://bucket/with", labels=True), "all", 16), here)
        without = open_images("s3://bucket/without", labels=True)
        assert sorted(labels_of(without)) == sorted(labels_of(here))
        with pytest.raises(LdmError, match=r"s3://bucket/none cannot be listed"):
            open_images("s3://bucket/none")
    finally:
        server.stop()
