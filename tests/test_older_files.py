"""Files of version 0.1 load, resume and count; see `tests/older_files/README.md`."""

import json
import re
import shlex
import shutil
import socket
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoders import Autoencoder, load_autoencoder
from ldm.cli import main
from pipelines import LatentDiffusionPipeline, train_autoencoder

ARCHIVE = Path(__file__).parent / "older_files" / "0.1.tar.xz"
STEPS, BATCH = 8, 4
OF_UNET_DISCRIMINATOR = {
    "adversarial", "logit_real", "logit_fake", "gradient_ratio", "cutmix",
    *("discriminator", "discriminator_gradient_norm", "critic", "critic_gradient_norm"),
}  # fmt: skip
"""Numbers that differ from version 0.1, whose U-Net discriminator had an activation too many."""
ZIP = Path("stage_two/finished/samples/seed0-steps4-zip")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(autouse=True)
def older(unpacked, tmp_path, monkeypatch) -> Path:
    """A copy of the older files as the current folder; no weights are found and no network."""

    def refuse(*_, **__):
        raise socket.gaierror("no network in tests")

    folder = tmp_path / "made"
    shutil.copytree(unpacked, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return folder


@pytest.fixture
def ldm(monkeypatch, capsys):
    """Call the command line in this process: what it prints."""

    def call(*words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["ldm", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        assert not left.value.code, printed
        return printed.out

    return call


def read_json(path: str | Path):
    return json.loads(Path(path).read_text("utf-8"))


def command_of(folder: str | Path) -> list[str]:
    """The words of the command that began a run, a folder of samples or a table."""
    for name in ("run.json", "samples.json", "table.json"):
        if Path(folder, name).is_file():
            return shlex.split(read_json(Path(folder, name))["command"])[1:]
    raise AssertionError(f"{folder} names no command")


def rows_of(path: str | Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def last_rows(path: str | Path) -> list[dict[str, float]]:
    rows = [row for row in rows_of(path) if row["images_seen"] == STEPS * BATCH]
    return [
        {
            k: v
            for k, v in row.items()
            if k not in ("images_per_second", "data_wait") and v is not None
        }
        for row in rows
    ]


def pictures(folder: Path | str) -> dict[str, np.ndarray]:
    files = sorted(Path(folder).rglob("img*.png"))
    return {file.name: np.asarray(Image.open(file)).astype(int) for file in files}


def zipped_pictures() -> dict[str, np.ndarray]:
    shutil.unpack_archive(ZIP / "samples.zip", "unzipped")
    return pictures("unzipped")


def assert_alike(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Pixels agree up to the rounding of another CPU."""
    assert ours.keys() == theirs.keys()
    for name, picture in ours.items():
        assert np.abs(picture - theirs[name]).max() <= 2, name


# ----------------------------------------------------------------------------------------- runs
@pytest.mark.parametrize(
    ("run", "twin"),
    [
        ("stage_one/stopped", "stage_one/finished/metrics.jsonl"),
        ("stage_one/patchgan", "expected/patchgan.jsonl"),
        ("stage_one/stylegan", "expected/stylegan.jsonl"),
        ("stage_two/stopped", "stage_two/finished/metrics.jsonl"),
        ("stage_two/edm2", "expected/edm2.jsonl"),
        ("stage_two/cached", "expected/cached.jsonl"),
    ],
)
def test_a_stopped_run_resumes_and_ends_like_an_unbroken_one(ldm, run, twin, monkeypatch):
    # version 0.1 showed its discriminators what lies beyond [−1, 1]
    monkeypatch.setattr(train_autoencoder, "in_range", lambda recon: recon)
    before = Path(run, "metrics.jsonl").read_text("utf-8")
    cache = {path: path.stat().st_mtime_ns for path in Path("cache").iterdir()}
    ldm(*command_of(run))
    assert Path(run, "metrics.jsonl").read_text("utf-8").startswith(before)
    assert read_json(f"{run}/result.json")["images_seen"] == STEPS * BATCH
    assert {path: path.stat().st_mtime_ns for path in Path("cache").iterdir()} == cache
    ours, theirs = last_rows(f"{run}/metrics.jsonl"), last_rows(twin)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for key in OF_UNET_DISCRIMINATOR if run == "stage_one/stopped" else ():
            one.pop(key, None), other.pop(key, None)
        shared = one.keys() & other.keys()
        assert "l1" in shared or "loss" in shared or "val_psnr" in shared
        # a key may have a new name by now, and its value stays
        renamed = [sorted(row[key] for key in row.keys() - shared) for row in (one, other)]
        assert renamed[0] == pytest.approx(renamed[1], rel=0.01, abs=1e-4)
        assert [one[key] for key in sorted(shared)] == pytest.approx(
            [other[key] for key in sorted(shared)], rel=0.01, abs=1e-4
        )


@pytest.mark.parametrize("run", ["stage_one/finished", "stage_two/finished"])
def test_a_finished_run_is_not_trained_again(ldm, run):
    written = Path(run, "ckpt.pt").stat().st_mtime_ns
    ldm(*command_of(run))
    assert Path(run, "ckpt.pt").stat().st_mtime_ns == written


def test_stage_one_loads_from_each_of_its_files():
    folder = Path("stage_one/finished")
    weights = load_autoencoder(folder).state_dict()
    for name in ("ckpt.pt", "ckpt.safetensors", "best.pt", "best.safetensors"):
        theirs = load_autoencoder(folder / name).state_dict()
        assert theirs.keys() == weights.keys()
        # the best of this run are its last
        assert all(torch.equal(theirs[key], weights[key]) for key in weights), name
    exported = Autoencoder.from_pretrained("exported").state_dict()
    assert all(torch.equal(exported[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", ["nafnet-vit-smc", "shared-wavelet", "sdvae", "dwt"])
def test_models_of_all_parts_reconstruct_as_before(name):
    ramp = torch.linspace(-1, 1, 32 * 32 * 3).sin().view(1, 32, 32, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        autoencoder = load_autoencoder(f"models/{name}.safetensors")
        recon = autoencoder.decode(autoencoder.encode(ramp).mode())
    means = torch.nn.functional.avg_pool2d(recon, 8).flatten()
    expected = torch.tensor(read_json("expected/models.json")[name])
    torch.testing.assert_close(means, expected, rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------------- samples
@pytest.mark.parametrize("file", ["", "ckpt.pt", "ckpt.safetensors"])
def test_stage_two_samples_as_before(file):
    pipe = LatentDiffusionPipeline.from_pretrained(Path("stage_two/finished", file))
    images = pipe.to("cpu", torch.float32)(n=6, seed=0, steps=4)
    images = ((images.clamp(-1, 1) + 1) * 127.5).round().int().permute(0, 2, 3, 1).numpy()
    assert_alike({f"img{i:08d}.png": image for i, image in enumerate(images)}, zipped_pictures())


def test_a_folder_of_samples_is_completed(ldm):
    there = pictures("samples/png")
    assert len(there) == 3
    ldm(*command_of("samples/png"))
    assert_alike(pictures("samples/png"), zipped_pictures())


def test_a_zip_of_samples_grows_in_place(ldm):
    before = zipped_pictures()
    ldm(*command_of(ZIP), "--n", 8)
    after = zipped_pictures()
    assert len(after) == 8
    assert_alike({name: after[name] for name in before}, before)


def test_shards_of_labelled_samples_grow(ldm):
    labels = read_json("samples/shards/labels.json")
    ldm(*command_of("samples/shards"), "--n", 8)
    assert read_json("samples/shards/manifest.json")["count"] == 8
    now = read_json("samples/shards/labels.json")
    assert now["classes"] == labels["classes"] and now["labels"][:6] == labels["labels"]


def test_another_ema_width_from_snapshots(ldm):
    ldm("ema", "stage_two/finished", "--std", 0.07, "--out", "wider.pt")
    pipe = LatentDiffusionPipeline.from_pretrained("wider.pt")
    assert pipe(n=1, seed=0, steps=2).isfinite().all()


# ----------------------------------------------------------------------------------- measurements
def test_samples_are_measured_against_kept_statistics(ldm):
    [measured] = ZIP.glob("fid-*noise*.json")
    ldm(
        "fid", ZIP, "--reference", "kept.npz", "--weights", "inception-2015-12-05.pt", "--force",
        "--device", "cpu", "--out", "fid.json",
    )  # fmt: skip
    now, then = read_json("fid.json"), read_json(measured)
    for name in ("fid", "kid", "precision", "recall"):
        assert now[name] == pytest.approx(then[name], rel=1e-3, abs=1e-6), name


def charts(page: str) -> int:
    return len(re.findall(r"<svg|<img", page))


@pytest.fixture
def page(ldm):
    """The report over some runs."""

    def write(*runs: str) -> str:
        ldm("report", *runs, "--images", 1, "--steps", 2, "--device", "cpu")
        return Path("report.html").read_text("utf-8")

    return write


def test_a_report_shows_older_runs_and_their_results(page):
    both = page("stage_one/finished", "stage_two/finished")
    [evaluation] = Path("stage_one/finished/eval").iterdir()
    shown = [float(number) for number in re.findall(r"\d+\.\d{2,}", both)]
    for measured in (read_json(evaluation)["numbers"]["psnr"], read_json(ZIP / "fid.json")["fid"]):
        assert min(abs(number - measured) for number in shown) <= 0.005

    alone = page("stage_one/finished")
    metrics = Path("stage_one/finished/metrics.jsonl")
    rows = rows_of(metrics)
    assert any({"critic", "critic_gradient_norm"} <= row.keys() for row in rows)
    for row in rows:
        row.pop("critic", None), row.pop("critic_gradient_norm", None)
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    without = page("stage_one/finished")
    assert charts(alone) - charts(without) == 2, "the discriminator's loss and gradient norm"


def test_a_curve_continues_under_its_new_key(ldm, page):
    ldm(*command_of("stage_one/stopped"))
    # and one for `data_wait`, which earlier versions did not log
    assert charts(page("stage_one/stopped")) == charts(page("stage_one/finished")) + 1


def test_gradients_are_read_from_an_older_log(ldm):
    printed = ldm("analyze", "gradients", "stage_one/finished", "--out", "analysis")
    assert "finished" in printed and any(Path("analysis").glob("*.csv"))


# -------------------------------------------------------------------------------- tables and rows
def table_words(number: str) -> list[str]:
    """The command that made a table, without the checkpoints that it was given."""
    words = command_of(f"reproduce/smoke/{number}")
    given = {i for i, word in enumerate(words) if word == "--take"}
    return [word for i, word in enumerate(words) if not {i, i - 1} & given]


def test_rows_measured_by_given_checkpoints_are_not_redone(ldm):
    rows = [Path(f"reproduce/smoke/t04/{row}/row.json") for row in ("group", "smc")]
    before = [path.read_bytes() for path in rows]
    ldm(*table_words("t04"))
    assert [path.read_bytes() for path in rows] == before
    assert not list(Path("reproduce/smoke/t04").rglob("run.json"))


def test_finished_rows_are_reused_and_started_ones_resumed(ldm):
    done = Path("reproduce/smoke/t17/with/row.json")
    begun = Path("reproduce/smoke/t01/ffhq128-litevae/autoencoder")
    before, rows = done.read_bytes(), (begun / "metrics.jsonl").read_text("utf-8")
    seconds = read_json(begun / ".training.json")["seconds"]
    ldm(*table_words("t17"))
    assert done.read_bytes() == before and not (done.parent / "autoencoder").exists()
    assert (begun / "metrics.jsonl").read_text("utf-8").startswith(rows)
    assert read_json(begun / ".training.json")["seconds"] > seconds
    table = read_json("reproduce/smoke/t17/table.json")
    [first, second] = [row["here"] for row in table["rows"]]
    assert first["numbers"] == read_json(done)["numbers"]
    assert second["numbers"]["psnr"] > 5 and second["trained_in"] == str(begun)


def test_the_list_of_tables_knows_older_rows(ldm):
    printed = ldm("reproduce", "--list")
    [row] = re.findall(r"^ +with +(smoke \S+)", printed.partition("T17")[2], re.MULTILINE)[:1]
    assert row == "smoke done"
