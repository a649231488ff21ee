"""Meeting, and one process that speaks for all; several are launched by the tests of commands."""

from types import SimpleNamespace

import pytest
import torch

from ldm import processes
from ldm.errors import LdmError
from ldm.processes import from_main, join_processes, make_accelerator


def test_alone():
    ranks, where = join_processes("cpu")
    assert (ranks.num_processes, where) == (1, torch.device("cpu"))
    assert from_main(ranks, lambda: 7) == 7


def test_a_device_that_is_not_there():
    with pytest.raises(LdmError, match="cuda:99"):
        join_processes("cuda:99")


@pytest.mark.parametrize("made", [7, None, LdmError("no room")])
def test_the_other_hears_what_the_main_process_made_or_said(monkeypatch, made):
    """Two processes in turn: what the first one sends is what the second one receives."""
    sent = []

    def broadcast(values):
        if not sent:
            sent.extend(values)
        values[:] = sent

    def make():
        if isinstance(made, LdmError):
            raise made
        return made

    monkeypatch.setattr(processes, "broadcast_object_list", broadcast)
    for is_main, call in ((True, make), (False, lambda: pytest.fail("the main process alone"))):
        ranks = SimpleNamespace(is_main_process=is_main, num_processes=2)
        if isinstance(made, LdmError):
            with pytest.raises(LdmError, match="no room"):
                from_main(ranks, call)
        else:
            assert from_main(ranks, call) == made


def test_a_launchers_environment_does_not_change_the_recipe(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = make_accelerator("cpu")
    assert accelerator.mixed_precision == "no"
    assert accelerator.gradient_accumulation_steps == 1
