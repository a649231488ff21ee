import shlex
from pathlib import Path

import pytest

from ldm.cli.options import STAGE_ONE, STAGE_TWO, find_presets, next_step
from ldm.config import list_presets, load_preset, published, resolve
from ldm.errors import UsageError
from pipelines.recipes import AutoencoderRecipe


def test_a_name_means_every_preset_that_has_it():
    assert find_presets("tiny") == [("ae", "tiny"), ("diffusion", "tiny")]
    assert find_presets("diffusion/tiny") == [("diffusion", "tiny")]


@pytest.mark.parametrize(
    ("name", "stage", "found"),
    [
        ("tiny", STAGE_ONE, ("ae", "tiny")),
        ("tiny", STAGE_TWO, ("diffusion", "tiny")),
        ("ae/litevae-b", STAGE_ONE, ("ae", "litevae-b")),
        ("t10-patchgan", STAGE_ONE, ("recipes", "t10-patchgan")),
    ],
)
def test_a_stage_takes_its_own(name, stage, found):
    assert find_presets(name, stage) == [found]


@pytest.mark.parametrize(
    ("name", "stage", "message"),
    [
        ("litevae-x", STAGE_ONE, "did you mean 'litevae-"),
        ("t10-patchgn", STAGE_ONE, "did you mean 't10-patchgan'"),
        ("celebahq256", STAGE_ONE, "other stage: use `ldm train-diffusion celebahq256`"),
        ("litevae-b", STAGE_TWO, "other stage: use `ldm train-ae litevae-b`"),
        ("diffusion/litevae-b", STAGE_TWO, "no preset 'diffusion/litevae-b'"),
    ],
)
def test_invalid_presets(name, stage, message):
    with pytest.raises(UsageError) as caught:
        find_presets(name, stage)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list_presets("recipes"))
def test_every_recipe_resolves_and_carries_the_papers_row(name):
    recipe = resolve(AutoencoderRecipe, load_preset("recipes", name))
    assert recipe.data.source.startswith("data/")
    if name[0] == "t" and name[1].isdigit() and not name.endswith("-plus"):  # a paper's row
        paper = published("recipes", name)
        assert str(paper["table"]) == name[1:].partition("-")[0].lstrip("0")
        assert paper["row"]
        if paper["table"] not in (3, 6):  # which are of costs and of latents
            assert 0 < paper["rfid"] < 6
        if "psnr" in paper:
            assert 24 < paper["psnr"] < 31 and 0.6 < paper["ssim"] < 0.9


def test_rows_of_a_table_differ():
    resolved = {}
    for name in list_presets("recipes"):
        if name.startswith("t"):
            table = name.partition("-")[0]
            recipe = resolve(AutoencoderRecipe, load_preset("recipes", name))
            assert recipe not in resolved.setdefault(table, []), name
            resolved[table].append(recipe)
    assert all(len(rows) > 1 for rows in resolved.values())


def test_what_tables_switch():
    def recipe(name):
        return resolve(AutoencoderRecipe, load_preset("recipes", name))

    assert recipe("t08-adaptive").adversarial.weighting == "adaptive"
    assert recipe("t08-adaptive").adversarial.weight == 0.5
    assert recipe("t10-stylegan").discriminator.type == "stylegan"
    assert recipe("t04-smc").decoder.norm == "smc" and recipe("t04-smc").latent_channels == 12
    assert recipe("t21-last-two").encoder.levels == (2, 3)
    assert recipe("t20-vit").encoder.aggregator.type == "vit"
    assert [phase.steps for phase in recipe("t05-128-tuned").phases] == [100_000, 50_000]
    assert recipe("t12-dwt-2").latent_channels == 48
    assert recipe("t14-esrgan").loss.lpips == 0 and recipe("t14-esrgan").loss.esrgan == 1


def test_the_next_command_can_be_pasted():
    line = next_step("ldm sample {} --n 4", Path("my runs/it's"))
    assert line == "next: ldm sample 'my runs/it'\"'\"'s' --n 4"
    assert shlex.split(line.removeprefix("next: "))[2] == "my runs/it's"
    assert next_step("ldm fid {}", "runs/x") == "next: ldm fid runs/x"
