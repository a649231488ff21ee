"""Sampling settings and classes: accepted, refused, named."""

import json
from math import inf, nan, sqrt
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch

from diffusion.samplers import SAMPLERS
from diffusion.schedules import SCHEDULES
from ldm.config import to_tree, validate
from ldm.errors import UsageError
from ldm.seeds import generator
from pipelines.sampling.settings import (
    Classes,
    Sampling,
    guided_levels,
    labels_slug,
    noise_levels,
    settings_slug,
)

CLASSES = Classes(3, ("cat", "dog", "2 emus"))


def test_every_sampler_and_schedule_can_be_chosen():
    fields = Sampling.model_fields
    assert set(get_args(fields["sampler"].annotation)) == set(SAMPLERS)
    assert set(get_args(fields["schedule"].annotation)) == set(SCHEDULES)


def test_settings_survive_json():
    asked = validate(Sampling, {"churn": inf, "interval": (0.2, inf), "guidance": 2})
    text = json.dumps(to_tree(asked), allow_nan=False)
    assert validate(Sampling, json.loads(text)) == asked


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "steps18"),
        ({"steps": 40, "sampler": "euler", "schedule": "cosine"}, "steps40-euler-cosine"),
        ({"guidance": 1.5, "interval": (0.2, 3)}, "steps18-guidance1.5-interval0.2to3"),
        ({"guidance": 2, "interval": (0.2, inf)}, "steps18-guidance2-interval0.2toinf"),
        ({"churn": {"S_churn": 40, "S_max": 50}}, "steps18-S_churn40-S_max50"),
        ({"sigma_max": 20}, "steps18-sigma_max20"),
    ],
)
def test_slug_names_the_non_default_settings(settings, name):
    assert settings_slug(validate(Sampling, settings)) == name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": (0.2, 3)}, "interval has no effect without guidance: set guidance"),
        ({"churn": {"S_churn": 5, "S_min": 3, "S_max": 1}}, "S_min=3 must not exceed S_max=1"),
        ({"churn": {"S_noise": 1.5}}, "have no effect without S_churn"),
        ({"churn": {"S_min": 1.5}}, "have no effect without S_churn"),
        ({"churn": {"S_churn": 1, "S_noise": inf}}, "'churn.S_noise': input should be a finite"),
        ({"churn": {"S_churn": nan}}, "'churn.S_churn': input should be greater"),
        ({"guidance": inf}, "'guidance': input should be a finite number"),
        ({"guidance": nan}, "'guidance': input should be a finite number"),
        ({"sigma_max": inf}, "'sigma_max': input should be a finite number"),
        ({"guidance": 2, "interval": (nan, 1)}, "'interval.0': input should be greater"),
        ({"steps": 10**13}, "'steps': input should be less than or equal to 100000"),
    ],
)
def test_invalid_or_ineffective_settings_are_refused(settings, message):
    with pytest.raises(UsageError) as error:
        validate(Sampling, settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_guided_levels_cover_the_interval_and_churn():
    model = SimpleNamespace(sigma_min=0.1, sigma_max=20.0)

    def asked(**settings):
        return guided_levels(validate(Sampling, {"steps": 6, "guidance": 2} | settings), model)

    levels = noise_levels(validate(Sampling, {"steps": 6}), model).tolist()
    assert asked() == (0.1, 20)
    assert asked(interval=(0.2, levels[2])) == (levels[4], levels[2])
    assert asked(interval=(levels[0], inf)) is None
    # raised noise asks in between, and no higher than the model knows
    assert asked(churn=9) == (0.1, 20)
    assert asked(churn=9, sigma_max=10) == (0.1, pytest.approx(10 * sqrt(2)))
    for highest, expected in ((levels[3], levels[3] * sqrt(2)), (levels[4], levels[3])):
        churn = {"S_churn": 9, "S_max": highest}
        top = asked(churn=churn, interval=(0.2, levels[2] - 0.1))[1]
        assert top == pytest.approx(expected)


# ------------------------------------------------------------------------------------ classes
@pytest.mark.parametrize(
    ("label", "number"),
    [
        (1, 1), (-1, -1), (np.int64(1), 1), (np.uint8(2), 2), (np.array(1), 1),
        (torch.tensor(1), 1), ("1", 1), ("-1", -1), (" 2 ", 2), ("+1", 1), ("dog", 1),
        (" dog", 1), ("2 emus ", 2),
    ],
)  # fmt: skip
def test_label_names_one_class(label, number):
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
def test_labels_name_several_classes(labels):
    assert CLASSES.choose(labels, 2, seed=0) == (1, 0)


@pytest.mark.parametrize(
    ("label", "message"),
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
def test_unknown_class_is_refused(label, message):
    for ask in (lambda: CLASSES.number(label), lambda: CLASSES.read([0, label])):
        with pytest.raises(UsageError) as error:
            ask()
        assert message in str(error.value) and "\n" not in str(error.value)


def test_balanced_labels_are_all_classes_in_turn():
    classes = Classes(3, ("cat", "dog", "emu"))
    for given in ("balanced", ["balanced"], ("balanced",)):
        assert classes.read(given) == (0, 1, 2) and classes.describe(given) == "balanced"
        assert classes.choose(given, 7, seed=0) == (0, 1, 2, 0, 1, 2, 0)
    assert classes.describe(["dog", 0]) == [1, 0] and classes.describe(None) is None
    assert labels_slug("balanced") == ["balanced"] and labels_slug([1, 0]) == ["class1_0"]
    named = Classes(2, ("balanced", "other"))
    assert named.read("balanced") == (0,) and named.describe("balanced") == [0]
    with pytest.raises(UsageError, match="has no classes"):
        Classes().read("balanced")


def test_number_of_labels_must_fit():
    with pytest.raises(UsageError, match="3 labels for 2 images: give one, or one per image"):
        CLASSES.choose([0, 1, 2], 2, seed=0)
    for none in ([], (), np.array([], int)):
        with pytest.raises(UsageError, match="labels are empty: give at least one"):
            CLASSES.choose(none, 2, seed=0)
        with pytest.raises(UsageError, match="labels are empty"):
            Classes().read(none)


def test_omitted_labels_are_drawn_uniformly():
    drawn = [CLASSES.draw(5, i) for i in range(600)]
    assert [drawn.count(label) / 600 for label in range(3)] == pytest.approx([1 / 3] * 3, abs=0.06)
    assert drawn[3] == generator(5, "class", 3).integers(3)
    assert CLASSES.choose(None, 4, seed=5) == tuple(drawn[:4])


def test_model_without_classes_takes_no_label():
    assert Classes().choose(None, 2, seed=0) is None and Classes().draw(0, 5) == -1
    with pytest.raises(UsageError, match="label -1: this model has no classes; omit labels"):
        Classes().number(-1)


def test_classes_may_have_no_names():
    with pytest.raises(UsageError, match=r"label 5: classes are 0 to 4, or -1 for none"):
        Classes(5).number(5)
