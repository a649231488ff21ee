"""Averages of weights against loops and closed forms; post-hoc ones against tracked ones."""

import io
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.integrate import quad
from torch import nn

from ldm.ema import (
    LARGEST_STD,
    TOLERANCE,
    Ema,
    PowerEma,
    combine,
    fit_snapshots,
    gamma_of_std,
    inner_product,
    list_snapshots,
    save_snapshot,
    solve_coefficients,
)
from ldm.errors import LdmError, UsageError
from ldm.run_folder import restore


class Counting(nn.Module):
    """Weights, a buffer of floats and a counter."""

    def __init__(self, width=5):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("count", torch.tensor(0))
        self.dropout = nn.Dropout(0.5)


def trajectory(steps, width=5):
    return torch.randn(steps, 2, width, generator=torch.Generator().manual_seed(0))


def train(model, ema, values, batch_size, start=0):
    for step, (weight, scale) in enumerate(values, start + 1):
        with torch.no_grad():
            model.weight.copy_(weight)
            model.scale.copy_(scale)
            model.count.add_(1)
        ema.update(images_seen=step * batch_size, batch_size=batch_size)


@pytest.mark.parametrize("half_life", [500, 40, 1e9, 0])
def test_follows_the_definition(half_life):
    values, batch = trajectory(200), 8
    model = Counting()
    ema = Ema(model, half_life)
    train(model, ema, values, batch)

    expected = values[0].double()
    for step, value in enumerate(values[1:].double(), 2):
        half = min(half_life, 0.05 * step * batch)
        decay = 0.0 if half == 0 else 0.5 ** (batch / half)
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(ema.ema_model.weight.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ema.ema_model.scale.double(), expected[1], rtol=1e-5, atol=1e-6)
    assert ema.ema_model.count.item() == 200


def test_half_life_is_what_it_says_whatever_the_batch():
    """From 0, following a constant 1: half the way after a half-life of images, late in a run."""
    for batch in (10, 50):
        model, start = Counting(), 20_000 // batch
        ema = Ema(model, half_life_images=1000)
        train(model, ema, torch.zeros(1, 2, 5), batch, start)
        train(model, ema, torch.ones(1000 // batch, 2, 5), batch, start + 1)
        torch.testing.assert_close(ema.ema_model.weight, torch.full((5,), 0.5))


@pytest.mark.parametrize("std", [0.02, 0.05, 0.1, 0.25, LARGEST_STD])
def test_power_average_is_the_integral_against_its_profile(std):
    """(γ+1)/t^(γ+1) ∫ τ^γ θ(τ) dτ with θ constant in a step: Karras et al. 2023, Eq. 2, exactly,
    here with batches that grow."""
    values, gamma = trajectory(200), gamma_of_std(std)
    model = Counting()
    ema, seen = PowerEma(model, std), [0]
    for step, (weight, scale) in enumerate(values, 1):
        with torch.no_grad():
            model.weight.copy_(weight)
            model.scale.copy_(scale)
            model.count.add_(1)
        batch = 8 if step < 100 else 24
        seen.append(seen[-1] + batch)
        ema.update(seen[-1], batch)

    profile = np.diff((np.array(seen) / seen[-1]) ** (gamma + 1))
    assert profile.sum() == pytest.approx(1, rel=1e-12)
    expected = (torch.from_numpy(profile)[:, None, None] * values.double()).sum(0)
    torch.testing.assert_close(ema.ema_model.weight.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ema.ema_model.scale.double(), expected[1], rtol=1e-5, atol=1e-6)
    assert ema.ema_model.count.item() == 200


def test_widest_power_average_is_the_mean():
    values, model = trajectory(50), Counting()
    ema = PowerEma(model, LARGEST_STD)
    train(model, ema, values, 4)
    assert ema.gamma == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(ema.ema_model.weight, values[:, 0].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 6.94, 16.97, 1000])
def test_gamma_of_the_width_of_its_density(gamma):
    mean = quad(lambda t: t * (gamma + 1) * t**gamma, 0, 1)[0]
    square = quad(lambda t: (t - mean) ** 2 * (gamma + 1) * t**gamma, 0, 1, epsabs=1e-14)[0]
    std = min(math.sqrt(square), LARGEST_STD)
    assert gamma_of_std(std) == pytest.approx(gamma, rel=1e-6, abs=1e-9)


def test_gamma_inverts_the_width():
    # as the paper gives them
    assert gamma_of_std(0.1) == pytest.approx(6.94, abs=5e-3)
    assert gamma_of_std(0.05) == pytest.approx(16.97, abs=5e-3)
    for std in np.geomspace(1e-4, LARGEST_STD, 50):
        gamma = gamma_of_std(std)
        # Karras et al. 2023, Eq. 126
        width = math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
        assert width == pytest.approx(std, rel=1e-9)


@pytest.mark.parametrize("std", [0.0, -0.1, 0.29, math.nan, math.inf])
def test_widths_that_no_average_has_are_refused(std):
    with pytest.raises(UsageError, match=r"above 0 and at most 0\.28868"):
        PowerEma(Counting(), std)


def test_first_update_copies_and_zero_half_life_always_does():
    model, values = Counting(), trajectory(3)
    ema, plain = Ema(model, 1e9), Ema(model, 0)
    power = PowerEma(model, 0.2)
    train(model, ema, values[:1], 4)
    assert torch.equal(ema.ema_model.weight, values[0, 0])
    power.update(images_seen=1000, batch_size=4)  # whatever came before
    assert torch.equal(power.ema_model.weight, values[0, 0])
    train(model, plain, values, 4)
    assert torch.equal(plain.ema_model.weight, values[-1, 0])


def test_average_is_a_frozen_model_of_its_own():
    model = Counting().train()
    ema = Ema(model, 100)
    assert type(ema.ema_model) is Counting
    assert not ema.ema_model.training and not ema.ema_model.dropout.training
    assert not any(parameter.requires_grad for parameter in ema.ema_model.parameters())
    assert model.training and model.weight.requires_grad
    train(model, ema, trajectory(1), 4)
    with torch.no_grad():
        model.weight.add_(1)
    assert not torch.equal(ema.ema_model.weight, model.weight)
    assert ema.ema_model.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("average", [lambda m: Ema(m, 200), lambda m: PowerEma(m, 0.1)])
def test_resumed_average_is_the_unbroken_one_bit_for_bit(average):
    values = trajectory(60)
    model = Counting()
    unbroken = average(model)
    train(model, unbroken, values[:25], 8)
    file = io.BytesIO()
    torch.save(unbroken.state_dict(), file)
    train(model, unbroken, values[25:], 8, start=25)

    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    other = Counting()
    other.count.fill_(25)
    resumed = average(other)
    resumed.load_state_dict(state)
    train(other, resumed, values[25:], 8, start=25)
    for name, value in unbroken.ema_model.state_dict().items():
        assert torch.equal(value, resumed.ema_model.state_dict()[name]), name


def test_state_of_another_model_is_refused():
    for state in (Ema(Counting(6), 10).state_dict(), {}):
        with pytest.raises(LdmError, match="the saved state of ema does not fit"):
            restore({"ema": Ema(Counting(5), 10)}, {"ema": state})


# ------------------------------------------------------------------------------- post-hoc
BATCH, STEPS, EVERY = 8, 1000, 25
STDS, WANTED = (0.05, 0.1), (0.05, 0.06, 0.07, 0.085, 0.12, 0.15)


class Network(nn.Module):
    """Weights, a constant and a counter."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(40, 30, generator=generator))
        self.register_buffer("constant", torch.randn(7, generator=generator))
        self.register_buffer("count", torch.tensor(0))


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Snapshots of a random walk with noise on top, and the wanted averages tracked beside it:
    (folder, {std: weights at the end}, {std: weights at half time})."""
    folder, network = tmp_path_factory.mktemp("run") / "ema", Network()
    kept = {std: PowerEma(network, std) for std in STDS}
    tracked = {std: PowerEma(network, std) for std in WANTED}
    generator = torch.Generator().manual_seed(1)
    walk, half = network.weight.detach().clone(), {}
    for step in range(1, STEPS + 1):
        walk += 0.01 * torch.randn(walk.shape, generator=generator)
        with torch.no_grad():
            network.weight.copy_(walk + 0.03 * torch.randn(walk.shape, generator=generator))
            network.count.add_(1)
        for ema in (*kept.values(), *tracked.values()):
            ema.update(step * BATCH, BATCH)
        if step % EVERY == 0:
            for std, ema in kept.items():
                save_snapshot(folder, step * BATCH, std, ema.ema_model.state_dict())
        if step == STEPS // 2:
            half = {std: copied(ema) for std, ema in tracked.items()}
    return folder, {std: copied(ema) for std, ema in tracked.items()}, half


def copied(ema):
    return {name: tensor.clone() for name, tensor in ema.ema_model.state_dict().items()}


# -------------------------------------------------------------------------------- profiles
def profile(tau, gamma, time):
    return np.where(tau <= time, (gamma + 1) * tau**gamma / time ** (gamma + 1), 0.0)


@pytest.mark.parametrize("a", [(16.97, 1.0), (6.94, 0.7), (0.0, 1.0), (0.0, 0.3), (80.0, 0.95)])
@pytest.mark.parametrize("b", [(16.97, 1.0), (6.94, 0.2), (0.0, 0.3), (80.0, 1.0)])
def test_inner_product_is_the_integral(a, b):
    end = min(a[1], b[1])
    integral = quad(lambda tau: profile(tau, *a) * profile(tau, *b), 0, end, epsabs=1e-13)[0]
    assert inner_product(*a, *b).item() == pytest.approx(integral, rel=1e-8)
    assert inner_product(*b, *a).item() == pytest.approx(inner_product(*a, *b).item(), rel=1e-12)


def test_solution_is_the_best_sum_on_a_grid_and_the_residual_is_its_distance():
    """Against plain least squares on profiles written out at 200,000 points."""
    gammas = np.array([gamma_of_std(std) for std in (0.05, 0.1) for _ in range(4)])
    times, gamma = np.tile([1000.0, 2000.0, 3000.0, 4000.0], 2), gamma_of_std(0.07)
    x, residual = solve_coefficients(gammas, times, gamma, 4000.0)
    assert x.sum() == pytest.approx(1, rel=1e-12)

    tau = (np.arange(200_000) + 0.5) / 200_000
    columns = profile(tau[:, None], gammas, times / 4000)
    wanted = profile(tau, gamma, 1.0)
    # the last coefficient is what the others leave of 1
    free = columns[:, :-1] - columns[:, -1:]
    best = np.linalg.lstsq(free, wanted - columns[:, -1], rcond=None)[0]
    np.testing.assert_allclose(x, np.append(best, 1 - best.sum()), atol=1e-6)
    distance = np.linalg.norm(columns @ x - wanted) / np.linalg.norm(wanted)
    assert residual == pytest.approx(distance, rel=1e-5)
    assert 0.01 < residual < TOLERANCE


def test_nearly_equal_profiles_are_stable():
    gammas = [gamma_of_std(std) for std in (0.05, 0.05 + 1e-13, 0.1, 0.1 + 1e-13)]
    x, residual = solve_coefficients(gammas, [100] * 4, gamma_of_std(0.05), 100)
    assert residual < 1e-6 and np.abs(x).sum() == pytest.approx(1, abs=1e-4)


# --------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("std", WANTED)
@pytest.mark.parametrize("at", [None, STEPS * BATCH // 2])
def test_synthesis_equals_tracking(training, std, at):
    """To 1e-5 of the weights (1e-4 at half time, of half the snapshots), and always to a part of
    how far two averages of neighbouring widths are from each other."""
    folder, end, half = training
    expected = (half if at else end)[std]
    made = combine(fit_snapshots(list_snapshots(folder), std, at)[0], expected)
    assert made.keys() == expected.keys()
    off = (made["weight"] - expected["weight"]).norm()
    assert off <= (1e-4 if at else 1e-5) * expected["weight"].norm()
    neighbour = (half if at else end)[0.15 if std < 0.15 else 0.12]["weight"]
    assert off < 0.01 * (neighbour - expected["weight"]).norm()
    assert torch.equal(made["constant"], expected["constant"])
    assert torch.equal(made["count"], expected["count"])
    assert made["weight"].dtype == torch.float32


def test_the_width_of_a_snapshot_gives_that_snapshot(training):
    folder, end, _ = training
    coefficients, residual = fit_snapshots(list_snapshots(folder), 0.05)
    assert residual < 1e-6
    made = combine(coefficients, end[0.05])["weight"]
    torch.testing.assert_close(made, end[0.05]["weight"], rtol=1e-6, atol=1e-7)


def test_the_residual_is_the_relative_error_of_noise(training):
    """Weights that are noise around a mean: the error is the residual's share of what is left."""
    snapshots = [s for s in list_snapshots(training[0]) if s.images_seen % 2000 == 0]
    coefficients, residual = fit_snapshots(snapshots, 0.07)
    tau = np.arange(1, 8001) / 8000

    def steps(gamma, time):  # the weight of each of 8000 updates in an average
        return np.diff(np.minimum(tau / time, 1) ** (gamma + 1), prepend=0)

    exact = steps(gamma_of_std(0.07), 1.0)
    made = sum(
        x * steps(gamma_of_std(s.std), s.images_seen / 8000) for s, x in coefficients.items()
    )
    noise = np.random.default_rng(0).standard_normal((8000, 2000))
    off, left = (made - exact) @ noise, exact @ noise
    assert off.std() / left.std() == pytest.approx(residual, rel=0.1)
    assert 0.005 < residual < TOLERANCE


def test_half_precision_has_the_documented_error(training, tmp_path):
    folder, end, _ = training
    for snapshot in list_snapshots(folder):
        weights = {
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in load_file(snapshot.path).items()
        }
        save_snapshot(tmp_path, snapshot.images_seen, snapshot.std, weights)
    made = combine(fit_snapshots(list_snapshots(tmp_path), 0.07)[0], end[0.07])
    assert made["weight"].dtype == torch.float32 and made["count"].dtype == torch.int64
    error = (made["weight"] - end[0.07]["weight"]).norm() / end[0.07]["weight"].norm()
    assert 1e-4 < error < 4e-4


# ---------------------------------------------------------------------------------- refusals
def test_a_fit_beyond_tolerance_is_refused(training):
    snapshots = list_snapshots(training[0])
    with pytest.raises(LdmError, match=r"std 0\.01 at 8000 images .* \d+%, 5% is allowed"):
        fit_snapshots(snapshots, 0.01)
    alone = [s for s in snapshots if s.std == 0.1 and s.images_seen == 8000]
    with pytest.raises(LdmError, match=r"\(1, of std 0\.1\): it would be off by 28%"):
        fit_snapshots(alone, 0.07)
    with pytest.raises(UsageError, match="above 0 and at most"):
        fit_snapshots(snapshots, 0.3)


def test_a_time_without_snapshot_is_refused_with_the_nearest(training):
    with pytest.raises(LdmError, match=r"no snapshot at 4090 images.*200 to 8000.*nearest at 4000"):
        fit_snapshots(list_snapshots(training[0]), 0.07, at=4090)


def test_snapshots_after_the_time_are_not_read(training):
    coefficients, _ = fit_snapshots(list_snapshots(training[0]), 0.07, at=2000)
    assert max(s.images_seen for s in coefficients) == 2000
    assert len(coefficients) == 2 * 2000 // (EVERY * BATCH)


# ------------------------------------------------------------------------------------ files
def test_snapshots_are_found_in_order_and_other_files_left_alone(tmp_path):
    weights = {"weight": torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    for images, std in ((3000, 0.1), (20, 0.1), (20, 0.05), (10**13, 0.05), (3000, 1e-05)):
        save_snapshot(tmp_path / "ema", images, std, weights)
    for name in ("notes.txt", "000000000020-x.safetensors", ".000000000040-0.1.safetensors.1"):
        (tmp_path / "ema" / name).touch()
    found = list_snapshots(tmp_path / "ema")
    assert all(load_file(s.path)["weight"].equal(weights["weight"]) for s in found)
    assert [(s.images_seen, s.std) for s in found] == [
        (20, 0.05), (20, 0.1), (3000, 1e-05), (3000, 0.1), (10**13, 0.05),
    ]  # fmt: skip
    assert found[0].path.name == "000000000020-0.05.safetensors"


def test_a_folder_without_snapshots_says_how_to_keep_them(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(LdmError, match=r"no snapshots.*ema_stds"):
            list_snapshots(folder)


def test_a_full_disk_leaves_no_snapshot(tmp_path, monkeypatch):
    def full(_number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LdmError, match="No space left"):
        save_snapshot(tmp_path, 8, 0.1, {"weight": torch.zeros(3)})
    assert not list(tmp_path.iterdir())


TINY = {"a": torch.zeros(3), "b": torch.ones(2), "count": torch.tensor(1)}


@pytest.fixture
def pair(tmp_path):
    """Two snapshots of a tiny network."""
    for std in STDS:
        save_snapshot(tmp_path, 64, std, TINY)
    return list_snapshots(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "truncated or damaged"),
        (lambda path: path.write_bytes(b""), "truncated or damaged"),
        (lambda path: path.unlink(), "could not read"),
        (lambda path: save_file({"a": torch.zeros(3)}, path), r"tensor b differs"),
        (lambda path: save_file({"a": torch.zeros(4)}, path), r"tensor a differs"),
        (lambda path: save_file({"x\n": torch.zeros(4)}, path), r"tensor x\\n differs"),
    ],
)
def test_damage_is_one_line_that_names_the_file(pair, damage, message):
    damage(pair[1].path)
    coefficients, _ = fit_snapshots(pair, 0.055)
    with pytest.raises(LdmError, match=message) as caught:
        combine(coefficients, TINY)
    assert str(pair[1].path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_is_the_coefficients_sum(dtype, pair):
    a, b = torch.ones(3, dtype=dtype), torch.ones(2, dtype=dtype)
    save_file({"a": 4 * a, "b": b} | count(7), pair[0].path)
    save_file({"a": 8 * a, "b": b} | count(9), pair[1].path)
    coefficients = dict(zip(pair, (1.5, -0.5), strict=True))
    combined = combine(coefficients, {"a": a, "b": b} | count(0))
    assert combined["a"].tolist() == [2.0] * 3 and combined["b"].tolist() == [1.0] * 2
    assert combined["a"].dtype == dtype
    assert combined["count"].item() == 7 and combined["count"].dtype == torch.int64


def count(value):
    return {"count": torch.tensor(value)}
