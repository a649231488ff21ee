import json
import re

import pytest

import pipelines.demo as job
from tests.small import AUTOENCODER, DIFFUSION


@pytest.mark.slow
def test_the_demo_leaves_one_page_with_everything_in_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "SWD_IMAGES", 32)
    path = job.run_demo(tmp_path / "demo", False, AUTOENCODER, DIFFUSION)
    page = path.read_text("utf-8")
    numbers = json.loads((tmp_path / "demo" / "numbers.json").read_text())
    assert f"{numbers['psnr']:.2f} dB" in page and f"{numbers['swd']:.1f}" in page
    assert page.count("data:image/png;base64,") == 2 and page.count("<svg") == 4
    assert not re.search(r'(src|href)="(?!data:|#)', page), "it must stand alone"
    for name in ("samples.png", "reconstructions.png"):
        assert (tmp_path / "demo" / name).is_file()

    # again: nothing is trained anew, unless asked
    before = (tmp_path / "demo" / "diffusion" / "ckpt.pt").stat().st_mtime_ns
    job.run_demo(tmp_path / "demo", False, AUTOENCODER, DIFFUSION)
    assert (tmp_path / "demo" / "diffusion" / "ckpt.pt").stat().st_mtime_ns == before
    assert "is already finished" in capsys.readouterr().out
    job.run_demo(tmp_path / "demo", True, AUTOENCODER, DIFFUSION)
    assert (tmp_path / "demo" / "diffusion" / "ckpt.pt").stat().st_mtime_ns > before
