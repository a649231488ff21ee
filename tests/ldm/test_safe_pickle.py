"""Third-party pickles: tensors are read bit for bit, and no code is run."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict, defaultdict
from datetime import datetime
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ldm.checkpoint import Damaged
from ldm.errors import LdmError
from ldm.safe_pickle import FLOAT8, Inert, read_foreign

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def write(path, tree, zipped=True):
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    return path


class Callback:
    """Not to be made again: its constructor tells."""

    def __init__(self):
        self.best = torch.ones(2)

    def __setstate__(self, state):
        pytest.fail("a foreign object was given its state")


class Mode(Enum):
    MIN = "min"


def trees():
    g = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=g)
    return {
        "plain": base,
        "transposed": base.T,
        "offset": base[2:, 1::2],
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(base[:2].clone()),
        **{
            str(dtype): torch.arange(5).to(dtype)
            for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
        },
        "bool": torch.tensor([True, False]),
    }


@FORMATS
def test_tensors_come_out_bit_for_bit(tmp_path, zipped):
    expected = trees()
    state = nn.Linear(2, 3).state_dict()  # an OrderedDict with an attribute
    tree = {"state_dict": OrderedDict(expected), "layer": state, "callback": Callback()}
    read = read_foreign(write(tmp_path / "a.ckpt", tree, zipped))
    assert read["state_dict"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert read["state_dict"][name].dtype == tensor.dtype, name
        assert torch.equal(read["state_dict"][name], tensor), name
    assert torch.equal(read["layer"]["weight"], state["weight"])
    assert isinstance(read["callback"], Inert)


@FORMATS
@pytest.mark.parametrize("name", FLOAT8)
def test_eight_bit_floats_come_out_bit_for_bit(tmp_path, zipped, name):
    expected = torch.tensor([[0.5, 1, 2], [4, 8, 16]]).to(getattr(torch, name))
    tree = {"w": expected, "row": expected[1:], "after": torch.ones(2)}
    read = read_foreign(write(tmp_path / "a.ckpt", tree, zipped))
    for key, tensor in tree.items():
        assert read[key].dtype == tensor.dtype and torch.equal(read[key].float(), tensor.float())


@FORMATS
def test_a_training_frameworks_checkpoint(tmp_path, zipped):
    """Objects of every manner of reduction beside the weights, none of them made again."""
    extras = {
        "callbacks": {Callback: {"best": 1.0}},
        "nested": [defaultdict(list, a=[Callback()]), {Mode.MIN: Callback()}],
        "at": datetime(2022, 6, 20),
        "range": range(3),
        "set": {1, 2},
        "numpy": np.float64(0.5),
        "slice": slice(1, 2),
        "exception": ValueError("x"),
        "optimizer": torch.optim.Adam(nn.Linear(2, 2).parameters()),
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
    }
    tree = {"epoch": 3, "state_dict": {"w": torch.arange(3.0)}, **extras}
    read = read_foreign(write(tmp_path / "a.ckpt", tree, zipped))
    assert read["epoch"] == 3
    assert torch.equal(read["state_dict"]["w"], torch.arange(3.0))
    assert isinstance(read["optimizer"], Inert) and isinstance(read["at"], Inert)


# ---------------------------------------------------------------------------------- bombs
class Reduces:
    """Pickles as the call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def bombs(mark):
    """A pickled object that leaves a file at `mark` if it is called."""
    touch, script = f"touch {mark}", f"open({str(mark)!r}, 'w').close()"
    return {
        "os.system": Reduces(os.system, (touch,)),
        "eval": Reduces(eval, (script,)),
        "exec": Reduces(exec, (script,)),
        "open": Reduces(open, (str(mark), "w")),
        "process": Reduces(subprocess.check_call, ((sys.executable, "-c", script),)),
        "torch": Reduces(torch.save, ([], str(mark))),
        "state": Reduces(Callback, (), {"a": 1}),
        "items": Reduces(list, (), None, iter([Reduces(os.system, (touch,))])),
        "pairs": Reduces(dict, (), None, None, iter([(1, Reduces(open, (str(mark), "w")))])),
        "setter": Reduces(str, (touch,), 1, None, None, os.system),
    }


@FORMATS
@pytest.mark.parametrize("name", bombs(Path()))
@pytest.mark.parametrize("wrap", [lambda b: b, lambda b: [{"a": (b,)}], lambda b: OrderedDict(b=b)])
def test_named_functions_are_not_called(tmp_path, zipped, name, wrap):
    mark = tmp_path / "mark"
    tree = {"w": torch.ones(2), "bomb": wrap(bombs(mark)[name])}
    read = read_foreign(write(tmp_path / "a.ckpt", tree, zipped))
    assert torch.equal(read["w"], torch.ones(2))
    assert not mark.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cos\nsystem\n(S'touch MARK'\ntR.",  # REDUCE
        b"(S'touch MARK'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch MARK'\no.",  # OBJ
        b"\x80\x02cos\nsystem\nS'touch MARK'\n\x85\x81.",  # NEWOBJ
        b"\x80\x04cos\nsystem\nS'touch MARK'\n\x85}\x92.",  # NEWOBJ_EX
        b"\x80\x04\x8c\x02os\x8c\x06system\x93S'touch MARK'\n\x85R.",  # STACK_GLOBAL
        b"cos\nsystem\n}S'a'\nS'touch MARK'\nsb.",  # BUILD on what stands for a function
        b"cos\nsystem\n)R(NS'x'\nN}tb.",  # BUILD with a slot state
        b"cbuiltins\neval\n(cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntRtR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n}S'__code__'\nI1\nsb.",  # BUILD on what is wanted
        b"ctorch\nFloatStorage\n(N}S'dtype'\nI1\nstb.",
        b"ccollections\nOrderedDict\n(N}S'x'\nI1\nstb.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(cos\nsystem\nS'touch MARK'\nI1\nI1\ntR.",
        b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.",
        b"ctorch.hub\nload\n(S'MARK'\nS'x'\ntR.",
        b"(S'storage'\ncos\nsystem\nS'0'\nS'cpu'\nI4\ntQ.",  # persistent ids
        b"Pstorage\n.",
        b"(S'module'\ncos\nsystem\nS'touch MARK'\nS'x'\ntQ.",
        b"(S'storage'\nctorch\nFloatStorage\nS'../../etc/passwd'\nS'cpu'\nI4\ntQ.",
        b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI400000000000\ntQ.",
        b"\x80\x02\x82\x01.",  # EXT1: a code of the extension registry
    ],
)
def test_calling_opcodes_call_placeholders(tmp_path, monkeypatch, opcodes):
    """Hand-written pickles, opened as a zip: either refused in one line, or inert."""
    mark = tmp_path / "mark"
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", opcodes.replace(b"MARK", str(mark).encode()))
        archive.writestr("a/version", "3\n")
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("called"))
    try:
        read = read_foreign(path)
    except LdmError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(read, Inert) or callable(read)
    assert not mark.exists()
    # what is wanted is as it was: a good file reads as before
    monkeypatch.undo()
    good = read_foreign(write(tmp_path / "good.ckpt", {"w": torch.arange(4.0), "c": Callback()}))
    assert torch.equal(good["w"], torch.arange(4.0))


def test_a_storage_of_negative_length_is_refused(tmp_path):
    """It would be the rest of the file: `frombuffer` takes a negative count for that."""
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("a/data.pkl", b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI-1\ntQ.")
        archive.writestr("a/data/0", bytes(16))
    with pytest.raises(Damaged) as caught:
        read_foreign(tmp_path / "a.ckpt")
    assert "negative length" in str(caught.value.__cause__)


def test_no_module_is_imported_by_name(tmp_path):
    (tmp_path / "evil_module_here.py").write_text("raise SystemExit('imported')")
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("a/data.pkl", b"cevil_module_here\nThing\n)R.")
    sys.path.insert(0, str(tmp_path))
    try:
        assert isinstance(read_foreign(tmp_path / "a.ckpt"), Inert)
    finally:
        sys.path.remove(str(tmp_path))
    assert "evil_module_here" not in sys.modules


def test_torchscript_is_not_opened(tmp_path, monkeypatch):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "a.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *_a, **_k: pytest.fail("TorchScript was loaded"))
    try:
        assert isinstance(read_foreign(tmp_path / "a.pt"), Inert)
    except LdmError as error:
        assert "\n" not in str(error)


# --------------------------------------------------------------------------------- damage
@FORMATS
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.99])
def test_truncated_files_are_one_line(tmp_path, zipped, kept):
    path = write(tmp_path / "a.ckpt", {"w": torch.ones(500), "c": Callback()}, zipped)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(Damaged) as caught:
        read_foreign(path)
    assert "\n" not in str(caught.value) and "a.ckpt" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(LdmError, match=r"could not read .*none\.ckpt"):
        read_foreign(tmp_path / "none.ckpt")


def test_a_view_past_its_storages_end_is_refused(tmp_path):
    """Neither memory of ours nor the rest of the file comes out as a tensor."""
    path = tmp_path / "a.ckpt"
    write(path, {"w": torch.zeros(4), "c": Callback()})
    content = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickled = archive.read("a/data.pkl")
        names = {name: archive.read(name) for name in archive.namelist()}
    # the tensor's size (4,) → (200,), its storage as it was
    assert pickled.count(b"K\x04\x85") == 1
    names["a/data.pkl"] = pickled.replace(b"K\x04\x85", b"K\xc8\x85")
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    with pytest.raises(Damaged):
        read_foreign(path)


def test_packed_storages_are_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    write(path, {"w": torch.zeros(4000), "c": Callback()})
    with zipfile.ZipFile(path) as archive:
        names = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in names.items():
            archive.writestr(name, data)
    with pytest.raises(Damaged):
        read_foreign(path)


def test_a_legacy_storage_of_another_length_is_refused(tmp_path):
    path = write(tmp_path / "a.ckpt", {"w": torch.ones(7), "c": Callback()}, zipped=False)
    content = path.read_bytes()
    at = content.rindex(struct.pack("<q", 7))
    path.write_bytes(content[:at] + struct.pack("<q", 6) + content[at + 8 :])
    with pytest.raises(Damaged):
        read_foreign(path)


def pickles(path):
    """Offsets of the ends of the five pickles of the older format; the values begin at the last."""
    with path.open("rb") as file:
        unpickler = type("Skip", (pickle.Unpickler,), {
            "persistent_load": lambda *_: None, "find_class": lambda *_: Inert,
        })  # fmt: skip
        for _ in range(5):
            unpickler(file).load()
            yield file.tell()


def test_a_legacy_storage_without_values_is_refused(tmp_path):
    """Else what this process has in its memory would come out as a tensor."""
    path = write(tmp_path / "a.ckpt", {"w": torch.ones(7)}, zipped=False)
    ends, content = list(pickles(path)), path.read_bytes()
    path.write_bytes(content[: ends[3]] + pickle.dumps([], 2) + content[ends[4] :])
    with pytest.raises(Damaged) as caught:
        read_foreign(path)
    assert "without values" in str(caught.value.__cause__)


def test_legacy_storages_are_no_larger_than_the_file_together(tmp_path):
    tree = {str(i): torch.zeros(100) for i in range(20)}
    path = write(tmp_path / "a.ckpt", tree, zipped=False)
    path.write_bytes(path.read_bytes()[: list(pickles(path))[4] + 1000])
    with pytest.raises(Damaged) as caught:
        read_foreign(path)
    assert "larger than the file" in str(caught.value.__cause__)


@FORMATS
@pytest.mark.parametrize("held", [0, 4])
def test_a_state_cannot_make_a_tensor_grow(tmp_path, zipped, held):
    """BUILD reaches a tensor's __setstate__, and so its set_ to the storage of another one."""
    read = read_foreign(write(tmp_path / "a.ckpt", {"w": torch.zeros(held)}, zipped))
    with pytest.raises(RuntimeError, match="not resizable"):
        read["w"].__setstate__((read["w"], 0, (100,), (1,)))


@FORMATS
def test_rarer_kinds_of_tensors_are_inert(tmp_path, zipped):
    tree = {"w": torch.ones(2), "sparse": torch.eye(3).to_sparse()}
    if zipped:  # in a row, values of a size that is not known end the reading
        tree["complex"] = torch.zeros(2, dtype=torch.complex64)
    read = read_foreign(write(tmp_path / "a.ckpt", tree, zipped))
    assert torch.equal(read.pop("w"), torch.ones(2))
    assert all(isinstance(value, Inert) for value in read.values())


def test_a_plain_pickle_is_no_checkpoint(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(Damaged):
        read_foreign(tmp_path / "a.ckpt")


@pytest.mark.parametrize("name", ["os.system", "eval", "open"])
def test_named_functions_are_called_by_pickle(tmp_path, name):
    mark = tmp_path / "mark"
    path = write(tmp_path / "a.ckpt", {"bomb": bombs(mark)[name]})
    torch.load(path, weights_only=False)
    assert mark.exists()
