"""Samples as a data source: the images that count, and the folders that are refused."""

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.prepare import prepare
from ldm.errors import LdmError
from pipelines.sampling.sample_folder import SampleFolder, SampleStore, image_name, newest_samples
from tests.pipelines.measuring.fid_sides import write_folder


def write(path, size=16, level=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size if isinstance(size, tuple) else (size, size)
    Image.fromarray(np.full((height, width, 3), level, np.uint8)).save(path)


@pytest.fixture
def sampled(tmp_path):
    """Output of `ldm sample --n 3`: three images in two folders, a manifest, and a sheet."""
    folder = tmp_path / "samples [1]"
    for i in (0, 999, 1000):
        write(folder / image_name(i), level=i % 256)
    write(folder / "grid.png", size=40)
    (folder / "samples.json").write_text(json.dumps({"n": 3, "seed": 7}))
    return folder


def refused(path, limit=None) -> str:
    with pytest.raises(LdmError) as error:
        SampleFolder(path, limit)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_only_numbered_images_count(sampled):
    folder = SampleFolder(sampled)
    assert len(folder) == 3
    assert folder.resolution == 16
    assert folder.made_with == {"n": 3, "seed": 7}
    assert [int(folder.load(i)[0, 0, 0]) for i in range(3)] == [0, 999 % 256, 1000 % 256]
    assert folder.name(2) == f"{sampled}/00001/img00001000.png"


def test_any_folder_of_pngs_without_our_sheets(tmp_path):
    for name in ("b.png", "deep/er/a.PNG", "grid.png", "neighbours.png"):
        write(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    folder = SampleFolder(tmp_path)
    assert [folder.name(i).removeprefix(f"{tmp_path}/") for i in range(len(folder))] == [
        "b.png",
        "deep/er/a.PNG",
    ], "sheets that our commands write are no samples"
    assert folder.made_with is None


def test_limit_keeps_the_first_images(sampled):
    assert len(SampleFolder(sampled, limit=2)) == 2
    assert len(SampleFolder(sampled, limit=99)) == 3


def test_newest_samples_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LdmError, match="no samples under runs/: give their folder, or run"):
        newest_samples()
    for age, name in enumerate(["c", "a", "b"]):
        mark = tmp_path / "runs" / name / "samples" / "seed0" / "samples.json"
        mark.parent.mkdir(parents=True)
        mark.write_text("{}")
        os.utime(mark, (1000 - age, 1000 - age))
    assert newest_samples().parent.parent.name == "c"


# ---------------------------------------------------------------------------------- errors
def test_missing_folder_is_refused(tmp_path):
    assert refused(tmp_path / "x") == (
        f"no folder of samples at {tmp_path / 'x'}: make one with `ldm sample`"
    )


def test_fewer_than_two_images_are_refused(tmp_path, sampled):
    write(tmp_path / "one" / "a.png")
    for text in (refused(tmp_path / "one"), refused(sampled, limit=1)):
        assert "holds 1 PNG image(s), at least 2 are needed" in text


def test_unfinished_sampling_is_refused(sampled):
    (sampled / "samples.json").write_text(json.dumps({"n": 50}))
    assert "holds 3 of its 50 samples: run the same `ldm sample` again" in refused(sampled)
    assert len(SampleFolder(sampled, limit=3)) == 3
    assert "holds 3 of its 50 samples" in refused(sampled, limit=4)


@pytest.mark.parametrize(
    "text",
    ["{", "[1, 2]", '{"n": null}', '{"n": "3"}', '{"model": "x"}', '{"data": 1}', '{"files": 2}'],
)
def test_damaged_manifest_is_refused(sampled, text):
    (sampled / "samples.json").write_text(text)
    assert "samples.json is damaged" in refused(sampled)


def test_compressed_images_are_refused(tmp_path):
    for name in ("a.png", "b.png", "deep/c.JPEG"):
        write(tmp_path / name)
    text = refused(tmp_path)
    assert "holds compressed images (deep/c.JPEG)" in text
    assert text.endswith("write samples as PNG")


def test_nested_sample_folders_are_refused(sampled):
    text = refused(sampled.parent)
    assert text.endswith(f"holds folders of samples, give one of them: {sampled}")


def test_images_that_are_not_square_have_a_height_and_a_width(tmp_path):
    for name in ("a.png", "b.png"):
        write(tmp_path / name, size=(20, 10))
    folder = SampleFolder(tmp_path)
    assert folder.resolution == (10, 20)
    assert next(folder.batches(2)).images.shape == (2, 3, 10, 20)
    write(tmp_path / "b.png", size=(10, 20))
    with pytest.raises(LdmError, match=r"b.png is 20×10 \(height×width\) but .*a.png is 10×20 "):
        folder.load(1)


def test_images_of_several_sizes_are_refused(tmp_path):
    write(tmp_path / "a.png", size=16)
    write(tmp_path / "b.png", size=24)
    folder = SampleFolder(tmp_path)
    with pytest.raises(LdmError, match=r"b.png is 24×24 but .*a.png is 16×16: samples must all"):
        folder.load(1)


def test_damaged_image_is_named(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    folder = SampleFolder(tmp_path)
    with pytest.raises(LdmError, match=r"b.png is damaged \(.*\): delete .*b.png and"):
        folder.load(1)
    (tmp_path / "a.png").write_bytes(b"")
    assert "a.png is damaged" in refused(tmp_path)


@pytest.fixture(params=["zip", "shards"])
def packed(request, tmp_path):
    """Three samples in another form, and a sheet beside them."""
    store = SampleStore(tmp_path, request.param)
    for i in range(3):
        store.write(i, Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 9, 3), "u1")))
    store.finish(9, "samples of a test", ())
    write(tmp_path / "grid.png", size=40)
    (tmp_path / "samples.json").write_text(json.dumps({"n": 3, "files": request.param}))
    return tmp_path


def test_packed_samples_are_read(packed):
    folder = SampleFolder(packed)
    assert len(folder) == 3 and folder.resolution == 9
    assert len(SampleFolder(packed, limit=2)) == 2
    assert np.array_equal(
        folder.load(2), np.random.default_rng(2).integers(0, 256, (9, 9, 3), "u1")
    )
    copy = pickle.loads(pickle.dumps(folder))  # as loader processes get it
    assert np.array_equal(copy.load(1), folder.load(1))


def test_unfinished_packed_samples_are_refused(packed):
    manifest = json.loads((packed / "samples.json").read_text())
    (packed / "samples.json").write_text(json.dumps(manifest | {"n": 4}))
    assert "holds 3 of its 4 samples" in refused(packed)
    for path in (*packed.glob("*.zip"), *packed.glob("*.tar")):
        path.unlink()
    assert "holds 0 of its 4 samples" in refused(packed)


def test_damaged_packed_samples_are_refused(packed):
    path = next(iter([*packed.glob("*.zip"), *packed.glob("*.tar")]))
    data = bytearray(path.read_bytes())
    where = data.index(b"\x89PNG")
    data[where : where + 40] = bytes(40)
    path.write_bytes(data)
    assert "is damaged (" in refused(packed)
    assert refused(packed).endswith(f"delete {path} and sample again")
    path.write_bytes(data[:600])
    assert "is truncated" in refused(packed)


def test_least_lowers_the_required_count(sampled):
    assert len(SampleFolder(sampled, limit=1, least=1)) == 1
    for path in sampled.glob("*/*.png"):
        path.unlink()
    (sampled / "samples.json").write_text("{}")
    with pytest.raises(LdmError, match="holds 0 PNG image"):
        SampleFolder(sampled, least=1)


# ------------------------------------------------------------------- archives of other tools
LEVELS = [np.random.default_rng(i).integers(0, 256, (9, 9, 3), "u1") for i in range(4)]


def zip_of(path, names=("b.png", "deep/a.png", "c.png")):
    with zipfile.ZipFile(path, "w") as archive:
        for name, image in zip(names, LEVELS, strict=False):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG" if name.endswith("jpg") else "PNG")
            archive.writestr(name, file.getvalue())
        archive.writestr("readme.txt", "no image")
    return path


def test_zip_of_another_tool_is_read(tmp_path):
    folder = SampleFolder(zip_of(tmp_path / "x.zip"), archives=True)
    assert len(folder) == 3 and folder.made_with is None and folder.resolution == 9
    order = [0, 2, 1]  # of their names
    assert all(np.array_equal(folder.load(i), LEVELS[order[i]]) for i in range(3))
    assert folder.result_path == tmp_path / "x.zip.fid.json"
    assert folder.name(2) == f"{tmp_path}/x.zip/deep/a.png"


def test_shards_of_another_tool_are_read(tmp_path):
    write_folder(tmp_path / "images", np.stack(LEVELS))
    prepare(tmp_path / "images", tmp_path / "shards", 9, held_out=1, shard_size=2, workers=0)
    folder = SampleFolder(tmp_path / "shards")
    assert len(folder) == 4 and np.array_equal(folder.load(3), LEVELS[3])
    assert folder.result_path == tmp_path / "shards" / "fid.json"
    some = SampleFolder(tmp_path / "shards" / "train-0000{0,1}.tar", archives=True)
    assert len(some) == 3 and np.array_equal(some.load(2), LEVELS[2])
    one = SampleFolder(tmp_path / "shards" / "train-00000.tar", archives=True)
    assert len(one) == 2 and one.result_path.name == "train-00000.tar.fid.json"


def test_samples_zip_stands_for_its_folder(tmp_path):
    file = zip_of(tmp_path / "samples.zip")
    assert SampleFolder(file, archives=True).path == file
    (tmp_path / "samples.json").write_text(json.dumps({"n": 3, "files": "zip"}))
    folder = SampleFolder(file, archives=True)
    assert folder.path == tmp_path and folder.made_with["n"] == 3


def test_archives_need_to_be_allowed(tmp_path):
    for name in ("x.zip", "gone.zip", "gone.tar"):
        zip_of(tmp_path / "x.zip")
        with pytest.raises(LdmError, match="no folder of samples at"):
            SampleFolder(tmp_path / name, archives=name.startswith("gone"))


@pytest.mark.parametrize("name", ["b.jpg", "b.JPEG", "b.webp", "b.avif", "b.gif"])
def test_archives_with_compressed_images_are_refused(name, tmp_path):
    with pytest.raises(LdmError, match=rf"x.zip holds compressed images \({name}\)"):
        SampleFolder(zip_of(tmp_path / "x.zip", ["a.png", name]), archives=True)


def test_damaged_or_empty_archives_are_refused(tmp_path):
    (tmp_path / "x.zip").write_bytes(zip_of(tmp_path / "y.zip").read_bytes()[:200])
    (tmp_path / "x.tar").write_bytes(b"no tar at all" * 100)
    zip_of(tmp_path / "empty.zip", [])
    for name, told in (("x.zip", "is truncated"), ("x.tar", "is truncated or corrupt"),
                       ("empty.zip", "holds no images")):  # fmt: skip
        with pytest.raises(LdmError, match=told):
            SampleFolder(tmp_path / name, archives=True)
    with pytest.raises(LdmError, match=r"holds 1 PNG image"):
        SampleFolder(zip_of(tmp_path / "one.zip", ["a.png"]), archives=True)


def test_batches_hold_every_image_once(sampled):
    folder = SampleFolder(sampled)
    shares = [list(folder.batches(2, rank, 2)) for rank in (0, 1)]
    ks = [k for share in shares for batch in share for k in batch.k.tolist()]
    assert sorted(ks) == [0, 1, 2]
    (batch,) = folder.batches(5)
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (3, 3, 16, 16)
    assert batch.images[:, 0, 0, 0].tolist() == [0, 999 % 256, 1000 % 256]
