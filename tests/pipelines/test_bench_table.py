import json

import pytest

from pipelines.bench import PAPER, SOURCE, Bench, EncoderCost, bench_encoders

VAE = EncoderCost("sdvae", 34_163_592, 136.36, 8000.0, 50.0)
SMALL = EncoderCost("litevae-s", 1_035_692, 5.76, 1000.0, 1250.0)
OTHER = EncoderCost("dwt", 0, 0.0, 100.0, 5000.0)
FACTS = {"device": "a machine", "versions": {"torch": "2.0"}}


def test_each_stands_beside_the_paper_and_ratios_beside_its_ratios():
    measured, ratios = Bench([VAE, SMALL, OTHER], FACTS).tables()
    assert measured[2][0] == [
        "sdvae", "34.16", "34.16", "136.36", "135.59", "8,000", "8,860", "50", "68"
    ]  # fmt: skip
    assert measured[2][2] == ["dwt", "0.00", "", "0.00", "", "100", "", "5,000", ""]
    # Table 3: 1.03 of 34.16 M, 1324 of 8860 MB, 384 against 68 images/s
    assert ratios[2] == [
        ["litevae-s", "0.03", "0.03", "0.04", "0.12", "0.15", "25.00", "5.65"],
        ["dwt", "0.00", "", "0.00", "0.01", "", "100.00", ""],
    ]
    for _, header, rows in (measured, ratios):
        assert all(len(row) == len(header) for row in rows)


def test_every_column_says_whose_it_is():
    measured, ratios = Bench([VAE, SMALL], FACTS).tables()
    assert measured[1][1:] == [
        "weights, M", "paper's weights, M", "GMAC", "paper's GMAC", "MiB", "paper's MB",
        "images/s", "paper's images/s",
    ]  # fmt: skip
    assert ratios[1][1:] == [
        "weights", "paper's weights", "GMAC", "memory", "paper's memory", "images/s",
        "paper's images/s",
    ]  # fmt: skip


@pytest.mark.parametrize("costs", [[VAE], [SMALL, OTHER]])
def test_there_are_no_ratios_without_two_of_which_one_is_the_vae(costs):
    assert len(Bench(costs, FACTS).tables()) == 1


def test_markdown_says_it_all():
    text = Bench([VAE, SMALL], FACTS).as_markdown()
    assert "- device: a machine\n- versions: torch 2.0\n" in text and SOURCE in text
    assert "| litevae-s | 1.04 | 1.03 | 5.76 |  | 1,000 | 1,324 | 1,250 | 384 |" in text
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert sorted(set(tables)) == [9, 10] and "as multiples of sdvae's" in text


def test_files_hold_what_was_measured_and_on_what(tmp_path):
    result = bench_encoders(["litevae-s"], 32, 4, "cpu", 1, 1, out=tmp_path / "new")
    tree = json.loads((tmp_path / "new" / "bench.json").read_text("utf-8"))
    (row,) = tree["encoders"]
    assert row["paper"] == PAPER["litevae-s"]._asdict()
    assert row["images_per_second"] == result.costs[0].images_per_second > 0
    assert "of 4 image(s) of 32²" in tree["memory"] and "on paper" in tree["memory"]
    assert "1 image(s) of 32² in a batch" in tree["speed"] and tree["versions"]["torch"]
    assert row["parameters"] == 1_035_692 and "compare the ratios" in tree["note"]
    assert (tmp_path / "new" / "bench.md").read_text("utf-8") == result.as_markdown()
