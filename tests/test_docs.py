"""README and docs: their commands and Python blocks run, their links and file names resolve.

Every `ldm` command is run at a tiny size on models trained by the README's own quickstart, in this
process. A command that needs a GPU, a download, or hours is only parsed, and `PARSE_ONLY` says why.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer
from PIL import Image
from skimage import data as photographs

from ldm.cli import app, main
from ldm.cli.options import STAGE_ONE as KINDS
from ldm.cli.options import find_presets
from tests.autoencoders.other_models import make

ROOT = Path(__file__).parent.parent
README, CONTRIBUTING, DESIGN = ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs/design.md"
GUIDES = [README, CONTRIBUTING, *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = sorted((ROOT / "docs/results").glob("*/*.md"))
PAGES = [*GUIDES, *sorted((ROOT / "docs/api").glob("*.md")), *RESULTS, ROOT / "CHANGELOG.md"]

# ------------------------------------------------------------------------------ the tiny sizes
SMALLER = {
    "--size 256": "--size 32",
    "--size 384x256": "--size 32x16",
    "--n 50000": "--n 4",
    "--n 64": "--n 4",
    "--resolution 128,256": "--resolution 32",
    "--resolution 256": "--resolution 32",
    "--bootstrap 100": "--bootstrap 2",
    "--steps 30": "--steps 2",
    "bench litevae-b sdvae": "bench litevae-b-quarter sdvae-quarter",
}
"""Replacements that make the docs' commands small."""

CPU = ["--device", "cpu"]
MEASURE = ["--features", "tests.test_docs:mean_colours", "--force", *CPU]
RUN = ["run={precision: fp32, device: cpu, log_every_steps: 1}", "data.workers=0"]
STAGE_TWO = [
    "resolution=32",
    "steps=4",
    "batch_size=2",
    "statistics_images=4",
    "ema_stds=[0.05, 0.1]",
    *RUN,
]
UNET = [
    "network.channels=16", "network.multipliers=[1, 2]", "network.blocks=1",
    "network.attention_factors=[2]", "network.head_width=8",
]  # fmt: skip
DIT = ["network.width=32", "network.depth=1", "network.heads=2"]
STAGE_ONE_PARTS = {
    "litevae-b": [
        "encoder.extractor={channels: 8, multipliers: [1, 2], blocks: 1}",
        "encoder.aggregator={channels: 8, multipliers: [1, 2], blocks: 1}",
        "decoder={channels: 8, blocks: 1}",
    ],
    # 32: diffusers normalises in 32 groups, whatever the width
    "sdvae": [
        "encoder={type: sdvae, channels: 32, blocks: 1}",
        "decoder={channels: 32, blocks: 1}",
    ],
    "dwt": ["decoder={channels: 8, blocks: 1}"],
    "distil-b": [
        "encoder.extractor={channels: 8, multipliers: [1, 2], blocks: 1}",
        "encoder.aggregator={channels: 8, multipliers: [1, 2], blocks: 1}",
    ],
}
STAGE_ONE = [
    "phases=[{resolution: 32, steps: 2}]", "batch_size=2", "loss.lpips=0", "validate_images=2",
    "adversarial={start: 0, ramp: 0}", "discriminator={channels: 4, multipliers: [1, 2, 2]}", *RUN,
]  # fmt: skip
TINY: dict[str, Callable[[list[str]], list[str]]] = {
    "data prepare": lambda words: ["--workers", "0", "--held-out", "4"],
    "train-ae": lambda words: [*STAGE_ONE, *STAGE_ONE_PARTS.get(words[0], []), *own_data(words)],
    "train-diffusion": lambda words: [
        *STAGE_TWO,
        *(DIT if "-dit-" in words[0] else UNET),
        *own_data(words),
    ],
    "sample": lambda words: [*CPU, "--precision", "fp32"],
    "fid": lambda words: MEASURE,
    "eval-ae": lambda words: [*CPU, "--limit", "4", "--no-fid"],
    "neighbours": lambda words: [*CPU, "--count", "2"],
    "analyze mmd": lambda words: [*CPU, "--n", "4", "--draws", "2"],
    "analyze scale": lambda words: [*CPU, "--resolutions", "32", "--no-fid"],
    "analyze latents": lambda words: CPU,
    "analyze features": lambda words: CPU,
    "report": lambda words: [*CPU, "--images", "2", "--steps", "2"],
    "bench": lambda words: [*CPU, *shlex.split("--resolution 64 --batch 1 --repeats 1")],
}
"""Words that bring a command down to a size for tests, given the words of the docs."""

WRITES = ("data prepare", "import", "export")
"""Commands whose second argument must not be there yet."""

PARSE_ONLY = {
    r"ldm demo": "takes minutes; tests/pipelines/test_demo.py runs it",
    r"ldm train-ae .*": "tests/pipelines/test_every_option.py trains every option",
    r"ldm train-diffusion (t07-.*|ffhq256 augment.*|.*litevae-b)": "as others that are run",
    r"ldm train-diffusion .*run\.trackers=.*": "needs trackers; tests/pipelines/test_trackers.py",
    r"ldm doctor .*": "takes ten seconds or more; tests/ldm/cli/test_doctor.py runs it",
    r"ldm reproduce t\d+.*": "takes a minute or more; tests/pipelines/reproduce runs every table",
    r"ldm import [\w-]+/[\w-]+ .*": "needs the Hugging Face Hub",
    r"ldm data prepare hf:.*": "needs the Hugging Face Hub; tests/ldm/data/test_hf.py has one",
    r"ldm sample owner/name .*": "needs the Hugging Face Hub",
    r"ldm import ((churches|celebahq)\.ckpt|my-(dit-)?pipeline/|DiT.*) .*": (
        "tests/pipelines/exchange does"
    ),
    r"ldm export .* --format (unet|transformer)": (
        "tests/pipelines/exchange export one that diffusers can have"
    ),
    r"ldm fid .*--reference ffhq256": "needs clean-fid's statistics and 256² samples",
    r"ldm fid --reference VIRTUAL.*": "needs ADM's batch; tests/pipelines/test_fid_batch.py has it",
    r"ldm fid .*fd-dinov2": "needs DINOv2's weights; tests/pipelines/test_fid_batch.py has some",
    r"ldm sample model\.pt .*": "needs an imported model",
    r"ldm fid --model .*--n 50000": "tests/pipelines/test_fid.py measures models directly",
    r"torchrun .*": "needs several processes; tests/pipelines/test_distributed.py has them",
}
NOT_OURS = {
    r"pip install .*": "would change the environment",
    r"python -m build": "downloads its build backend; .ci/run calls it",
    r"pytest.*": "runs this test",
    r"(ruff|mypy|mkdocs|pre-commit)( .*)?": "a developer's tool; .ci/run calls it",
    r"\.ci/run": "runs this test",
    r"python -m benchmarks\..*": "takes minutes",
    r"python examples/.*": "takes minutes; tests/test_examples.py runs it",
}


def own_data(words: list[str]) -> list[str]:
    """Some images for a preset whose data set is not here."""
    given = [word for word in words if word.startswith("data.source=")]
    return given or ["data.source=data/mine"]


def mean_colours(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Features (B, 3) in Inception's place: `ldm fid --features tests.test_docs:mean_colours`."""
    return lambda images: images.float().mean(dim=(2, 3))


# ---------------------------------------------------------------------- what stands in the docs
class Block(NamedTuple):
    page: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def blocks(page: Path, language: str) -> Iterator[Block]:
    """The fenced blocks of a language."""
    text = page.read_text("utf-8")
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(page, text.count("\n", 0, found.start()) + 2, found[1])


def commands(page: Path) -> Iterator[Command]:
    """The commands of its bash blocks, one each, without their comments."""
    for block in blocks(page, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                words = shlex.split(part, comments=True)
                if words:
                    yield Command(str(block), shlex.join(words))


def once(found: Iterator[Command]) -> list[Command]:
    """Each command where it stands first."""
    return list({command.text: command for command in reversed(list(found))}.values())[::-1]


def reason(text: str, table: dict[str, str]) -> str | None:
    return next((why for pattern, why in table.items() if re.fullmatch(pattern, text)), None)


QUICKSTART = [command for command in commands(README) if command.text.startswith("ldm ")][
    1:7
]  # after the demo: data prepare … fid
ALL = once(command for page in GUIDES for command in commands(page))
OURS = [command for command in ALL if command.text.startswith("ldm ")]
PARSED = [command for command in ALL if reason(command.text, PARSE_ONLY)]
IN_QUICKSTART = {command.text for command in QUICKSTART}
RUNNABLE = [c for c in OURS if c not in PARSED and c.text not in IN_QUICKSTART]
RECORDED = once(command for page in RESULTS for command in commands(page))


# -------------------------------------------------------------------------- running and parsing
def ldm(words: list[str]) -> int:
    """The exit status of the command line, called in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", ["ldm", *words])
        main()
    return left.value.code or 0


def split_command(words: list[str]) -> tuple[str, list[str]]:
    """`data prepare`, or `sample`, and the words after it."""
    length = 2 if words[0] in ("data", "analyze") else 1
    return " ".join(words[:length]), words[length:]


def tiny(text: str) -> list[str]:
    """The words of a command of the docs, without `ldm`, at a size for tests."""
    for printed, run in SMALLER.items():
        text = re.sub(rf"(?<!\S){re.escape(printed)}(?!\S)", run, text)
    words = shlex.split(text)[1:]
    name, rest = split_command(words)
    return words + (TINY[name](rest) if name in TINY else [])


def parse(words: list[str]) -> None:
    """Check that command, options and settings exist, and run nothing."""
    command = typer.main.get_command(app)
    name, rest = split_command(words)
    for part in name.split():
        command = command.commands[part]
    given = command.make_context(name, list(rest)).params
    settings = [w for w in rest if re.match(r"[a-z][\w.]*=", w) and name != "report"]
    if name == "train-ae":
        words = [*given["words"], "distil-b" if given["teacher"] else "finetune"]
        preset = next(word for word in words if "=" not in word)
        preset = "/".join(find_presets(preset, KINDS)[0])
        assert ldm(["show", preset, *settings]) == 0
    elif name == "doctor":
        assert ldm(["show", given["preset"], *settings]) == 0
    elif name == "train-diffusion":
        preset = rest[0] if "=" not in rest[0] and not rest[0].startswith("-") else "ffhq256"
        assert ldm(["show", f"diffusion/{preset}", *settings]) == 0
    elif name == "reproduce":
        number, letter = re.fullmatch(r"t(\d+)([ab]?)", rest[0]).groups()
        assert (ROOT / f"configs/tables/t{int(number):02d}{letter}.yaml").is_file()
        settings = [word for word in settings if not re.match("imagenet=|vae=", word)]
        assert ldm(["show", "litevae-b", *settings]) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder in which the README's quickstart has run, and what else the docs' commands name."""
    folder = tmp_path_factory.mktemp("docs")
    astronaut = photographs.astronaut()
    for i in range(24):
        image = Image.fromarray(astronaut[64 * (i // 6) :, 64 * (i % 6) :][:64, :64])
        path = folder / "my-images" / ("cat", "dog")[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    shutil.make_archive(str(folder / "ffhq"), "zip", folder / "my-images")
    shutil.copytree(folder / "my-images", folder / "celebahq")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        quiet_machine(patch, folder)
        outs = {"train-ae": "runs/litevae-b", "train-diffusion": "runs/ldm"}
        for command in QUICKSTART:
            if command.text.startswith("ldm doctor"):
                continue
            words = tiny(command.text)
            out = ["--out", outs[words[0]]] if words[0] in outs else []
            assert ldm([*words, *out]) == 0, command
        for text in (
            "ldm data prepare my-images data/ffhq256 --size 256",
            "ldm data prepare my-images data/labelled --size 256 --labels",
            "ldm train-ae litevae-b decoder.norm=smc adversarial.weighting=adaptive --out runs/smc",
            "ldm train-ae sdvae --out runs/sdvae",
            "ldm train-ae dwt --out runs/dwt",
            "ldm export runs/sdvae my-vae --format diffusers",
            "ldm export runs/sdvae kl-f8.ckpt --format compvis",
            "ldm train-ae --from my-vae data.source=data/mine --out runs/finetuned",
            "ldm train-ae distil-b --teacher my-vae data.source=data/mine --out runs/distilled",
            "ldm import my-vae sd-vae.pt",
            "ldm ema runs/ldm --std 0.07",
        ):
            assert ldm(tiny(text)) == 0, text
        make("AutoencoderTiny").save_pretrained("my-tiny-vae")
    shutil.copytree(folder / "runs/smc", folder / "runs/adaptive")
    return folder


def quiet_machine(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """No weights in any cache, and no network to fetch them from."""
    patch.setenv("LDM_CACHE", str(folder / "cache"))
    patch.setenv("TORCH_HOME", str(folder / "torch"))
    patch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def here(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it, as the working directory."""
    folder = tmp_path / "here"
    ignored = shutil.ignore_patterns("state", "tensorboard", "best.*", "ckpt.safetensors")
    shutil.copytree(trained, folder, ignore=ignored)
    monkeypatch.chdir(folder)
    quiet_machine(monkeypatch, folder)
    return folder


# ------------------------------------------------------------------------------------ the tests
def test_the_quickstart_runs_in_order(trained):
    names = [split_command(shlex.split(command.text)[1:])[0] for command in QUICKSTART]
    assert names == ["data prepare", "doctor", "train-ae", "train-diffusion", "sample", "fid"]
    assert list((trained / "runs/ldm/samples/seed0-steps18").glob("fid-*.json"))


@pytest.mark.parametrize("command", RUNNABLE, ids=str)
def test_a_command_runs(here, command):
    words = tiny(command.text)
    name, rest = split_command(words)
    if name in WRITES:
        remove(Path(rest[1]))
        remove(Path(rest[1]).with_suffix(".safetensors"))  # the twin of a .pt
    assert ldm(words) == 0


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.parametrize("command", [*PARSED, *RECORDED], ids=str)
def test_a_command_that_is_not_run_parses(command):
    words = shlex.split(command.text)
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        launched = get_args_parser().parse_args(words[1:])
        assert launched.module and launched.training_script == "ldm"
        words = ["ldm", *(word for word in launched.training_script_args if word != "--")]
        # without `--` the launcher takes options that begin like its own
        assert " -m ldm -- " in command.text
    parse(words[1:])


def test_every_exception_matches_a_command():
    for pattern in PARSE_ONLY | NOT_OURS:
        assert any(re.fullmatch(pattern, command.text) for command in ALL), pattern


@pytest.mark.parametrize("command", [c for c in ALL if c not in OURS], ids=str)
def test_every_other_command_is_listed_with_a_reason(command):
    assert reason(command.text, NOT_OURS | PARSE_ONLY), command
    if extras := re.findall(r"\[([\w,]+)\]", command.text):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        assert set(extras[0].split(",")) <= set(project["optional-dependencies"])
    if script := re.match(r"python (examples/\w+\.py)(.*)", command.text):
        source = (ROOT / script[1]).read_text("utf-8")
        for option in re.findall(r"--[\w-]+", script[2]):
            assert f'"{option}"' in source, option
    if module := re.match(r"python -m (benchmarks\.\w+)(.*)", command.text):
        names = (module[1], "benchmarks.comparison")  # which holds the options that all share
        source = "".join(Path(importlib.util.find_spec(n).origin).read_text("utf-8") for n in names)
        for option in re.findall(r"--[\w-]+", module[2]):
            assert f'"{option}"' in source, option


@pytest.mark.parametrize(
    "block", [block for page in GUIDES for block in blocks(page, "python")], ids=str
)
def test_a_python_block_runs(here, block):
    text = block.text.replace('"cuda", torch.bfloat16', '"cpu"').replace("n=16", "n=2")
    text = re.sub(r"\b(256, 256|250, 200)\b", "64, 48", text)
    text = text.replace('build_autoencoder("litevae-b"', 'build_autoencoder("litevae-b-quarter"')
    torch.manual_seed(0)
    exec(compile(text, str(block), "exec"), {"__name__": "docs"})


@pytest.mark.parametrize("block", list(blocks(CONTRIBUTING, "diff")), ids=str)
def test_a_diff_applies(block):
    command = ["git", "apply", "--check", "--verbose", "-"]
    done = subprocess.run(command, cwd=ROOT, input=block.text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_diffs_work_together(tmp_path):
    for package in ("ldm", "autoencoders", "diffusion", "pipelines", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    for block in blocks(CONTRIBUTING, "diff"):
        command = ["git", "apply", "-"]
        subprocess.run(command, cwd=tmp_path, input=block.text, text=True, check=True)

    def python(*words: str) -> None:
        env = os.environ | {"PYTHONPATH": str(tmp_path), "TORCH_HOME": str(tmp_path)}
        subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, check=True)

    settings = ["encoder={type: patch}", "loss.charbonnier=1", "run.device=cpu"]
    python("-m", "ldm", "train-ae", "tiny", *settings, "phases=[{resolution: 64, steps: 2}]")
    python("-m", "ldm", "eval-ae", "--no-fid", "--limit", "4", *CPU)
    python("-c", SECOND_ORDER)


SECOND_ORDER = """
import torch
from diffusion import karras_sigmas
from diffusion.samplers import SAMPLERS

def sample(sampler, steps):  # of data drawn from N(0, 0.5²)
    noise = torch.ones(1, 1, 1, 1)
    return SAMPLERS[sampler](lambda x, s: x / (1 + 4 * s**2), noise, karras_sigmas(steps))

exact = sample("heun", 2000)
coarse, fine = ((sample("dpm-2", steps) - exact).abs().item() for steps in (40, 80))
assert 3 < coarse / fine < 5, (coarse, fine)
"""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    targets += re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
    for target in targets:
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page}: {target}"


def anchors(page: Path) -> set[str]:
    """The anchors of its headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_files_named_in_the_design_exist():
    named = re.findall(r"`([\w./]+(?:\.py|/))`", DESIGN.read_text("utf-8"))
    assert len(named) > 40
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "pipelines" / name).exists(), name


@pytest.mark.parametrize(
    ("walk", "most"),
    [
        ("training step of stage one", 8),
        ("training step of stage two", 8),
        ("sample", 8),
        ("FID", 9),
        ("reproduced table", 9),
    ],
)
def test_a_guided_walk_is_short(walk, most):
    text = DESIGN.read_text("utf-8")
    section = re.search(rf"^### One {walk}\n(.*?)^##", text, re.MULTILINE | re.DOTALL)[1]
    assert 3 <= len(re.findall(r"^\d+\. `", section, re.MULTILINE)) <= most


def test_the_readme_is_short():
    lines = README.read_text("utf-8").splitlines()
    assert len(lines) <= 160
    assert max(map(len, lines)) <= 100
