import os
import re
import signal
import threading
from functools import partial

import pytest
import torch
from torch import nn

import ldm.run
from ldm.checkpoint import ModelFile, load_model
from ldm.config import resolve
from ldm.console import received
from ldm.data import workers
from ldm.distributed import check_batch, make_accelerator
from ldm.errors import Interrupted, LdmError, UsageError
from ldm.files import write_atomically
from ldm.run import MAX_BAD_STEPS, Run, RunConfig, start_run
from ldm.run_folder import TrainingState, latest_state, load_state


class Recipe(RunConfig):
    """Any config does."""


@pytest.fixture
def run(tmp_path):
    received.clear()
    yield Run(tmp_path, RunConfig(device="cpu"), make_accelerator("cpu"))
    workers.stopping.clear()


def one_step(run, factor: float = 1.0, clip_norm: float | None = None):
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
    before = module.weight.clone()
    with run.accelerator.accumulate(module):
        loss = module(torch.ones(2, 3)).square().mean() * factor
        norm = run.step(loss, module, optimizer, "it", clip_norm)
    return module.weight.detach() - before, norm


@pytest.mark.parametrize(
    ("sizes", "advice"),
    [
        ((42, 1, 8), "use batch_size=40 or 48, or 1, 2, 3, 6, 7, 14, 21, 42 process(es)"),
        ((42, 2, 4), "use batch_size=40 or 48, or 1, 3, 7, 21 process(es)"),
        ((3, 2, 1), "use batch_size=2 or 4"),
        ((3, 1, 4), "use batch_size=4, or 1, 3 process(es)"),
    ],
)
def test_a_batch_that_does_not_divide_names_those_that_do(sizes, advice):
    with pytest.raises(UsageError) as refused:
        check_batch(*sizes)
    assert str(refused.value).endswith(advice)


def test_a_step_updates_and_clears(run):
    change, norm = one_step(run)
    assert change.abs().max() > 0 and norm > 0


def test_clipping_bounds_the_update(run):
    change, norm = one_step(run, factor=1000.0, clip_norm=1.0)
    assert norm > 1
    assert change.norm() <= 0.1 + 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_step_is_skipped_and_counted(run, bad):
    change, _ = one_step(run, factor=bad)
    assert change.abs().max() == 0 and run.skipped["it"] == 1


def test_an_infinite_loss_with_finite_gradients_is_skipped(run):
    module = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
    before = module.weight.clone()
    with run.accelerator.accumulate(module):
        run.step(module(torch.ones(1, 1)).sum() + float("inf"), module, optimizer, "it", None)
    assert torch.equal(module.weight, before) and run.skipped.total() == 1


def test_ten_bad_steps_in_a_row_stop_the_run(run):
    for _ in range(MAX_BAD_STEPS - 1):
        one_step(run, float("nan"))
    one_step(run)
    for _ in range(MAX_BAD_STEPS - 1):
        one_step(run, float("nan"))
    run.save({"images_seen": 8, "w": torch.ones(1)}, model(1.0))
    one_step(run, float("nan"))
    with pytest.raises(LdmError, match=r"not finite in 10 steps in a row.*state/8"):
        one_step(run)  # the step after the tenth
    assert run.skipped["it"] == 2 * MAX_BAD_STEPS - 1
    assert torch.equal(load_state(run.folder / "state" / "8")["w"], torch.ones(1))


@pytest.mark.parametrize("before", [0, 2])
def test_a_skipped_step_leaves_no_trace(run, before):
    """Weights and Adam's state are those of a run without the step, from the first step on."""
    outcomes = []
    for steps in ([1.0] * (before + 2), [1.0] * before + [float("nan")] + [1.0] * 2):
        torch.manual_seed(0)
        module = nn.Linear(3, 1)
        optimizer = torch.optim.Adam(module.parameters(), 0.1, fused=True)
        for number, factor in enumerate(steps):
            with run.accelerator.accumulate(module):
                loss = module(torch.ones(2, 3)).square().mean() * factor
                run.step(loss, module, optimizer, "it", 1.0)
            if factor != factor and number == 0:
                assert all(torch.equal(s, torch.zeros_like(s)) for s in states(optimizer))
        outcomes.append([*module.parameters(), *states(optimizer)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def states(optimizer) -> list[torch.Tensor]:
    return [tensor for state in optimizer.state.values() for tensor in state.values()]


def test_processes_skip_a_step_and_stop_together(run, monkeypatch):
    theirs = torch.zeros(2)  # the other process's flags: not finite, asked to stop
    monkeypatch.setattr(run, "world", 2)
    monkeypatch.setattr(run, "sum", lambda flags: flags + theirs)
    theirs[0] = 1
    change, _ = one_step(run)
    assert change.abs().max() == 0 and run.skipped["it"] == 1
    theirs[:] = torch.tensor([0, 1])
    change, _ = one_step(run)
    assert change.abs().max() > 0 and not run.stop_after_step()
    one_step(run)
    assert run.stop_after_step() and run.skipped["it"] == 1


def test_accumulated_micro_batches_make_one_update(tmp_path):
    run = Run(tmp_path, RunConfig(device="cpu"), make_accelerator("cpu", accumulate=2))
    torch.manual_seed(0)
    together, apart = nn.Linear(3, 1), nn.Linear(3, 1)
    apart.load_state_dict(together.state_dict())
    data = torch.randn(4, 3)
    optimizer = torch.optim.SGD(apart.parameters(), lr=0.1, fused=True)
    norms = []
    for half in data.chunk(2):
        with run.accelerator.accumulate(apart):
            loss = apart(half).square().mean()
            norms.append(run.step(loss, apart, optimizer, "it", None))
    assert norms[0] is None and norms[1] is not None
    together(data).square().mean().backward()
    expected = together.weight - 0.1 * together.weight.grad
    assert torch.allclose(apart.weight, expected, atol=1e-6)


def test_an_infinite_loss_in_any_micro_batch_skips_the_step(tmp_path):
    run = Run(tmp_path, RunConfig(device="cpu"), make_accelerator("cpu", accumulate=2))
    module = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
    before = module.weight.clone()
    for extra in (float("inf"), 0.0):
        with run.accelerator.accumulate(module):
            run.step(module(torch.ones(1, 1)).sum() + extra, module, optimizer, "it", None)
    assert torch.equal(module.weight, before) and run.skipped["it"] == 1


def test_say_prints_brackets(run, capsys):
    run.say("runs/[abl]/[/x]")
    assert "runs/[abl]/[/x]" in capsys.readouterr().out


def test_save_and_resume(run):
    assert run.resume() is None
    run.skipped["it"] = 3
    run.save({"images_seen": 16, "t": torch.arange(3)}, model(1.0))
    run.settle()
    again = Run(run.folder, run.config, run.accelerator)
    tree = again.resume()
    assert tree["images_seen"] == 16 and torch.equal(tree["t"], torch.arange(3))
    assert again.skipped["it"] == 3


def model(value: float) -> ModelFile:
    return ModelFile("autoencoder", {}, {"w": torch.full((3,), value)})


@pytest.fixture
def held_back(monkeypatch):
    """Keeps saved states from being written until it is set."""
    held_back, save = threading.Event(), ldm.run.save_state

    def wait_and_save(*arguments):
        assert held_back.wait(60)
        return save(*arguments)

    monkeypatch.setattr(ldm.run, "save_state", wait_and_save)
    return held_back


def test_training_goes_on_while_the_state_of_its_moment_is_written(run, held_back):
    weights, moments = torch.ones(3), {0: {"exp_avg": torch.ones(3)}}
    exported = model(1.0)
    run.save({"images_seen": 8, "w": weights, "opt": {"state": moments}}, exported)
    for tensor in (weights, moments[0]["exp_avg"], exported.weights["w"]):
        tensor.zero_()  # the next step
    assert latest_state(run.folder / "state") is None
    held_back.set()
    run.settle()
    saved = load_state(run.folder / "state" / "8")
    found = load_model(run.folder / "ckpt.pt", "autoencoder").weights["w"]
    for tensor in (saved["w"], saved["opt"]["state"][0]["exp_avg"], found):
        assert torch.equal(tensor, torch.ones(3))


def test_a_save_and_the_end_wait_for_the_save_before(run, held_back):
    run.save({"images_seen": 8}, model(1.0))
    threading.Timer(0.2, held_back.set).start()
    run.save({"images_seen": 16}, model(2.0))
    assert (run.folder / "state" / "8" / "state.pt").is_file()
    run.finish({})
    assert latest_state(run.folder / "state").name == "16"


def test_a_save_does_not_wait_for_the_best_model(run, held_back, monkeypatch):
    save = ldm.run.save_model
    monkeypatch.setattr(ldm.run, "save_model", lambda *files: (held_back.wait(60), save(*files)))
    run.write_model("best.pt", model(1.0))
    run.save({"images_seen": 8}, model(2.0))
    assert not (run.folder / "best.pt").exists()
    held_back.set()
    run.settle()
    assert load_model(run.folder / "best.pt", "autoencoder").weights["w"][0] == 1
    assert latest_state(run.folder / "state").name == "8"


def test_a_weight_that_is_there_twice_is_saved_once(run):
    frozen = torch.ones(10_000)
    run.save({"images_seen": 8, "network": {"w": frozen}, "ema": {"w": frozen}}, model(1.0))
    run.settle()
    assert (run.folder / "state" / "8" / "state.pt").stat().st_size < 2 * frozen.nbytes


def test_a_model_that_cannot_be_written_stops_the_run_without_a_state(run):
    (run.folder / "ckpt.pt").mkdir()
    run.save({"images_seen": 8}, model(1.0))
    run.writer.join()
    assert run.stop_requested() and latest_state(run.folder / "state") is None
    with pytest.raises(LdmError, match=r"could not write .*ckpt\.pt"):
        run.interrupted("stopped")
    (run.folder / "ckpt.pt").rmdir()
    run.save({"images_seen": 16}, model(1.0))  # said once
    assert run.finish({}) and latest_state(run.folder / "state").name == "16"


def test_a_run_that_fails_waits_for_its_files_and_says_which_it_lost(tmp_path, held_back, caplog):
    config, folder = RunConfig(device="cpu"), tmp_path / "run"
    with pytest.raises(ValueError, match="a fault"):  # noqa: SIM117
        with start_run("autoencoder", "x", Recipe(), config, folder=folder) as run:
            run.save({"images_seen": 8}, model(1.0))
            run.writer.submit(partial(write_atomically, folder / "state", b""))
            threading.Timer(0.2, held_back.set).start()
            raise ValueError("a fault")
    assert latest_state(folder / "state").name == "8"
    assert re.search(r"could not write .*state", caplog.text)
    assert not workers.stopping.is_set()  # or the next run of this process would stop at once


def test_a_signal_does_not_cut_the_wait_of_a_run_that_fails(tmp_path, held_back):
    def signal_and_go_on():
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Timer(0.2, held_back.set).start()

    config, folder = RunConfig(device="cpu"), tmp_path / "run"
    with pytest.raises(ValueError, match="a fault"):  # noqa: SIM117
        with start_run("autoencoder", "x", Recipe(), config, folder=folder) as run:
            run.save({"images_seen": 8}, model(1.0))
            threading.Timer(0.2, signal_and_go_on).start()
            raise ValueError("a fault")
    assert latest_state(folder / "state").name == "8"


def test_a_stop_whose_files_are_lost_is_an_error(tmp_path):
    config, folder = RunConfig(device="cpu"), tmp_path / "run"
    with pytest.raises(LdmError, match="could not write"):  # noqa: SIM117
        with start_run("autoencoder", "x", Recipe(), config, folder=folder) as run:
            (folder / "ckpt.pt").mkdir()
            run.save({"images_seen": 8}, model(1.0))
            raise Interrupted("stopped, waiting for a loader worker")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_requests_a_stop(tmp_path, number):
    config = RunConfig(device="cpu")
    handler = signal.getsignal(number)
    with start_run("autoencoder", "x", Recipe(), config, folder=tmp_path / "run") as run:
        assert not run.stop_requested()
        os.kill(os.getpid(), number)
        assert run.stop_requested()
    assert signal.getsignal(number) is handler


def test_only_a_third_ctrl_c_stops_at_once(run):
    """Launchers repeat SIGTERM, and torchrun repeats Ctrl-C; only a person insists."""
    for number in [signal.SIGTERM] * 4 + [signal.SIGINT] * 2:
        run.request_stop(number)
    with pytest.raises(KeyboardInterrupt):
        run.request_stop(signal.SIGINT)


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    config = RunConfig(device="cpu")
    folder = tmp_path / "run"
    with (
        start_run("autoencoder", "x", Recipe(), config, folder=folder),
        pytest.raises(LdmError, match="another process is at work"),
        start_run("autoencoder", "x", Recipe(), config, folder=folder),
    ):
        pass


def stop_at_three(key):
    """Stop the process that works on three."""
    if key == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    return key


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_a_stopped_worker_and_saves(tmp_path, monkeypatch, number):
    monkeypatch.setattr(workers, "PATIENCE", 0)
    config, saved, seen = RunConfig(device="cpu"), [], []
    state = TrainingState(batch_size=1, total_steps=9)
    with start_run("autoencoder", "x", Recipe(), config, folder=tmp_path / "run") as run:
        stream = workers.load_in_workers(stop_at_three, range(9), 1, "")
        with pytest.raises(Interrupted, match=f"waiting for a loader worker, saved in {tmp_path}"):
            for batch in run.until_stopped(state, stream, lambda: saved.append(seen[-1])):
                seen.append(batch)
                if batch == 2:
                    os.kill(os.getpid(), number)
        monkeypatch.setattr(type(run.accelerator), "sync_gradients", False)
        stream = workers.load_in_workers(stop_at_three, range(3, 9), 1, "")
        with pytest.raises(Interrupted, match=r"waiting for a loader worker$"):
            list(run.until_stopped(state, stream, lambda: saved.append("the middle of a step")))
    assert (seen, saved) == ([0, 1, 2], [2])
    assert not workers.stopping.is_set()


def test_dropout_depends_on_the_image_number(run):
    draws = []
    for image in (5, 6, 5):
        run.begin(image)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])


def test_auto_compiles_on_a_gpu_with_all_that_it_needs(monkeypatch, tmp_path):
    def compiles(device="cuda", compile="auto", **settings):
        return RunConfig(compile=compile, **settings).compiles(torch.device(device))

    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": tmp_path})
    monkeypatch.setattr("ldm.device.has_triton", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: name in ("g++", "gcc"))
    assert compiles() and not compiles("cpu") and not compiles(deterministic=True)
    for there in ((), ("g++",), ("gcc",)):
        monkeypatch.setattr("shutil.which", lambda name, there=there: name in there)
        assert not compiles() and not compiles(compile=False)
        assert compiles(compile=True) and compiles("cpu", compile=True)
    monkeypatch.setattr("shutil.which", lambda _: True)
    assert compiles()
    (tmp_path / "Python.h").unlink()
    assert not compiles()
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("ldm.device.has_triton", lambda: False)
    assert not compiles()


def test_deterministic_runs_restore_the_settings_and_name_what_is_not(tmp_path):
    config = Recipe(device="cpu", deterministic=True)
    message = "adaptive_max_pool2d_backward_cuda does not have a deterministic implementation, but"
    with (
        pytest.raises(LdmError, match=r"adaptive_max_pool2d_backward_cuda is not deterministic"),
        start_run("autoencoder", "tiny", config, config, folder=tmp_path / "run"),
    ):
        assert torch.are_deterministic_algorithms_enabled()
        raise RuntimeError(message)
    assert not torch.are_deterministic_algorithms_enabled()


# --------------------------------------------------------------------------- speed and traces
def test_usage_is_the_time_waited_and_the_share_of_the_peak(run, monkeypatch):
    now = iter([0.0, 1.0, 1.0, 1.5])
    monkeypatch.setattr("ldm.run.time.monotonic", lambda: next(now))
    waited = run.waits(["a", "b"])
    assert [next(waited), next(waited)] == ["a", "b"]
    run.flops, run._peak, run.world = {"a kind": 3e9}, 1e12, 2
    run.begin(0, "a kind")
    # 1.5 s of 6 s; 3e9 operations for each of 100 images in 6 s on two devices of 1e12 a second
    assert run._usage(6.0, 100) == {"data_wait": 0.25, "mfu": pytest.approx(0.025)}
    run.begin(100, "another kind")
    assert run._usage(6.0, 100) == {"data_wait": 0.0}


@pytest.mark.parametrize("window", ["5", "7:7", "9:8", "-1:3", "a:b", "1:2:3"])
def test_a_window_that_is_none_is_one_line(window):
    with pytest.raises(UsageError, match=r"^'profile': must be START:STOP, two counts of steps, t"):
        resolve(RunConfig, {}, [f"profile={window}"])


def test_a_window_of_steps_is_read_from_the_command_line():
    """YAML 1.1 takes 10:20 for a number of base 60."""
    assert resolve(RunConfig, {}, ["profile=10:20"]).profile == "10:20"
