"""Run every path that only a CUDA GPU takes, check and measure it, and write one page.

    python -m benchmarks.gpu_check [--quick] [--device auto] [--minutes 10] [--out docs/results]

Both stages train by their own commands' functions on the photographs that scikit-image brings; no
weights are needed. A check that fails does not end the others, and the exit status is then 1. None
begins after --minutes. On a CPU the same checks run, except for those of CUDA alone; --quick takes
toy models.

Writes gpu_check.md, gpu_check.json and a trace of each stage's steps, for ui.perfetto.dev.
"""

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from autoencoders import build_autoencoder
from benchmarks.comparison import add_out, as_markdown, describe_machine, make_parser
from benchmarks.gpu_trainings import (
    NETWORKS,
    STAGE_TWO,
    Figures,
    Setting,
    Unavailable,
    check_distributed,
    check_memory,
    check_resume,
    check_stage_one,
    check_stage_two,
    check_traces,
)
from diffusion import EDM, build_network, karras_sigmas, sample_heun
from ldm.config import load_preset, resolve
from ldm.data import DataConfig, batches, open_source
from ldm.device import full_float32, memory_format, one_ahead, resolve_device, synchronise
from ldm.ema import Ema, PowerEma
from ldm.errors import LdmError, brief
from ldm.images import as_float, to_pil
from ldm.metrics.inception import FeatureExtractor
from ldm.seeds import normal
from ldm.tables import markdown_table
from pipelines.bench import bench_encoders
from pipelines.latents import Codec
from pipelines.recipes import DiffusionRecipe


@dataclass
class Result:
    """The outcome of a check."""

    name: str
    outcome: str
    """passed, failed or not run."""
    seconds: float
    note: str = ""
    figures: list[dict[str, str]] = field(default_factory=list)
    page: str = ""
    """A page of another benchmark, in Markdown."""
    traceback: str = ""


# ----------------------------------------------------------------------------------- checks
def check_side_stream(setting: Setting) -> Figures:
    """Batches encoded ahead on a side stream are those of the plain order, to the bit."""
    setting.need_gpu()
    torch.manual_seed(0)
    encoder = build_autoencoder("litevae-b")
    codec = Codec(encoder, torch.zeros(4), torch.ones(4)).to(setting.device)
    images = [torch.rand(16, 3, 128, 128).pin_memory() for _ in range(12)]
    noise = [normal(0, "posterior", range(16 * i, 16 * i + 16), (4, 16, 16)) for i in range(12)]

    def encode(i: int) -> tuple[Tensor]:
        on_device = images[i].to(setting.device, non_blocking=True) * 2 - 1
        layout = memory_format(setting.device)
        on_device = on_device.contiguous(memory_format=layout)
        return (codec.encode(on_device, noise[i].pin_memory().to(setting.device)),)

    busy = torch.randn(4096, 4096, device=setting.device)

    def consume(z: Tensor) -> Tensor:
        nonlocal busy
        busy = (busy @ busy).clamp(-1, 1)  # the next batch is encoded meanwhile
        return (z + 0 * busy[0, 0]).cpu()

    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        plain = [consume(encode(i)[0]) for i in range(12)]
        ahead = [consume(z) for (z,) in one_ahead(range(12), encode, setting.device)]
    equal = sum(map(torch.equal, plain, ahead))
    if equal < 12:
        raise AssertionError(f"only {equal} of 12 batches are equal")
    yield {"": "batches equal to the bit", "of 12": str(equal)}


@full_float32()
def check_sampler(setting: Setting) -> Figures:
    """Heun's sampler, with its state in float64, gives on the device what it gives on the CPU."""
    preset, settings = STAGE_TWO["quick"]
    torch.manual_seed(0)
    recipe = resolve(DiffusionRecipe, load_preset("diffusion", preset), settings)
    network = build_network(recipe.network).eval()
    for weight in network.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.02)
    noise = normal(0, "sample", range(4), (4, 8, 8))

    def draw(device: torch.device, samples: Tensor) -> Tensor:
        denoiser = EDM(network.to(device, memory_format=memory_format(device)))
        return sample_heun(denoiser, samples.to(device), karras_sigmas(18)).double().cpu()

    with torch.no_grad():
        expected = draw(torch.device("cpu"), noise)
        together = draw(setting.device, noise)
        alone = torch.cat([draw(setting.device, one) for one in noise.split(1)])
    scale = float(expected.std())
    for what, other in (("beside the CPU", expected), ("beside one at a time", alone)):
        differs = float((together - other).abs().max()) / scale
        yield {"": what, "largest difference": f"{differs:.1e}"}
        if differs > 1e-3:
            raise AssertionError(f"{what}, samples differ by {differs:.1e} of their deviation")


def check_adam(setting: Setting) -> Figures:
    """Fused Adam follows its equations, and a skipped step changes no bit."""
    draws = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(1000, generator=draws).to(setting.device))
    optimizer: Any = torch.optim.Adam([weight], 1e-3, (0.9, 0.99), 1e-8, fused=True)
    w, m, v = weight.detach().double().cpu(), *torch.zeros(2, 1000, dtype=torch.float64)
    for step in range(1, 11):
        gradient = torch.randn(1000, generator=draws)
        weight.grad = gradient.to(setting.device)
        optimizer.found_inf = torch.zeros((), device=setting.device)
        optimizer.step()
        # Kingma and Ba 2015 (arXiv 1412.6980), Algorithm 1
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient.double() ** 2
        w = w - 1e-3 * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
    differs = float((weight.detach().double().cpu() - w).abs().max())
    before = weight.detach().clone()
    optimizer.found_inf = torch.ones((), device=setting.device)
    optimizer.step()
    if differs > 3e-6 or not torch.equal(before, weight):
        raise AssertionError(f"it differs by {differs:.1e}, or a skipped step changed weights")
    yield {"": "fused Adam beside its equations", "largest difference": f"{differs:.1e}"}


def check_averages(setting: Setting) -> Figures:
    """Moving averages follow their equations on the device."""
    linear = nn.Linear(100, 100).to(setting.device)
    averages = {"half-life": Ema(linear, 50), "power function": PowerEma(linear, 0.1)}
    expected = dict.fromkeys(averages, linear.weight.detach().double().cpu())
    for step in range(1, 11):
        nn.init.normal_(linear.weight)
        new, images = linear.weight.detach().double().cpu(), 8 * step
        for name, average in averages.items():
            average.update(images, 8)
            decay = average.decay(images, 8) if step > 1 else 0.0
            expected[name] = decay * expected[name] + (1 - decay) * new
    for name, average in averages.items():
        found: Any = average.ema_model.weight
        differs = float((found.double().cpu() - expected[name]).abs().max())
        yield {"": name, "largest difference": f"{differs:.1e}"}
        if differs > 1e-5:
            raise AssertionError(f"{name}: it differs by {differs:.1e}")


def check_inception(setting: Setting) -> Figures:
    """A network in TorchScript, of Inception's interface, gives the CPU's features."""

    class Published(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.Conv2d(32, 2048, 3, 8), nn.ReLU(),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            )  # fmt: skip

    torch.manual_seed(0)
    path = setting.work / "inception.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is on its way out
        torch.jit.save(torch.jit.script(Published().eval()), str(path))
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    expected, found = (FeatureExtractor(path, d)(images) for d in ("cpu", setting.device))
    differs = float((found - expected).abs().max() / expected.abs().max())
    if differs > 2e-3:
        raise AssertionError(f"features differ by {differs:.1e} of the largest")
    yield {"": "features beside the CPU's", "largest difference": f"{differs:.1e}"}


def check_loader(setting: Setting) -> Figures:
    """The speed of loading PNGs; on a machine with a GPU they come in pinned memory."""
    resolution, count, files = (32, 64, 32) if setting.quick else (256, 2048, 256)
    photos = DataConfig(source="photos", crop="random", workers=0)
    drawn = batches(open_source(photos, "train", resolution), photos, resolution, 0, 0, files, 16)
    folder = setting.work / "images"
    folder.mkdir()
    for batch in drawn:
        for k, image in zip(batch.k.tolist(), as_float(batch.images), strict=True):
            to_pil(image).save(folder / f"{k:04d}.png")
    for workers in (0, 2) if setting.quick else (0, 4, 12):
        config = DataConfig(source=str(folder), held_out=0, flip=True, workers=workers)
        stream = batches(
            open_source(config, "train", resolution), config, resolution, 0, 0, count, 16
        )
        if next(stream).images.is_pinned() != torch.cuda.is_available():
            raise AssertionError(f"{workers} workers: images are not in pinned memory")
        start = time.perf_counter()
        seen = sum(len(batch.images) for batch in stream)
        speed = seen / (time.perf_counter() - start)
        yield {"": f"{workers} workers, {resolution}²", "images/s": f"{speed:,.0f}"}


# ----------------------------------------------------------------------------- measurements
def measure_encoders(setting: Setting) -> str:
    """The paper's Table 3."""
    names = ("sdvae", "litevae-s") if setting.quick else ("sdvae", *_LITEVAES)
    sizes: dict[str, Any] = {"resolution": 32, "batch": 2, "repeats": 1} if setting.quick else {}
    pages = [
        bench_encoders(names, device=str(setting.device), precision=precision, **sizes)
        for precision in ("fp32", "bf16")[: 1 + setting.on_gpu]
    ]
    return "\n".join(page.as_markdown() for page in pages)


_LITEVAES = ("litevae-s", "litevae-b", "litevae-m", "litevae-l")


def measure_beside_diffusers(setting: Setting) -> str:
    """Training steps of both stages, and sampling, beside diffusers in the same run."""
    try:
        from benchmarks import stage_one, stage_two
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed: pip install 'ldm[test]'") from error
    device = setting.device
    if setting.quick:
        first = stage_one.Setting(device, 1, 32, 1, widths=(32, 32, 32, 32))
        second = stage_two.Setting(device, 1, 32, 1, 2, sampling_steps=2)
        narrow = second.network.model_copy(update={"channels": 64, "multipliers": (1, 2)})
        second = replace(second, network=narrow)
    else:
        first = stage_one.Setting(device, 32, 256, 10)
        second = stage_two.Setting(device, 48, 256, 3, 10, sampling_steps=18)
    rows = stage_one.measure_decoders(first) + stage_one.measure_training(first)
    rows += stage_two.measure_training(second) + stage_two.measure_sampling(second)
    return as_markdown("Beside diffusers", {}, rows, []).partition("\n")[2]


CHECKS: dict[str, Callable[[Setting], Figures | str]] = {
    "side stream": check_side_stream,
    "Adam": check_adam,
    "averages": check_averages,
    "sampler": check_sampler,
    "Inception": check_inception,
    "loader": check_loader,
    "stage one": check_stage_one,
    **{f"stage two, {name}": partial(check_stage_two, network=name) for name in NETWORKS["full"]},
    "resume": check_resume,
    "distributed": check_distributed,
    "memory": check_memory,
    "traces": check_traces,
    "encoders": measure_encoders,
    "beside diffusers": measure_beside_diffusers,
}
"""The quick ones first: one that fails shows early."""


# -------------------------------------------------------------------------------------- run
def run(name: str, setting: Setting) -> Result:
    """Run a check, and describe how it ended."""
    start = time.perf_counter()
    result = Result(name, "passed", 0)
    try:
        found = CHECKS[name](setting)
        if isinstance(found, str):
            result.page = found
        else:
            result.figures.extend(found)
        synchronise(setting.device)  # or an error of its kernels is the next check's
    except Unavailable as why:
        result.outcome, result.note = "not run", str(why)
    except Exception as error:  # whatever a new machine brings
        result.outcome = "failed"
        is_ours = isinstance(error, AssertionError | LdmError)
        result.note = str(error) if is_ours else f"{type(error).__name__}: {brief(error)}"
        result.traceback = traceback.format_exc()
    result.seconds = time.perf_counter() - start
    return result


def as_page(facts: dict[str, Any], results: list[Result]) -> str:
    """Format the results as a Markdown page."""
    lines = ["# GPU check", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    table = [(r.name, r.outcome, f"{r.seconds:.1f}", r.note.replace("|", "\\|")) for r in results]
    lines += markdown_table(("check", "outcome", "seconds", "note"), table, left=2)
    for result in results:
        check = CHECKS[result.name]
        about = (getattr(check, "func", check).__doc__ or "").partition("\n")[0]
        if result.figures or result.page:
            lines += ["", f"## {result.name.capitalize()}", "", about, ""]
        if result.figures:
            titles = list(dict.fromkeys(key for row in result.figures for key in row))
            rows = [[row.get(title, "") for title in titles] for row in result.figures]
            lines += markdown_table(titles, rows, left=1)
        lines += [result.page.strip()] if result.page else []
    return "\n".join(lines) + "\n"


def write(out: Path, work: Path, facts: dict[str, Any], results: list[Result]) -> str:
    """Write the page, its numbers and the traces so far; return the page."""
    for trace in work.glob("gpu_check-*.json.gz"):
        copyfile(trace, out / trace.name)
    page, tree = as_page(facts, results), facts | {"checks": [asdict(r) for r in results]}
    (out / "gpu_check.md").write_text(page, "utf-8")
    text = json.dumps(tree, indent=1, ensure_ascii=False)
    (out / "gpu_check.json").write_text(text + "\n", "utf-8")
    return page


def main(arguments: list[str]) -> int:
    """Run the checks, write the page after each; 1 if any failed."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="toy models, on any machine")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--minutes", type=float, default=10, help="no check begins later")
    parser.add_argument("--only", action="append", choices=CHECKS, help="a check; repeatable")
    add_out(parser)
    given = parser.parse_args(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for run.deterministic
    device, begun = resolve_device(given.device), time.perf_counter()
    facts = {
        "command": " ".join(["python -m benchmarks.gpu_check", *arguments]),
        **describe_machine(device, "as named"),
    }
    results: list[Result] = []
    given.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        setting = Setting(device, given.quick, Path(folder))
        for name in given.only or CHECKS:
            if time.perf_counter() - begun > 60 * given.minutes:
                results.append(Result(name, "not run", 0, "no time was left: raise --minutes"))
            else:
                results.append(run(name, setting))
            print(f"{name}: {results[-1].outcome} {results[-1].note}", flush=True)
            page = write(given.out, setting.work, facts, results)
    print(page)
    return int(any(result.outcome == "failed" for result in results))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LdmError as error:
        sys.exit(str(error))
