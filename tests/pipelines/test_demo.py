import json
import re

import pytest
import torch

import pipelines.demo as job
from ldm.data.prepare import prepare
from ldm.errors import LdmError, UsageError
from ldm.seeds import normal
from pipelines import LatentDiffusionPipeline
from tests.pipelines.measuring.fid_sides import enlarged, pictures, write_folder
from tests.pipelines.untrained import make_model
from tests.small import AUTOENCODER, DIFFUSION

SMALL = {"stage_one": [*AUTOENCODER, "decoder.multipliers=[1, 1, 2]"], "stage_two": DIFFUSION}


@pytest.mark.slow
def test_the_demo_leaves_one_page_with_everything_in_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "SWD_IMAGES", 32)
    path = job.run_demo(tmp_path / "demo", **SMALL)
    page = path.read_text("utf-8")
    numbers = json.loads((tmp_path / "demo" / "numbers.json").read_text())
    assert f"{numbers['psnr']:.2f} dB" in page and f"{numbers['swd']:.1f}" in page
    assert page.count("data:image/png;base64,") == 3 and page.count("<svg") == 4
    assert not re.search(r'(src|href)="(?!data:|#)', page), "it must stand alone"
    for name in ("samples.png", "reconstructions.png", "from-noise.png"):
        assert (tmp_path / "demo" / name).is_file()

    # again: nothing is trained anew, unless asked
    before = (tmp_path / "demo" / "diffusion" / "ckpt.pt").stat().st_mtime_ns
    job.run_demo(tmp_path / "demo", **SMALL)
    assert (tmp_path / "demo" / "diffusion" / "ckpt.pt").stat().st_mtime_ns == before
    assert "is already finished" in capsys.readouterr().out
    job.run_demo(tmp_path / "demo", True, **SMALL)
    assert (tmp_path / "demo" / "diffusion" / "ckpt.pt").stat().st_mtime_ns > before


@pytest.mark.slow
def test_the_demo_of_a_folder_shows_its_images_and_says_what_is_next(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "SWD_IMAGES", 32)
    write_folder(tmp_path / "mine", enlarged(enlarged(pictures(24, 0))))
    data = str(tmp_path / "mine")
    page = job.run_demo(tmp_path / "demo", data=data, **SMALL).read_text("utf-8")
    assert data in page and "scikit-image" not in page and "Images that training never saw" in page
    assert all(line in page for line in job.NEXT)
    assert f"next, on your own images: {job.NEXT[0]}" in " ".join(capsys.readouterr().out.split())
    for stage in ("autoencoder", "diffusion"):
        config = (tmp_path / "demo" / stage / "config.yaml").read_text("utf-8")
        assert f"source: {data}" in config
    # another folder's demo is not this one's
    with pytest.raises(LdmError, match=r"data\.source"):
        job.run_demo(tmp_path / "demo", **SMALL)


def test_an_earlier_demo_is_kept_unless_asked(tmp_path):
    run = tmp_path / "demo" / "autoencoder"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"kind": "autoencoder", "preset": "tiny"}))
    with pytest.raises(UsageError, match="an earlier version: replace it by --fresh"):
        job.run_demo(tmp_path / "demo")
    assert (run / "run.json").is_file()


def test_data_without_held_out_images_is_refused_before_training(tmp_path):
    mine = write_folder(tmp_path / "mine", enlarged(pictures(24, 0)))
    prepare(mine, tmp_path / "all", 48, held_out=0)
    with pytest.raises(UsageError, match="holds out no images"):
        job.run_demo(tmp_path / "demo", data=str(tmp_path / "all"))
    assert not (tmp_path / "demo" / "autoencoder").exists()


def test_samples_are_shown_from_noise_on(tmp_path):
    pipe = LatentDiffusionPipeline.from_pretrained(make_model(tmp_path / "model", 0), "cpu", "fp32")
    strip = job.from_noise(pipe).unflatten(0, (job.FROM_NOISE, -1))
    assert strip.shape[:3] == (2, 10, 3)
    assert torch.equal(strip[:, -1], pipe(n=2, seed=0))
    noise = torch.cat([normal(0, "sample", [i], pipe.latent_shape) for i in range(2)])
    first = pipe.codec.decode(noise * pipe.codec.sigma_data)
    torch.testing.assert_close(strip[:, 0], first, rtol=0, atol=1e-3)
