"""Tables of the Hugging Face Hub's layout, made here, as sources of images."""

import json
import pickle
import shutil

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from ldm.data import DataConfig, open_source
from ldm.data.dataset import (
    content_identity,
    find_kind,
    holds_out,
    open_images,
)
from ldm.data.hf import is_hub
from ldm.data.loader import batches
from ldm.data.prepare import prepare
from ldm.data.transforms import CorruptImage
from ldm.errors import LdmError, UsageError
from tests.ldm.data.pictures import coordinates, encode, labels_of, noise, png_folder
from tests.ldm.data.test_labels import in_tar

IMAGE = Features({"image": Image()})
LABELLED = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """A cache of its own, and no Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def cells(first: int, count: int) -> list[dict]:
    """Images with their numbers as pixels, as `datasets` keeps them."""
    return [
        {"bytes": encode(coordinates(n)), "path": f"{n}.png"} for n in range(first, first + count)
    ]


def rows(first: int, count: int, labels: bool = True) -> Dataset:
    columns = {"image": cells(first, count)}
    if labels:
        columns["label"] = [n % 2 for n in range(count)]
    return Dataset.from_dict(columns, features=LABELLED if labels else IMAGE)


@pytest.fixture
def repository(tmp_path):
    """A folder as a repository of the Hub: two files of 4 and 6 images to train on, one of 3."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    for name, part in (
        ("train-00000-of-00002", rows(0, 4)),
        ("train-00001-of-00002", rows(4, 6)),
        ("validation-00000-of-00001", rows(10, 3)),
    ):
        part.to_parquet(folder / "data" / f"{name}.parquet")
    return folder


@pytest.fixture
def hub(repository, monkeypatch):
    """The repository as owner/name on the Hub; the words that it was asked by."""
    asked, load = [], datasets.load_dataset

    def fetch(name, config=None, revision=None):
        asked.append((name, config, revision))
        if name != "owner/name":
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub\nmore")
        return load(str(repository))

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    return asked


def test_images_are_read_in_order_validation_last(repository):
    source = open_images(repository)
    assert len(source) == 13 and source.held_out == 3
    for index in (0, 3, 4, 9, 10, 12):
        np.testing.assert_array_equal(source.load(index), coordinates(index))
    assert source.name(4) == f"{repository}/train/4.png"
    assert source.name(12) == f"{repository}/validation/2.png"


def test_the_hubs_own_split_is_held_out(repository):
    train, val = (open_source(DataConfig(source=str(repository)), s, 16) for s in ("train", "val"))
    assert (len(train), len(val)) == (10, 3) and val.load(0)[0, 0, 0] == 10
    # as many as are asked for, still the last
    config = DataConfig(source=str(repository), held_out=5, labels=False)
    assert len(open_source(config, "val", 16)) == 5


@pytest.mark.parametrize(
    ("word", "asked", "count"),
    [
        ("hf:owner/name", ("owner/name", None, None), 13),
        ("hf:owner/name:train", ("owner/name", None, None), 10),
        ("hf:owner/name:validation", ("owner/name", None, None), 3),
        ("hf:owner/name@v1.0:train", ("owner/name", None, "v1.0"), 10),
        ("hf:owner/name@refs/convert/parquet", ("owner/name", None, "refs/convert/parquet"), 13),
        ("hf:owner/name:small/train", ("owner/name", "small", None), 10),
    ],
)
def test_the_hub_is_asked_by_name_revision_and_split(hub, word, asked, count):
    config = DataConfig(source=word, held_out=1)
    assert len(open_source(config, "all", 16)) == count
    assert hub == [asked] and open_images(word).name(0).startswith(f"{word}/")


def test_what_is_a_name_of_the_hub():
    assert is_hub("hf:owner/name") and is_hub("hf:mnist")
    assert not is_hub("hf://datasets/owner/name/a.tar") and not is_hub("/data/hf:x")
    assert holds_out(DataConfig(source="hf:owner/name"))
    assert not holds_out(DataConfig(source="hf:owner/name", held_out=0))


def test_a_split_alone_holds_out_by_number(hub):
    source = DataConfig(source="hf:owner/name:train")
    assert len(open_source(source, "val", 16)) == 1  # one in twenty, at least one


def test_labels_have_the_names_of_the_feature(repository):
    source = open_images(repository, labels=True)
    assert source.classes == ("cat", "dog")
    assert labels_of(source) == [n % 2 for n in (*range(4), *range(6), *range(3))]
    held_out = open_source(DataConfig(source=str(repository), labels=True), "val", 16)
    assert len(held_out) == 3 and held_out.load(0)[0, 0, 0] == 10, "the Hub's own, not every n-th"


@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        ([2, 0, 2], ("0", "1", "2"), [2, 0, 2]),
    ],
)
def test_labels_without_a_feature(tmp_path, values, classes, labels):
    table = rows(0, 3, labels=False).add_column("class", values)
    table.save_to_disk(tmp_path / "saved")
    source = open_images(tmp_path / "saved", labels=True)
    assert source.classes == classes and labels_of(source) == labels


def test_save_to_disk_of_one_and_of_several_splits(tmp_path):
    rows(0, 3).save_to_disk(tmp_path / "one")
    DatasetDict(train=rows(0, 3), test=rows(3, 2)).save_to_disk(tmp_path / "two")
    one, two = open_images(tmp_path / "one"), open_images(tmp_path / "two")
    assert (len(one), one.held_out) == (3, None) and (len(two), two.held_out) == (5, 2)
    np.testing.assert_array_equal(two.load(4), coordinates(4))


@pytest.mark.parametrize("kind", ["bytes", "paths", "struct"])
def test_images_as_bytes_paths_or_structs(tmp_path, kind):
    png_folder(tmp_path / "table" / "pictures", [coordinates(n) for n in range(3)])
    columns = {
        "bytes": [encode(coordinates(n)) for n in range(3)],
        "paths": [f"pictures/{n:04d}.png" for n in range(3)],
        "struct": cells(0, 3),
    }
    for number in range(4):  # more tables than images
        table = pyarrow.table({"picture": [columns[kind][number % 3]], "n": [number]})
        pyarrow.parquet.write_table(table, tmp_path / "table" / f"{number}.parquet")
    source = open_images(tmp_path / "table")
    for index in range(3):
        np.testing.assert_array_equal(source.load(index), coordinates(index))


def test_corrupt_and_missing_images_are_named(tmp_path):
    bad = [None, {"bytes": b"damage", "path": "x.png"}, {"bytes": None, "path": "/nowhere/1.png"},
           {"bytes": None, "path": None}]  # fmt: skip
    (tmp_path / "table").mkdir()
    table = pyarrow.table({"image": [*cells(0, 200), *bad]})
    pyarrow.parquet.write_table(table, tmp_path / "table" / "a.parquet")
    source = open_images(tmp_path / "table")
    for index, told in (
        (200, "no image in this row"),
        (201, "not an image"),
        (202, "/nowhere/1.png lies outside of the data set"),
        (203, "no image in this row"),
    ):
        with pytest.raises(CorruptImage, match=told):
            source.load(index)


def test_nothing_is_decoded_but_what_is_asked_for(repository, monkeypatch):
    from PIL import Image as Pillow

    opened, real = [], Pillow.open
    monkeypatch.setattr(Pillow, "open", lambda *a, **k: opened.append(1) or real(*a, **k))
    source = open_images(repository, labels=True)
    assert not opened
    source.load(5)
    assert len(opened) == 1


def test_it_travels_to_workers_by_reference(repository):
    source = open_images(repository, labels=True)
    content_identity(source, 13)  # which remembers files
    pickled = pickle.dumps(source)
    assert len(pickled) < 20_000
    np.testing.assert_array_equal(pickle.loads(pickled).load(11), coordinates(11))


@pytest.mark.slow
def test_workers_read_the_same_images(repository):
    source = open_images(repository)
    alone, helped = (
        next(batches(source, DataConfig(workers=workers), 16, 0, 0, 8, 8)).images
        for workers in (0, 2)
    )
    assert alone.equal(helped)


def test_identities_follow_the_content(repository, tmp_path):
    source = open_images(repository)
    before = content_identity(source, 13)
    again = open_images(repository)
    assert content_identity(again, 13) == before
    rows(50, 6).to_parquet(repository / "data" / "train-00001-of-00002.parquet")
    other = open_images(repository)
    assert content_identity(other, 13) != before


def test_prepare_makes_shards_of_it(repository, tmp_path):
    manifest = prepare(repository, tmp_path / "shards", 32, workers=0, labels=True)
    assert [manifest["splits"][split]["count"] for split in ("train", "val")] == [10, 3]
    assert manifest["classes"] == ["cat", "dog"]
    config = DataConfig(source=str(tmp_path / "shards"), labels=True)
    val = open_source(config, "val", 32)
    assert [val.label(i) for i in range(3)] == [0, 1, 0]


def test_prepare_takes_names_of_the_hub(hub, tmp_path):
    manifest = prepare("hf:owner/name:train", tmp_path / "shards", 32, held_out=2, workers=0)
    assert manifest["source"] == "hf:owner/name:train" and manifest["count"] == 10
    again = json.loads((tmp_path / "shards" / "manifest.json").read_text("utf-8"))
    assert again == manifest


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (
            "hf:owner/nam",
            "hf:owner/nam could not be opened .Couldn't reach 'owner/nam' on the Hub.",
        ),
        ("hf:owner/name:trian", "has no split 'trian'; did you mean 'train'"),
        ("hf:a/b/c", "must have the form hf:OWNER/NAME"),
        ("hf:", "must have the form hf:OWNER/NAME"),
    ],
)
def test_what_cannot_be_opened(hub, word, told):
    with pytest.raises(LdmError, match=told) as caught:
        open_images(word)
    assert "\n" not in str(caught.value)


def test_columns_that_are_not_clear_are_asked_for(tmp_path):
    table = rows(0, 3).add_column("other", cells(3, 3)).cast_column("other", Image())
    table = table.rename_column("image", "face").add_column("text", ["a", "b", "c"])
    table.save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    with pytest.raises(
        UsageError, match=r"several columns .* data\.image_column to one of face, o"
    ):
        open_images(path)
    source = open_source(DataConfig(source=path, image_column="other", held_out=1), "all", 16)
    np.testing.assert_array_equal(source.load(0), coordinates(3))
    with pytest.raises(UsageError, match="no column 'fce'; did you mean 'face'"):
        open_images(path, image_column="fce")
    with pytest.raises(UsageError, match="column 'other' does not hold classes"):
        open_images(path, labels=True, image_column="face", label_column="other")
    with pytest.raises(UsageError, match=r"no table: omit data\.image_column"):
        open_images(png_folder(tmp_path / "p", [noise(0)]), image_column="image")


def test_a_table_without_images_or_classes(tmp_path):
    Dataset.from_dict({"text": ["a"], "n": [1]}).save_to_disk(tmp_path / "text")
    with pytest.raises(UsageError, match=r"no column that may hold the images: set .* text, n"):
        open_images(tmp_path / "text")
    rows(0, 3, labels=False).save_to_disk(tmp_path / "plain")
    with pytest.raises(UsageError, match="no column that may hold the labels"):
        open_images(tmp_path / "plain", labels=True)
    unlabelled = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_dict({"image": cells(0, 2), "label": [0, -1]}, features=unlabelled).save_to_disk(
        tmp_path / "test"
    )
    with pytest.raises(UsageError, match=r"test/train/1.png has class -1"):
        open_images(tmp_path / "test", labels=True)


# ------------------------------------------------------------------- tables beside other files
def test_a_table_beside_images_or_shards_is_left_out(tmp_path, caplog):
    """As img2dataset writes one for each tar, and captions come beside images."""
    captions = pyarrow.table({"url": ["a.jpg", "b.jpg"], "caption": ["x", "y"]})
    folder = png_folder(tmp_path / "images", [noise(n) for n in range(3)])
    pyarrow.parquet.write_table(captions, folder / "captions.parquet")
    assert find_kind(folder) == "images" and len(open_images(folder)) == 3
    assert "read as images; its tables (captions.parquet) are left out" in caplog.text
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(2):
        in_tar(shards / f"{number:05d}", {f"{number}.png": encode(noise(number))})
        pyarrow.parquet.write_table(captions, shards / f"{number:05d}.parquet")
    assert find_kind(shards) == "shards" and len(open_images(shards)) == 2


def test_files_outside_of_a_table_are_not_read(tmp_path):
    secret = png_folder(tmp_path / "secret", [noise(0)]) / "0000.png"
    (tmp_path / "table").mkdir()
    table = pyarrow.table({"image": [str(secret), "../secret/0000.png"]})
    pyarrow.parquet.write_table(table, tmp_path / "table" / "a.parquet")
    source = open_images(tmp_path / "table")
    for index in range(2):
        with pytest.raises(CorruptImage, match="lies outside of the data set"):
            source.load(index)


def test_a_folder_of_the_hubs_name_is_not_taken_for_it(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(UsageError, match="there is a folder owner/name here, too"):
        open_images("hf:owner/name")
    assert not hub


@pytest.mark.parametrize("values", [[0, None, 1], ["a", None, "b"]])
def test_rows_without_a_class_are_named(tmp_path, values):
    (tmp_path / "table").mkdir()
    table = pyarrow.table({"image": cells(0, 3), "label": values})
    pyarrow.parquet.write_table(table, tmp_path / "table" / "a.parquet")
    with pytest.raises(UsageError, match=r"table/train/1\.png has no class: omit labels"):
        open_images(tmp_path / "table", labels=True)


def test_splits_of_other_classes_are_refused(tmp_path):
    swapped = Features({"image": Image(), "label": ClassLabel(names=["dog", "cat"])})
    test = Dataset.from_dict({"image": cells(3, 2), "label": [0, 1]}, features=swapped)
    DatasetDict(train=rows(0, 3), test=test).save_to_disk(tmp_path / "a")
    DatasetDict(train=rows(0, 3), test=rows(3, 2, labels=False)).save_to_disk(tmp_path / "b")
    for name in "ab":
        with pytest.raises(UsageError, match="'label' of split 'test' is of another kind"):
            open_images(tmp_path / name, labels=True)
        assert len(open_images(tmp_path / name)) == 5


def test_a_copy_has_the_same_content(repository, tmp_path):
    before = content_identity(open_images(repository), 13)
    copy = shutil.copytree(repository, tmp_path / "copy" / "repository")
    assert content_identity(open_images(copy), 13) == before


def test_compression_is_seen_in_tables(tmp_path):
    from pipelines.fid import find_compressed

    (tmp_path / "table").mkdir()
    jpegs = [{"bytes": encode(noise(n, 32, 32), "JPEG"), "path": None} for n in range(3)]
    pyarrow.parquet.write_table(pyarrow.table({"image": jpegs}), tmp_path / "table" / "a.parquet")
    source = open_images(tmp_path / "table")
    assert find_compressed(source, 32) == source.name(0) and source.name(0).endswith("/0.jpg")


def test_columns_of_a_table_can_be_prepared(tmp_path):
    table = rows(0, 3).add_column("other", cells(3, 3)).cast_column("other", Image())
    table.rename_column("image", "face").save_to_disk(tmp_path / "saved")
    manifest = prepare(
        tmp_path / "saved", tmp_path / "out", 32, held_out=1, workers=0, labels=True,
        image_column="other", label_column="label",
    )  # fmt: skip
    assert manifest["count"] == 3 and manifest["classes"] == ["cat", "dog"]
