"""Scales shrink recipes and keep what a table varies; targets share trainings."""

from functools import cache
from itertools import combinations

import pytest

from autoencoders import Autoencoder
from ldm.config import flatten, load_preset, resolve, to_tree
from ldm.errors import LdmError, UsageError
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe
from pipelines.reproduce.plan import (
    SCALES,
    BuildPlan,
    load_scale,
    parse_data,
    parse_take,
    published_recipe,
)
from pipelines.reproduce.tables import all_tables, find_tables

ROWS = [(table, row) for table in all_tables() for row in table.rows]


def switched(recipes):
    """{key: which pairs of rows differ in it}."""
    trees = [flatten(to_tree(recipe)) for recipe in recipes]
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
def test_rows_differ_at_every_scale_where_the_papers_do(table, scale):
    plan = BuildPlan(load_scale(scale))
    theirs = switched([published_recipe(row.preset) for row in table.rows])
    if scale == "smoke":
        theirs.pop("loss.lpips", None)  # off in every row; Table 14 still has ESRGAN's
    assert theirs, "a table varies something"
    assert switched([plan.recipe_of(row.preset) for row in table.rows]) == theirs


@pytest.mark.parametrize("scale", ["smoke", "small"])
def test_the_keys_that_name_a_row_stay(scale):
    """Not only do rows differ: they are what their names say."""
    plan = BuildPlan(load_scale(scale))
    recipe = {row.preset: plan.recipe_of(row.preset) for _, row in ROWS}
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
def test_scale_paper_keeps_the_papers_recipe(row):
    recipe = BuildPlan(load_scale("paper")).recipe_of(row.preset)
    kind = "diffusion" if isinstance(recipe, DiffusionRecipe) else "recipes"
    assert recipe == resolve(type(recipe), load_preset(kind, row.preset))


def test_rules_by_numbers():
    """Worked out by hand: a quarter of the widths, half the sides, a fiftieth of the steps."""
    plan = BuildPlan(load_scale("small"))
    recipe = {row.preset: plan.recipe_of(row.preset) for _, row in ROWS}
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
    plan = BuildPlan(load_scale("smoke"))
    for _, row in ROWS:
        recipe = plan.recipe_of(row.preset)
        if isinstance(recipe, AutoencoderRecipe):
            assert recipe.loss.lpips == 0 and recipe.loss.l1 == 1
            assert max(phase.resolution for phase in recipe.phases) <= 64
            assert recipe.total_steps <= 16


def test_the_decoders_norm_has_groups_of_several_channels():
    """Alone in its group a channel would forget how bright the picture is."""
    for scale in ("smoke", "small"):
        recipe = BuildPlan(load_scale(scale)).recipe_of(ROWS[0][1].preset)
        norms = [
            part for part in Autoencoder(recipe.model).decoder.modules()
            if type(part).__name__ == "GroupNorm"
        ]  # fmt: skip
        assert norms and all(norm.num_channels >= 3 * norm.num_groups for norm in norms)


# ---------------------------------------------------------------------------------- settings
def test_settings_apply_to_the_recipes_that_have_them():
    plan = BuildPlan(
        load_scale("small"), settings=["loss.lpips=0", "network.channels=32", "lr=1e-3"]
    )
    recipe = {row.preset: plan.recipe_of(row.preset) for _, row in ROWS}
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
def test_bad_settings_are_refused(setting, told):
    with pytest.raises(UsageError, match=told):
        BuildPlan(load_scale("small"), settings=[setting]).targets(find_tables("t4")[0])


def test_a_bad_value_is_refused():
    with pytest.raises(UsageError, match="batch_size"):
        BuildPlan(load_scale("small"), settings=["batch_size=0"]).recipe_of(ROWS[0][1].preset)


def test_settings_index_lists():
    recipe = BuildPlan(load_scale("small"), settings=["phases.0.steps=7"]).recipe_of("t04-smc")
    assert recipe.total_steps == 7


# --------------------------------------------------------------------------------- targets
SEVEN = ["t04-group", "t08-constant", "t09-baseline", "t10-unet", "t14-lpips", "t15-without",
         "t16-hinge"]  # fmt: skip


@cache
def targets(scale="small", data=(), settings=()):
    plan = BuildPlan(load_scale(scale), data, settings)
    return {target.row.preset: target for table in all_tables() for target in plan.targets(table)}


def folders(found, *names):
    return {str(found[name].training.folder) for name in names}


@pytest.mark.parametrize("scale", SCALES)
def test_the_seven_equal_rows_of_the_ablations_share_one_training(scale):
    found = targets(scale)
    assert folders(found, *SEVEN) == {f"reproduce/{scale}/t04/group/autoencoder"}
    # and what differs does not
    others = ["t04-smc", "t08-adaptive", "t09-gaussian", "t14-esrgan", "t15-with", "t16-logistic"]
    assert len(folders(found, *others, "t04-group")) == len(others) + 1
    for name in others:
        assert found[name].training.folder.parent == found[name].folder


def test_tables_of_other_sizes_share_trainings():
    found = targets("paper")
    assert folders(found, "t21-all", "t17-without", "t06-litevae") == {
        "reproduce/paper/t01/imagenet256-nz4-litevae/autoencoder"
    }
    assert folders(found, "t02a-b", "t18-unet", "t20-unet", "t09-wavelet") == {
        "reproduce/paper/t01/imagenet128-nz12-litevae/autoencoder"
    }


def test_both_stages_are_shared():
    found = targets("paper")
    seven, thirteen = found["t07-ffhq-litevae"], found["t13-ffhq-litevae"]
    assert seven.stage_one == thirteen.stage_one and seven.stage_two == thirteen.stage_two
    assert str(seven.stage_one.folder).endswith("paper/t01/ffhq256-litevae/autoencoder")
    assert str(seven.stage_two.folder).endswith("paper/t07/ffhq-litevae/diffusion")
    # a stage one of no row has a place of its own
    assert str(found["t07-celebahq-vae"].stage_one.folder) == "reproduce/paper/ae/sdvae/autoencoder"


def test_one_data_set_for_several_is_trained_on_once():
    one = targets("small", data=("photos",))
    assert len(folders(one, "t11-ffhq-vae", "t11-deepfashion-vae")) == 1
    two = targets(
        "small",
        data=(
            "deepfashion=/x",
            "photos",
        ),
    )
    assert len(folders(two, "t11-ffhq-vae", "t11-deepfashion-vae")) == 2
    assert two["t11-deepfashion-vae"].data.source == "/x"
    assert two["t11-ffhq-vae"].data.source == "photos"


def test_data_defaults_to_photographs_or_the_papers():
    assert {target.data.source for target in targets("smoke").values()} == {"photos"}
    paper = targets("paper")
    assert paper["t11-deepfashion-vae"].data.source == "data/deepfashion256"
    named = targets("paper", data=("imagenet=/mnt/imagenet",))
    assert named["t04-smc"].data.source == "/mnt/imagenet"
    assert named["t01-ffhq128-vae"].data.source == "data/ffhq128"


def test_rows_of_tables_5_and_22_are_measured_at_one_size():
    for scale, side in (("smoke", 64), ("small", 128), ("paper", 256)):
        found = targets(scale)
        for table in ("t05", "t22"):
            sides = {
                found[f"{table}-{n}"].resolution for n in ("256-full", "128-full", "128-tuned")
            }
            assert sides == {side}
    assert targets("small")["t04-smc"].resolution == 64


def test_settings_that_make_two_rows_the_same_are_refused():
    plan = BuildPlan(load_scale("small"), settings=["loss.gaussian=0", "loss.wavelet=0"])
    [table] = find_tables("t9")
    with pytest.raises(UsageError, match="rows 'baseline' and 'gaussian' of T9 the same"):
        plan.targets(table)
    [other] = find_tables("t4")
    assert len(plan.targets(other)) == 2


def test_equal_recipes_stay_equal_under_settings():
    found = targets("small", settings=("loss.lpips=0", "batch_size=4"))
    assert len(folders(found, *SEVEN)) == 1


# ------------------------------------------------------------------------------------- words
def test_data_is_parsed(tmp_path):
    (tmp_path / "a=b").mkdir()
    assert parse_data(["/x"]) == {"": "/x"}
    assert parse_data(["ffhq=/x", "y"]) == {"ffhq": "/x", "": "y"}
    assert parse_data([str(tmp_path / "a=b")]) == {"": str(tmp_path / "a=b")}
    for words, told in (
        (["x", "y"], "given twice"),
        (["ffhq=x", "ffhq=y"], "given twice for ffhq"),
        (["cifar=x"], "the paper's data sets are ffhq, imagenet"),
    ):
        with pytest.raises(UsageError, match=told):
            parse_data(words)


def test_take_is_parsed(tmp_path):
    [table] = find_tables("t4")
    (tmp_path / "x.pt").touch()
    for name in ("smc", "t04-smc", "t04/smc"):
        assert parse_take(table, [f"{name}={tmp_path}/x.pt"]) == {"smc": tmp_path / "x.pt"}
    for words, kind, told in (
        (["smc"], UsageError, "must have the form ROW=PATH"),
        ([f"gauss={tmp_path}/x.pt"], UsageError, "T4 has no row 'gauss'; its rows are: group, smc"),
        ([f"smc={tmp_path}/x.pt", f"t04-smc={tmp_path}/x.pt"], UsageError, "twice"),
        (["smc=nowhere.pt"], LdmError, "nowhere.pt does not exist"),
    ):
        with pytest.raises(kind, match=told):
            parse_take(table, words)


def test_settings_need_not_fit_other_tables():
    [table] = find_tables("t17")  # Table 12's DWT-2 gives 48 channels, and no other number
    for target in BuildPlan(load_scale("small"), settings=["latent_channels=8"]).targets(table):
        assert target.stage_one.recipe.latent_channels == 8
