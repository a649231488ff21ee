"""Classes of images: from folders, splits of folders, `dataset.json`, CSV files and shards."""

import json
import logging
import os
import tarfile
from io import BytesIO

import numpy as np
import pytest

from ldm.data import DataConfig, open_source, sources
from ldm.data.dataset import open_images
from ldm.data.labels import folder_labels, match_labels, numbered_labels, read_label_file
from ldm.data.prepare import prepare
from ldm.errors import LdmError, UsageError
from tests.ldm.data.pictures import coordinates, encode, labels_of, zip_file

PNG = encode(coordinates(0))
EDM = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00001000.png"]


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    """Notes are told again in every test."""
    monkeypatch.setattr(sources, "_told", set())


def in_folder(path, files: dict[str, bytes]):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def in_zip(path, files):
    return zip_file(path.with_suffix(".zip"), files)


def in_tar(path, files):
    with tarfile.open(path.with_suffix(".tar"), "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
    return path.with_suffix(".tar")


# ---------------------------------------------------------------------------------- folders
def classified(*names):
    classes, labels = folder_labels(names, "data")
    return classes, labels.tolist()


def test_the_first_folder_is_the_class_in_the_order_of_names():
    assert classified("dog/1.png", "Dog/1.png", "cat/1.png", "cat/a/2.png", "b/cat/1.png") == (
        ("Dog", "b", "cat", "dog"),
        [3, 0, 2, 2, 1],
    )


def test_folders_that_hold_every_image_are_no_classes():
    assert classified("x/cat/1.png", "x/dog/a/2.png") == (("cat", "dog"), [0, 1])
    assert classified("x/y/cat/1.png", "x/y/dog/1.png") == (("cat", "dog"), [0, 1])
    # x and xy begin alike, and are two folders all the same
    assert classified("xy/cat/1.png", "x/cat/1.png") == (("x", "xy"), [1, 0])


@pytest.mark.parametrize(
    "names",
    [
        ["1.png", "2.png"],
        ["cat/1.png", "dog/1.png", "2.png"],
        ["x/cat/1.png", "x/2.png", "x/dog/1.png"],
        ["cat/2.png", "cat/3.png"],
    ],
)
def test_an_image_outside_every_class_is_named(names):
    with pytest.raises(UsageError) as error:
        folder_labels(names, "data")
    stray = next(name for name in names if not name.endswith("/1.png") or len(names) == 2)
    assert str(error.value) == (
        f"data/{stray} has no class: with labels, every image must be in one of two or more "
        "folders named after the classes; move it into one, or omit labels"
    )


def test_folders_by_number_are_no_classes():
    numbered = ["00000/img00000999.png", "00001/img00001000.png"]
    with pytest.raises(UsageError, match=r"^data has numbered folders \(00000/img0.*not classes"):
        folder_labels(numbered, "data")
    with pytest.raises(UsageError, match="numbered folders"):
        folder_labels([f"ffhq/{name}" for name in numbered], "data")
    assert folder_labels(["00000/cat.png", *numbered], "data")[0] == ("00000", "00001")


def test_names_that_are_no_utf8_can_be_written():
    assert classified(os.fsdecode(b"\xe9/1.png"), "z/1.png") == (("z", "\\xe9"), [1, 0])


# ------------------------------------------------------------------------- splits of folders
IMAGENET = [
    "train/n01/a.png", "train/n01/b.png", "train/n02/a.png", "train/n03/a.png",
    "val/n01/v.png", "val/n03/v.png",
]  # fmt: skip


@pytest.mark.parametrize("container", [in_folder, in_zip])
@pytest.mark.parametrize("val", ["val", "validation", "valid"])
def test_train_and_val_are_splits_not_classes(tmp_path, caplog, container, val):
    names = [name.replace("val/", f"{val}/") for name in IMAGENET]
    path = container(tmp_path / "imagenet", dict.fromkeys(names, PNG))
    with caplog.at_level(logging.WARNING):
        source = open_images(path, labels=True)
    assert source.classes == ("n01", "n02", "n03")
    assert labels_of(source) == [0, 0, 1, 2, 0, 2] and source.held_out == 2
    assert [source.name(i) for i in (0, 5)] == [f"{path}/{names[0]}", f"{path}/{names[5]}"]
    assert caplog.messages == [
        f"{path} has splits, not classes: 4 of train, 2 of val images; val is held out"
    ]
    config = DataConfig(source=str(path), labels=True)
    assert [len(open_source(config, split, 16)) for split in ("train", "val")] == [4, 2]
    assert len(caplog.messages) == 1, "once, however often it is opened"


def test_images_of_test_are_left_out_with_a_word(tmp_path, caplog):
    names = [*IMAGENET, "test/1.png", "test/2.png"]
    path = in_folder(tmp_path / "imagenet", dict.fromkeys(names, PNG))
    with caplog.at_level(logging.WARNING):
        source = open_images(path, labels=True)
    assert len(source) == 6 and "2 of test images" in caplog.text
    assert "those of test are left out" in caplog.text


def test_prepare_keeps_the_splits(tmp_path):
    path = in_folder(tmp_path / "imagenet", dict.fromkeys(IMAGENET, PNG))
    manifest = prepare(path, tmp_path / "out", 32, workers=0, labels=True)
    assert [manifest["splits"][split]["count"] for split in ("train", "val")] == [4, 2]
    val = open_source(DataConfig(source=str(tmp_path / "out"), labels=True), "val", 32)
    assert [val.classes[val.label(i)] for i in range(2)] == ["n01", "n03"]


@pytest.mark.parametrize(
    "names",
    [
        ["train/1.png", "bus/1.png"],  # vehicles
        ["train/1.png", "test/1.png"],
        ["train/1.png", "val/1.png", "1.png"],
        ["x/train/1.png", "x/val/1.png"],
    ],
)
def test_other_folders_are_classes_or_nothing(tmp_path, names):
    source = open_images(in_folder(tmp_path / "data", dict.fromkeys(names, PNG)))
    assert len(source) == len(names) and source.held_out is None


# ------------------------------------------------------------------------------- dataset.json
def described(labels) -> bytes:
    return json.dumps({"labels": labels}).encode()


@pytest.mark.parametrize("container", [in_folder, in_zip])
def test_labels_of_edms_dataset_tool(tmp_path, container):
    table = described([[EDM[2], 1], [EDM[0], 3], [EDM[1], 0]])
    path = container(tmp_path / "edm", dict.fromkeys(EDM, PNG) | {"dataset.json": table})
    source = open_images(path, labels=True)
    assert source.classes == ("0", "1", "2", "3") and labels_of(source) == [3, 0, 1]
    assert labels_of(open_images(path)) == [-1] * 3


@pytest.mark.parametrize("container", [in_folder, in_zip])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (described(None), "has numbered folders .* without a dataset.json"),
        (described([[EDM[0], 3]]), r"dataset.json gives no class for 2 images, such as 00000/i"),
        (described([[EDM[0], [0, 1]]]), r"not a dataset.json .*\[0, 1\] is not a class number"),
        (b"{", "dataset.json is not a dataset.json of EDM's dataset tool .not JSON"),
        (b"[]", "not a dataset.json of EDM"),
        (described([[n, -1] for n in EDM]), "00000/img00000000.png has class -1, not one from 0"),
        (described([[n, 10**7] for n in EDM]), "has class 10000000, not one from 0 to 999,999"),
    ],
)
def test_a_dataset_json_that_does_not_fit(tmp_path, container, content, told):
    path = container(tmp_path / "edm", dict.fromkeys(EDM, PNG) | {"dataset.json": content})
    with pytest.raises(LdmError, match=told) as caught:
        open_images(path, labels=True)
    assert "\n" not in str(caught.value)
    assert len(open_images(path)) == 3, "without labels nothing of it is read"


# ------------------------------------------------------------------------------------ CSV files
@pytest.mark.parametrize(
    ("text", "table"),
    [
        ("a.png,cat\nb.png,dog\n", {"a.png": "cat", "b.png": "dog"}),
        ("\ufefffile_name,size,label\r\na.png,3,cat\r\n", {"a.png": "cat"}),
        ("Label\tImage\n7\tx/a.png\n", {"x/a.png": "7"}),
        ('filename,class\n"a, b.png","wild ""cat"""\n', {"a, b.png": 'wild "cat"'}),
        ("a.png, cat\n\n", {"a.png": "cat"}),
        ("", {}),
    ],
)
def test_label_files_with_and_without_a_header(tmp_path, text, table):
    path = tmp_path / "labels.csv"
    path.write_text(text, "utf-8", newline="")
    if text:
        assert read_label_file(path) == table
    else:
        with pytest.raises(UsageError, match="has 0 columns"):
            read_label_file(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a,b,c\n", "has 3 columns and no header that names them: give one with file_name"),
        (b"image,label\na.png\n", "line 2: too few columns"),
        (b"\xff\xfe", "could not read .*labels.csv"),
        (b"a,\x00b\n", ""),
        (b"a," + b"b" * 200_000 + b"\n", "is no table of comma-separated values"),
    ],
)
def test_label_files_that_cannot_be_read(tmp_path, content, told):
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    if told:
        with pytest.raises(LdmError, match=told):
            read_label_file(path)
    else:
        assert read_label_file(path) == {"a": "\x00b"}
    with pytest.raises(LdmError, match="could not read"):
        read_label_file(tmp_path / "none.csv")


@pytest.mark.parametrize("container", [in_folder, in_zip, in_tar])
def test_labels_of_a_file_fit_every_container(tmp_path, container):
    path = container(tmp_path / "data", {"x/1.png": PNG, "x/2.png": PNG, "y/3.png": PNG})
    table = tmp_path / "labels.csv"
    table.write_text("image,label\n1.png,dog\n2.png,cat\n3.png,dog\nother.png,bird\n")
    config = DataConfig(source=str(path), labels=True, label_file=str(table), held_out=1)
    source = open_source(config, "all", 16)
    assert source.classes == ("cat", "dog") and labels_of(source) == [1, 0, 1]
    manifest = prepare(path, tmp_path / "out", 32, workers=0, held_out=1, label_file=table)
    assert manifest["classes"] == ["cat", "dog"]
    prepared = open_source(DataConfig(source=str(tmp_path / "out"), labels=True), "all", 32)
    # the middle one is held out, and stands last
    assert sorted(labels_of(prepared)) == [0, 1, 1]


def test_names_in_label_files_match_paths_then_files_then_stems(tmp_path):
    path = tmp_path / "labels.csv"
    names = ["x/1.png", "y/1.png"]
    assert match_labels(names, {"x/1.png": "a", "y/1.png": "b"}, path)[1].tolist() == [0, 1]
    with pytest.raises(UsageError, match=r"no class for 2 of 2 images, such as x/1.png and 1 more"):
        match_labels(names, {"1.png": "a"}, path)  # which of them?
    assert match_labels(["x/1.png", "y/2.png"], {"1": "b", "2": "a"}, path)[0] == ("a", "b")
    classes, labels = match_labels(["1.png", "2.png"], {"1.png": "7", "2.png": "2"}, path)
    assert len(classes) == 8 and labels.tolist() == [7, 2], "numbers stay what they are"


def test_a_label_file_needs_labels_and_no_table(tmp_path):
    with pytest.raises(
        UsageError, match=r"data\.label_file: classes are read with data\.labels=true"
    ):
        open_images(tmp_path, label_file="x.csv")
    with pytest.raises(
        UsageError, match=r"hf:a/b is a table: choose its column by data\.label_col"
    ):
        open_images("hf:a/b", labels=True, label_file="x.csv")


# ------------------------------------------------------------------------------------- shards
def test_classes_of_json_members(tmp_path):
    files = {"0.png": PNG, "0.json": b'{"label": 4}', "1.png": PNG, "1.json": b'{"class": 2}'}
    source = open_images(in_tar(tmp_path / "a", files), labels=True)
    assert labels_of(source) == [4, 2] and len(source.classes) == 5
    named = files | {"0.json": b'{"label": "cat"}', "1.json": b'{"caption": "x", "cls": "bat"}'}
    source = open_images(in_tar(tmp_path / "b", named), labels=True)
    assert source.classes == ("bat", "cat") and labels_of(source) == [1, 0]
    both = files | {"0.cls": b"1"}
    assert labels_of(open_images(in_tar(tmp_path / "c", both), labels=True)) == [1, 2]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"1.json": b'{"label": "cat"}'}, "has names and numbers as classes: use one"),
        ({"1.json": b'{"caption": "x"}'}, r"a.tar/1.png has no .cls or .json member"),
        ({"1.json": b"{"}, r"a.tar/1.json is damaged .not JSON"),
        ({"1.json": b'{"label": -3}'}, "1.png has class -3, not one from 0 to 999,999"),
    ],
)
def test_json_members_that_do_not_fit(tmp_path, change, told):
    files = {"0.png": PNG, "0.json": b'{"label": 4}', "1.png": PNG, "1.json": b'{"label": 2}'}
    path = in_tar(tmp_path / "a", files | change)
    with pytest.raises(LdmError, match=told):
        open_images(path, labels=True)
    assert len(open_images(path)) == 2


def test_numbers_stay_within_bounds():
    assert numbered_labels(np.array([0, 999_999]), str)[1].dtype == np.int32


def test_members_that_hold_classes_are_not_left_out(tmp_path, caplog):
    files = {"0.png": PNG, "0.json": b'{"label": 4}', "0.meta.json": b"{"}
    assert len(open_images(in_tar(tmp_path / "a", files), labels=True)) == 1
    assert "1 .json, such as 0.meta.json" in caplog.text
    damaged = {"0.png": PNG, "0.cls": b"3", "0.json": b"{"}
    assert labels_of(open_images(in_tar(tmp_path / "b", damaged), labels=True)) == [3]


def test_images_of_one_name_are_not_told_apart_by_a_label_file(tmp_path):
    for number in range(2):
        in_tar(tmp_path / f"{number}", {"0.png": PNG})
    table = tmp_path / "labels.csv"
    table.write_text("0.png,cat\n")
    with pytest.raises(UsageError, match=r"several images have one name, such as 0\.png"):
        open_images(tmp_path, labels=True, label_file=str(table))
    table.write_text("0.png,cat\n0.png,dog\n")
    with pytest.raises(LdmError, match=r"gives 0\.png two classes, cat and dog"):
        read_label_file(table)


def test_fewer_than_the_official_held_out_images_are_not_trained_on(tmp_path):
    path = in_folder(tmp_path / "imagenet", dict.fromkeys(IMAGENET, PNG))
    config = DataConfig(source=str(path), labels=True, held_out=1)
    train, val = (open_source(config, split, 16) for split in ("train", "val"))
    assert (len(train), len(val)) == (4, 1) and "/val/n03" in val.name(0)
    assert all("/train/" in train.name(i) for i in range(4))


@pytest.mark.parametrize("key", ["label_file", "image_column", "label_column"])
def test_settings_that_photographs_do_not_have(key):
    with pytest.raises(
        UsageError, match=rf"data\.{key} does not apply to the built-in photographs"
    ):
        open_source(DataConfig(**{key: "x"}), "train", 64)


def test_an_image_of_a_split_without_a_class_is_named_in_full(tmp_path):
    names = ["train/n01/a.png", "train/n02/a.png", "val/ILSVRC_1.png"]
    path = in_folder(tmp_path / "imagenet", dict.fromkeys(names, PNG))
    with pytest.raises(UsageError, match=r"imagenet/val/ILSVRC_1\.png has no class"):
        open_images(path, labels=True)
