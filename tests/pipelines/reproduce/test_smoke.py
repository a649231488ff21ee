"""Two tables for real, at the smallest scale: T4, of reconstructions, and T6, of latents."""

import json
import socket
from pathlib import Path

import pytest

from pipelines.reproduce.runner import reproduce


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """An empty folder, no published weights, and no network."""

    def refuse(*_, **__):
        raise AssertionError("the network is asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.slow
def test_table_4():
    shorter = ["phases.0.steps=6"]
    [result] = reproduce("t4", "smoke", settings=shorter)
    smc, group = result.numbers["smc"], result.numbers["group"]
    assert 5 < smc["psnr"] < 25 and smc["psnr"] != group["psnr"] and smc["swd"] > 0
    assert smc["rfid"] is smc["lpips"] is None  # what stood in is not shown
    folder = Path("reproduce/smoke/t04")
    evaluated = json.loads((folder / "smc" / "evaluation.json").read_text("utf-8"))
    assert evaluated["evaluations"][0]["numbers"]["rfid"] > 0  # but it ran
    written = (folder / "smc" / "autoencoder" / "ckpt.pt").stat().st_mtime_ns
    text = (folder / "table.md").read_text("utf-8")
    [again] = reproduce("t4", "smoke", settings=shorter)
    assert again.numbers == result.numbers
    assert (folder / "smc" / "autoencoder" / "ckpt.pt").stat().st_mtime_ns == written
    for part in ("29.32", f"{smc['psnr']:.2f}", "cannot be judged", "6 steps at 32²"):
        assert part in text, part


@pytest.mark.slow
def test_table_6():
    [result] = reproduce("t6", "smoke", settings=["phases.0.steps=2"])
    for row in ("vae", "litevae"):
        assert len(result.numbers[row]) == 5
        assert all(spread >= 0 for _, spread in result.numbers[row].values())
        assert result.numbers[row]["mmd_25"][0] > 0
    tree = json.loads(Path("reproduce/smoke/t06/table.json").read_text("utf-8"))
    assert tree["rows"][0]["here"]["trained_in"] == "reproduce/smoke/t01/ffhq256-vae/autoencoder"
    assert tree["settings"] == ["phases.0.steps=2"]
