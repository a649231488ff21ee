"""The paper's numbers and claims in `configs/tables/`: they hold, do not, or cannot be judged."""

import re

import numpy as np
import pytest
from scipy import stats

from ldm.config import list_presets, validate
from ldm.errors import UsageError
from pipelines.reproduce.tables import (
    COLUMNS,
    STUDENT_T,
    UNKNOWN,
    Claim,
    Row,
    Table,
    all_tables,
    find_tables,
    judge,
)
from tests.pipelines.reproduce.images import equal_images, judge_numbers

TABLES = all_tables()
ROWS = tuple(Row(table="t99", name=name, label=(name,), paper={}) for name in "ab")


def test_tables_are_all_22_in_order():
    numbers = [int(re.match(r"T(\d+)", table.number)[1]) for table in TABLES]
    assert sorted(set(numbers)) == list(range(1, 23)) and numbers == sorted(numbers)


def test_every_row_has_a_recipe_and_every_recipe_a_row():
    rows = {
        ("diffusion" if table.measure == "generation" else "recipes", row.preset)
        for table in TABLES
        for row in (*table.rows, *table.ours.rows)
    }
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
        assert list(row.paper) == list(table.columns), row.preset
        assert len(row.label) == (1 if table.transposed else len(table.header))
    labels = [row.label for row in table.rows]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.number)
def test_every_claim_holds_in_the_papers_own_numbers(table):
    paper = {row.name: row.paper for row in table.rows}
    claims = judge_numbers(table, paper, {}, each=equal_images(paper))
    assert claims
    for claim in claims:
        assert claim.verdict == "holds", (claim.claim.says, claim.comparisons)


def test_a_reversed_claim_does_not_hold_in_the_papers_numbers():
    [table] = find_tables("t10")
    claim = table.claims[0].model_copy(update={"row": "patchgan", "than": "unet"})
    wrong = table.model_copy(update={"claims": (claim,)})
    paper = {row.name: row.paper for row in table.rows}
    [judged] = judge_numbers(wrong, paper, {}, each=equal_images(paper))
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
    good = {"name": "t99", "title": "", "header": ["x"], "rows": ROWS, "columns": ["rfid"],
            "claims": []}  # fmt: skip
    validate(Table, good)
    with pytest.raises(UsageError, match=told):
        validate(Table, good | change)


def test_yardsticks_are_the_widest_that_the_paper_calls_similar():
    """Table 11 (DeepFashion), Table 10 (PatchGAN), Table 16: no wider, and not by much."""
    widest = {"rfid": (1.71, 1.64), "lpips": (0.070, 0.063), "psnr": (29.24, 29.61),
              "ssim": (0.86, 0.88)}  # fmt: skip
    for name, (row, other) in widest.items():
        needed = -COLUMNS[name].margins("better", row, other)
        yardstick = COLUMNS[name].margins("no_worse", other, other)
        assert needed <= yardstick < 1.2 * needed, name


def test_our_rows_stand_behind_the_papers():
    [t2a] = find_tables("t2a")
    ours = t2a.with_ours()
    assert [row.name for row in ours.rows] == ["vae", "s", "b", "m", "l", "s-plus", "b-plus"]
    assert ours.rows[-1].label == ("LiteVAE-B-plus",) and not ours.rows[-1].paper
    assert ours.claims == t2a.claims + t2a.ours.claims and not ours.ours.rows
    [t9] = find_tables("t9")
    assert t9.with_ours() == t9


def test_all_our_claims_say_so():
    claims = [claim for table in TABLES for claim in table.ours.claims]
    assert claims and all(claim.says.startswith("ours") for claim in claims)
    papers = [claim for table in TABLES for claim in table.claims]
    assert not any(claim.says.startswith("ours") for claim in papers)


# ---------------------------------------------------------------------------------- claims
def table(relation: str, columns: tuple[str, ...] = ("rfid", "psnr")) -> Table:
    claim = Claim(says="a beats b", row="a", relation=relation, than="b")
    return Table(
        name="t99", title="", header=("row",), rows=ROWS, columns=("params", *columns),
        claims=(claim,),
    )  # fmt: skip


def verdict(relation: str, column: str, a, b) -> str:
    numbers = {"a": {column: a}, "b": {column: b}}
    [claim] = judge_numbers(table(relation, (column,)), numbers, {}, each=equal_images(numbers))
    return claim.verdict


@pytest.mark.parametrize(
    ("relation", "column", "a", "b", "holds"),
    [
        ("better", "rfid", 0.99, 1.0, True),  # lower is better
        ("better", "rfid", 1.0, 1.0, False),
        ("better", "rfid", 1.01, 1.0, False),
        ("better", "psnr", 29.1, 29.0, True),  # higher is better
        ("better", "psnr", 28.9, 29.0, False),
        ("no_worse", "rfid", 1.05, 1.0, True),  # 5 % of the row compared with
        ("no_worse", "rfid", 1.06, 1.0, False),
        ("no_worse", "rfid", 0.2, 1.0, True),
        ("no_worse", "psnr", 28.6, 29.0, True),  # 0.4 dB
        ("no_worse", "psnr", 28.5, 29.0, False),
        ("no_worse", "ssim", 0.86, 0.88, True),  # whose difference is a hair above 0.02
        ("similar", "psnr", 29.4, 29.0, True),
        ("similar", "psnr", 29.5, 29.0, False),  # better is not alike
        ("similar", "psnr", 28.5, 29.0, False),
    ],
)
def test_relations(relation, column, a, b, holds):
    assert verdict(relation, column, a, b) == ("holds" if holds else "does not hold")


@pytest.mark.parametrize("relation", ["better", "no_worse", "similar"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_infinite_numbers_are_not_judged(relation, number):
    assert verdict(relation, "psnr", number, 29.0) == "cannot be judged"


def test_parameters_are_not_claimed():
    assert table("better").claimed(table("better").claims[0]) == ("rfid", "psnr")


def test_no_column_stands_in_for_another():
    numbers = {"a": {"psnr": 30.0, "rfid": None}, "b": {"psnr": 29.0, "rfid": 1.0}}
    why = {"a": {"rfid": "no weights"}}
    [claim] = judge_numbers(table("better"), numbers, why, each=equal_images(numbers))
    assert claim.verdict == "cannot be judged"
    assert [f.verdict for f in claim.comparisons] == ["cannot be judged", "holds"]
    assert claim.comparisons[0].why == "no weights" and claim.comparisons[0].here is None
    # but one column that speaks against it is enough
    numbers["a"]["psnr"] = 28.0
    [claim] = judge_numbers(table("better"), numbers, why, each=equal_images(numbers))
    assert claim.verdict == "does not hold"


def test_a_doubtful_number_is_shown_and_not_judged():
    numbers = {"a": {"rfid": 1.0, "psnr": 30.0}, "b": {"rfid": 2.0, "psnr": 29.0}}
    [claim] = judge_numbers(table("better"), numbers, {"b": {"rfid": "of 38 images"}})
    comparison = claim.comparisons[0]
    assert (comparison.verdict, comparison.here, comparison.why) == (
        "cannot be judged", (1.0, 2.0), "of 38 images",
    )  # fmt: skip


def test_missing_rows_are_not_judged():
    [claim] = judge_numbers(table("better"), {"b": {"rfid": 1.0, "psnr": 2.0}}, {})
    assert {f.why for f in claim.comparisons} == {"not measured"}


def test_a_short_scale_judges_nothing():
    numbers = {"a": {"rfid": 1.0, "psnr": 30.0}, "b": {"rfid": 2.0, "psnr": 29.0}}
    [claim] = judge_numbers(table("better"), numbers, {}, "too short")
    assert claim.verdict == "cannot be judged"
    assert all(f.why == "too short" and f.here for f in claim.comparisons)


@pytest.mark.parametrize("relation", ["better", "no_worse", "similar"])
def test_an_unknown_error_is_noted(relation):
    """rFID, FID, throughput and memory are measured once, over all images together."""
    columns = ("rfid", "fid", "memory", "images_per_second", "gmac", "psnr")
    numbers = {"a": dict.fromkeys(columns, 50.001), "b": dict.fromkeys(columns, 50.001)}
    numbers["a"] |= {"rfid": 50.0, "images_per_second": 50.002, "gmac": 50.0, "psnr": 50.002}
    each = equal_images(numbers)
    [claim] = judge_numbers(table(relation, columns), numbers, {}, each=each)
    told = {comparison.column: comparison.why for comparison in claim.comparisons}
    unknown = dict.fromkeys(("rfid", "fid", "memory", "images_per_second"), UNKNOWN)
    assert told == unknown | {"gmac": "", "psnr": ""}
    verdicts = {comparison.column: comparison.verdict for comparison in claim.comparisons}
    assert verdicts["rfid"] == "holds"
    assert verdicts["memory"] == ("does not hold" if relation == "better" else "holds")
    # counted on paper
    [claim] = judge_numbers(table(relation, columns), numbers, {}, "", each, {"memory"})
    assert {f.column for f in claim.comparisons if f.why} == set(unknown) - {"memory"}


def test_mmd_is_judged_by_the_images_shares():
    """Means that are far apart beside their own errors, and near beside that of the difference."""
    shares = RNG.normal(0, 0.3, (2, 40))
    shares -= shares.mean(1, keepdims=True)
    each = {
        row: {"k": np.arange(40), "mmd_25": value + share}
        for row, value, share in zip("ab", (1.0, 1.1), shares, strict=True)
    }
    numbers = {row: {"mmd_25": (of["mmd_25"].mean(), 0.04)} for row, of in each.items()}
    [claim] = judge_numbers(table("better", ("mmd_25",)), numbers, {}, each=each)
    [comparison] = claim.comparisons
    expected = stats.sem(each["a"]["mmd_25"] - each["b"]["mmd_25"])
    assert comparison.error == pytest.approx(expected) and 0.05 < expected < 0.1
    assert comparison.why == "within two standard errors"
    # over other images, however many they were
    del each["b"]
    [claim] = judge_numbers(table("better", ("mmd_25",)), numbers, {}, each=each)
    assert claim.comparisons[0].why == "not measured over the same images"


# ---------------------------------------------------------------------- by how much images decide
RNG = np.random.default_rng(0)
HARD = RNG.normal(29, 3, 40)  # what one image has and another has not


def of_images(gain: float, noise: float = 0.1) -> dict[str, dict]:
    """Two rows of 40 images: `a` is better by `gain` dB in the mean, more or less of each."""
    more = RNG.normal(0, noise, 40)
    values = {"a": HARD + gain + more - more.mean(), "b": HARD}
    return {row: {"k": np.arange(40), "psnr": psnr} for row, psnr in values.items()}


def judged(relation: str, each):
    numbers = {row: {"psnr": float(of["psnr"].mean())} for row, of in each.items()}
    [claim] = judge_numbers(table(relation, ("psnr",)), numbers, {}, "", each)
    return claim.comparisons[0]


def test_the_standard_error_is_of_the_differences():
    each = of_images(0.5)
    expected = stats.sem(each["a"]["psnr"] - each["b"]["psnr"])
    assert judged("better", each).error == pytest.approx(expected) and expected < 0.05
    assert stats.sem(HARD) > 0.3, "images by themselves spread far more"


@pytest.mark.parametrize(
    ("relation", "gain", "verdict"),
    [
        ("better", 0.1, "holds"), ("better", -0.1, "does not hold"),
        ("better", 0.02, "cannot be judged"), ("better", -0.02, "cannot be judged"),
        ("no_worse", -0.3, "holds"), ("no_worse", -0.5, "does not hold"),
        ("no_worse", -0.41, "cannot be judged"), ("no_worse", 0.01, "holds"),
        ("similar", 0.3, "holds"), ("similar", 0.5, "does not hold"),
        ("similar", 0.39, "cannot be judged"),
    ],
)  # fmt: skip
def test_claims_within_two_standard_errors_are_not_judged(relation, gain, verdict):
    comparison = judged(relation, of_images(gain))
    assert comparison.verdict == verdict
    assert (comparison.why == "within two standard errors") == (verdict == "cannot be judged")


def test_rows_of_different_images_are_not_compared():
    each = of_images(9.0)
    each["a"]["k"] = np.arange(1, 41)
    comparison = judged("better", each)
    assert (comparison.error, comparison.why) == (None, "not measured over the same images")
    each["a"] = {name: values[:35] for name, values in each["a"].items()}
    assert judged("better", each).verdict == "cannot be judged"


def test_fewer_than_thirty_images_decide_nothing():
    for count, why in ((29, "over fewer than 30 images"), (30, "")):
        each = {
            row: {name: values[:count] for name, values in of.items()}
            for row, of in of_images(9.0).items()
        }
        assert judged("better", each).why == why


@pytest.mark.parametrize("relation", ["no_worse", "similar"])
@pytest.mark.parametrize("kind", ["a part", "a share"])
def test_a_claim_on_the_edge_is_rarely_judged(relation, kind):
    """LPIPS is alike within 12 % of each image's own, however our loss comes about."""
    hard = np.abs(RNG.normal(0.3, 0.1, (200, 64)))
    noise = RNG.normal(0, 0.02, hard.shape)
    worse = 1.12 * hard if kind == "a share" else hard + 0.12 * hard.mean()
    found = 0
    for ours, other in zip(worse + noise, hard, strict=True):
        each = {
            "a": {"k": np.arange(64), "lpips": ours},
            "b": {"k": np.arange(64), "lpips": other},
        }
        numbers = {row: {"lpips": float(of["lpips"].mean())} for row, of in each.items()}
        [claim] = judge_numbers(table(relation, ("lpips",)), numbers, {}, each=each)
        found += claim.verdict != "cannot be judged"
    assert 0 < found < 24, "one in twenty of 200, and what chance adds"


# ---------------------------------------------------------------------------- over several seeds
def test_student_t_is_that_of_scipy():
    expected = [stats.t.ppf(0.975, seeds - 1) for seeds in range(2, 11)]
    np.testing.assert_allclose(STUDENT_T, expected, atol=0.005)


def judged_over_seeds(relation: str, a: list[float], b: list[float], column="psnr"):
    numbers = {"a": {column: np.mean(a)}, "b": {column: np.mean(b)}}
    records = {
        row: {"numbers": of, "missing": {}, "seeds": {column: values}}
        for (row, of), values in zip(numbers.items(), (a, b), strict=True)
    }
    each = equal_images(numbers)
    [claim] = judge(table(relation, (column,)), records, each, "")
    return claim.comparisons[0]


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.9, 1.0, 1.1], "holds"), ([-0.9, -1.0, -1.1], "does not hold"),
        ([0.2, 1.0, 1.8], "cannot be judged"),  # 1.0 ± 0.46: 2.2 standard errors, of 4.3
        ([0.9, 1.1], "cannot be judged"),  # of two, ten of them
        ([0.7, 0.9, 1.0, 1.1, 1.3], "holds"),
    ],
)  # fmt: skip
def test_seeds_that_disagree_decide_nothing(gains, verdict):
    found = judged_over_seeds("better", [29 + gain for gain in gains], [29.0] * len(gains))
    assert found.verdict == verdict
    assert (found.why == "within the error over seeds") == (verdict == "cannot be judged")
    assert found.error == pytest.approx(stats.sem(gains))


def test_the_error_of_rfid_is_known_over_seeds():
    found = judged_over_seeds("better", [3.0, 3.1, 3.2], [4.0, 4.1, 4.2], "rfid")
    assert (found.verdict, found.why, found.error) == ("holds", "", pytest.approx(0, abs=1e-12))
    unsure = judged_over_seeds("no_worse", [3.0, 3.5, 4.0], [3.2, 3.3, 3.4], "rfid")
    assert unsure.why == "within the error over seeds"


def test_the_larger_of_two_errors_counts():
    """Seeds that agree do not make up for images that do not."""
    more = RNG.normal(0, 3, 40)
    each = {
        "a": {"k": np.arange(40), "psnr": HARD + 0.3 + more - more.mean()},
        "b": {"k": np.arange(40), "psnr": HARD},
    }
    numbers = {row: {"psnr": float(of["psnr"].mean())} for row, of in each.items()}
    records = {
        row: {"numbers": of, "missing": {}, "seeds": {"psnr": [of["psnr"] + d for d in (0, 0.01)]}}
        for row, of in numbers.items()
    }
    [claim] = judge(table("better", ("psnr",)), records, each, "")
    [found] = claim.comparisons
    assert found.why == "within two standard errors"
    assert found.error == pytest.approx(stats.sem(more))
