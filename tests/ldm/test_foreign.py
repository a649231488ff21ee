"""Renaming both ways, shapes that must fit, and the weights in other toolkits' folders."""

import pytest
import torch

from ldm.checkpoint import open_safetensors, to_safetensors
from ldm.errors import LdmError
from ldm.foreign import (
    PICKLED_FILE,
    WEIGHTS_FILE,
    as_multiples,
    find_prefix,
    fit,
    layer_sizes,
    pick,
    read_weights,
    rename,
    renamed,
    reverse,
    weights_files,
)

PAIRS = [("levels.0", "up.1"), ("levels.1", "up.0"), ("skip", "shortcut"), ("conv", "op.conv")]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("levels.0.skip.weight", "up.1.shortcut.weight"),
        ("levels.1.conv.bias", "up.0.op.conv.bias"),
        ("levels.10.skipped.conv1.weight", "levels.10.skipped.conv1.weight"),  # whole parts alone
        ("skip", "shortcut"),
    ],
)
def test_names_are_renamed_by_whole_parts_and_back(ours, theirs):
    assert rename(ours, PAIRS) == theirs
    assert rename(theirs, reverse(PAIRS)) == ours


def test_renaming_keeps_order_and_tensors():
    weights = {"skip.weight": torch.zeros(1), "a": torch.ones(1)}
    assert list(renamed(weights, PAIRS)) == ["shortcut.weight", "a"]
    assert renamed(weights, PAIRS)["a"] is weights["a"]


def test_the_prefix_is_the_one_that_has_the_first_tensor():
    names = ["model.in.weight", "out.weight"]
    assert find_prefix(names, ["", "model."], "in.weight") == "model."
    assert find_prefix(names, ["", "model."], "mid.weight") is None


def test_parts_are_picked_from_under_the_prefix():
    weights = {name: torch.zeros(1) for name in ("m.in.weight", "m.loss.weight", "in.weight")}
    assert list(pick(weights, "m.", ("in.", "out."))) == ["in.weight"]


def test_weights_that_fit_come_in_our_order():
    expected = {"b.conv": torch.zeros(2, device="meta"), "skip": torch.zeros(3, device="meta")}
    theirs = {"shortcut": torch.ones(3), "b.op.conv": torch.ones(2)}
    fitted = fit(theirs, expected, PAIRS)
    assert list(fitted) == ["b.conv", "skip"] and torch.equal(fitted["skip"], theirs["shortcut"])
    assert fitted["skip"].data_ptr() != theirs["shortcut"].data_ptr()  # it outlives their file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shortcut": None}, "tensor shortcut is none in the file, (3,) in the model"),
        ({"shortcut": torch.ones(4)}, "tensor shortcut is (4,) in the file, (3,) in the model"),
        ({"x\n": torch.ones(4)}, r"tensor x\n is (4,) in the file, none in the model"),
        (
            {"shortcut": torch.ones(3).long()},
            "tensor shortcut is of torch.int64 in the file, torch.float32",
        ),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_named(change, message):
    theirs = {"shortcut": torch.ones(3)} | change
    theirs = {name: tensor for name, tensor in theirs.items() if tensor is not None}
    with pytest.raises(LdmError) as caught:
        fit(theirs, {"skip": torch.zeros(3, device="meta")}, PAIRS)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_come_from_a_weight_of_the_right_dimensions():
    weights = {"conv": torch.zeros(5, 3, 1, 1), "linear": torch.zeros(4, 2)}
    assert layer_sizes(weights, "conv") == (5, 3)
    assert layer_sizes(weights, "linear", 2) == (4, 2)
    for name in ("linear", "none"):
        with pytest.raises(LdmError, match=f"tensor {name} is .*, not of 4 dimensions"):
            layer_sizes(weights, name)


def test_widths_are_multiples_of_the_first():
    assert as_multiples([32, 96], 32) == [1, 3]
    for widths, base in (([32, 48], 32), ([], 0), ([0], 0), ([32, 0], 32)):
        with pytest.raises(LdmError, match="are not multiples of the first one"):
            as_multiples(widths, base)


def test_shards_are_read_as_one(tmp_path):
    parts = {"a": {"x": torch.ones(2)}, "b": {"y": torch.zeros(3)}}
    for name, weights in parts.items():
        (tmp_path / name).write_bytes(to_safetensors(weights, format="pt"))
    read = read_weights(*(tmp_path / name for name in parts))
    assert {name: tensor.tolist() for name, tensor in read.items()} == {"x": [1, 1], "y": [0] * 3}
    with open_safetensors(tmp_path / "a") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["", ".fp16"], [""]),
        ([".non_ema", ".fp16"], [".fp16"]),
        (["-00001-of-00002", "-00002-of-00002"], ["-00001-of-00002", "-00002-of-00002"]),
        *(
            ([*shards, ".z"], list(shards))
            for shards in (
                (".fp16-00001-of-00002", ".fp16-00002-of-00002"),
                ("-00001-of-00002.fp16", "-00002-of-00002.fp16"),  # as older versions wrote it
            )
        ),
        (
            ["-00001-of-00002", "-00001-of-00002.fp16", "-00002-of-00002"],
            ["-00001-of-00002", "-00002-of-00002"],
        ),
        (["-00001-of-00001", ""], [""]),
    ],
)
def test_the_plain_file_then_shards_then_a_variant(tmp_path, there, taken):
    stem = WEIGHTS_FILE.removesuffix(".safetensors")
    for kind in there:
        (tmp_path / f"{stem}{kind}.safetensors").touch()
    assert [path.name for path in weights_files(tmp_path)] == [
        f"{stem}{kind}.safetensors" for kind in taken
    ]


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        (["-00001-of-00003", "-00003-of-00003"], "shard 2 of 3"),
        (["-00002-of-00002"], "shard 1 of 2"),
        (["-00001-of-00002.fp16"], "shard 2 of 2"),
        ([".fp16-00001-of-00002"], "shard 2 of 2"),
    ],
)
def test_a_missing_shard_is_named(tmp_path, there, missing):
    stem = WEIGHTS_FILE.removesuffix(".safetensors")
    for kind in there:
        (tmp_path / f"{stem}{kind}.safetensors").touch()
    with pytest.raises(LdmError) as caught:
        weights_files(tmp_path)
    message = f"lacks {missing}, beside {stem}{there[0]}.safetensors: copy or fetch it again"
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickle_comes_after_safetensors_and_before_a_variant(tmp_path):
    with pytest.raises(LdmError, match=f"holds no {WEIGHTS_FILE}: save it again"):
        weights_files(tmp_path)
    (tmp_path / PICKLED_FILE).touch()
    assert weights_files(tmp_path) == [tmp_path / PICKLED_FILE]
    (tmp_path / WEIGHTS_FILE).with_suffix(".fp16.safetensors").touch()  # rounded
    assert weights_files(tmp_path) == [tmp_path / PICKLED_FILE]
    (tmp_path / WEIGHTS_FILE).touch()
    assert weights_files(tmp_path) == [tmp_path / WEIGHTS_FILE]


# ------------------------------------------------------------------------ training loops' files
@pytest.mark.parametrize(
    "key", ["state_dict", "model_state_dict", "model", "ema", "model_ema", "ema_state_dict"]
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_are_found_in_the_tree_of_a_training_loop(tmp_path, key, prefix, capsys):
    weights = {f"{prefix}{name}": torch.ones(2) for name in ("conv.weight", "module.bias")}
    optimiser = {"state": {0: {"exp_avg": torch.zeros(2)}}}
    torch.save({key: weights, "optimizer": optimiser, "step": 7}, tmp_path / "a.pt")
    assert read_weights(tmp_path / "a.pt").keys() == {"conv.weight", "module.bias"}
    assert not capsys.readouterr().out


def test_wrappers_are_taken_off_flat_files_and_only_off_all_names(tmp_path):
    for names, expected in (
        (("module.a", "module.b"), {"a", "b"}),
        (("module.a", "b"), {"module.a", "b"}),
        (("module.",), {""}),
        ((), set()),
    ):
        torch.save({name: torch.ones(1) for name in names}, tmp_path / "a.pt")
        assert read_weights(tmp_path / "a.pt").keys() == expected
    (tmp_path / "a.safetensors").write_bytes(to_safetensors({"module.a": torch.ones(1)}))
    assert read_weights(tmp_path / "a.safetensors").keys() == {"a"}


@pytest.mark.parametrize("raw", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("average", ["ema", "model_ema", "ema_state_dict"])
def test_averaged_weights_come_first_and_one_line_says_so(tmp_path, raw, average, capsys):
    path = tmp_path / f"{raw}-{average}.pt"
    plain = {"module.w": torch.zeros(2), "module.counter": torch.tensor(5)}
    averaged = {"w": torch.ones(2), "decay": torch.tensor(0.9)}  # without buffers
    torch.save({raw: plain, average: averaged, "opt": {}}, path)
    for _ in range(3):
        read = read_weights(path)
    assert read.keys() == {"w", "counter"} and read["w"].tolist() == [1, 1] and read["counter"] == 5
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        f"{path} holds averaged weights ({average}) beside the raw ones ({raw}): the averaged "
        "ones are used"
    )


def test_an_average_of_other_names_is_none_of_these_weights(tmp_path, capsys):
    for other in ({"decay": torch.tensor(0.9)}, {}, 0.999, None):
        torch.save({"model": {"w": torch.zeros(2)}, "ema": other}, tmp_path / "a.pt")
        read = read_weights(tmp_path / "a.pt")
        assert read.keys() == {"w"} and not read["w"].any()
    torch.save({"model": {}, "w": torch.ones(1)}, tmp_path / "a.pt")
    assert read_weights(tmp_path / "a.pt").keys() == {"w"}
    assert not capsys.readouterr().out
