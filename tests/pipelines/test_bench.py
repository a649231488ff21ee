"""Costs of encoders and their tables; nothing here looks at a clock."""

import json
import re

import pytest
import torch

from autoencoders import build_autoencoder
from ldm.config import published
from ldm.errors import UsageError
from pipelines import bench
from pipelines.bench import PAPER, SOURCE, Bench, EncoderCost, bench_encoders
from tests.golden import ENCODER_GMAC_256, LITEVAE_ENCODER_PARAMETERS, SDVAE_ENCODER_PARAMETERS

QUICK = {"resolution": 32, "batch": 2, "device": "cpu", "repeats": 1}
VAE = EncoderCost("sdvae", 34_163_592, 136.36, 8000.0, 50.0)
SMALL = EncoderCost("litevae-s", 1_035_692, 5.76, 1000.0, 1250.0)
OTHER = EncoderCost("dwt", 0, 0.0, 100.0, 5000.0)
FACTS = {"device": "a machine", "versions": {"torch": "2.0"}}


def measure(*args, **how):
    return bench_encoders(*args, **how).costs


@pytest.fixture(autouse=True)
def no_clock(monkeypatch):
    """A tenth of a second for each call; what they answered is kept."""
    answers = {}

    def take(calls, repeats, device):
        answers.update({name: call() for name, call in calls.items()})
        return dict.fromkeys(calls, 0.1)

    monkeypatch.setattr(bench, "time_interleaved", take)
    return answers


def test_parameters_and_arithmetic_are_golden(no_clock):
    names = ("sdvae", "litevae-b")
    costs = measure(names, **QUICK)
    assert [cost.name for cost in costs] == list(names)
    wanted = {**LITEVAE_ENCODER_PARAMETERS, "sdvae": SDVAE_ENCODER_PARAMETERS}
    for cost in costs:
        assert cost.parameters == wanted[cost.name]
        assert cost.parameters / 1e6 == pytest.approx(PAPER[cost.name].parameters, abs=0.01)
        # convolutions take as many for each pixel; attention, less than a hundredth, does not
        assert cost.gmac == pytest.approx(ENCODER_GMAC_256[cost.name] / 8**2, rel=0.01)
        assert no_clock[cost.name].mean.shape == (2, 4, 4, 4)


def test_paper_costs_equal_those_of_the_recipes():
    for name, theirs in PAPER.items():
        told = published("recipes", f"t03-{name}")
        numbers = (told["params"], told["memory"], told["images_per_second"])
        assert numbers == (pytest.approx(theirs.parameters, abs=0.01), *theirs[2:])


def test_speed_is_of_the_timed_batch(no_clock):
    (cost,) = measure(["dwt"], **QUICK)
    assert cost.images_per_second == pytest.approx(20)
    (cost,) = measure(["dwt"], **QUICK, timed=5)
    assert cost.images_per_second == pytest.approx(50) and len(no_clock["dwt"].mean) == 5
    (cost,) = measure(["dwt"], 32, 64, "cpu", 1)
    assert cost.images_per_second == pytest.approx(20)  # two of them: it is a CPU


@torch.no_grad()
def test_memory_lies_between_the_largest_layer_and_all_layers():
    encoder = build_autoencoder("litevae-s").encoder
    weights = sum(p.numel() * 4 for p in encoder.parameters())
    largest, all_of_them = 0, 0

    def watch(module, given, answer):
        nonlocal largest, all_of_them
        size = given[0].nbytes + answer.nbytes
        largest, all_of_them = max(largest, size), all_of_them + size

    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm):
            module.register_forward_hook(watch)
    encoder(torch.zeros(2, 3, 32, 32))
    peaks = {b: measure(["litevae-s"], 32, b, "cpu", 1)[0].peak_mib for b in (2, 4, 8)}
    assert largest < peaks[2] * 2**20 - weights < all_of_them
    # it grows with the batch, from the weights alone
    assert peaks[8] - peaks[4] == pytest.approx(2 * (peaks[4] - peaks[2]))
    assert (2 * peaks[2] - peaks[4]) * 2**20 == pytest.approx(weights, rel=1e-3)


def test_names_count_once_and_half_precision_takes_less_memory():
    (half,) = measure(["litevae-s"], 32, 32, "cpu", 1, precision="bf16")
    (whole,) = measure(["litevae-s", "litevae-s"], 32, 32, "cpu", 1)
    assert half.peak_mib < whole.peak_mib


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"names": ["litevea-b"]}, "no preset 'litevea-b'; did you mean 'litevae-b'?"),
        ({"names": []}, "name one or more"),
        ({"batch": 0}, "--batch 0: must be at least 1"),
        ({"timed": -1}, "--timed -1: must be at least 1"),
        ({"repeats": 0}, "--repeats 0: must be at least 1"),
        ({"resolution": 100}, "--resolution 100: it must be a multiple of 8"),
    ],
)
def test_bad_options_are_refused_in_one_line(asked, told):
    with pytest.raises(UsageError) as error:
        measure(**{"names": ["litevae-s"], **QUICK, **asked})
    assert told in str(error.value) and "\n" not in str(error.value)


def test_costs_and_ratios_stand_beside_the_papers():
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


def test_headers_name_the_papers_columns():
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
def test_ratios_need_the_vae_and_another(costs):
    assert len(Bench(costs, FACTS).tables()) == 1


def test_markdown_holds_facts_and_tables():
    text = Bench([VAE, SMALL], FACTS).as_markdown()
    assert "- device: a machine\n- versions: torch 2.0\n" in text and SOURCE in text
    row = "| litevae-s | 1.04 | 1.03 | 5.76 | | 1,000 | 1,324 | 1,250 | 384 |"
    assert row in re.sub(" +", " ", text)
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert sorted(set(tables)) == [9, 10] and "as multiples of sdvae's" in text


def test_files_hold_costs_and_conditions(tmp_path):
    result = bench_encoders(["litevae-s"], 32, 4, "cpu", 1, 1, out=tmp_path / "new")
    tree = json.loads((tmp_path / "new" / "bench.json").read_text("utf-8"))
    (row,) = tree["encoders"]
    assert row["paper"] == PAPER["litevae-s"]._asdict()
    assert row["images_per_second"] == result.costs[0].images_per_second > 0
    assert "batch size 4 at 32²" in tree["memory"] and "counted" in tree["memory"]
    assert "batch size 1 at 32²" in tree["speed"] and tree["versions"]["torch"]
    assert row["parameters"] == 1_035_692 and "compare the ratios" in tree["note"]
    assert (tmp_path / "new" / "bench.md").read_text("utf-8") == result.as_markdown()
