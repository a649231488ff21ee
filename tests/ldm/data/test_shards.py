import json
import tarfile

import numpy as np
import pytest
from webdataset import TarWriter

from ldm.data.shards import index_shard, open_shards, read_manifest
from ldm.data.transforms import CorruptImage
from ldm.errors import LdmError, UsageError
from tests.ldm.data.pictures import encode, labels_of, noise


def shard(path, numbers):
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for n in numbers:
            sample = {"__key__": f"sub/{n:04d}", "png": encode(noise(n)), "json": b"{}"}
            writer.write(sample | {"seg.png": encode(noise(99))})
    return path


def manifest_of(counts):
    shards = [{"name": name, "count": count} for name, count in counts.items()]
    splits = {"train": {"count": sum(counts.values()), "shards": shards}}
    return {"format": 1, "splits": splits | {"val": {"count": 0, "shards": []}}}


@pytest.fixture
def folder(tmp_path):
    shard(tmp_path / "b-000.tar", range(3, 5))
    shard(tmp_path / "a-000.tar", range(3))
    return tmp_path


def test_shards_are_read_by_position_in_the_order_of_names(folder):
    source = open_shards(folder)
    assert len(source) == 5
    assert source.name(4) == f"{folder}/b-000.tar/sub/0004.png"
    for index in (4, 0, 2, 1, 3):
        np.testing.assert_array_equal(source.load(index), noise(index))


def test_one_shard_and_a_pattern_of_shards(folder):
    assert len(open_shards(folder / "b-000.tar")) == 2
    source = open_shards(folder / "{b,a}-000.tar")
    np.testing.assert_array_equal(source.load(0), noise(3))
    shard(folder / "c-001.tar", [7])
    shard(folder / "c-002.tar", [8])
    assert len(open_shards(folder / "c-{001..002}.tar")) == 2
    with pytest.raises(LdmError, match=r"shard .*c-003\.tar does not exist"):
        open_shards(folder / "c-{001..003}.tar")


def test_long_names_and_pax_headers(tmp_path):
    path = tmp_path / "long.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        (tmp_path / "é.png").write_bytes(encode(noise(1)))
        tar.add(tmp_path / "é.png", arcname=f"{'d' * 120}/é.png")
    np.testing.assert_array_equal(open_shards(path).load(0), noise(1))


def cut_in_data(data, members):
    return data[: members[-1].offset + 100]


def cut_between_members(data, members):
    return data[: members[-1].offset - tarfile.BLOCKSIZE]


def cut_before_the_end_marker(data, members):
    return data[: members[-1].offset + -(-members[-1].size // 512) * 512]


def broken_header(data, members):
    header = members[1].offset - tarfile.BLOCKSIZE
    return data[:header] + b"\xff" * tarfile.BLOCKSIZE + data[members[1].offset :]


def text(data, members):
    return b"no tar at all" * 1000


def empty(data, members):
    return b""


@pytest.mark.parametrize(
    "damage",
    [cut_in_data, cut_between_members, cut_before_the_end_marker, broken_header, text, empty],
)
def test_a_damaged_shard_is_one_clear_line(tmp_path, damage):
    path = tmp_path / "x.tar"
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for n in range(3):
            writer.write({"__key__": str(n), "png": encode(noise(n))})
    path.write_bytes(damage(path.read_bytes(), index_shard(path)))
    with pytest.raises(LdmError, match=r"x\.tar is truncated or corrupt \(.+\): copy or prepare"):
        open_shards(path)


def test_the_counts_of_a_manifest_are_checked(folder):
    manifest = manifest_of({"a-000.tar": 3, "b-000.tar": 9})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LdmError, match=r"b-000\.tar is .*\(2 images, 9 in the manifest\)"):
        open_shards(folder)
    with pytest.raises(LdmError, match="9 in the manifest"):
        open_shards(folder / "b-000.tar")
    assert len(open_shards(folder / "a-000.tar")) == 3


def test_a_shard_of_the_manifest_that_is_missing_is_named(folder):
    manifest = manifest_of({"a-000.tar": 3, "c-000.tar": 1})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LdmError, match=r"c-000\.tar does not exist"):
        open_shards(folder)


def test_manifests_that_cannot_be_used(folder):
    path = folder / "manifest.json"
    path.write_text('{"cut')
    with pytest.raises(LdmError, match=r"manifest\.json is damaged.*: run `ldm data prepare`"):
        read_manifest(folder)
    path.write_text(json.dumps(manifest_of({}) | {"format": 2}))
    with pytest.raises(LdmError, match="has format 2, this version reads up to 1: upgrade"):
        read_manifest(folder)
    path.write_text('["another tool\'s"]')
    assert read_manifest(folder) is None
    assert len(open_shards(folder)) == 5


def test_a_preparation_that_was_not_finished_is_refused(folder):
    (folder / "a-000.tar.json").write_text("{}")
    with pytest.raises(LdmError, match="is not complete: run the same `ldm data prepare` again"):
        open_shards(folder)


def test_shards_without_images_say_what_is_read(tmp_path):
    with TarWriter(str(tmp_path / "x.tar"), encoder=False) as writer:
        writer.write({"__key__": "1", "txt": b"hello"})
    with pytest.raises(
        LdmError, match=r"no images in .*x\.tar .left out: 1 \.txt, such as 1\.txt.: \.png"
    ):
        open_shards(tmp_path)


def test_a_corrupt_image_and_a_shard_that_is_gone(tmp_path):
    path = tmp_path / "x.tar"
    with TarWriter(str(path), encoder=False) as writer:
        writer.write({"__key__": "1", "png": b"broken"})
    source = open_shards(path)
    with pytest.raises(CorruptImage, match="not an image"):
        source.load(0)
    path.unlink()
    with pytest.raises(CorruptImage, match="No such file"):
        source.load(0)


def labelled_shard(path, classes, **others):
    """Image n and beside it `classes[n]`, the bytes of its .cls; None: there is none."""
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for n, text in enumerate(classes):
            sample = {"__key__": f"sub/{n:04d}", "png": encode(noise(n)), "seg.cls": b"77"}
            writer.write(sample | ({} if text is None else {"cls": text}) | others)
    return path


def test_classes_are_the_cls_beside_the_images(tmp_path):
    labelled_shard(tmp_path / "a.tar", [b"2", b" 0\n", b"11"])
    labelled_shard(tmp_path / "b.tar", [b"2"], CLS=b"3")  # of two, the last in the tar counts
    source = open_shards(tmp_path, labels=True)
    assert labels_of(source) == [2, 0, 11, 2]
    assert source.classes == tuple(str(n) for n in range(12))
    np.testing.assert_array_equal(source.load(2), noise(2))
    without = open_shards(tmp_path)
    assert (labels_of(without), without.classes) == ([-1] * 4, ())


def test_a_cls_may_come_before_or_after_its_image(tmp_path):
    for number, names in enumerate([("1.cls", "1.png"), ("1.png", "1.cls")]):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name in names:
                path = tmp_path / name
                path.write_bytes(b"4" if name == "1.cls" else encode(noise(1)))
                tar.add(path, arcname=name)
    assert labels_of(open_shards(tmp_path, labels=True)) == [4, 4]


def test_the_manifest_names_the_classes(tmp_path):
    labelled_shard(tmp_path / "a.tar", [b"1", b"0"])
    manifest = manifest_of({"a.tar": 2})
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert open_shards(tmp_path, labels=True).classes == ("0", "1")
    manifest["classes"] = ["cat", "dog", "newt"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for path in (tmp_path, tmp_path / "a.tar", tmp_path / "{a,a}.tar"):
        assert open_shards(path, labels=True).classes == ("cat", "dog", "newt")
    assert open_shards(tmp_path).classes == ()
    manifest["classes"] = ["cat"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError) as error:
        open_shards(tmp_path, labels=True)
    assert str(error.value) == (
        f"{tmp_path}/a.tar/sub/0000.png has class 1, but manifest.json names only classes below "
        "1: prepare the images again, or omit labels"
    )


def test_an_image_without_cls_is_named(tmp_path):
    labelled_shard(tmp_path / "a.tar", [b"1", None])
    with pytest.raises(UsageError) as error:
        open_shards(tmp_path, labels=True)
    assert str(error.value) == (
        f"{tmp_path}/a.tar/sub/0001.png has no .cls or .json member with its class: prepare the "
        "images with `ldm data prepare … --labels`, or omit labels"
    )


@pytest.mark.parametrize("text", [b"", b"cat", b"-1", b"1.0", b"1_0", b"1000000", b"9" * 5000])
def test_a_cls_that_is_no_number_is_named(tmp_path, text):
    labelled_shard(tmp_path / "a.tar", [b"1", text])
    with pytest.raises(
        LdmError, match=r"^.*a\.tar/sub/0001\.cls holds b'.{0,32}', not a class .*$"
    ):
        open_shards(tmp_path, labels=True)
    assert len(open_shards(tmp_path)) == 2


def test_a_shard_cut_in_a_cls_is_one_clear_line(tmp_path):
    path = labelled_shard(tmp_path / "a.tar", [b"1"])
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"sub/0000.cls") + 512])
    with pytest.raises(LdmError, match=r"a\.tar is truncated or corrupt \(.+\): copy or prepare"):
        open_shards(path, labels=True)
