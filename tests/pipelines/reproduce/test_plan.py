"""What there is to train, and what is trained once for several rows."""

from functools import cache

import pytest

from ldm.errors import LdmError, UsageError
from pipelines.reproduce.plan import SCALES, Plan, parse_data, parse_take
from pipelines.reproduce.tables import all_tables, find_tables

SEVEN = ["t04-group", "t08-constant", "t09-baseline", "t10-unet", "t14-lpips", "t15-without",
         "t16-hinge"]  # fmt: skip


@cache
def jobs(scale="small", data=(), settings=()):
    plan = Plan(SCALES[scale], data, settings)
    return {job.row.preset: job for table in all_tables() for job in plan.jobs(table)}


def folders(found, *names):
    return {str(found[name].training.folder) for name in names}


@pytest.mark.parametrize("scale", SCALES)
def test_the_seven_equal_rows_of_the_ablations_share_one_training(scale):
    found = jobs(scale)
    assert folders(found, *SEVEN) == {f"reproduce/{scale}/t04/group/autoencoder"}
    # and what differs does not
    others = ["t04-smc", "t08-adaptive", "t09-gaussian", "t14-esrgan", "t15-with", "t16-logistic"]
    assert len(folders(found, *others, "t04-group")) == len(others) + 1
    for name in others:
        assert found[name].training.folder.parent == found[name].folder


def test_rows_are_shared_between_tables_of_other_sizes_too():
    found = jobs("paper")
    assert folders(found, "t21-all", "t17-without", "t06-litevae") == {
        "reproduce/paper/t01/imagenet256-nz4-litevae/autoencoder"
    }
    assert folders(found, "t02a-b", "t18-unet", "t20-unet", "t09-wavelet") == {
        "reproduce/paper/t01/imagenet128-nz12-litevae/autoencoder"
    }


def test_both_stages_are_shared():
    found = jobs("paper")
    seven, thirteen = found["t07-ffhq-litevae"], found["t13-ffhq-litevae"]
    assert seven.stage_one == thirteen.stage_one and seven.stage_two == thirteen.stage_two
    assert str(seven.stage_one.folder).endswith("paper/t01/ffhq256-litevae/autoencoder")
    assert str(seven.stage_two.folder).endswith("paper/t07/ffhq-litevae/diffusion")
    # a stage one of no row has a place of its own
    assert str(found["t07-celebahq-vae"].stage_one.folder) == "reproduce/paper/ae/sdvae/autoencoder"


def test_one_data_set_stands_for_several_and_is_trained_on_once():
    one = jobs("small", data=("photos",))
    assert len(folders(one, "t11-ffhq-vae", "t11-deepfashion-vae")) == 1
    two = jobs(
        "small",
        data=(
            "deepfashion=/x",
            "photos",
        ),
    )
    assert len(folders(two, "t11-ffhq-vae", "t11-deepfashion-vae")) == 2
    assert two["t11-deepfashion-vae"].data.source == "/x"
    assert two["t11-ffhq-vae"].data.source == "photos"


def test_data_left_out():
    assert {job.data.source for job in jobs("smoke").values()} == {"photos"}
    paper = jobs("paper")
    assert paper["t11-deepfashion-vae"].data.source == "data/deepfashion256"
    named = jobs("paper", data=("imagenet=/mnt/imagenet",))
    assert named["t04-smc"].data.source == "/mnt/imagenet"
    assert named["t01-ffhq128-vae"].data.source == "data/ffhq128"


def test_rows_of_tables_5_and_22_are_measured_at_one_size():
    for scale, side in (("smoke", 64), ("small", 128), ("paper", 256)):
        found = jobs(scale)
        for table in ("t05", "t22"):
            sides = {
                found[f"{table}-{n}"].resolution for n in ("256-full", "128-full", "128-tuned")
            }
            assert sides == {side}
    assert jobs("small")["t04-smc"].resolution == 64


def test_settings_that_undo_what_a_table_varies_are_refused():
    plan = Plan(SCALES["small"], settings=["loss.gaussian=0", "loss.wavelet=0"])
    [table] = find_tables("t9")
    with pytest.raises(UsageError, match="rows 'baseline' and 'gaussian' of T9 the same"):
        plan.jobs(table)
    [other] = find_tables("t4")
    assert len(plan.jobs(other)) == 2


def test_equal_recipes_stay_equal_under_settings():
    found = jobs("small", settings=("loss.lpips=0", "batch_size=4"))
    assert len(folders(found, *SEVEN)) == 1


# ------------------------------------------------------------------------------------- words
def test_words_of_data(tmp_path):
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


def test_words_of_checkpoints(tmp_path):
    [table] = find_tables("t4")
    (tmp_path / "x.pt").touch()
    assert parse_take(table, [f"smc={tmp_path}/x.pt"]) == {"smc": tmp_path / "x.pt"}
    for words, kind, told in (
        (["smc"], UsageError, "of the form ROW=PATH"),
        ([f"gauss={tmp_path}/x.pt"], UsageError, "its rows are: group, smc"),
        ([f"smc={tmp_path}/x.pt", f"t04-smc={tmp_path}/x.pt"], UsageError, "twice"),
        (["smc=nowhere.pt"], LdmError, "nothing is at nowhere.pt"),
    ):
        with pytest.raises(kind, match=told):
            parse_take(table, words)


def test_settings_need_not_fit_the_rows_of_other_tables():
    [table] = find_tables("t17")  # Table 12's DWT-2 gives 48 channels, and no other number
    for job in Plan(SCALES["small"], settings=["latent_channels=8"]).jobs(table):
        assert job.stage_one.recipe.latent_channels == 8
