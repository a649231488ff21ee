"""Which class is meant: numbers of any kind, names, and what is neither."""

import numpy as np
import pytest
import torch

from ldm.errors import UsageError
from ldm.seeds import generator
from pipelines.sampling.settings import Classes

CLASSES = Classes(3, ("cat", "dog", "2 emus"))


@pytest.mark.parametrize(
    ("label", "number"),
    [
        (1, 1), (-1, -1), (np.int64(1), 1), (np.uint8(2), 2), (np.array(1), 1),
        (torch.tensor(1), 1), ("1", 1), ("-1", -1), (" 2 ", 2), ("+1", 1), ("dog", 1),
        (" dog", 1), ("2 emus ", 2),
    ],
)  # fmt: skip
def test_one_class(label, number):
    assert CLASSES.number(label) == number and type(CLASSES.number(label)) is int
    assert CLASSES.read(label) == (number,)
    assert CLASSES.choose(label, 3, seed=0) == (number,) * 3


@pytest.mark.parametrize(
    "labels",
    [
        [1, 0], (1, 0), ["dog", 0], np.array([1, 0]), torch.tensor([1, 0]), [np.int64(1), "0"],
        [torch.tensor(1), np.uint8(0)], ["dog", " cat"], iter([1, 0]),
    ],
)  # fmt: skip
def test_several_classes(labels):
    assert CLASSES.choose(labels, 2, seed=0) == (1, 0)


@pytest.mark.parametrize(
    ("label", "told"),
    [
        (3, "label 3: classes are 0 to 2 (cat, dog, 2 emus), or -1 for none"),
        (-2, "label -2: classes are 0 to 2"),
        (np.int64(9), "label 9: classes are"),
        ("7", "label 7: classes are"),
        ("cow", "label 'cow': classes are"),
        ("", "label '': classes are"),
        ("--1", "label '--1': classes are"),
        ("1.5", "label '1.5': classes are"),
        ("\u0661", "label '\u0661': classes are"),
        (1.5, "label 1.5: classes are"),
        (1.0, "label 1.0: classes are"),
        (True, "label True: classes are"),
        (np.bool_(True), "classes are"),
        (torch.tensor(1.0), "classes are"),
        (None, "label None: classes are"),
        ([1], "label [1]: classes are"),
        (torch.tensor([1]), "classes are"),
    ],
)
def test_what_is_no_class(label, told):
    for ask in (lambda: CLASSES.number(label), lambda: CLASSES.read([0, label])):
        with pytest.raises(UsageError) as error:
            ask()
        assert told in str(error.value) and "\n" not in str(error.value)


def test_not_one_for_each():
    with pytest.raises(UsageError, match="3 labels for 2 images: give one, or one for each"):
        CLASSES.choose([0, 1, 2], 2, seed=0)
    for none in ([], (), np.array([], int)):
        with pytest.raises(UsageError, match="labels are empty: give at least one"):
            CLASSES.choose(none, 2, seed=0)
        with pytest.raises(UsageError, match="labels are empty"):
            Classes().read(none)


def test_left_out_they_are_drawn_evenly():
    drawn = CLASSES.draw(5, range(600))
    assert [drawn.count(label) / 600 for label in range(3)] == pytest.approx([1 / 3] * 3, abs=0.06)
    assert drawn[3] == generator(5, "class", 3).integers(3)
    assert CLASSES.choose(None, 4, seed=5) == tuple(drawn[:4])


def test_a_model_without_classes():
    assert Classes().choose(None, 2, seed=0) is None
    with pytest.raises(UsageError, match="label -1: this model has no classes, leave labels out"):
        Classes().number(-1)


def test_classes_without_names():
    with pytest.raises(UsageError, match=r"label 5: classes are 0 to 4, or -1 for none"):
        Classes(5).number(5)
