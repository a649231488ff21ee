import torch

from ldm.logbook import Logbook, cut_rows, read_rows


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


def test_another_process_writes_nothing(tmp_path):
    book = Logbook(None)
    book.add(l1=1.0)
    assert book.row(1)["l1"] == 1.0
    cut_rows(tmp_path / "none.jsonl", 0)
    assert not list(tmp_path.iterdir())
