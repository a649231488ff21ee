"""The paper's numbers and claims in `configs/tables/`."""

import re

import pytest

from ldm.config import list_presets, validate
from ldm.errors import UsageError
from pipelines.reproduce.claims import judge
from pipelines.reproduce.tables import COLUMNS, TableConfig, all_tables, find_row, find_tables
from tests.pipelines.reproduce.images import equal_images

TABLES = all_tables()


def test_tables_are_all_22_in_order():
    numbers = [int(re.match(r"T(\d+)", table.number)[1]) for table in TABLES]
    assert sorted(set(numbers)) == list(range(1, 23)) and numbers == sorted(numbers)


def test_every_row_has_a_recipe_and_every_recipe_a_row():
    rows = {(row.kind, row.preset) for table in TABLES for row in table.rows}
    recipes = {
        (kind, name)
        for kind in ("recipes", "diffusion")
        for name in list_presets(kind)
        if re.match(r"t\d\d", name)
    }
    assert rows == recipes


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.number)
def test_rows_have_the_papers_numbers_in_every_column(table):
    for row in table.rows:
        assert list(row.paper) == list(table.config.columns), row.preset
        assert len(row.label) == (1 if table.config.transposed else len(table.config.header))
    labels = [row.label for row in table.rows]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.number)
def test_every_claim_holds_in_the_papers_own_numbers(table):
    paper = {row.name: row.paper for row in table.rows}
    claims = judge(table, paper, {}, each=equal_images(paper))
    assert claims
    for claim in claims:
        assert claim.verdict == "holds", (claim.claim.says, claim.comparisons)


def test_a_reversed_claim_does_not_hold_in_the_papers_numbers():
    [table] = find_tables("t10")
    claim = table.config.claims[0].model_copy(update={"row": "patchgan", "than": "unet"})
    config = table.config.model_copy(update={"claims": (claim,)})
    wrong = type(table)(table.name, config, table.rows)
    paper = {row.name: row.paper for row in table.rows}
    [judged] = judge(wrong, paper, {}, each=equal_images(paper))
    assert judged.verdict == "does not hold"


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("t9", ["T9"]), ("T09", ["T9"]), ("9", ["T9"]), ("table 9", ["T9"]), ("t2b", ["T2b"]),
        ("t2", ["T2a", "T2b"]), ("T22", ["T22"]),
    ],
)  # fmt: skip
def test_tables_are_found_by_word(word, found):
    assert [table.number for table in find_tables(word)] == found


@pytest.mark.parametrize("word", ["t23", "t0", "figure5", "", "t2c", "t1-t4"])
def test_an_unknown_table_lists_all(word):
    with pytest.raises(UsageError) as caught:
        find_tables(word)
    told = str(caught.value)
    assert "\n" not in told
    assert all(f" {table.number}" in told for table in TABLES)


def test_rows_are_found_by_any_name():
    [table] = find_tables("t9")
    for word in ("gaussian", "t09-gaussian", "t09/gaussian"):
        assert find_row(table, word).preset == "t09-gaussian"
    with pytest.raises(UsageError, match="no row 'smc'; its rows are: baseline, gaussian, wavelet"):
        find_row(table, "smc")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"columns": ["rfit"]}, "no 'rfit'; did you mean 'rfid'"),
        ({"claims": [{"says": "", "row": "c", "relation": "better", "than": "a"}]}, "no 'c'"),
        (
            {"claims": [{"says": "", "row": "a", "relation": "better", "than": "b",
                         "columns": ["psnr"]}]},
            "no 'psnr'",
        ),
    ],
)  # fmt: skip
def test_bad_tables_are_refused(change, told):
    good = {"title": "", "header": ["x"], "rows": ["a", "b"], "columns": ["rfid"], "claims": []}
    validate(TableConfig, good)
    with pytest.raises(UsageError, match=told):
        validate(TableConfig, good | change)


def test_yardsticks_are_the_widest_that_the_paper_calls_similar():
    """Table 11 (DeepFashion), Table 10 (PatchGAN), Table 16: no wider, and not by much."""
    widest = {"rfid": (1.71, 1.64), "lpips": (0.070, 0.063), "psnr": (29.24, 29.61),
              "ssim": (0.86, 0.88)}  # fmt: skip
    for name, (row, other) in widest.items():
        needed = -COLUMNS[name].gain(row, other)
        assert needed <= COLUMNS[name].yardstick(other) < 1.2 * needed, name
