"""Imports point down only, nowhere in a circle, and to declared libraries only."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.house import (
    Source,
    find_circles,
    import_graph,
    imported,
    is_cli,
    read_sources,
    sub_packages,
)

ROOT = Path(__file__).parent.parent
CLI, JOBS, MODELS, GROUND = 3, 2, 1, 0


def floor(module: str) -> int | None:
    if is_cli(module):
        return CLI
    floors = {"pipelines": JOBS, "autoencoders": MODELS, "diffusion": MODELS, "ldm": GROUND}
    return floors.get(module.partition(".")[0])


SOURCES = read_sources(ROOT)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.path))
def test_imports_point_down(source):
    own = source.module
    siblings = {"autoencoders": "diffusion", "diffusion": "autoencoders"}
    for name in imported(source):
        if floor(name) is None:
            continue
        assert floor(name) <= floor(own), f"{own} imports {name}, which stands above it"
        assert name.partition(".")[0] != siblings.get(own.partition(".")[0]), f"{own} ↔ {name}"


NAMES = {
    "PIL": "pillow", "cleanfid": "clean-fid", "pywt": "pywavelets", "skimage": "scikit-image",
    "yaml": "pyyaml",
}  # fmt: skip
OPTIONAL = {
    "diffusers",
    "datasets",
    "wandb",
    "fsspec",
    "aiohttp",
}  # missing, they are an error that names them


def test_every_imported_library_is_a_dependency():
    names = {name.partition(".")[0] for source in SOURCES for name in imported(source)}
    names -= {*(source.path.parts[0] for source in SOURCES), *sys.stdlib_module_names, *OPTIONAL}
    assert {"torch", "PIL", "huggingface_hub"} <= names
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {re.match(r"[\w-]+", text)[0].lower() for text in project["dependencies"]}
    assert {NAMES.get(name, name.replace("_", "-")) for name in names} <= declared


def test_an_import_that_points_up_is_seen():
    culprit = Source(Path("diffusion/edm.py"), "def f():\n    from pipelines import fid\n")
    assert "pipelines.fid" in imported(culprit)
    assert floor("pipelines.fid") > floor("diffusion.edm")


def test_no_modules_import_each_other():
    assert find_circles(import_graph(SOURCES)) == []


def test_no_sub_packages_import_each_other():
    graph = import_graph(SOURCES)
    below_the_cli = {own: needed for own, needed in graph.items() if floor(own) < CLI}
    assert find_circles(sub_packages(below_the_cli)) == []


@pytest.mark.parametrize(
    "back",
    [
        "from autoencoders.a import f\n",
        "from autoencoders import a\n",
        "def g():\n    import autoencoders.a\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from autoencoders.a import f\n",
    ],
)
def test_a_circle_is_seen(back):
    sources = {"a": "from autoencoders import b\n", "b": "x = 1\n"}
    assert find_circles(graph_of(sources)) == []
    assert find_circles(graph_of(sources | {"b": back})) == [["autoencoders.a", "autoencoders.b"]]


def test_a_circle_of_sub_packages_is_seen():
    sources = {"a": "import autoencoders.deep.b\n", "deep/b": "", "d": ""}
    below = graph_of(sources | {"deep/c": "from autoencoders.d import x\n"})
    assert find_circles(sub_packages(below)) == []
    graph = graph_of(sources | {"deep/c": "import autoencoders.a\n"})
    assert find_circles(graph) == []  # none of modules: a → deep.b, deep.c → a
    assert find_circles(sub_packages(graph)) == [["autoencoders.a", "autoencoders.deep"]]


def graph_of(sources: Mapping[str, str]) -> dict[str, set[str]]:
    return import_graph(
        [Source(Path("autoencoders", f"{name}.py"), text) for name, text in sources.items()]
    )


def loaded_by(statement: str) -> set[str]:
    """The modules in a fresh process after a statement."""
    code = f"import sys; {statement}; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)
    return set(output.stdout.decode().split())


def test_help_imports_no_torch():
    """`ldm --help` must answer at once: torch alone takes longer than that to import."""
    assert not {"torch", "pydantic"} & loaded_by("import ldm.cli")


def test_training_an_autoencoder_imports_no_measuring():
    loaded = loaded_by("import pipelines.train_autoencoder")
    assert "pipelines.train_autoencoder" in loaded
    above = ("pipelines.fid", "pipelines.evaluate", "pipelines.measuring")
    assert not [name for name in loaded if name.startswith(above)]
