"""Lines and exit status of `ldm doctor`."""

import json
from dataclasses import replace

import pytest
import torch
import typer
from typer.testing import CliRunner

from ldm.cli.doctor import _disk, _duration, _timing, doctor
from ldm.errors import UsageError
from pipelines.doctor import checks, timing
from pipelines.doctor import doctor as doctors
from pipelines.doctor.costs import Disk, Memory
from pipelines.doctor.doctor import Diagnosis, Length, Machine
from pipelines.doctor.timing import Speed, Stretch, Timing
from tests.pipelines.doctor.dry_runs import costs as cached_costs
from tests.pipelines.doctor.test_checks import save_run

TINY = [
    "phases=[{resolution: 32, steps: 4}]", "batch_size=2", "discriminator.multipliers=[1, 2]",
    "encoder={extractor: {multipliers: [1]}, aggregator: {multipliers: [1]}}",
]  # fmt: skip
SMALL = "network={channels: 16, multipliers: [1], blocks: 1, head_width: 8}"


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No network, no runs, all weights there, and a CPU; equal networks are worked out once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "ask_size", lambda url: None)
    monkeypatch.setattr(checks, "has_backbone", lambda network: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctors, "Costs", cached_costs)


@pytest.fixture
def run():
    """Call the command: (status, stdout)."""
    app = typer.Typer()
    app.command()(doctor)

    def call(*words):
        done = CliRunner().invoke(app, [str(word) for word in words])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.stdout

    return call


def test_a_preset_that_is_ready(run):
    code, out = run("ae/tiny", *TINY, "--no-trial")
    assert code == 0
    assert "ae/tiny on cpu" in out and "photos: 8 images" in out
    assert "batch      2 = 1 process × 1 micro-batch × 2 images" in out
    assert "GMAC an image of 32²" in out and "discriminator" in out
    assert "activations of 2 images, estimated" in out and "states to resume from" in out
    assert "images/s" not in out
    assert out.rstrip().endswith(
        "ready: ldm train-ae tiny 'phases=[{resolution: 32, steps: 4}]' batch_size=2 "
        "'discriminator.multipliers=[1, 2]' "
        "'encoder={extractor: {multipliers: [1]}, aggregator: {multipliers: [1]}}'"
    )


def test_numbers_are_never_cut(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    _, out = run("ae/tiny", *TINY, "--no-trial")
    assert "…" not in out
    encoder = next(line for line in out.splitlines() if line.strip().startswith("encoder"))
    header = next(line for line in out.splitlines() if line.startswith("networks"))
    assert len(encoder) == len(header)  # the last column ends where its name does


def test_missing_requirements_exit_with_1(run):
    code, out = run("diffusion/tiny", SMALL, "data.source=nowhere", "--no-trial")
    assert code == 1
    assert "stage one  none yet; tiny is assumed" in out
    assert "error: no autoencoder run" in out and "error: data.source: nowhere" in out
    assert out.index("error:") < out.index("note:")
    assert out.rstrip().endswith("2 errors would stop this run")


def test_a_name_of_both_stages(run, tmp_path):
    _, out = run("tiny", *TINY, "--no-trial")
    assert "ae/tiny on cpu" in out and "ldm doctor diffusion/tiny" in out
    save_run(tmp_path / "a", "tiny")
    code, out = run("tiny", "--ae", tmp_path / "a", SMALL, "--no-trial")
    assert code == 0 and "diffusion/tiny on cpu" in out
    assert f"stage one  {tmp_path / 'a'}" in out and "ready: ldm train-diffusion tiny" in out


def test_a_batch_that_does_not_divide_is_no_equation(run):
    code, out = run("ae/tiny", *TINY, "--no-trial", "--processes", 4)
    assert code == 1 and "use batch_size=4, or 1, 2 process(es)" in out
    assert "\n  batch      2\n" in out


def diagnosed(trial, compiles=False):
    """A diagnosis of a GPU."""
    machine = Machine("cuda:0", "", "bf16", 2**35, 2**35, compiles=compiles)
    length = Length(8, 16, 1, 1, 16, 128, 8)
    memory, disk = Memory(1, 1, 1, 1, 1, 1, 1, 1, 1), Disk(1, 1, 1, 1, 1)
    known = ("tiny", "diffusion", "photos", None, machine, length, [])
    return Diagnosis(*known, [], {64: 1.0}, memory, disk, trial)


def test_the_peak_comes_with_the_size_it_was_measured_on():
    speeds = (Speed(Stretch(64, 8), 32, 1, 5.0, 1.0), Speed(Stretch(64, 8), 64, 4, 5.0, 1.0))
    last = _timing(diagnosed(None), Timing(speeds, 2.0, 3 * 2**30, out_of_memory=False))[-1]
    assert last[0] == "3.00 GiB of GPU memory at the peak, with 4 images of 64²"
    last = _timing(diagnosed(None), Timing(speeds, 2.0, 3 * 2**30, out_of_memory=True))[-1]
    assert last[0] == "3.00 GiB of GPU memory at the peak, before it ran out"


def test_timing_without_compiling_says_so():
    found = Timing((), 2.0, None, out_of_memory=False)
    assert "run.compile" not in str(_timing(diagnosed(found), found))
    assert "timed without run.compile" in str(_timing(diagnosed(found, compiles=True), found))


def test_a_cache_on_a_disk_of_its_own_is_listed_apart():
    found = diagnosed(None)
    sizes = _disk(found.disk, found.machine)
    assert sizes["total"] == 5 and sizes["cached latents"] == 1
    apart = _disk(found.disk, replace(found.machine, cache_disk=7))
    assert apart["total"] == 4 and apart["free there"] == 7


def test_json(run):
    code, out = run("diffusion/tiny", SMALL, "--json", "--no-trial", "--processes", 4)
    found = json.loads(out)
    assert code == 1 and found["ready"] is False and found["trial"] is None
    assert found["length"]["processes"] == 4 and found["length"]["each"] == 8
    assert found["parts"][0]["name"] == "network"
    assert {problem["level"] for problem in found["problems"]} >= {"error"}


def test_timing_is_printed(run, monkeypatch):
    monkeypatch.setattr(timing, "MOST_REPEATS", 1)
    code, out = run("ae/tiny", *TINY)
    assert code == 0 and "images/s" in out
    assert "3 steps at 32², with the discriminator" in out
    assert "1 steps at 32², without the discriminator" in out


def test_a_device_is_passed_on(run):
    code, out = run("ae/tiny", *TINY, "--no-trial", "--device", "cuda")
    assert code == 1 and "no CUDA device" in out
    assert "length     4 steps" in out and "networks" not in out and "memory" not in out


def test_stage_one_given_twice(run):
    with pytest.raises(UsageError, match="given twice"):
        run("diffusion/tiny", "autoencoder=x", "--ae", "y")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.2, "0 seconds"),
        (119, "119 seconds"),
        (120, "2.0 minutes"),
        (3 * 3600, "3.0 hours"),
        (36 * 3600, "36.0 hours"),
        (4 * 86400, "4.0 days"),
        (3 * 365 * 86400, "3.0 years"),
    ],
)
def test_durations_have_units(seconds, told):
    assert _duration(seconds) == told
