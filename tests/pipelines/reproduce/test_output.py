"""Tables, claims and differences from the paper as text."""

from functools import cache

import numpy as np
import pytest

from ldm.config import flatten
from pipelines.reproduce.output import (
    EDM,
    ONE_SEED,
    SILENT,
    Result,
    claim_lines,
    show,
    table_lines,
    undone_differences,
)
from pipelines.reproduce.plan import BuildPlan, decisive, load_scale, published_recipe
from pipelines.reproduce.tables import all_tables, find_tables
from tests.pipelines.reproduce.images import equal_images, judge_numbers


def test_our_numbers_stand_beside_the_papers():
    [table] = find_tables("t4")
    numbers = {"group": {"rfid": None, "psnr": 24.0, "swd": 31.26}, "smc": {"psnr": 23.456}}
    assert table_lines(table, numbers) == [
        "| Normalization | rFID ↓ paper | here | LPIPS ↓ paper | here | PSNR ↑ paper |  here | "
        "SSIM ↑ paper | here | SWD ×10³ ↓ here |",
        "|:--------------|-------------:|-----:|--------------:|-----:|-------------:|------:|"
        "-------------:|-----:|----------------:|",
        "| Group Norm    |         1.01 |    – |         0.070 |    – |        29.24 | 24.00 | "
        "        0.86 |    – |            31.3 |",
        "| SMC           |         0.97 |    – |         0.070 |    – |        29.32 | 23.46 | "
        "        0.87 |    – |               – |",
    ]


def test_psnr_and_swd_stand_beside_a_missing_rfid():
    [table] = find_tables("t12")
    numbers = {"dwt": {"rfid": None, "psnr": 20.0, "swd": 10.0}}
    header, _, _, dwt, _ = table_lines(table, numbers)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, dwt)]
    assert cells[0][3:] == ["rFID ↓ paper", "here", "PSNR ↑ here", "SWD ×10³ ↓ here"]
    assert cells[1] == ["ImageNet", "DWT", "12", "1.65", "–", "20.00", "10.0"]
    claimed = table.claimed(table.claims[0])
    assert claimed == ("rfid",)


def test_table_6_has_its_rows_as_columns():
    [table] = find_tables("t6")
    lines = table_lines(table, {"vae": {"mmd_25": (8.0, 0.25)}, "litevae": {}})
    assert lines[0].split(" | ")[0] == "| σ  " and "SD-VAE paper" in lines[0]
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["25", "8.67 ± 0.10", "8.000 ± 0.250", "1.44 ± 0.28", "–"]
    assert len(lines) == 2 + 5


@pytest.mark.parametrize("table", all_tables(), ids=lambda table: table.number)
def test_every_table_is_rectangular_and_has_the_papers_rows(table):
    lines = table_lines(table, {})
    assert len({len(line) for line in lines}) == 1
    assert len({line.count("|") for line in lines}) == 1
    if not table.transposed:
        assert len(lines) == 2 + len(table.rows)
        for line, row in zip(lines[2:], table.rows, strict=True):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert tuple(cells[: len(row.label)]) == row.label


def test_claims_are_compared_column_by_column():
    [table] = find_tables("t8")
    numbers = {
        "adaptive": {"rfid": None, "lpips": 0.1, "psnr": 24.0, "ssim": 0.7},
        "constant": {"rfid": None, "lpips": 0.1, "psnr": 23.0, "ssim": 0.71},
    }
    missing = {name: {"rfid": "no weights"} for name in numbers}
    each = equal_images(numbers)
    each["constant"]["psnr"] = each["constant"]["psnr"] + np.tile([0.011, -0.011], 20)
    lines = claim_lines(judge_numbers(table, numbers, missing, each=each), table)
    assert lines == [
        "- **does not hold**: a constant weight does as well as the adaptive one",
        "  - rFID: the paper's 1.01 against 1.01: cannot be judged (no weights)",
        "  - LPIPS: 0.100 against 0.100 (+0.000 ± 0.000), the paper's 0.070 against 0.070: holds",
        "  - PSNR: 23.00 against 24.00 (−1.0000 ± 0.0018), the paper's 29.33 against 29.24: "
        "does not hold",
        "  - SSIM: 0.710 against 0.700 (+0.010 ± 0.000), the paper's 0.87 against 0.86: holds",
        "- **does not hold**: a constant weight improves PSNR and SSIM",
        "  - PSNR: 23.00 against 24.00 (−1.0000 ± 0.0018), the paper's 29.33 against 29.24: "
        "does not hold",
        "  - SSIM: 0.710 against 0.700 (+0.010 ± 0.000), the paper's 0.87 against 0.86: holds",
    ]


def test_an_unknown_error_is_noted_once_a_claim():
    [table] = find_tables("t10")
    numbers = {"unet": {"rfid": 50.001}, "stylegan": {"rfid": 50.002}, "patchgan": {"rfid": 50.0}}
    lines = claim_lines(judge_numbers(table, numbers, {}), table)
    assert lines[:4] == [
        "- **holds** (its error is unknown): a U-Net discriminator gives a better rFID than "
        "StyleGAN's",
        "  - rFID: 50.00 against 50.00, the paper's 1.01 against 1.38",
        "- **does not hold** (its error is unknown): a U-Net discriminator gives a better rFID "
        "than PatchGAN",
        "  - rFID: 50.00 against 50.00, the paper's 1.01 against 1.61",
    ]
    [table] = find_tables("t3")
    numbers = {row.name: {"memory": 100.0, "images_per_second": 1.0} for row in table.rows}
    numbers["litevae-b"] = {"memory": 99.0, "images_per_second": 0.9}
    lines = claim_lines(judge_numbers(table, numbers, {}), table)
    assert lines[0].startswith("- **does not hold** (its error is unknown): ")
    assert lines[1].endswith(": holds") and lines[2].endswith(": does not hold")
    lines = claim_lines(judge_numbers(table, numbers, {}, counted={"memory"}), table)
    assert lines[0].startswith("- **does not hold**: ") and lines[1].endswith(": holds")
    assert lines[2].endswith(": does not hold (its error is unknown)")


def test_a_common_reason_is_given_once():
    [table] = find_tables("t9")
    lines = claim_lines(judge_numbers(table, {}, {}, "too short"), table)
    assert (
        lines[0] == "- **cannot be judged** (too short): the Gaussian loss improves PSNR and SSIM"
    )
    assert "\n".join(lines).count("too short") == len(table.claims)


def test_a_long_reason_is_shortened_only_where_it_is_printed_below():
    [table] = find_tables("t9")
    claims, why = judge_numbers(table, {}, {}, "long " * 20), "long " * 20
    assert why in claim_lines(claims, table)[0]
    assert "(see below)" in claim_lines(claims, table, {why})[0]


@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        ("memory", 12130.4, "12,130"),
        ("lpips", 0.0714, "0.071"),
        ("mmd_25", (1.0, 0.5), "1.000 ± 0.500"),
        ("mmd_25", [1.0, 0.5], "1.000 ± 0.500"),  # as JSON gives it back
        ("psnr", None, "–"),
    ],
)
def test_numbers_are_formatted_by_column(column, value, shown):
    assert show(column, value) == shown


# --------------------------------------------------------------- differences from the paper
@cache
def plan_of(scale, settings=()):
    return BuildPlan(load_scale(scale), settings=settings)


def deviations(table, scale, records=None, settings=()):
    plan = plan_of(scale, settings)
    return Result(table, plan, plan.targets(table), records or {}, {}, 0.0).deviations


def lines(word, *how, **options):
    [table] = find_tables(word)
    return deviations(table, *how, **options)


@pytest.mark.parametrize("table", all_tables(), ids=lambda table: table.number)
def test_the_full_recipe_has_no_deviations(table):
    found = deviations(table, "paper")
    if table.measure != "encoder":
        edm = (EDM,) if table.measure == "generation" else ()
        assert tuple(found) == (SILENT, ONE_SEED, *edm)


@pytest.mark.parametrize("table", all_tables(), ids=lambda table: table.number)
def test_every_differing_key_is_reported(table):
    if table.measure == "encoder":
        return
    plan, found = plan_of("small"), deviations(table, "small")
    for row in table.rows:
        ours = flatten(decisive(plan.recipe_of(row.preset)))
        theirs = flatten(decisive(published_recipe(row.preset)))
        keys = [k for k in ours if ours[k] != theirs.get(k)]
        assert len(found) >= len(keys) + 2 > 2


def test_deviations_are_in_words():
    found = lines("t4", "small", settings=("loss.lpips=0",))
    assert "Data: the photographs of scikit-image instead of data/imagenet128." in found
    assert "Training: 4,000 steps at 64² instead of 200,000 steps at 128²." in found
    assert "Batch size: 8 instead of 16." in found
    [lpips] = [line for line in found if line.startswith("Weight of LPIPS in the loss: 0")]
    assert "VGG-16" in lpips
    assert "Settings: loss.lpips=0." in found


def test_stylegans_default_width_is_a_number():
    [line] = [line for line in lines("t10", "small") if line.startswith("Base width of the disc")]
    assert line == "Base width of the discriminator: 16 instead of 64; 64 instead of 256."


def test_only_decisive_keys_of_a_run_are_reported():
    settings = ("run.seed=1", "run.precision=bf16", "run.log_every_steps=3", "run.keep_states=1")
    found = lines("t4", "small", settings=settings)
    assert "Seed: 1 instead of 0." in found
    assert "Precision of the training: bf16 instead of auto." in found
    assert not any("steps: 3 in" in line or "keep_states: " in line for line in found)
    [target, *_] = plan_of("small", settings).targets(find_tables("t4")[0])
    kept = target.request(load_scale("small").protocol)["trained"]["recipe"]["run"]
    assert kept == {"seed": 1, "precision": "bf16"}


def test_different_ways_share_a_line():
    [line] = [
        line for line in lines("t2a", "smoke") if "base width of feature extr" in line.lower()
    ]
    assert "2 instead of 16" in line and "4 instead of 32" in line and "8 instead of 64" in line


def test_both_stages_are_reported():
    found = lines("t13", "smoke")
    assert any(line.startswith("Stage one, training: 8 steps at 64²") for line in found)
    assert any(line.startswith("Steps: 51 instead of 635,000") for line in found)


def test_shared_trainings_are_reported():
    assert any("Rows ffhq-vae, deepfashion-vae differ in" in line for line in lines("t11", "smoke"))
    assert not any("share one training" in line for line in lines("t12", "smoke"))


def test_checkpoints_and_notes_are_reported():
    record = {"taken": {"path": "x.pt"}, "notes": ["Measured over 38 images."]}
    found = lines(
        "t4", "small", {"smc": record, "group": {"taken": None, "notes": record["notes"]}}
    )
    assert any(line.startswith("Row smc is x.pt") for line in found)
    assert found.count("Measured over 38 images.") == 1


@pytest.mark.parametrize(
    ("word", "settings", "found"),
    [
        ("t14", ("loss.lpips=0",), ["loss.lpips"]),  # the row LPIPS would have none
        ("t15", ("loss.lpips=0",), []),
        ("t5", ("phases.0.steps=8",), []),
        ("t9", ("batch_size=4",), []),
    ],
)
def test_undone_differences_are_found(word, settings, found):
    [table] = find_tables(word)
    assert undone_differences(plan_of("small", settings).targets(table), settings) == found
