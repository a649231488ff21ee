import os
import pickle

import numpy as np
import pytest

from ldm.data import DataConfig, open_source
from ldm.data.sources import FolderSource, ZipSource, folder_labels, label_of, unlabelled
from ldm.errors import UsageError
from tests.ldm.data.pictures import Coded, CodedClasses, class_folder, encode, noise, zip_file


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
        f"data/{stray} has no class: labels want every image in one of two or more folders named "
        "after the classes; move it into one, or leave labels out"
    )


def test_folders_by_number_are_no_classes():
    numbered = ["00000/img00000999.png", "00001/img00001000.png"]
    with pytest.raises(UsageError, match=r"^data holds folders by number \(00000/img0.*no classes"):
        folder_labels(numbered, "data")
    with pytest.raises(UsageError, match="folders by number"):
        folder_labels([f"ffhq/{name}" for name in numbered], "data")
    assert folder_labels(["00000/cat.png", *numbered], "data")[0] == ("00000", "00001")


def test_names_that_are_no_utf8_can_be_written():
    assert classified(os.fsdecode(b"\xe9/1.png"), "z/1.png") == (("z", "\\xe9"), [1, 0])


def test_no_classes():
    classes, labels = unlabelled(3)
    assert classes == () and labels.tolist() == [-1, -1, -1]


def test_a_source_without_label_has_none():
    assert label_of(Coded(2), 1) == -1
    assert label_of(CodedClasses(2), 1) == 1


FILES = {"dog/1.png": noise(0), "cat/2.png": noise(1), "cat/deep/1.png": noise(2)}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_folders_and_zips(tmp_path, kind):
    if kind == "folder":
        path, source = class_folder(tmp_path / "a", FILES), FolderSource
    else:
        members = {f"a/{name}": encode(image) for name, image in FILES.items()}
        path, source = zip_file(tmp_path / "a.zip", members | {"readme.txt": b""}), ZipSource
    images = source(path, labels=True)
    assert images.classes == ("cat", "dog")
    again = pickle.loads(pickle.dumps(images))
    for index, (label, number) in enumerate([(0, 1), (0, 2), (1, 0)]):
        assert type(images.label(index)) is int
        assert images.label(index) == again.label(index) == label
        np.testing.assert_array_equal(images.load(index), noise(number))
    without = source(path)
    assert (without.classes, without.label(0)) == ((), -1)
    assert [without.name(i) for i in range(3)] == [images.name(i) for i in range(3)]


def test_a_folder_without_classes_is_one_clear_line(tmp_path):
    folder = class_folder(tmp_path / "a", {"1.png": noise(0), "2.png": noise(1)})
    assert len(open_source(DataConfig(source=str(folder)), "all", 32)) == 2
    with pytest.raises(UsageError, match=r"^.*/a/1\.png has no class: .* leave labels out$"):
        open_source(DataConfig(source=str(folder), labels=True), "all", 32)


@pytest.mark.parametrize("split", ["train", "val", "all"])
def test_every_split_knows_all_classes(tmp_path, split):
    folder = class_folder(tmp_path / "a", {f"{c}/{n}.png": noise(n) for c in "ab" for n in (0, 1)})
    source = open_source(DataConfig(source=str(folder), labels=True, held_out=1), split, 32)
    assert source.classes == ("a", "b")
    for index in range(len(source)):
        assert source.classes[source.label(index)] == source.name(index)[-7]
    assert open_source(DataConfig(source=str(folder)), split, 32).classes == ()


def test_the_photographs_are_classes():
    source = open_source(DataConfig(labels=True), "val", 64)
    assert f"'{source.classes[source.label(3)]}'" in source.name(3)
