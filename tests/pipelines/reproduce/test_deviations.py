"""Everything that is not as in the paper is said, and nothing that is."""

from functools import cache

import pytest

from ldm.config import to_tree
from pipelines.reproduce.output import EDM, STANDING, deviations, is_told, levelled
from pipelines.reproduce.plan import SCALES, Plan, published_recipe
from pipelines.reproduce.rows import asked_of
from pipelines.reproduce.tables import all_tables, find_tables
from tests.pipelines.reproduce.test_scales import leaves


@cache
def plan_of(scale, settings=()):
    return Plan(SCALES[scale], settings=settings)


def lines(word, scale, records=None, settings=()):
    [table] = find_tables(word)
    plan = plan_of(scale, settings)
    return deviations(table, plan.jobs(table), plan.settings, records or {})


@pytest.mark.parametrize("table", all_tables(), ids=lambda table: table.number)
def test_the_full_recipe_differs_in_nothing(table):
    plan = plan_of("paper")
    told = deviations(table, plan.jobs(table), (), {})
    if table.config.measure != "encoder":
        edm = (EDM,) if table.config.measure == "generation" else ()
        assert tuple(told) == STANDING + edm


@pytest.mark.parametrize("table", all_tables(), ids=lambda table: table.number)
def test_every_key_that_differs_is_told(table):
    if table.config.measure == "encoder":
        return
    plan = plan_of("small")
    told = deviations(table, plan.jobs(table), (), {})
    for row in table.rows:
        ours = dict(leaves(to_tree(plan.recipe_of(row))))
        theirs = dict(leaves(to_tree(published_recipe(row.kind, row.preset))))
        keys = [k for k in ours if ours[k] != theirs.get(k) and is_told(k)]
        assert len(told) >= len(keys) + len(STANDING) > len(STANDING)


def test_in_words():
    told = lines("t4", "small", settings=("loss.lpips=0",))
    assert "Data: the photographs inside scikit-image in place of data/imagenet128." in told
    assert "Training: 4,000 steps at 64² in place of 200,000 steps at 128²." in told
    assert "Images a step: 8 in place of 16." in told
    [lpips] = [line for line in told if line.startswith("Weight of LPIPS in the loss: 0")]
    assert "VGG-16" in lpips
    assert "Set by hand: loss.lpips=0." in told


def test_stylegans_own_width_is_a_number():
    [line] = [line for line in lines("t10", "small") if line.startswith("Base width of the disc")]
    assert line == "Base width of the discriminator: 16 in place of 64; 64 in place of 256."


def test_of_how_a_run_is_carried_out_what_decides_its_numbers():
    settings = ("run.seed=1", "run.precision=bf16", "run.log_every_steps=3", "run.keep_states=1")
    told = lines("t4", "small", settings=settings)
    assert "Seed: 1 in place of 0." in told
    assert "Precision of the training: bf16 in place of auto." in told
    assert not any("steps: 3 in" in line or "keep_states: " in line for line in told)
    [job, *_] = plan_of("small", settings).jobs(find_tables("t4")[0])
    kept = asked_of(job, SCALES["small"].measuring)["trained"]["recipe"]["run"]
    assert kept == {"seed": 1, "precision": "bf16"}


def test_several_ways_in_one_line():
    [line] = [
        line for line in lines("t2a", "smoke") if "base width of feature extr" in line.lower()
    ]
    assert "2 in place of 16" in line and "4 in place of 32" in line and "8 in place of 64" in line


def test_both_stages_are_told():
    told = lines("t13", "smoke")
    assert any(line.startswith("Stage one, training: 8 steps at 64²") for line in told)
    assert any(line.startswith("Steps: 51 in place of 635,000") for line in told)


def test_rows_that_one_training_stands_for():
    assert any("Rows ffhq-vae, deepfashion-vae differ in" in line for line in lines("t11", "smoke"))
    assert not any("stands for them" in line for line in lines("t12", "smoke"))


def test_what_was_given_and_what_was_noted():
    record = {"taken": {"path": "x.pt"}, "notes": ["Measured over 38 images."]}
    told = lines("t4", "small", {"smc": record, "group": {"taken": None, "notes": record["notes"]}})
    assert any(line.startswith("Row smc is x.pt") for line in told)
    assert told.count("Measured over 38 images.") == 1


@pytest.mark.parametrize(
    ("word", "settings", "told"),
    [
        ("t14", ("loss.lpips=0",), ["loss.lpips"]),  # the row LPIPS would have none
        ("t15", ("loss.lpips=0",), []),
        ("t5", ("phases.0.steps=8",), []),
        ("t9", ("batch_size=4",), []),
    ],
)
def test_settings_that_level_what_the_rows_differ_in_are_found(word, settings, told):
    [table] = find_tables(word)
    assert levelled(plan_of("small", settings).jobs(table), settings) == told
