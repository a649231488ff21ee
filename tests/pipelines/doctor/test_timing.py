"""Durations from timed steps, by a clock that only the steps move."""

from types import SimpleNamespace

import pytest
import torch

from ldm.config import load_preset, resolve
from ldm.errors import LdmError
from pipelines.doctor import timing
from pipelines.doctor.timing import StepTimer, Stretch, stretches, time_training
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe


class Pretended:
    """Steps of known length: a second for every 10⁹ multiply-accumulates, and an update's."""

    def __init__(self, monkeypatch, update: float = 0.25, smallest: int = 32, pace: float = 1.0):
        self.now, self.smallest, self.pace = 0.0, smallest, pace
        self.run = SimpleNamespace(device=torch.device("cpu"))
        self.state = SimpleNamespace(parts={}, advance=lambda: self.pass_time(update))
        self.tried: list[tuple[int, int, bool]] = []
        monkeypatch.setattr(timing.time, "monotonic", lambda: self.now)

    def pass_time(self, seconds):
        self.now += seconds

    def accepts(self, side):
        return side >= self.smallest

    def gmac(self, side, adversarial_active):
        return (2 if adversarial_active else 1) * (side / 64) ** 2

    def step(self, side, images, adversarial_active):
        self.tried.append((side, images, adversarial_active))
        self.pass_time(self.pace * images * self.gmac(side, adversarial_active))

    def time(self, loads, batch, accumulate=1, processes=1, fits=lambda *_: True, end=1000):
        costs = SimpleNamespace(
            batch=batch, step=lambda side, active: SimpleNamespace(gmac=self.gmac(side, active))
        )
        timer = StepTimer(self, costs, fits)
        return time_training(timer, loads, accumulate, processes, end)


def test_the_recipes_own_step_is_timed_where_there_is_time(monkeypatch):
    pretended = Pretended(monkeypatch)
    loads = (Stretch(64, 100, adversarial_active=True), Stretch(64, 50))
    found = pretended.time(loads, 4)
    active, quiet = found.speeds
    assert (active.measured_side, active.measured_batch) == (64, 4)
    assert (quiet.measured_side, quiet.measured_batch) == (64, 4)
    assert active.seconds == pytest.approx(100 * (0.25 + 4 * 2))
    assert quiet.seconds == pytest.approx(50 * (0.25 + 4 * 1))
    assert active.images_per_second == pytest.approx(4 / 8.25)
    assert found.seconds == pytest.approx(active.seconds + quiet.seconds)
    assert found.peak is None and not found.out_of_memory
    assert pretended.tried[0] == (32, 1, True)  # the smallest first


def test_an_update_counts_once_a_batch_and_processes_share_it(monkeypatch):
    (speed,) = Pretended(monkeypatch).time((Stretch(64, 10),), 4, 3, 2).speeds
    assert speed.seconds == pytest.approx(10 * (0.25 + 3 * 4 * 1))
    assert speed.images_per_second == pytest.approx(3 * 4 * 2 / 12.25)


def test_updates_of_optimisers_are_timed_separately(monkeypatch):
    pretended = Pretended(monkeypatch)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: pretended.pass_time(100))  # before the timer's
    pretended.state.parts = {"optimizer": optimizer}
    timer = StepTimer(pretended, SimpleNamespace(batch=4), None)
    optimizer.register_step_pre_hook(lambda *_: pretended.pass_time(3))
    step = pretended.step
    pretended.step = lambda *size: (step(*size), optimizer.step())
    assert timer.step(64, 4, False) == (4 + 100, 3 + 0.25)


def test_steps_that_take_too_long_are_scaled_from_smaller_images(monkeypatch):
    pretended = Pretended(monkeypatch)
    (speed,) = pretended.time((Stretch(512, 10),), 16, end=30).speeds
    assert speed.measured_side < 512 and speed.measured_batch == 1
    # exactly, since these steps follow their arithmetic
    assert speed.seconds == pytest.approx(10 * (0.25 + 16 * 64))
    assert pretended.now < 40


def test_a_smaller_batch_is_scaled_as_well(monkeypatch):
    (speed,) = Pretended(monkeypatch).time((Stretch(64, 10),), 64, end=40).speeds
    assert speed.measured_side == 64 and 1 <= speed.measured_batch < 64
    assert speed.seconds == pytest.approx(10 * (0.25 + 64))


def test_the_next_phase_starts_where_the_last_one_ended(monkeypatch):
    pretended = Pretended(monkeypatch)
    loads = (Stretch(64, 10, True), Stretch(128, 10, True))
    found = pretended.time(loads, 4, end=10_000)
    assert [s.measured_side for s in found.speeds] == [64, 128]
    assert pretended.tried.count((32, 1, True)) == 2  # to warm up, and the first size
    second = pretended.tried[pretended.tried.index((128, 1, True)) - 1 :]
    assert second[:4] == [(64, 1, True), (128, 1, True), (128, 2, True), (128, 4, True)]


def test_a_phase_without_memory_is_scaled_from_smaller_images(monkeypatch):
    loads = (Stretch(64, 10, True), Stretch(128, 10, True))
    found = Pretended(monkeypatch).time(loads, 4, fits=lambda side, _: side < 128, end=10_000)
    assert [s.measured_side for s in found.speeds] == [64, 64] and found.out_of_memory
    assert found.speeds[1].seconds == pytest.approx(10 * (0.25 + 4 * 8))


def test_memory_ends_the_growth(monkeypatch):
    fits = lambda side, images: images <= 2  # noqa: E731
    found = Pretended(monkeypatch).time((Stretch(64, 10),), 8, fits=fits)
    assert found.out_of_memory and found.speeds[0].measured_batch == 2


def test_a_device_that_runs_out_of_memory_ends_the_growth(monkeypatch):
    pretended = Pretended(monkeypatch)
    step = pretended.step

    def limited(side, images, adversarial_active):
        if images > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(side, images, adversarial_active)

    pretended.step = limited
    found = pretended.time((Stretch(64, 10),), 8)
    assert found.out_of_memory and found.speeds[0].measured_batch == 2


def test_no_memory_at_all_is_one_line(monkeypatch):
    pretended = Pretended(monkeypatch)
    with pytest.raises(LdmError, match="not enough memory for one image of 32²"):
        pretended.time((Stretch(64, 10),), 8, fits=lambda *_: False)
    assert not pretended.tried


def test_a_later_phase_without_memory_names_its_own_size(monkeypatch):
    pretended = Pretended(monkeypatch, smallest=64)
    loads = (Stretch(64, 10, True), Stretch(96, 10, True))
    with pytest.raises(LdmError, match="not enough memory for one image of 96²"):
        pretended.time(loads, 16, fits=lambda side, _: side < 96, end=10_000)


def test_without_time_one_step_is_still_timed(monkeypatch):
    (speed,) = Pretended(monkeypatch).time((Stretch(64, 10),), 8, end=0).speeds
    assert (speed.measured_side, speed.measured_batch) == (32, 1)
    assert speed.seconds == pytest.approx(10 * (0.25 + 8))


def test_stretches_of_both_stages():
    recipe = resolve(AutoencoderRecipe, load_preset("ae", "litevae-b"))
    # 150,000 steps, a fifth of them before the discriminator starts
    assert stretches(recipe) == [
        Stretch(128, 70_000, adversarial_active=True), Stretch(128, 30_000),
        Stretch(256, 50_000, adversarial_active=True),
    ]  # fmt: skip
    for settings in (["adversarial.weight=0"], ["adversarial.start=1"]):
        recipe = resolve(AutoencoderRecipe, load_preset("ae", "litevae-b"), settings)
        assert stretches(recipe) == [Stretch(128, 100_000), Stretch(256, 50_000)]
    recipe = resolve(AutoencoderRecipe, load_preset("ae", "litevae-b"), ["adversarial.start=0.8"])
    assert stretches(recipe) == [
        Stretch(128, 100_000), Stretch(256, 30_000, adversarial_active=True), Stretch(256, 20_000)
    ]  # fmt: skip
    recipe = resolve(DiffusionRecipe, load_preset("diffusion", "ffhq256"), ["steps=7"])
    assert stretches(recipe) == [Stretch(256, 7)]
