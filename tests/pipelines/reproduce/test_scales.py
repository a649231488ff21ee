"""A scale makes recipes smaller and leaves what a table varies as it is."""

from itertools import combinations

import pytest

from autoencoders import Autoencoder
from ldm.config import load_preset, resolve, to_tree
from ldm.errors import UsageError
from pipelines.recipes import AutoencoderRecipe
from pipelines.reproduce.plan import (
    SCALES,
    Plan,
    check_settings,
    find_scale,
    published_recipe,
    scale_recipe,
)
from pipelines.reproduce.tables import all_tables

ROWS = [(table, row) for table in all_tables() for row in table.rows]


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def switched(recipes):
    """{key: which pairs of rows differ in it}."""
    trees = [dict(leaves(to_tree(recipe))) for recipe in recipes]
    found = {}
    for key in set().union(*trees) - {"data.source"}:
        pairs = {
            (i, j)
            for i, j in combinations(range(len(trees)), 2)
            if trees[i].get(key) != trees[j].get(key)
        }
        if pairs:
            found[key] = pairs
    return found


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", all_tables(), ids=lambda table: table.number)
def test_rows_differ_at_every_scale_just_where_the_papers_do(table, scale):
    plan = Plan(SCALES[scale])
    theirs = switched([published_recipe(row.kind, row.preset) for row in table.rows])
    if scale == "smoke":
        theirs.pop("loss.lpips", None)  # off in every row; Table 14 still has ESRGAN's
    assert theirs, "a table varies something"
    assert switched([plan.recipe_of(row) for row in table.rows]) == theirs


@pytest.mark.parametrize("scale", ["smoke", "small"])
def test_what_names_a_switch_is_untouched(scale):
    """Not only do rows differ: they are what their names say."""
    plan = Plan(SCALES[scale])
    recipe = {row.preset: plan.recipe_of(row) for _, row in ROWS}
    assert recipe["t04-smc"].decoder.norm == "smc" and recipe["t04-group"].decoder.norm == "group"
    assert recipe["t09-gaussian"].loss.gaussian == 0.5 and recipe["t09-wavelet"].loss.wavelet == 1
    assert recipe["t21-last-two"].encoder.levels == (2, 3)
    assert recipe["t14-esrgan"].loss.esrgan == 1 and recipe["t15-with"].loss.ldl == 1
    assert recipe["t08-adaptive"].adversarial.weighting == "adaptive"
    assert recipe["t16-logistic"].adversarial.loss == "logistic"
    assert recipe["t12-dwt-2"].latent_channels == 48
    assert recipe["t20-vit"].encoder.aggregator.type == "vit"
    assert recipe["t18-nafnet"].encoder.extractor.type == "nafnet"
    assert recipe["t19-shared"].encoder.shared and recipe["t17-with"].conv1x1
    widths = [recipe[f"t02a-{size}"].encoder.extractor.channels for size in "sbml"]
    assert widths[0] * 2 == widths[1] and widths[1] * 2 == widths[2] == widths[3]
    sides = [phase.resolution for phase in recipe["t05-128-tuned"].phases]
    assert sides == [recipe["t05-128-full"].phases[0].resolution, 2 * sides[0]]


@pytest.mark.parametrize("row", [row for _, row in ROWS], ids=lambda row: row.preset)
def test_at_scale_paper_a_recipe_is_the_papers(row):
    recipe = Plan(SCALES["paper"]).recipe_of(row)
    assert recipe == resolve(type(recipe), load_preset(row.kind, row.preset))


def test_the_rules_by_numbers():
    """Worked out by hand: a quarter of the widths, half the sides, a fiftieth of the steps."""
    plan = Plan(SCALES["small"])
    recipe = {row.preset: plan.recipe_of(row) for _, row in ROWS}
    b = recipe["t02a-b"]
    assert b.encoder.extractor.channels == b.encoder.aggregator.channels == 8
    assert b.encoder.extractor.multipliers == (1, 2, 3) and b.latent_channels == 12
    assert b.decoder.channels == 40 and b.decoder.multipliers == (1, 2, 4, 4)
    assert [(p.resolution, p.steps) for p in b.phases] == [(64, 4000)]
    # 55,400 images of 3.2 M: of 32,000, a hundredth of both
    assert b.batch_size == 8 and b.ema_half_life_images == pytest.approx(554)
    assert b.discriminator.channels == 16 and b.discriminator.multipliers == (1, 2, 4, 8)
    assert b.loss.lpips == 1 and b.lr == 5e-4
    assert recipe["t01-ffhq256-vae"].encoder.channels == 32
    assert recipe["t10-patchgan"].discriminator.layers == 2
    stylegan = recipe["t10-stylegan"].discriminator
    assert (stylegan.resolution, stylegan.channels, stylegan.max_channels) == (64, 64, 128)
    vit = recipe["t20-vit"].encoder.aggregator
    assert (vit.width, vit.grid, vit.heads) == (32, 8, 4)
    two = recipe["t07-ffhq-vae"]
    assert (two.steps, two.batch_size, two.resolution) == (12_700, 21, 128)
    assert (two.network.channels, two.network.head_width) == (56, 8)


def test_smoke_needs_no_published_weights():
    plan = Plan(SCALES["smoke"])
    for _, row in ROWS:
        recipe = plan.recipe_of(row)
        if isinstance(recipe, AutoencoderRecipe):
            assert recipe.loss.lpips == 0 and recipe.loss.l1 == 1
            assert max(phase.resolution for phase in recipe.phases) <= 64
            assert recipe.total_steps <= 16


def test_the_decoders_norm_has_groups_of_several_channels():
    """Alone in its group a channel would forget how bright the picture is."""
    for scale in ("smoke", "small"):
        recipe = Plan(SCALES[scale]).recipe_of(ROWS[0][1])
        norms = [
            part for part in Autoencoder(recipe.model).decoder.modules()
            if type(part).__name__ == "GroupNorm"
        ]  # fmt: skip
        assert norms and all(norm.num_channels >= 3 * norm.num_groups for norm in norms)


# ---------------------------------------------------------------------------------- settings
def test_settings_go_to_the_recipes_that_know_them():
    plan = Plan(SCALES["small"], settings=["loss.lpips=0", "network.channels=32", "lr=1e-3"])
    recipe = {row.preset: plan.recipe_of(row) for _, row in ROWS}
    assert recipe["t04-smc"].loss.lpips == 0 and recipe["t04-smc"].lr == 1e-3
    assert recipe["t07-ffhq-vae"].network.channels == 32 and recipe["t07-ffhq-vae"].lr == 1e-3


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("batchsize=3", "unknown key 'batchsize'; did you mean 'batch_size'"),
        ("data.source=x", "--data"),
        ("autoencoder=x", "--take"),
        ("lr", "not of the form key=value"),
    ],
)
def test_settings_that_cannot_be(setting, told):
    with pytest.raises(UsageError, match=told):
        check_settings([setting])


def test_a_bad_value_is_refused():
    with pytest.raises(UsageError, match="batch_size"):
        Plan(SCALES["small"], settings=["batch_size=0"]).recipe_of(ROWS[0][1])


def test_lists_take_an_index():
    recipe = scale_recipe(AutoencoderRecipe(), SCALES["small"], ["phases.0.steps=7"])
    assert recipe.total_steps == 7


def test_scales_have_names():
    assert find_scale("smoke").name == "smoke"
    with pytest.raises(UsageError, match="smoke, small, paper"):
        find_scale("large")
