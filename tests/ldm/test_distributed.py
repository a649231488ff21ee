"""Helpers for several processes, in one; tests of commands launch several."""

from types import SimpleNamespace

import pytest
import torch

from ldm import distributed as processes
from ldm.distributed import fail_together, from_main, join_processes, make_accelerator
from ldm.errors import LdmError


def test_alone():
    ranks, where = join_processes("cpu")
    assert (ranks.num_processes, where) == (1, torch.device("cpu"))
    assert from_main(ranks, lambda: 7) == 7


def test_a_device_that_is_not_there():
    with pytest.raises(LdmError, match="cuda:99"):
        join_processes("cuda:99")


@pytest.mark.parametrize("made", [7, None])
def test_from_main_sends_the_result_to_all(monkeypatch, made):
    """Two processes in turn: what the first one sends is what the second one receives."""
    sent = []

    def broadcast(values):
        if not sent:
            sent.extend(values)
        values[:] = sent

    monkeypatch.setattr(processes, "broadcast_object_list", broadcast)
    monkeypatch.setattr(processes, "gather_object", lambda mine: mine)
    assert from_main(rank(0), lambda: made) == made
    assert from_main(rank(1), lambda: pytest.fail("the main process alone")) == made


def rank(number: int) -> SimpleNamespace:
    return SimpleNamespace(is_main_process=number == 0, process_index=number, num_processes=2)


def raised(ranks, error: Exception | None) -> Exception | None:
    """The outcome of an action of one process."""
    try:
        with fail_together(ranks):
            if error is not None:
                raise error
    except Exception as out:
        return out
    return None


def test_a_failed_process_prints_its_error_while_it_waits(monkeypatch, capsys):
    monkeypatch.setattr(processes, "gather_object", lambda mine: mine)
    raised(rank(1), KeyError("a bug"))
    assert "process 1 failed and waits for the others" in capsys.readouterr().err


LACKING, BROKEN = LdmError("no room"), KeyError("a bug")


@pytest.mark.parametrize(
    ("theirs", "out"),
    [
        ((None, None), (None, None)),
        ((LACKING, None), (LACKING, LACKING)),
        ((None, LACKING), (LACKING, LACKING)),
        ((BROKEN, None), (BROKEN, "process 0 failed: KeyError: 'a bug'")),
        # the first would live with its own, and wait for the second
        ((LACKING, BROKEN), ("process 1 failed: KeyError: 'a bug'", BROKEN)),
    ],
)
def test_if_one_process_fails_all_do(monkeypatch, theirs, out):
    errors = []
    monkeypatch.setattr(processes, "gather_object", lambda mine: errors.extend(mine) or mine)
    for number, error in enumerate(theirs):
        raised(rank(number), error)
    monkeypatch.setattr(processes, "gather_object", lambda mine: list(errors))
    for number, (error, expected) in enumerate(zip(theirs, out, strict=True)):
        found = raised(rank(number), error)
        if isinstance(expected, str):
            assert type(found) is RuntimeError and str(found) == expected
        else:
            assert found is expected


def test_from_main_raises_the_error_on_all(monkeypatch):
    """Of any type; the others would otherwise wait for the result."""
    errors = []
    monkeypatch.setattr(
        processes, "gather_object", lambda mine: errors.extend(mine) or list(errors)
    )
    with pytest.raises(ZeroDivisionError):
        from_main(rank(0), lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="process 0 failed: ZeroDivisionError: division by zero"):
        from_main(rank(1), lambda: pytest.fail("the main process alone"))


def test_a_single_process_raises_its_own_error():
    ranks, _ = join_processes("cpu")
    assert raised(ranks, LACKING) is LACKING and raised(ranks, BROKEN) is BROKEN


def test_a_launchers_environment_does_not_change_the_recipe(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = make_accelerator("cpu")
    assert accelerator.mixed_precision == "no"
    assert accelerator.gradient_accumulation_steps == 1


def test_files_of_other_machines_may_show_late(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    shown = [[1, 2], [2], []]
    assert processes.wait_for_files(lambda: shown.pop(0), 2) == [] == shown
    monkeypatch.setattr(processes, "SHOWN_WITHIN", 0.0)
    assert processes.wait_for_files(lambda: [1], 2) == [1]


def test_one_process_does_not_wait_for_its_own_files(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waited"))
    assert processes.wait_for_files(lambda: [1], 1) == [1]
