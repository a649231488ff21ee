"""What encoders cost; nothing here looks at a clock."""

import pytest
import torch

import pipelines.bench as job
from autoencoders import build_autoencoder
from ldm.config import published
from ldm.errors import UsageError
from pipelines.bench import PAPER, measure_encoders
from tests.golden import (
    ENCODER_GMAC_256,
    LITEVAE_ENCODER_PARAMETERS,
    SDVAE_ENCODER_PARAMETERS,
)

SMALL = {"resolution": 32, "batch": 2, "device": "cpu", "repeats": 1}


@pytest.fixture(autouse=True)
def no_clock(monkeypatch):
    """A tenth of a second for each call; what they answered is kept."""
    answers = {}

    def take(calls, repeats, device):
        answers.update({name: call() for name, call in calls.items()})
        return dict.fromkeys(calls, 0.1)

    monkeypatch.setattr(job, "take_turns", take)
    return answers


def test_golden_sizes_and_arithmetic(no_clock):
    names = ("sdvae", "litevae-b")
    costs = measure_encoders(names, **SMALL)
    assert [cost.name for cost in costs] == list(names)
    wanted = {**LITEVAE_ENCODER_PARAMETERS, "sdvae": SDVAE_ENCODER_PARAMETERS}
    for cost in costs:
        assert cost.parameters == wanted[cost.name]
        assert cost.parameters / 1e6 == pytest.approx(PAPER[cost.name].parameters, abs=0.01)
        # convolutions take as many for each pixel; attention, less than a hundredth, does not
        assert cost.gmac == pytest.approx(ENCODER_GMAC_256[cost.name] / 8**2, rel=0.01)
        assert no_clock[cost.name].mean.shape == (2, 4, 4, 4)


def test_the_papers_numbers_are_those_of_its_recipes():
    for name, theirs in PAPER.items():
        told = published("recipes", f"t03-{name}")
        numbers = (told["params"], told["memory"], told["images_per_second"])
        assert numbers == (pytest.approx(theirs.parameters, abs=0.01), *theirs[1:3])


def test_images_per_second_are_of_what_was_timed(no_clock):
    (cost,) = measure_encoders(["dwt"], **SMALL)
    assert cost.images_per_second == pytest.approx(20)
    (cost,) = measure_encoders(["dwt"], **SMALL, timed=5)
    assert cost.images_per_second == pytest.approx(50) and len(no_clock["dwt"].mean) == 5
    (cost,) = measure_encoders(["dwt"], 32, 64, "cpu", 1)
    assert cost.images_per_second == pytest.approx(20)  # two of them: it is a CPU


@torch.no_grad()
def test_memory_lies_between_the_largest_layer_and_all_of_them():
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
    peaks = {b: measure_encoders(["litevae-s"], 32, b, "cpu", 1)[0].peak_mib for b in (2, 4, 8)}
    assert largest < peaks[2] * 2**20 - weights < all_of_them
    # it grows with the batch, from the weights alone
    assert peaks[8] - peaks[4] == pytest.approx(2 * (peaks[4] - peaks[2]))
    assert (2 * peaks[2] - peaks[4]) * 2**20 == pytest.approx(weights, rel=1e-3)


def test_a_name_counts_once_and_half_precision_takes_less_memory():
    (half,) = measure_encoders(["litevae-s"], 32, 32, "cpu", 1, precision="bf16")
    (whole,) = measure_encoders(["litevae-s", "litevae-s"], 32, 32, "cpu", 1)
    assert half.peak_mib < whole.peak_mib


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"names": ["litevea-b"]}, "no preset 'litevea-b'; did you mean 'litevae-b'?"),
        ({"names": []}, "name one or more"),
        ({"batch": 0}, "--batch 0: it must be at least 1"),
        ({"timed": -1}, "--timed -1: it must be at least 1"),
        ({"repeats": 0}, "--repeats 0: it must be at least 1"),
        ({"resolution": 100}, "--resolution 100: it must be a multiple of 8"),
    ],
)
def test_what_cannot_be_is_one_line(asked, told):
    with pytest.raises(UsageError) as error:
        measure_encoders(**{"names": ["litevae-s"], **SMALL, **asked})
    assert told in str(error.value) and "\n" not in str(error.value)
