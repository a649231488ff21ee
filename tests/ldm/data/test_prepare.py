import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import DataConfig, evaluation_batches, open_source
from ldm.data.prepare import _prepare_image, prepare
from ldm.errors import LdmError, UsageError
from tests.ldm.data.pictures import Coded, encode, noise, png_folder, zip_file

here = partial(prepare, workers=0)


@pytest.fixture
def images(tmp_path):
    """Twenty-five 48×40 PNGs."""
    return png_folder(tmp_path / "images", [noise(n) for n in range(25)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_manifest_and_split(images, tmp_path):
    manifest = here(images, tmp_path / "out", size=32, held_out=4, shard_size=10)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    splits = manifest.pop("splits")
    assert manifest == {
        "format": 1,
        "count": 25,
        "size": 32,
        "filter": "lanczos",
        "crop": "center",
        "source": "images",
        "skipped": [],
    }
    assert [(s["name"], s["count"]) for s in splits["train"]["shards"]] == [
        ("train-00000.tar", 10),
        ("train-00001.tar", 10),
        ("train-00002.tar", 1),
    ]
    assert [(s["name"], s["count"]) for s in splits["val"]["shards"]] == [("val-00000.tar", 4)]
    for shard in splits["train"]["shards"] + splits["val"]["shards"]:
        data = (tmp_path / "out" / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    with tarfile.open(tmp_path / "out" / "val-00000.tar") as tar:
        assert tar.getnames() == [f"{index:08d}.png" for index in range(21, 25)]


def test_images_of_the_size_were_resized_by_no_filter(tmp_path):
    """A statistic is by how images came to their size, and these came as they are."""
    squares = png_folder(tmp_path / "squares", [noise(n)[:32, :32] for n in range(3)])
    manifest = here(squares, tmp_path / "out", size=32, held_out=1)
    assert manifest["filter"] == "none"
    assert here(squares, tmp_path / "out", size=32, held_out=1) == manifest  # from the sidecars
    (squares / "larger.png").write_bytes(encode(noise(3)))
    assert here(squares, tmp_path / "other", size=32, held_out=1)["filter"] == "lanczos"


@pytest.mark.parametrize(
    ("filter", "resampling"),
    [
        ("lanczos", Image.Resampling.LANCZOS),
        ("box", Image.Resampling.BOX),
        ("bicubic", Image.Resampling.BICUBIC),
    ],
)
def test_the_centre_is_cut_out_then_resized(images, tmp_path, filter, resampling):
    here(images, tmp_path / "out", size=32, filter=filter)
    config = DataConfig(source=str(tmp_path / "out"))
    train, val = (open_source(config, split, 32) for split in ("train", "val"))
    assert (len(train), len(val)) == (24, 1)
    for source, index, n in ((train, 0, 0), (train, 23, 23), (val, 0, 24)):
        square = Image.fromarray(noise(n)).crop((0, 4, 40, 44))
        expected = np.asarray(square.resize((32, 32), resampling))
        np.testing.assert_array_equal(source.load(index), expected)


def test_images_of_another_height_than_width(tmp_path):
    folder = png_folder(tmp_path / "images", [noise(n, 60, 40) for n in range(3)])
    manifest = here(folder, tmp_path / "out", size=(45, 20), held_out=1)
    assert manifest["size"] == [45, 20]  # height first
    data = DataConfig(source=str(tmp_path / "out"))
    with Image.open(folder / "0001.png") as whole:
        # of 60×40, 4:9 leaves 60×27 (26⅔)
        crop = whole.crop((6, 0, 33, 60)).resize((20, 45), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(open_source(data, "train", (45, 20)).load(1), np.asarray(crop))
    said = "prepared at 45×20, smaller than the 20×45 requested: .*--size 20x45"
    with pytest.raises(LdmError, match=said):
        open_source(data, "train", (20, 45))
    said = r"3 of 3 images are smaller than 40×60: .* \(60×40 \(height×width\)"
    with pytest.raises(LdmError, match=said):
        here(folder, tmp_path / "other", size=(40, 60))
    # at its own size nothing is resized
    assert here(folder, tmp_path / "own", size=(60, 40))["filter"] == "none"


def test_the_manifests_split_can_be_overruled(images, tmp_path):
    here(images, tmp_path / "out", size=32, held_out=4, shard_size=10)
    out = str(tmp_path / "out")
    assert len(open_source(DataConfig(source=out), "val", 32)) == 4
    assert len(open_source(DataConfig(source=out, held_out=7), "val", 32)) == 7
    assert len(open_source(DataConfig(source=out), "all", 32)) == 25


def test_nothing_held_out(images, tmp_path):
    manifest = here(images, tmp_path / "out", size=32, held_out=0)
    assert manifest["splits"]["val"] == {"count": 0, "shards": []}
    assert len(open_source(DataConfig(source=str(tmp_path / "out")), "train", 32)) == 25


def test_again_after_a_loss_and_in_processes_the_bytes_are_the_same(images, tmp_path):
    out = tmp_path / "out"
    here(images, out, size=32, shard_size=6)
    before = contents(out)
    kept = (out / "train-00000.tar").stat().st_mtime_ns

    here(images, out, size=32, shard_size=6)
    assert contents(out) == before

    (out / "train-00002.tar").unlink()
    (out / "manifest.json").unlink()
    (out / ".train-00001.tar.1.partial").write_bytes(b"left by a kill")
    here(images, out, size=32, shard_size=6)
    assert contents(out) == before
    assert (out / "train-00000.tar").stat().st_mtime_ns == kept  # not made again

    (out / "train-00001.tar").write_bytes(before["train-00001.tar"][:-1024])
    here(images, out, size=32, shard_size=6)
    assert contents(out) == before

    prepare(images, tmp_path / "other", size=32, shard_size=6, workers=2)
    assert contents(tmp_path / "other") == before


def test_a_zip_an_array_folder_and_shards_as_sources(images, tmp_path):
    members = {p.name: p.read_bytes() for p in images.iterdir()}
    zipped = zip_file(tmp_path / "images.zip", members)
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    for n in range(25):
        np.save(arrays / f"imgHQ{n:05d}.npy", noise(n).transpose(2, 0, 1)[None])
    here(images, tmp_path / "a", size=40)
    here(zipped, tmp_path / "b", size=40)
    here(arrays, tmp_path / "c", size=40)
    here(tmp_path / "a", tmp_path / "d", size=40)
    tars = [(tmp_path / name / "train-00000.tar").read_bytes() for name in "abcd"]
    assert tars[0] == tars[1] == tars[2] == tars[3]
    assert [json.loads((tmp_path / n / "manifest.json").read_text())["source"] for n in "abc"] == [
        "images",
        "images.zip",
        "arrays",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": 16}, "size 32 there, 16 now"),
        ({"filter": "box"}, "filter 'lanczos' there, 'box' now"),
        ({"held_out": 3, "shard_size": 5}, "held_out 1 there, 3 now; shard_size 1000 there, 5 now"),
    ],
)
def test_a_destination_made_with_other_settings_is_refused(images, tmp_path, change, said):
    here(images, tmp_path / "out", size=32)
    before = contents(tmp_path / "out")
    with pytest.raises(LdmError, match=r"was prepared with other settings .*: choose another") as e:
        here(images, tmp_path / "out", **{"size": 32} | change)
    assert said in str(e.value)
    assert contents(tmp_path / "out") == before


def test_a_source_with_other_images_is_other_settings(images, tmp_path):
    here(images, tmp_path / "out", size=32)
    (images / "0000.png").rename(images / "0000b.png")
    with pytest.raises(LdmError, match=r"other settings \(the list of images"):
        here(images, tmp_path / "out", size=32)


@pytest.mark.parametrize("workers", [0, 1])
def test_up_to_one_percent_corrupt_images_are_left_out_and_named(tmp_path, caplog, workers):
    folder = png_folder(tmp_path / "images", [noise(0, 8, 8)] * 100)
    (folder / "0030.png").write_bytes(encode(noise(0))[:50])
    with caplog.at_level(logging.WARNING, "ldm"):
        manifest = prepare(folder, tmp_path / "out", size=8, shard_size=20, workers=workers)
    assert "0030.png" in caplog.text
    assert manifest["count"] == 99
    assert [skipped["name"] for skipped in manifest["skipped"]] == ["0030.png"]
    assert manifest["splits"]["train"]["shards"][1]["count"] == 19
    assert len(open_source(DataConfig(source=str(tmp_path / "out")), "all", 8)) == 99
    # skipped images count on going on, too
    (tmp_path / "out" / "train-00000.tar").unlink()
    (folder / "0000.png").write_bytes(b"")
    with pytest.raises(LdmError, match="2 of 100 images are corrupt"):
        prepare(folder, tmp_path / "out", size=8, shard_size=20, workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_more_than_one_percent_corrupt_stops_with_the_list(tmp_path, workers):
    folder = png_folder(tmp_path / "images", [noise(0, 8, 8)] * 40)
    (folder / "0003.png").write_bytes(b"")
    with pytest.raises(LdmError, match=r"1 of 40 images are corrupt, more than 1%: .*0003\.png"):
        prepare(folder, tmp_path / "out", size=8, shard_size=10, workers=workers)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(LdmError, match="is not complete"):
        open_source(DataConfig(source=str(tmp_path / "out")), "train", 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_small_images_are_counted_and_named_at_once(images, tmp_path, workers):
    for number in (7, 19):
        (images / f"00{number:02d}.png").write_bytes(encode(noise(0, 30, 50)))
    told = (
        r"^2 of 25 images are smaller than 32×32: \S*0007\.png \(50×30\), \S*0019\.png \(50×30\): "
        "give --small skip or --small enlarge, or a smaller --size$"
    )
    with pytest.raises(LdmError, match=told):
        prepare(images, tmp_path / "out", size=32, shard_size=5, workers=workers)
    assert not list((tmp_path / "out").glob(".*.partial"))
    # shards that were finished before stay
    assert [tar.name for tar in (tmp_path / "out").glob("*.tar")] == ["train-00000.tar"]


def test_small_images_are_skipped_or_enlarged_on_request(images, tmp_path):
    (images / "0007.png").write_bytes(encode(noise(0, 30, 50)))
    skipped = prepare(images, tmp_path / "skip", size=32, workers=0, small="skip")
    assert skipped["count"] == 24
    assert skipped["skipped"] == [{"name": "0007.png", "reason": "too small: 50×30"}]
    enlarged = prepare(images, tmp_path / "enlarge", size=32, workers=0, small="enlarge")
    assert enlarged["count"] == 25 and not enlarged["skipped"]
    source = open_source(DataConfig(source=str(tmp_path / "enlarge")), "all", 32)
    expected = Image.fromarray(noise(0, 30, 50)[:, 10:40]).resize((32, 32), Image.LANCZOS)
    np.testing.assert_array_equal(source.load(7), np.asarray(expected))


def test_after_a_bad_file_was_removed_it_goes_on(images, tmp_path):
    """Shards of the same images stay; the others are written again, and none is left over."""
    (images / "0012.png").write_bytes(encode(noise(0, 30, 50)))
    call = partial(prepare, images, tmp_path / "out", size=32, shard_size=5, workers=0, held_out=4)
    with pytest.raises(LdmError, match="1 of 25 images are smaller"):
        call()
    before = {tar.name: tar.stat().st_mtime_ns for tar in (tmp_path / "out").glob("*.tar")}
    assert sorted(before) == ["train-00000.tar", "train-00001.tar"]
    (images / "0012.png").unlink()
    manifest = call()
    assert manifest["count"] == 24 and manifest["splits"]["val"]["count"] == 4
    for name, written in before.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == written
    fresh = prepare(images, tmp_path / "fresh", size=32, shard_size=5, workers=0, held_out=4)
    assert manifest == fresh and call() == fresh
    # a complete one is of these images alone
    (images / "0013.png").unlink()
    with pytest.raises(LdmError, match=r"other settings \(images 24 there, 23 now; the list of"):
        call()


def test_the_shards_of_another_data_set_are_not_touched(images, tmp_path):
    (images / "0012.png").write_bytes(encode(noise(0, 30, 50)))
    call = partial(prepare, size=32, shard_size=5, workers=0, held_out=4)
    with pytest.raises(LdmError, match="1 of 25 images are smaller"):
        call(images, tmp_path / "out")
    before = {tar.name: tar.read_bytes() for tar in (tmp_path / "out").glob("*.tar*")}
    other = png_folder(tmp_path / "other" / "images", [noise(99 + n) for n in range(9)])
    for number, path in enumerate(sorted(other.iterdir())):
        path.rename(other / f"x{number}.png")
    with pytest.raises(LdmError, match=r"was prepared with other settings .*the list of images"):
        call(other, tmp_path / "out")
    assert {tar.name: tar.read_bytes() for tar in (tmp_path / "out").glob("*.tar*")} == before


def test_shards_of_an_earlier_attempt_do_not_stay(images, tmp_path):
    (images / "0023.png").write_bytes(encode(noise(0, 30, 50)))
    call = partial(prepare, images, tmp_path / "out", size=32, shard_size=5, workers=0, held_out=1)
    with pytest.raises(LdmError, match="1 of 25 images are smaller"):
        call()
    for number in range(11, 25):
        (images / f"00{number}.png").unlink()
    assert call()["count"] == 11
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3


def test_what_makes_no_sense_is_refused(images, tmp_path):
    with pytest.raises(LdmError, match=r"nowhere does not exist: give a folder"):
        here(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UsageError, match="is the source: choose another folder"):
        here(images, images)
    with pytest.raises(UsageError, match="is a file: the destination must be a folder"):
        here(images, images / "0000.png")
    with pytest.raises(UsageError, match="holding out 25 of 25 images leaves none"):
        here(images, tmp_path / "out", held_out=25)
    with pytest.raises(UsageError, match="no filter 'nearest': choose one of lanczos, box"):
        here(images, tmp_path / "out", filter="nearest")
    for name in ("size", "shard_size"):
        with pytest.raises(UsageError, match="must be at least 1"):
            here(images, tmp_path / "out", **{name: 0})
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "train-00000.tar").write_bytes(b"somebody's")
    with pytest.raises(
        UsageError, match=r"train-00000\.tar was not written by .*: choose an empty"
    ):
        here(images, tmp_path / "theirs")
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "train-00000.tar.json").write_text("{cut")
    with pytest.raises(LdmError, match=r"train-00000\.tar\.json is damaged.*: delete it"):
        here(images, tmp_path / "out")


def endless(source, size, filter, index):
    """Prepare an image; from the twelfth on, never."""
    if index > 10:
        time.sleep(3600)
    return _prepare_image(source, size, filter, index)


def begin(source: Path, out: Path) -> subprocess.Popen:
    """A preparation in processes of its own that has finished a shard, and cannot finish all."""
    code = (
        "import signal, sys; from ldm.data import prepare as module\n"
        "from tests.ldm.data.test_prepare import endless\n"
        # a shell's background job starts with Ctrl-C ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "module._prepare_image = endless\n"
        "module.prepare(sys.argv[1], sys.argv[2], size=32, shard_size=5, workers=2)"
    )
    command = [sys.executable, "-c", code, str(source), str(out)]
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        command, cwd=root, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(out.glob("*.tar")):
        time.sleep(0.02)
    assert process.poll() is None, process.stderr.read()
    return process


@pytest.mark.slow
def test_ctrl_c_leaves_finished_shards_and_no_partial_files(images, tmp_path):
    out = tmp_path / "out"
    process = begin(images, out)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to every process
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0, errors
    assert "KeyboardInterrupt" in errors
    finished = sorted(p.name for p in out.glob("*.tar"))
    assert 0 < len(finished) < 3
    assert not list(out.glob(".*.partial"))
    assert not (out / "manifest.json").exists()
    before = {name: (out / name).stat().st_mtime_ns for name in finished}
    here(images, out, size=32, shard_size=5)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == before
    assert len(open_source(DataConfig(source=str(out)), "all", 32)) == 25


def group_members(group: int) -> list[int]:
    """Processes of a group that still run (zombies have an empty command line)."""
    alive = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getpgid(int(entry.name)) == group and (entry / "cmdline").read_bytes():
                    alive.append(int(entry.name))
            except OSError:
                continue
    return alive


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_a_killed_preparation_leaves_no_process_behind(images, tmp_path):
    process = begin(images, tmp_path / "out")
    assert len(group_members(process.pid)) >= 3
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while group_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not group_members(process.pid)


def test_prepared_or_read_directly_the_pixels_are_the_same(tmp_path):
    """Odd sizes both ways, so that cutting and resizing do not exchange."""
    sizes = [(97, 61), (61, 97), (64, 64), (33, 200), (32, 32), (75, 41)]
    folder = png_folder(tmp_path / "images", [noise(n, *size) for n, size in enumerate(sizes)])
    here(folder, tmp_path / "out", size=32, held_out=0)
    direct, prepared = (
        next(evaluation_batches(open_source(DataConfig(source=str(path)), "all", 32), 32, 8))
        for path in (folder, tmp_path / "out")
    )
    assert len(direct.images) == 6 and torch.equal(direct.images, prepared.images)


def test_names_that_are_no_utf8_are_written_readably(tmp_path):
    folder = tmp_path / os.fsdecode(b"im\xe9ges")
    try:
        png_folder(folder, [noise(n) for n in range(150)])
        (folder / os.fsdecode(b"0000\xff.png")).write_bytes(encode(noise(0)))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (folder / os.fsdecode(b"0001\xe9.png")).write_bytes(b"broken")
    manifest = here(folder, tmp_path / "out", size=32)
    assert manifest["count"] == 151 and manifest["source"] == "im\\xe9ges"
    assert [skipped["name"] for skipped in manifest["skipped"]] == ["0001\\xe9.png"]
    assert here(folder, tmp_path / "out", size=32) == manifest


class Fatal(Coded):
    """Kills the process that loads its eighth image."""

    def load(self, index):
        if index == 7:
            os._exit(9)
        return super().load(index)


def test_a_killed_worker_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr("ldm.data.prepare.open_images", lambda *_: Fatal(20))
    with pytest.raises(LdmError, match=r"a loader worker was killed, .*fewer --workers; finished"):
        prepare(tmp_path, tmp_path / "out", size=16, shard_size=5, workers=1)
    assert [tar.name for tar in (tmp_path / "out").glob("*.tar")] == ["train-00000.tar"]


@pytest.mark.parametrize("workers", [0, 2])
def test_progress_counts_every_image(monkeypatch, images, tmp_path, workers):
    counted = []

    @contextmanager
    def count(what, total):
        assert (what, total) == ("preparing", 25)
        yield counted.append

    monkeypatch.setattr("ldm.data.prepare.show_progress", count)
    prepare(images, tmp_path / "out", size=32, shard_size=10, workers=workers)
    assert sum(counted) == 25
