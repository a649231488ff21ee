"""Tables as text."""

import numpy as np
import pytest

from pipelines.reproduce.claims import judge
from pipelines.reproduce.output import claim_lines, show, table_lines
from pipelines.reproduce.tables import all_tables, find_tables
from tests.pipelines.reproduce.images import equal_images


def test_ours_stands_beside_theirs():
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


def test_psnr_and_swd_stand_beside_an_rfid_that_is_missing():
    [table] = find_tables("t12")
    numbers = {"dwt": {"rfid": None, "psnr": 20.0, "swd": 10.0}}
    header, _, _, dwt, _ = table_lines(table, numbers)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, dwt)]
    assert cells[0][3:] == ["rFID ↓ paper", "here", "PSNR ↑ here", "SWD ×10³ ↓ here"]
    assert cells[1] == ["ImageNet", "DWT", "12", "1.65", "–", "20.00", "10.0"]
    claimed = table.claimed(table.config.claims[0])
    assert claimed == ("rfid",)


def test_table_6_has_its_rows_across():
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
    if not table.config.transposed:
        assert len(lines) == 2 + len(table.rows)
        for line, row in zip(lines[2:], table.rows, strict=True):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert tuple(cells[: len(row.label)]) == row.label


def test_claims_in_words():
    [table] = find_tables("t8")
    numbers = {
        "adaptive": {"rfid": None, "lpips": 0.1, "psnr": 24.0, "ssim": 0.7},
        "constant": {"rfid": None, "lpips": 0.1, "psnr": 23.0, "ssim": 0.71},
    }
    missing = {name: {"rfid": "no weights"} for name in numbers}
    each = equal_images(numbers)
    each["constant"]["psnr"] = each["constant"]["psnr"] + np.tile([0.011, -0.011], 20)
    lines = claim_lines(judge(table, numbers, missing, each=each), table)
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


def test_an_error_that_is_not_known_is_said_once_a_line():
    [table] = find_tables("t10")
    numbers = {"unet": {"rfid": 50.001}, "stylegan": {"rfid": 50.002}, "patchgan": {"rfid": 50.0}}
    lines = claim_lines(judge(table, numbers, {}), table)
    assert lines[:4] == [
        "- **holds** (its error is not known): a U-Net discriminator gives a better rFID than "
        "StyleGAN's",
        "  - rFID: 50.00 against 50.00, the paper's 1.01 against 1.38",
        "- **does not hold** (its error is not known): a U-Net discriminator gives a better rFID "
        "than PatchGAN",
        "  - rFID: 50.00 against 50.00, the paper's 1.01 against 1.61",
    ]
    [table] = find_tables("t3")
    numbers = {row.name: {"memory": 100.0, "images_per_second": 1.0} for row in table.rows}
    numbers["litevae-b"] = {"memory": 99.0, "images_per_second": 0.9}
    lines = claim_lines(judge(table, numbers, {}), table)
    assert lines[0].startswith("- **does not hold** (its error is not known): ")
    assert lines[1].endswith(": holds") and lines[2].endswith(": does not hold")
    lines = claim_lines(judge(table, numbers, {}, counted={"memory"}), table)
    assert lines[0].startswith("- **does not hold**: ") and lines[1].endswith(": holds")
    assert lines[2].endswith(": does not hold (its error is not known)")


def test_one_reason_is_said_once():
    [table] = find_tables("t9")
    lines = claim_lines(judge(table, {}, {}, "too short"), table)
    assert (
        lines[0] == "- **cannot be judged** (too short): the Gaussian loss improves PSNR and SSIM"
    )
    assert "\n".join(lines).count("too short") == len(table.config.claims)


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
def test_numbers(column, value, shown):
    assert show(column, value) == shown
