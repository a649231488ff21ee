import numpy as np
import pytest

from ldm.data.split import split_indices, take_split
from tests.ldm.data.pictures import CodedClasses


def test_the_last_by_name():
    assert split_indices(10, 3, evenly=False) == (range(7), range(7, 10))


@pytest.mark.parametrize("evenly", [False, True])
@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (10, 0), (10, 3), (97, 96), (30, 7)])
def test_each_image_is_in_one_split_and_both_are_in_order(count, held_out, evenly):
    train, val = (list(part) for part in split_indices(count, held_out, evenly))
    assert len(val) == held_out
    assert (train, val) == (sorted(train), sorted(val))
    assert sorted(train + val) == list(range(count))


def test_evenly_means_every_so_many_th():
    assert split_indices(20, 4, evenly=True)[1].tolist() == [4, 9, 14, 19]
    assert split_indices(20, 1, evenly=True)[1].tolist() == [19]
    assert split_indices(10, 3, evenly=True)[1].tolist() == [2, 5, 9]


def test_evenly_gives_each_class_its_share_to_one_image():
    sizes = [1300, 732, 40, 1, 900]
    labels = np.repeat(range(5), sizes)
    val = split_indices(len(labels), 100, evenly=True)[1]
    held_out = np.bincount(labels[val], minlength=5)
    assert (abs(held_out - 100 * np.array(sizes) / len(labels)) < 1).all()


def test_a_part_keeps_classes_and_labels():
    part = take_split(CodedClasses(20), "val", 4, evenly=True)
    assert part.classes == ("a", "b", "c")
    assert [part.label(i) for i in range(4)] == [1, 0, 2, 1]
    assert [part.load(i)[0, 0, 0] for i in range(4)] == [4, 9, 14, 19]
    assert part.name(3) == "image 19"
