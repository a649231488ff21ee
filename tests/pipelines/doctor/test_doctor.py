"""Whole diagnoses of small recipes."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import tracking

from autoencoders import Autoencoder, load_autoencoder
from autoencoders.discriminators import build_discriminator
from diffusion import build_network
from ldm.checkpoint import fingerprint
from ldm.data import open_source
from ldm.errors import LdmError, UsageError
from ldm.run import start_run
from pipelines.doctor import checks, doctor
from pipelines.doctor.checks import Problem
from pipelines.doctor.costs import count_parameters
from pipelines.doctor.doctor import diagnose
from pipelines.doctor.timing import Stretch, Timing
from pipelines.latents import Codec, open_cache
from tests.pipelines.doctor.dry_runs import costs as cached_costs
from tests.pipelines.doctor.test_checks import save_images, save_run
from tests.small import autoencoder_recipe, diffusion_recipe

ONE_PHASE = "phases=[{resolution: 32, steps: 4}]"


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No network, no runs, all weights there, and a CPU; equal networks are worked out once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "ask_size", lambda url: None)
    monkeypatch.setattr(checks, "has_backbone", lambda network: True)
    monkeypatch.setattr(checks, "check_inception", lambda: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "Costs", cached_costs)


def errors(diagnosis):
    return [problem.text for problem in diagnosis.problems if problem.level == "error"]


@pytest.mark.parametrize("seconds", [0, 1])
def test_a_diagnosis_leaves_the_random_generator_alone(seconds):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    diagnose(autoencoder_recipe(), "tiny", seconds=seconds)
    assert torch.equal(torch.rand(1), expected)


def test_stage_one():
    recipe = autoencoder_recipe()
    found = diagnose(recipe, "tiny", seconds=0)
    assert found.ready and not found.problems and found.trial is None
    networks = {part.name: part for part in found.parts}
    ae, discriminator = Autoencoder(recipe.model), build_discriminator(recipe.discriminator)
    assert networks["encoder"].parameters == count_parameters(ae.encoder)
    assert networks["decoder"].parameters == count_parameters(ae.decoder)
    assert networks["discriminator"].parameters == count_parameters(discriminator)
    assert set(found.step_gmac) == set(networks["encoder"].gmac) == {64, 32}
    # 64² has four times the pixels of 32²
    gmac = networks["decoder"].gmac
    assert gmac[64] == pytest.approx(4 * gmac[32], rel=0.05)
    assert found.length == doctor.Length(8, 4, 1, 1, 4, images=32, data=8)
    assert found.machine.precision == "fp32" and found.machine.device == "cpu"
    assert found.machine.memory > 0 and found.machine.disk > 0
    json.dumps(asdict(found))


def test_without_a_discriminator_there_is_none():
    found = diagnose(autoencoder_recipe("adversarial.weight=0", ONE_PHASE), "tiny", seconds=0)
    assert [part.name for part in found.parts] == ["encoder", "decoder"]


def test_stage_two(tmp_path):
    model = save_run(tmp_path / "runs" / "a", "tiny")
    recipe = diffusion_recipe("", "data.labels=true")
    found = diagnose(recipe, "tiny", seconds=0)
    assert found.ready and found.autoencoder == "runs/a/ckpt.pt"
    networks = {part.name: part for part in found.parts}
    encoder = count_parameters(Autoencoder(model).encoder)
    assert networks["encoder"].parameters == encoder
    labelled = recipe.network.model_copy(update={"classes": 8})  # one a photograph
    assert networks["network"].parameters == count_parameters(build_network(labelled))
    assert found.length.images == 8 * 4 and found.length.data == 8
    json.dumps(asdict(found))


def test_everything_missing_is_told_at_once():
    recipe = diffusion_recipe("", "data.source=nowhere", "data.labels=true", "batch_size=6")
    found = diagnose(recipe, "tiny", processes=4, seconds=0)
    assert not found.ready and found.length.data is None
    told = errors(found)
    assert len(told) == 3 and all("\n" not in text for text in told)
    assert "no autoencoder run" in told[0] and "nowhere does not exist" in told[1]
    assert "use batch_size=4 or 8, or " in told[2] and found.length.each == 2
    notes = [problem.text for problem in found.problems if problem.level == "note"]
    assert notes == ["the data's classes are not known: 1,000 are assumed"]


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    found = diagnose(autoencoder_recipe("run.trackers=[mlflow]"), "tiny", seconds=0)
    [text] = errors(found)
    assert text.startswith("run.trackers: mlflow is not installed: ") and not found.ready


def test_settings_that_do_not_fit_stage_one_are_refused(tmp_path):
    save_run(tmp_path / "runs" / "a", "tiny")
    with pytest.raises(UsageError, match="multiple of 16"):
        diagnose(diffusion_recipe("", "resolution=40"), "tiny", seconds=0)


def test_a_device_that_is_not_there():
    found = diagnose(autoencoder_recipe("run.device=cuda"), "tiny", seconds=0)
    assert errors(found) == ["device 'cuda' requested, but PyTorch sees no CUDA device: use cpu"]
    assert found.machine.device == "cpu"


def test_a_process_that_uses_another_device(monkeypatch):
    def used(device):
        raise LdmError("this Python process already uses cpu")

    monkeypatch.setattr(doctor, "make_accelerator", used)
    found = diagnose(autoencoder_recipe(), "tiny", seconds=0)
    assert errors(found) == ["this Python process already uses cpu"] and found.memory is None


@pytest.mark.parametrize(
    "recipe",
    [
        autoencoder_recipe("run={device: cuda, compile: true}"),
        diffusion_recipe("", "run={device: cuda, compile: true}"),
    ],
)
def test_without_the_device_all_else_is_told_and_no_cost_worked_out(recipe, monkeypatch):
    monkeypatch.setattr(doctor, "Costs", None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    found = diagnose(recipe, "tiny")
    told = errors(found)
    assert "no CUDA device" in told[0] and "C++ compiler" in told[-1]
    assert found.length.images == 32 and found.length.data == 8
    assert (found.parts, found.step_gmac) == ([], {})
    assert found.memory is None and found.disk is None and found.trial is None
    json.dumps(asdict(found))


def test_data_of_a_size_that_suits_every_phase():
    recipe = autoencoder_recipe("data.source=nowhere")
    (told,) = errors(diagnose(recipe, "tiny", seconds=0))
    assert "--size 64" in told  # not the first phase's 32, which would not do for the second


def pretend(monkeypatch, **properties):
    """Another machine."""
    machine = doctor._machine
    monkeypatch.setattr(
        doctor, "_machine", lambda recipe, device: replace(machine(recipe, device), **properties)
    )


def test_too_little_memory(monkeypatch):
    recipe = autoencoder_recipe(ONE_PHASE, "adversarial.weight=0")
    memory = diagnose(recipe, "tiny", seconds=0).memory

    def scarce(free):
        with monkeypatch.context() as patch:
            pretend(patch, memory=free)
            return diagnose(recipe, "tiny", seconds=0)

    assert not scarce(memory.total).problems
    (problem,) = scarce(memory.total - 1).problems
    assert problem.level == "warning"
    assert problem.text.endswith("accumulate=2 makes micro-batches of 2")
    (problem,) = scarce(memory.lasting - 1).problems
    assert problem.level == "error" and "use smaller networks" in problem.text


def test_advice_that_its_own_sum_bears_out(monkeypatch):
    """Of EDM2's activations, the normalised filters are there for one image as for many."""
    network = "network={type: edm2, channels: 16, multipliers: [1], blocks: 1, head_width: 8}"

    def found(*settings):
        recipe = diffusion_recipe("", network, *settings)
        return diagnose(recipe, "tiny", seconds=0)

    totals = {n: found(f"accumulate={n}").memory.total for n in (2, 4)}
    for fewest, after in ((2, 4), (4, None)):
        with monkeypatch.context() as patch:
            pretend(patch, memory=totals[fewest])
            told = [p.text for p in found().problems if p.level == "warning"]
            assert told[0].endswith(f"accumulate={fewest} makes micro-batches of {4 // fewest}")
            pretend(patch, memory=totals[fewest] - 1)
            told = [p.text for p in found().problems if p.level == "warning"]
            smaller = "use smaller images or networks"
            assert told[0].endswith(f"makes micro-batches of {4 // after}" if after else smaller)


def test_a_cpu_is_not_tried_beyond_its_memory(monkeypatch):
    network = "network={type: edm2, channels: 16, multipliers: [1], blocks: 1, head_width: 8}"
    recipe = diffusion_recipe("", network)
    asked = []

    def tried(timer, *_):
        asked.append({images: timer.fits(32, images) for images in (1, 2, 4)})
        return Timing((), 1.0, peak=None, out_of_memory=False)

    monkeypatch.setattr(doctor, "time_training", tried)
    memory = diagnose(recipe, "tiny", seconds=1).memory
    one = diagnose(diffusion_recipe("", network, "accumulate=4"), "tiny", seconds=0).memory
    for free in (one.total, one.total - 1, memory.lasting - 1):
        with monkeypatch.context() as patch:
            pretend(patch, memory=free)
            diagnose(recipe, "tiny", seconds=1)
    everything, first, nothing = asked  # and without room for the weights no trial is begun
    assert all(everything.values()) and not any(nothing.values())
    assert first == {1: True, 2: False, 4: False}


def test_too_little_disk(monkeypatch):
    monkeypatch.setattr(doctor, "disk_at", lambda folder: (0, 1000))
    (told,) = errors(diagnose(autoencoder_recipe(), "tiny", seconds=0))
    assert told.startswith("disk: ") and "run.keep_states" in told


def cached(source):
    small = "network={channels: 16, multipliers: [1], blocks: 1, head_width: 8}"
    return diffusion_recipe(
        "", small, "cache=kept", f"data={{source: {source}, crop: center, flip: true}}"
    )


def test_a_cache_on_another_disk(tmp_path, monkeypatch):
    save_images(tmp_path / "images", 32)
    apart = diagnose(cached("images"), "tiny", seconds=0)
    assert apart.machine.cache_disk is None
    # mean and deviation of every image and of its mirror image, as in the cache's files
    assert apart.disk.cache == np.empty((3, 2, 2, 4, 4, 4), np.float32).nbytes
    free = {doctor.RUNS: apart.disk.run, Path("kept"): apart.disk.cache}
    monkeypatch.setattr(doctor, "disk_at", lambda folder: (folder, free[folder]))
    assert len(errors(diagnose(cached("images"), "tiny", seconds=0))) == 1  # stage one
    free[Path("kept")] -= 1
    found = diagnose(cached("images"), "tiny", seconds=0)
    assert found.machine.cache_disk == free[Path("kept")]
    assert errors(found)[-1].startswith("the cache's disk: ")


def test_a_cache_that_is_there_needs_no_more_room(tmp_path):
    save_images(tmp_path / "images", 32, count=4)
    recipe = cached("images")
    save_run(tmp_path / "runs" / "a", "tiny")
    model = load_autoencoder("runs/a")
    codec = Codec(model, torch.zeros(4), torch.ones(4))
    sha, source = fingerprint(model.state_dict()), open_source(recipe.data, "train", 32)
    with start_run("diffusion", "tiny", recipe, recipe.run, 1, tmp_path / "run") as run:
        open_cache(recipe, codec, sha, source, run)
    found = diagnose(recipe, "tiny", seconds=0)
    assert found.disk.cache == 0 and not errors(found)
    save_run(tmp_path / "runs" / "b", "tiny", bias=1.0)
    (told,) = errors(diagnose(recipe, "tiny", seconds=0))
    assert "kept holds latents of another autoencoder" in told


def test_a_cache_of_others_is_told_and_nothing_is_written(tmp_path):
    save_images(tmp_path / "images", 32)
    assert diagnose(cached("images"), "tiny", seconds=0).disk.cache > 0
    assert diagnose(cached("nowhere"), "tiny", seconds=0).disk.cache == 0
    assert not (tmp_path / "kept").exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("mine")
    found = diagnose(cached("images"), "tiny", seconds=0)
    assert "is not empty and holds no cache" in errors(found)[-1] and found.disk.cache == 0
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("levels", "ready"),
    [([], True), (["note", "warning"], True), (["note", "error"], False)],
)
def test_only_an_error_stops_a_run(levels, ready):
    machine = doctor.Machine("cpu", "2 cores", "fp32", memory=2**30, disk=2**30)
    length = doctor.Length(8, 4, processes=1, accumulate=1, each=4, images=32, data=8)
    problems = [Problem(level, "what, where, what to do") for level in levels]
    known = ("tiny", "autoencoder", "photos", None, machine, length, problems)
    found = doctor.Diagnosis(*known)
    assert found.ready == ready and found.memory is None


def test_the_disk_of_a_folder_that_does_not_exist(tmp_path, monkeypatch):
    missing = tmp_path / "not" / "yet"
    (number, free), (same, near) = doctor.disk_at(missing), doctor.disk_at(tmp_path)
    assert number == same and free == pytest.approx(near, rel=0.1)
    stat = os.stat
    monkeypatch.setattr(
        doctor.Path, "stat",
        lambda path, **how: SimpleNamespace(st_dev=path.name, st_mode=stat(path).st_mode),
    )  # fmt: skip
    assert doctor.disk_at(missing)[0] == tmp_path.name


def test_micro_batches_that_divide_and_fit():
    machine = doctor.Machine("cpu", "", "fp32", memory=1000, disk=0)

    def told(batch_size, processes, most):
        def need(accumulate, each):
            assert accumulate * each * processes == batch_size
            return SimpleNamespace(total=1000 if each <= most else 1001)

        length = doctor.Length(1, batch_size, processes, 1, batch_size // processes, 1, None)
        return doctor._smaller(need, SimpleNamespace(machine=machine, length=length))

    assert told(42, 1, most=41) == "accumulate=2 makes micro-batches of 21"
    assert told(42, 1, most=20) == "accumulate=3 makes micro-batches of 14"
    assert told(9, 1, most=8) == "accumulate=3 makes micro-batches of 3"
    assert told(64, 4, most=3) == "accumulate=8 makes micro-batches of 2"
    smaller = "use smaller images or networks"
    assert told(4, 4, most=0) == told(8, 1, most=0) == told(6, 4, most=9) == smaller


def test_a_gpu_that_runs_out_in_the_trial(monkeypatch):
    """As the trial finds it on a device whose memory is not known before."""
    recipe = autoencoder_recipe(ONE_PHASE, "adversarial.weight=0")

    def tried(timer, *_):
        assert timer.fits(10_000, 10_000)  # a GPU says so itself where it does not
        return Timing((), 1.0, peak=5, out_of_memory=True)

    pretend(monkeypatch, device="cuda:0")
    monkeypatch.setattr(doctor, "time_training", tried)
    (told,) = errors(diagnose(recipe, "tiny", seconds=1))
    assert told == (
        "micro-batches of 4 do not fit into this GPU's memory: "
        "accumulate=2 makes micro-batches of 2"
    )


def test_a_trial_of_both_stages(tmp_path):
    recipe = autoencoder_recipe(ONE_PHASE)
    found = diagnose(recipe, "tiny", seconds=0.01)
    assert found.ready and [s.load.steps for s in found.trial.speeds] == [3, 1]
    assert found.trial.seconds > 0 and not list(tmp_path.iterdir())  # nothing was written
    # stage one is not there: its shape is enough
    found = diagnose(diffusion_recipe("", "resolution=32"), "tiny", seconds=0.01)
    assert not found.ready and found.trial.speeds[0].load == Stretch(32, 8)
    assert not list(tmp_path.iterdir())


def test_a_trial_without_room_is_left_out(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(doctor, "StepTimer", full)
    found = diagnose(autoencoder_recipe(), "tiny", seconds=1)
    assert found.trial is None
    assert [p.text for p in found.problems] == ["not timed: CUDA out of memory."]
