"""A network of features: there on every process or on none, and looked for once."""

from types import SimpleNamespace

import pytest
import torch

from ldm import distributed as processes
from ldm.errors import LdmError, UsageError
from pipelines.measuring import metrics as features
from pipelines.measuring.metrics import find_extractor, load_on_all, notes_on

CPU = torch.device("cpu")


class Ranks:
    """Two processes in turn: what the main one tells, the other one hears."""

    def __init__(self, monkeypatch):
        self.told = None
        monkeypatch.setattr(features, "from_main", self.from_main)

    def from_main(self, ranks, make):
        if ranks.is_main_process:
            self.told = make()
        return self.told


MAIN, OTHER = (
    SimpleNamespace(is_main_process=rank == 0, process_index=rank, num_processes=2)
    for rank in (0, 1)
)


def test_what_is_there_is_loaded_by_every_process(monkeypatch):
    Ranks(monkeypatch)
    loads = iter("ab")
    assert load_on_all(lambda: next(loads), MAIN) == ("a", None)
    assert load_on_all(lambda: next(loads), OTHER) == ("b", None)


def test_what_is_missing_is_looked_for_by_the_main_process_alone(monkeypatch):
    Ranks(monkeypatch)
    tried = []

    def load():
        tried.append(1)
        raise LdmError("no weights")

    assert load_on_all(load, MAIN) == load_on_all(load, OTHER) == (None, "no weights")
    assert len(tried) == 1


def test_what_one_process_lacks_none_has(monkeypatch):
    """Else the one would leave while the others wait for its share."""
    Ranks(monkeypatch)
    reasons = []
    monkeypatch.setattr(features, "gather_object", lambda mine: reasons + mine)

    def load():
        raise LdmError("not on this machine")

    assert load_on_all(lambda: "a", MAIN) == ("a", None)
    assert load_on_all(load, OTHER) == (None, "not on this machine")
    reasons.append("not on this machine")  # as the main process hears it
    assert load_on_all(lambda: "a", MAIN) == (None, "not on this machine")


def test_a_module_that_breaks_on_one_process_ends_all(monkeypatch):
    """It is no missing file, and raised on that one alone would leave the others waiting."""
    Ranks(monkeypatch)
    told = []

    def load():
        raise KeyError("a bug")

    assert load_on_all(lambda: "a", MAIN) == ("a", None)
    monkeypatch.setattr(processes, "gather_object", lambda mine: told.extend(mine) or told)
    with pytest.raises(KeyError):
        load_on_all(load, OTHER)
    assert [str(error) for error in told] == ["process 1 failed: KeyError: 'a bug'"]


def test_a_wrong_word_is_no_missing_file(monkeypatch):
    Ranks(monkeypatch)
    with pytest.raises(UsageError, match="mode 'x' does not exist"):
        find_extractor(None, "x", None, 32, CPU, MAIN)


def test_what_a_person_has_asked_for_must_be_there_on_every_process(monkeypatch, tmp_path):
    Ranks(monkeypatch)
    for rank in (MAIN, OTHER):
        with pytest.raises(LdmError, match=r"no Inception weights at .*x.pt"):
            find_extractor(None, "clean", tmp_path / "x.pt", 32, CPU, rank)


def test_what_a_reader_has_to_know():
    published, other = (SimpleNamespace(name="a:b", is_published=p) for p in (True, False))
    assert notes_on(None, None) == notes_on(published, None) == []
    [note] = notes_on(other, "a:b")
    assert "the features are of a:b" in note
    [note] = notes_on(other, None)
    assert "not the published Inception" in note
