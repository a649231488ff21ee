"""Make the files that `tests/test_older_files.py` reads. They need the version that wrote them.

python tests/older_files/make.py tests/older_files/0.1.tar.xz    # in a checkout of that version
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent.parent

WATCH = "log_every_steps: 2, validate_every_steps: 4, save_every_steps: 4, keep_states: 1"
RUN = f"run={{precision: fp32, device: cpu, {WATCH}}}"
AUTOENCODER = [
    "tiny", "data={source: pictures, crop: random, flip: true, workers: 0}", RUN,
    "phases=[{resolution: 16, steps: 4}, {resolution: 32, steps: 4}]", "batch_size=4",
    "encoder={depth: 2, extractor: {channels: 2, multipliers: [1], blocks: 1}, "
    "aggregator: {channels: 2, multipliers: [1], blocks: 1}}",
    "decoder={channels: 2, multipliers: [1, 1, 2], blocks: 1, norm: group}",
    "discriminator={channels: 2, multipliers: [1, 2]}", "conv1x1=true", "validate_images=4",
    "adversarial={start: 0.25, ramp: 0.25, weighting: adaptive, cutmix: 1}", "warmup_images=8",
]  # fmt: skip
DWT = ["encoder={type: dwt, depth: 2}", "latent_channels=12", "conv1x1=false", "loss.kl=0"]
SMALL = [
    *DWT, "decoder={channels: 2, multipliers: [1, 1, 1]}", "adversarial.cutmix=0",
    "phases=[{resolution: 32, steps: 8}]",
]  # fmt: skip
DISCRIMINATORS = {
    "patchgan": "discriminator={type: patchgan, channels: 2, layers: 1}",
    "stylegan": "discriminator={type: stylegan, resolution: 32, channels: 2, max_channels: 2}",
}
# Of each part of an autoencoder that a file may hold the weights of, one.
MODELS = {
    "nafnet-vit-smc": [
        "encoder.extractor={type: nafnet, channels: 2, blocks: 1}",
        "encoder.aggregator={type: vit, width: 8, depth: 1, heads: 2, grid: 4}",
        "decoder.norm=smc",
    ],
    "shared-wavelet": [
        "encoder.shared=true", "encoder.levels=[1, 2]",
        "decoder={output: wavelet, multipliers: [1, 2]}",
    ],
    "sdvae": ["encoder={type: sdvae, channels: 2, multipliers: [1, 1, 2], blocks: 1}"],
    "dwt": DWT,
}  # fmt: skip
DIFFUSION = [
    "tiny", "data={source: pictures, crop: random, flip: true, workers: 0}", RUN,
    "resolution=32", "steps=8", "batch_size=4", "statistics_images=8", "warmup_images=8",
    "network={channels: 4, multipliers: [1, 1], blocks: 1, head_width: 4}",
    "ema_half_life_images=16", "lr=0.02",
]  # fmt: skip
POWERS = ["ema_stds=[0.05, 0.1]", "snapshots=2"]
EDM2 = [
    "network={type: edm2, channels: 4, multipliers: [1], blocks: 1, head_width: 4}",
    "network.attention_factors=[]", "denoiser={uncertainty: true}",
    "data={labels: true, flip: false}",
    "label_dropout=0.1", "augment.probability=0.15",
]  # fmt: skip
# Flips are what a cache keeps; windows are not.
CACHED = ["data.crop=center", "cache=cache"]
TABLE = [
    "--scale", "smoke", "--data", "pictures", "phases.0={resolution: 32, steps: 8}", "batch_size=4",
    "encoder.extractor={channels: 2, multipliers: [1], blocks: 1}", "validate_images=4",
    "encoder.aggregator={channels: 2, multipliers: [1], blocks: 1}",
    "decoder={channels: 2, multipliers: [1, 1, 1, 1], blocks: 1}",
    "discriminator={channels: 2, multipliers: [1, 2]}", "latent_channels=4", "run.device=cpu",
    "run.precision=fp32", "run.save_every_steps=4", "run.keep_states=1",
]  # fmt: skip

# Asks the run to stop when it has saved its first state: it does so after the next step.
STOP = """
from ldm.cli import main
from ldm.run import Run

save = Run.save
Run.save = lambda run, *words: (save(run, *words), run.request_stop())
main()
"""


def ldm(*words: str | Path, stop: bool = False) -> None:
    """Run a command in the current folder; `stop`: until its first state is saved, and a step."""
    start = ["-c", STOP] if stop else ["-m", "ldm"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "LDM_CACHE": "statistics-cache", "TORCH_HOME": "no-weights",
        "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    done = subprocess.run([sys.executable, *start, *map(str, words)], env=environment)
    assert done.returncode == (130 if stop else 0), words


def make_pictures() -> None:
    """24 labelled windows of photographs, as shards."""
    from skimage import data

    for name in ("astronaut", "chelsea", "coffee"):
        photograph = getattr(data, name)()
        (Path("windows") / name).mkdir(parents=True)
        for i in range(8):
            window = photograph[24 * i : 24 * i + 96 : 3, 100:196:3]
            Image.fromarray(np.ascontiguousarray(window)).save(f"windows/{name}/{i}.png")
    ldm("data", "prepare", "windows", "pictures", "--size", 32, "--labels", "--held-out", 6,
        "--workers", 0)  # fmt: skip


def make_runs() -> None:
    for name in ("finished", "stopped"):
        ldm("train-ae", *AUTOENCODER, "--out", f"stage_one/{name}", stop=name == "stopped")
    for name, discriminator in DISCRIMINATORS.items():
        twins = ("train-ae", *AUTOENCODER, *SMALL, discriminator, "--out")
        ldm(*twins, f"twins/{name}")
        ldm(*twins, f"stage_one/{name}", stop=True)
    two = ("train-diffusion", *DIFFUSION, "--ae", "stage_one/finished")
    for name in ("finished", "stopped"):
        ldm(*two, *POWERS, "--out", f"stage_two/{name}", stop=name == "stopped")
    for name, settings in (("edm2", EDM2), ("cached", CACHED)):
        ldm(*two, *settings, "--out", f"twins/{name}")
        ldm(*two, *settings, "--out", f"stage_two/{name}", stop=True)
    Path("expected").mkdir()
    for twin in Path("twins").iterdir():
        shutil.copy(twin / "metrics.jsonl", f"expected/{twin.name}.jsonl")


def ramp() -> Tensor:
    """An image (1, 3, 32, 32) in [−1, 1]."""
    return torch.linspace(-1, 1, 32 * 32 * 3).sin().view(1, 32, 32, 3).permute(0, 3, 1, 2)


def make_models() -> None:
    from autoencoders import load_autoencoder

    Path("models").mkdir()
    means = {}
    for name, settings in MODELS.items():
        run = f"model-runs/{name}"
        ldm("train-ae", *AUTOENCODER, *settings, "lr=0.02", "adversarial.weight=0", "--out", run)
        shutil.copy(f"{run}/ckpt.safetensors", f"models/{name}.safetensors")
        with torch.no_grad():
            ae = load_autoencoder(f"models/{name}.safetensors")
            recon = ae.decode(ae.encode(ramp()).mode())
        pooled = nn.functional.avg_pool2d(recon, 8).flatten().tolist()
        means[name] = [round(value, 5) for value in pooled]
    Path("expected/models.json").write_text(json.dumps(means))
    ldm("export", "stage_one/finished", "exported", "--format", "hub")


class FakeInception(nn.Module):
    """2048 features, of which all but three are 0."""

    class Layers(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            colours = nn.functional.adaptive_avg_pool2d(images, 1).flatten(1)
            return nn.functional.pad(colours, (0, 2045))

    def __init__(self) -> None:
        super().__init__()
        self.layers = self.Layers()

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return self.layers((images - 128) / 128)


def make_measurements() -> None:
    one, two = "stage_one/finished", "stage_two/finished"
    ldm("eval-ae", one, "--data", "pictures", "--split", "all", "--force", "--no-fid")
    sample = ("--n", 6, "--steps", 4, "--device", "cpu", "--precision", "fp32")
    ldm("sample", two, *sample, "--format", "zip")
    ldm("sample", two, *sample, "--out", "samples/png")
    for i in (1, 4, 5):
        Path(f"samples/png/00000/img{i:08d}.png").unlink()
    ldm("sample", "stage_two/edm2", *sample, "--format", "shards", "--out", "samples/shards")

    # the network takes 2048 images or more to be kept
    torch.jit.script(FakeInception()).save("inception-2015-12-05.pt")
    noise = np.random.default_rng(0).integers(0, 256, (2048, 32, 32, 3), np.uint8)
    with zipfile.ZipFile("noise.zip", "w") as archive:
        for i, picture in enumerate(noise):
            with archive.open(f"{i:04d}.png", "w") as file:
                Image.fromarray(picture).save(file, format="png")
    weights = ("--weights", "inception-2015-12-05.pt")
    samples = f"{two}/samples/seed0-steps4-zip"
    ldm("fid", samples, "--data", "noise.zip", *weights, "--force", "--device", "cpu")
    ldm("fid", samples, "--split", "all", *weights, "--force", "--device", "cpu")
    [kept] = Path("statistics-cache/statistics").glob("*.npz")
    with np.load(kept) as parts:  # nearly all of it is 0
        np.savez_compressed("kept.npz", **parts)


def make_rows() -> None:
    """Of Table 17 a row that was done and one that was begun; of Table 4 two that were taken."""
    ldm("reproduce", "t17", *TABLE, "--take", "without=stage_one/finished")
    shutil.rmtree("reproduce/smoke/t17/without")
    ldm("reproduce", "t17", *TABLE, stop=True)
    take = [f"{row}=stage_one/finished/ckpt.pt" for row in ("group", "smc")]
    ldm("reproduce", "t4", *TABLE, "--take", take[0], "--take", take[1])


def keep(archive: Path) -> None:
    """Pack what is tested, without what names this machine or takes room for nothing."""
    for run in [*Path("stage_one").iterdir(), *Path("stage_two").iterdir()]:
        if run.name == "finished":
            shutil.rmtree(run / "state")
            for prefix in ("recon", "samples"):
                for older in sorted(run.glob(f"pictures/{prefix}-*.png"))[:-1]:
                    older.unlink()
        else:
            shutil.rmtree(run / "pictures")
    shutil.rmtree("reproduce/smoke/t17/with/autoencoder")
    names = ("pictures", "stage_one", "stage_two", "cache", "models", "exported", "expected",
             "samples", "reproduce", "inception-2015-12-05.pt", "kept.npz")  # fmt: skip
    here = [str(ROOT), str(Path.cwd()), str(Path.home())]
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for file in sorted(file for name in names for file in [Path(name), *Path(name).rglob("*")]):
            if not file.is_file() or file.name == ".lock" or file.parent.name == "tensorboard":
                continue
            content = file.read_bytes()
            found = [word for word in here if word.encode() in content]
            assert not found, (file, found)
            entry = tarfile.TarInfo(str(file))
            entry.size = len(content)
            tar.addfile(entry, BytesIO(content))


def main() -> None:
    archive = Path(sys.argv[1]).absolute()
    sys.path.insert(0, str(ROOT))
    with TemporaryDirectory() as folder:
        work = Path(folder) / "made"  # results are named after two folders
        work.mkdir()
        os.chdir(work)
        for make in (make_pictures, make_runs, make_models, make_measurements, make_rows):
            make()
        keep(archive)
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
