"""What a trial makes of times, by a clock that only the steps move."""

from types import SimpleNamespace

import pytest
import torch

from ldm.config import load_preset, resolve
from ldm.errors import LdmError
from pipelines.doctor import timing as trial
from pipelines.doctor.timing import Load, stretches, try_out
from pipelines.recipes import AutoencoderRecipe


class Pretended:
    """Steps of known length: a second for every 10⁹ multiply-accumulates, and an update's."""

    def __init__(self, monkeypatch, update: float = 0.25, smallest: int = 32, pace: float = 1.0):
        self.now, self.updating, self.smallest, self.pace = 0.0, update, smallest, pace
        self.run = SimpleNamespace(device=torch.device("cpu"))
        self.tried: list[tuple[int, int, bool]] = []
        monkeypatch.setattr(trial.time, "monotonic", lambda: self.now)

    def takes(self, side):
        return side >= self.smallest

    def gmac(self, side, adversarial_active):
        return (2 if adversarial_active else 1) * (side / 64) ** 2

    def step(self, side, images, adversarial_active):
        self.tried.append((side, images, adversarial_active))
        self.now += self.updating + self.pace * images * self.gmac(side, adversarial_active)

    def update(self, adversarial_active):
        self.now += self.updating


def always(side, images):
    return True


def test_the_recipes_own_step_is_timed_where_there_is_time(monkeypatch):
    pretended = Pretended(monkeypatch)
    loads = (Load(64, 100, adversarial_active=True), Load(64, 50))
    found = try_out(pretended, loads, 4, 1, 1, always, seconds=1000)
    quarrel, quiet = found.speeds
    assert (quarrel.measured_side, quarrel.measured_batch) == (64, 4)
    assert (quiet.measured_side, quiet.measured_batch) == (64, 4)
    assert quarrel.seconds == pytest.approx(100 * (0.25 + 4 * 2))
    assert quiet.seconds == pytest.approx(50 * (0.25 + 4 * 1))
    assert quarrel.images_per_second == pytest.approx(4 / 8.25)
    assert found.seconds == pytest.approx(quarrel.seconds + quiet.seconds)
    assert found.peak is None and not found.out_of_memory
    assert pretended.tried[0] == (32, 1, True)  # the smallest first


def test_an_update_is_paid_once_a_batch_and_processes_share_it(monkeypatch):
    pretended = Pretended(monkeypatch)
    (speed,) = try_out(pretended, (Load(64, 10),), 4, 3, 2, always, seconds=1000).speeds
    assert speed.seconds == pytest.approx(10 * (0.25 + 3 * 4 * 1))
    assert speed.images_per_second == pytest.approx(3 * 4 * 2 / 12.25)


def test_what_takes_too_long_is_scaled_from_what_does_not(monkeypatch):
    pretended = Pretended(monkeypatch, pace=1.0)
    (speed,) = try_out(pretended, (Load(512, 10),), 16, 1, 1, always, seconds=30).speeds
    assert speed.measured_side < 512 and speed.measured_batch == 1
    # exactly, since these steps follow their arithmetic
    assert speed.seconds == pytest.approx(10 * (0.25 + 16 * 64))
    assert pretended.now < 40


def test_a_smaller_batch_is_scaled_as_well(monkeypatch):
    pretended = Pretended(monkeypatch)
    (speed,) = try_out(pretended, (Load(64, 10),), 64, 1, 1, always, seconds=40).speeds
    assert speed.measured_side == 64 and 1 <= speed.measured_batch < 64
    assert speed.seconds == pytest.approx(10 * (0.25 + 64))


def test_the_next_phase_does_not_climb_again(monkeypatch):
    pretended = Pretended(monkeypatch)
    loads = (Load(64, 10, True), Load(128, 10, True))
    found = try_out(pretended, loads, 4, 1, 1, always, seconds=10_000)
    assert [s.measured_side for s in found.speeds] == [64, 128]
    assert pretended.tried.count((32, 1, True)) == 2  # to warm up, and the first rung
    second = pretended.tried[pretended.tried.index((128, 1, True)) - 1 :]
    assert second[:4] == [(64, 1, True), (128, 1, True), (128, 2, True), (128, 4, True)]


def test_a_phase_without_room_is_scaled_from_smaller_images(monkeypatch):
    pretended = Pretended(monkeypatch)
    loads = (Load(64, 10, True), Load(128, 10, True))
    found = try_out(pretended, loads, 4, 1, 1, lambda side, _: side < 128, seconds=10_000)
    assert [s.measured_side for s in found.speeds] == [64, 64] and found.out_of_memory
    assert found.speeds[1].seconds == pytest.approx(10 * (0.25 + 4 * 8))


def test_memory_ends_the_climb(monkeypatch):
    pretended = Pretended(monkeypatch)
    found = try_out(
        pretended, (Load(64, 10),), 8, 1, 1, lambda side, images: images <= 2, seconds=1000
    )
    assert found.out_of_memory and found.speeds[0].measured_batch == 2


def test_a_device_that_runs_out_ends_the_climb(monkeypatch):
    pretended = Pretended(monkeypatch)
    step = pretended.step

    def limited(side, images, adversarial_active):
        if images > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(side, images, adversarial_active)

    pretended.step = limited
    found = try_out(pretended, (Load(64, 10),), 8, 1, 1, always, seconds=1000)
    assert found.out_of_memory and found.speeds[0].measured_batch == 2


def test_no_room_at_all_is_one_line(monkeypatch):
    pretended = Pretended(monkeypatch)
    with pytest.raises(LdmError, match="no room for one image of 32²"):
        try_out(pretended, (Load(64, 10),), 8, 1, 1, lambda *_: False, seconds=1000)
    assert not pretended.tried


def test_a_later_phase_that_begins_with_several_images_says_so(monkeypatch):
    """The second phase begins where the first was quick enough: at two images of its own."""
    pretended = Pretended(monkeypatch, smallest=64)
    loads = (Load(64, 10, True), Load(96, 10, True))
    with pytest.raises(LdmError, match="no room for 4 images of 96²"):
        try_out(
            pretended, loads, 16, 1, 1, lambda side, count: (side, count) <= (96, 1), seconds=10_000
        )


def test_without_time_one_step_is_still_timed(monkeypatch):
    pretended = Pretended(monkeypatch)
    (speed,) = try_out(pretended, (Load(64, 10),), 8, 1, 1, always, seconds=0).speeds
    assert (speed.measured_side, speed.measured_batch) == (32, 1)
    assert speed.seconds == pytest.approx(10 * (0.25 + 8))


def test_stretches_of_stage_one():
    recipe = resolve(AutoencoderRecipe, load_preset("ae", "litevae-b"))
    # 150,000 steps, a fifth of them before the discriminator begins
    assert stretches(recipe) == (
        Load(128, 70_000, adversarial_active=True), Load(128, 30_000),
        Load(256, 50_000, adversarial_active=True),
    )  # fmt: skip
    for settings in (["adversarial.weight=0"], ["adversarial.start=1"]):
        recipe = resolve(AutoencoderRecipe, load_preset("ae", "litevae-b"), settings)
        assert stretches(recipe) == (Load(128, 100_000), Load(256, 50_000))
    recipe = resolve(AutoencoderRecipe, load_preset("ae", "litevae-b"), ["adversarial.start=0.8"])
    assert stretches(recipe) == (
        Load(128, 100_000), Load(256, 30_000, adversarial_active=True), Load(256, 20_000)
    )  # fmt: skip
