import json
import math

import pytest
import torch

from ldm.errors import LdmError
from ldm.logbook import Logbook, cut_rows, read_rows, stack_scalars
from tests.small import file_size_limit


def test_a_row_is_the_mean_since_the_last(tmp_path):
    book = Logbook(tmp_path)
    book.add(l1=torch.tensor(1.0), kl=2.0)
    book.add(l1=torch.tensor(3.0))
    row = book.row(32, lr=0.5)
    assert row["l1"] == 2.0 and row["kl"] == 2.0 and row["lr"] == 0.5
    assert row["images_per_second"] > 0
    book.row(64, val_psnr=20.0)
    book.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [r["images_seen"] for r in rows] == [32, 64]
    assert "l1" not in rows[1] and rows[1]["val_psnr"] == 20.0
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_name_may_be_a_number_on_one_step_and_a_tensor_on_the_next():
    weights = [0.5, torch.tensor(0.25, dtype=torch.bfloat16), torch.tensor(2)]
    assert stack_scalars(weights).tolist() == [0.5, 0.25, 2]
    # "meta" stands for a GPU: tensors of it do not mix with those of the CPU, either
    weights.append(torch.empty((), device="meta"))
    for values in (weights, weights[::-1]):
        assert stack_scalars(values).device.type == "meta"


def test_a_resumed_run_writes_the_lost_rows_again(tmp_path):
    book = Logbook(tmp_path)
    for seen in (10, 20, 30):
        book.row(seen, x=1.0)
    book.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"images_seen": 40, "x"')  # killed while it wrote
    book = Logbook(tmp_path, resume_at=20)
    book.row(30, x=2.0)
    book.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(r["images_seen"], r["x"]) for r in rows] == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_a_resumed_row_is_the_mean_of_all_its_steps(tmp_path):
    """Saved as plain numbers after any step; a row written later than the state is replaced."""
    values = torch.randn(7, generator=torch.manual_seed(0)) * 1e3
    (tmp_path / "whole").mkdir()
    whole = Logbook(tmp_path / "whole")
    for value in values:
        whole.add(loss=value, weight=0.5)
    expected = whole.row(28)
    for saved_at in range(1, 8):
        folder = tmp_path / str(saved_at)
        folder.mkdir()
        book = Logbook(folder)
        book.row(4 * saved_at, val_psnr=1.0)
        for value in values[:saved_at]:
            book.add(loss=value, weight=0.5)
        saved = book.state_dict()
        assert all(type(v) is float for listed in saved["pending"].values() for v in listed)
        book.row(4 * saved_at, val_psnr=2.0)  # and it is killed
        book.close()
        book = Logbook(folder, 4 * saved_at, saved)
        for value in values[saved_at:]:
            book.add(loss=value, weight=0.5)
        row = book.row(28)
        assert (row["loss"], row["weight"]) == (expected["loss"], expected["weight"])
        book.close()
        rows = read_rows(folder / "metrics.jsonl")
        assert [row.get("val_psnr") for row in rows] == [1.0, None]


def test_another_process_writes_nothing(tmp_path):
    book = Logbook(None)
    book.add(l1=1.0)
    assert book.row(1)["l1"] == 1.0
    cut_rows(tmp_path / "none.jsonl", 0)
    assert not list(tmp_path.iterdir())


def strict(line: str) -> dict:
    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_a_skipped_step_leaves_the_row_finite_and_json(tmp_path):
    book = Logbook(tmp_path)
    for loss, norm in ((1.0, math.inf), (math.nan, math.nan), (3.0, math.nan)):
        book.add(loss=torch.tensor(loss), norm=norm)
    row = book.row(8, psnr=math.inf)
    assert row["loss"] == 2.0 and f"{row['norm']:.3f}" == "nan"
    book.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    written = strict(line)
    assert (written["loss"], written["norm"], written["psnr"]) == (2.0, None, None)
    assert "norm" not in read_rows(tmp_path / "metrics.jsonl")[0]
    cut_rows(tmp_path / "metrics.jsonl", 8)
    assert (tmp_path / "metrics.jsonl").read_text() == line + "\n"


def test_tensorboard_gets_finite_values_only(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    book = Logbook(tmp_path)
    book.row(8, loss=math.nan)
    book.row(16, loss=1.0)
    book.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(16, 1.0)]


@pytest.mark.parametrize("content", ["[1]\n", '{"x": 1}\n', "7\n", "\xff\n"])
def test_invalid_lines_are_ignored(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content + '{"images_seen": 4}\n', "latin-1")
    cut_rows(path, 4)
    assert path.read_text() == '{"images_seen": 4}\n'


@pytest.mark.parametrize("part", ["row", "picture"])
def test_a_full_disk_is_one_line(tmp_path, part):
    book = Logbook(tmp_path)
    with pytest.raises(LdmError) as caught, file_size_limit(65536):
        for seen in range(2000):
            if part == "row":
                book.row(seen, **{f"name{i}": 1 / 3 for i in range(100)})
            else:
                book.picture("noise", torch.rand(3, 128, 128), seen)
    start = f"could not write the metrics in {tmp_path} (File too large): free disk space"
    assert str(caught.value).startswith(start) and "\n" not in str(caught.value)


def test_read_rows_gives_former_metrics_their_present_names(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"images_seen": 8, "critic": 2.0, "critic_gradient_norm": 1.0}\n'
    )
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"images_seen": 8, "discriminator": 2.0, "discriminator_gradient_norm": 1.0}
    ]
