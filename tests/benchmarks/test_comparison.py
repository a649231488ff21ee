import json
import re

import pytest
import torch

from benchmarks.comparison import Row, Target, as_markdown, compare, describe_machine, judge, write
from ldm.device import name_device

ROWS = [
    Row("encoder", "quick", 0.1, 5.0, 40.0, 100.0),
    Row("encoder", "theirs", 0.5, 1.0, 8.0, 400.0),
    Row("wavelet", "ours", 0.002, 1.0, 2000.0),
]


def test_ratios_are_over_the_reference():
    rows = compare("encoder", {"quick": 0.1, "theirs": 0.5}, "theirs", 4, {"quick": 100.0})
    assert rows[0] == ROWS[0]
    assert (rows[1].ratio, rows[1].images_per_second, rows[1].peak_mib) == (1.0, 8.0, None)


@pytest.mark.parametrize(
    ("bound", "of_memory", "measured", "reached"),
    [
        (5, False, 5, True),
        (5.1, False, 5, False),
        (0.25, True, 0.25, True),
        (0.2, True, 0.25, False),
    ],
)
def test_a_target_is_reached_at_its_bound(bound, of_memory, measured, reached):
    (verdict,) = judge([Target("B", "encoder", "quick", "theirs", bound, of_memory)], ROWS)
    assert verdict.measured == pytest.approx(measured)
    assert verdict.reached == reached
    assert str(bound) in verdict.target


def test_page_and_json_hold_the_same(tmp_path):
    verdicts = judge([Target("B", "encoder", "quick", "theirs", 6)], ROWS)
    page = write(tmp_path / "new", "speed", "Speed", {"device": "a CPU"}, ROWS, verdicts)
    assert (tmp_path / "new" / "speed.md").read_text("utf-8") == page
    assert "# Speed\n\n- device: a CPU\n" in page
    lines = [re.sub(" +", " ", line) for line in page.splitlines()]
    assert "| encoder | quick | 100.0 | 40.00 | 5.00 | 100 |" in lines
    assert "| wavelet | ours | 2.0 | 2,000 | 1.00 | |" in lines
    assert "| B | ≥ 6 times as fast | 5.00 | no |" in lines
    tree = json.loads((tmp_path / "new" / "speed.json").read_text("utf-8"))
    assert [Row(**row) for row in tree["rows"]] == ROWS
    assert tree["targets"][0]["reached"] is False
    assert "target" not in as_markdown("Speed", {}, ROWS, [])


def test_the_machine_is_described_in_words():
    found = describe_machine(torch.device("cpu"), "float32")
    assert found["device"] == name_device(torch.device("cpu")) and found["precision"] == "float32"
    assert found["torch"] == torch.__version__
