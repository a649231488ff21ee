import json
import logging
import tarfile
from functools import partial

import pytest

from ldm.data import DataConfig, evaluation_batches, holds_out, open_source
from ldm.data.prepare import prepare
from ldm.errors import LdmError, UsageError
from tests.ldm.data.pictures import class_folder, noise, png_folder, zip_file

SIZES = {"cat": 10, "dog": 5, "newt": 5}
here = partial(prepare, size=32, shard_size=6, workers=0, labels=True)


@pytest.fixture
def images(tmp_path):
    """Twenty 48×40 PNGs in three folders, each image another."""
    names = [f"{name}/{n}.png" for name, count in SIZES.items() for n in range(count)]
    return class_folder(tmp_path / "images", {name: noise(i) for i, name in enumerate(names)})


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def members(tar):
    with tarfile.open(tar) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def classes_of(path, split, **config):
    """The class's name of each image of a split, in order."""
    source = open_source(DataConfig(source=str(path), labels=True, **config), split, 32)
    return [source.classes[source.label(i)] for i in range(len(source))]


def test_cls_beside_each_image_and_classes_in_the_manifest(images, tmp_path):
    out = tmp_path / "out"
    manifest = here(images, out, held_out=4)
    assert manifest["classes"] == ["cat", "dog", "newt"]
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert [shard["count"] for shard in manifest["splits"]["train"]["shards"]] == [6, 6, 4]
    # numbers 4, 9, 14 and 19 are held out: each class has its share
    held_out = members(out / "val-00000.tar")
    assert {name: data for name, data in held_out.items() if name.endswith("cls")} == {
        "00000004.cls": b"0", "00000009.cls": b"0", "00000014.cls": b"1", "00000019.cls": b"2",
    }  # fmt: skip
    assert sorted(members(out / "train-00000.tar")) == sorted(
        f"{n:08d}.{kind}" for n in (0, 1, 2, 3, 5, 6) for kind in ("cls", "png")
    )


def test_prepared_or_read_directly_split_and_labels_are_the_same(images, tmp_path):
    here(images, tmp_path / "out", held_out=4)
    for split in ("train", "val"):
        streams = [
            list(evaluation_batches(open_source(config, split, 32), 32, 50))
            for config in (
                DataConfig(source=str(images), labels=True, held_out=4),
                DataConfig(source=str(tmp_path / "out"), labels=True),
                DataConfig(source=str(tmp_path / "out"), labels=True, held_out=4),
            )
        ]
        for (direct,), (prepared,) in ((streams[0], other) for other in streams[1:]):
            assert direct.labels.equal(prepared.labels)
            assert direct.images.equal(prepared.images)
    assert classes_of(tmp_path / "out", "val") == ["cat", "cat", "dog", "newt"]
    # without labels the split of the prepared images is the same, too
    plain = DataConfig(source=str(tmp_path / "out"))
    (batch,) = evaluation_batches(open_source(plain, "val", 32), 32, 50)
    assert batch.images.equal(streams[1][0].images) and batch.labels.tolist() == [-1] * 4


def test_the_manifests_split_can_be_overruled(images, tmp_path):
    here(images, tmp_path / "out", held_out=4)
    assert len(classes_of(tmp_path / "out", "all")) == 20
    assert set(classes_of(tmp_path / "out", "val", held_out=5)) == set(SIZES)
    assert len(classes_of(tmp_path / "out", "train", held_out=0)) == 20


def test_nothing_held_out(images, tmp_path):
    here(images, tmp_path / "out", held_out=0)
    config = DataConfig(source=str(tmp_path / "out"), labels=True)
    assert not holds_out(config)
    assert len(open_source(config, "train", 32)) == 20


@pytest.mark.parametrize("workers", [0, 2])
def test_again_after_a_loss_and_in_processes_the_bytes_are_the_same(images, tmp_path, workers):
    out = tmp_path / "out"
    here(images, out, held_out=3)
    before = contents(out)
    kept = (out / "train-00000.tar").stat().st_mtime_ns
    (out / "train-00001.tar").unlink()
    (out / "manifest.json").unlink()
    here(images, out, held_out=3, workers=workers)
    assert contents(out) == before
    assert (out / "train-00000.tar").stat().st_mtime_ns == kept  # not made again


def test_labels_pass_from_shards_to_shards_and_from_a_zip(images, tmp_path):
    here(images, tmp_path / "a", held_out=0)
    here(tmp_path / "a", tmp_path / "b", held_out=0)
    files = {f"top/{p.relative_to(images)}": p.read_bytes() for p in images.rglob("*.png")}
    here(zip_file(tmp_path / "images.zip", files), tmp_path / "c", held_out=0)
    first, *others = ({n: d for n, d in contents(tmp_path / x).items() if n.endswith("tar")}
                      for x in "abc")  # fmt: skip
    assert others == [first, first]
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["classes"] == list(SIZES)


def test_a_corrupt_image_takes_its_label_along(tmp_path, caplog):
    names = [f"{name}/{n:03d}.png" for name in "ab" for n in range(60)]
    folder = class_folder(tmp_path / "a", dict.fromkeys(names, noise(0)))
    (folder / "a/059.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "ldm"):
        here(folder, tmp_path / "out", held_out=0)
    assert classes_of(tmp_path / "out", "all") == ["a"] * 59 + ["b"] * 60


def test_with_and_without_labels_are_other_settings(images, tmp_path):
    here(images, tmp_path / "with", held_out=1)
    here(images, tmp_path / "without", held_out=1, labels=False)
    before = contents(tmp_path / "with"), contents(tmp_path / "without")
    for name, labels in (("with", False), ("without", True)):
        with pytest.raises(LdmError, match=r"other settings \(the class labels\): choose another"):
            here(images, tmp_path / name, held_out=1, labels=labels)
    assert (contents(tmp_path / "with"), contents(tmp_path / "without")) == before


def test_other_classes_of_the_same_images_are_other_settings(tmp_path):
    folder = png_folder(tmp_path / "a", [noise(n) for n in range(4)])
    here(folder, tmp_path / "shards", held_out=0, labels=False)
    for text in (b"0", b"1"):
        with tarfile.open(tmp_path / "shards" / "train-00000.tar", "a") as tar:
            for n in range(4):
                (tmp_path / "cls").write_bytes(text)
                tar.add(tmp_path / "cls", f"{n:08d}.cls")
        if text == b"0":
            here(tmp_path / "shards", tmp_path / "out", held_out=0)
    with pytest.raises(LdmError, match=r"other settings \(the class labels\)"):
        here(tmp_path / "shards", tmp_path / "out", held_out=0)


def test_without_labels_nothing_speaks_of_them(images, tmp_path):
    manifest = here(images, tmp_path / "out", held_out=4, labels=False)
    assert "classes" not in manifest
    report = json.loads((tmp_path / "out" / "val-00000.tar.json").read_text())
    assert not [key for key in report["settings"] if "label" in key]
    assert list(members(tmp_path / "out" / "val-00000.tar")) == [
        f"{n:08d}.png" for n in range(16, 20)
    ]
    with pytest.raises(
        UsageError, match=r"train-00000\.tar/00000000\.png has no \.cls or \.json member"
    ):
        classes_of(tmp_path / "out", "all")


def test_a_source_without_classes_is_one_clear_line_and_nothing_is_written(tmp_path):
    folder = png_folder(tmp_path / "a", [noise(0)] * 3)
    with pytest.raises(UsageError, match=r"^.*/a/0000\.png has no class: .*omit labels$"):
        here(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
