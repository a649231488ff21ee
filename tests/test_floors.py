"""Imports point down only, and nowhere in a circle."""

import ast
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("ldm", "autoencoders", "diffusion", "pipelines")
CLI, JOBS, MODELS, GROUND = 3, 2, 1, 0


def floor(module: str) -> int | None:
    if module == "ldm.cli" or module.startswith("ldm.cli.") or module == "ldm.__main__":
        return CLI
    floors = {"pipelines": JOBS, "autoencoders": MODELS, "diffusion": MODELS, "ldm": GROUND}
    return floors.get(module.partition(".")[0])


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports: at its top, inside functions, or for type checkers only."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import, which nothing here resolves"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def import_graph(root: Path) -> dict[str, set[str]]:
    """Each module of the packages in a folder, and those of them that it imports."""
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }
    graph = {}
    for own, path in paths.items():
        graph[own] = {_module_of(name, paths) for name in imported(path)} - {own, ""}
    return graph


def _module_of(name: str, paths: Mapping[str, Path]) -> str:
    """The longest part of a dotted name that is a module; "" where none is."""
    while name and name not in paths:
        name = name.rpartition(".")[0]
    return name


def sub_packages(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The graph with every directory below a top-level package as one node; the modules directly
    under a top-level package stay nodes of their own."""

    def node(module: str) -> str:
        return ".".join(module.split(".")[:2])

    joined: dict[str, set[str]] = {}
    for own, needed in graph.items():
        joined.setdefault(node(own), set()).update(node(name) for name in needed)
    return {own: needed - {own} for own, needed in joined.items()}


def circle(graph: Mapping[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    siblings = {"autoencoders": "diffusion", "diffusion": "autoencoders"}
    for name in imported(path):
        if floor(name) is None:
            continue
        assert floor(name) <= floor(own), f"{own} imports {name}, which stands above it"
        assert name.partition(".")[0] != siblings.get(own.partition(".")[0]), f"{own} ↔ {name}"


def test_an_import_that_points_up_is_seen(tmp_path):
    culprit = tmp_path / "culprit.py"
    culprit.write_text("def f():\n    from pipelines import fid\n")
    assert "pipelines.fid" in imported(culprit)
    assert floor("pipelines.fid") > floor("diffusion.edm")


def test_no_modules_import_each_other():
    assert circle(import_graph(ROOT)) is None


def test_no_sub_packages_import_each_other():
    graph = import_graph(ROOT)
    below_the_cli = {own: needed for own, needed in graph.items() if floor(own) < CLI}
    assert circle(sub_packages(below_the_cli)) is None


@pytest.mark.parametrize(
    "back",
    [
        "from autoencoders.a import f\n",
        "from autoencoders import a\n",
        "def g():\n    import autoencoders.a\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from autoencoders.a import f\n",
    ],
)
def test_a_circle_is_seen(tmp_path, back):
    write(tmp_path, {"a": "from autoencoders import b\n", "b": "x = 1\n"})
    assert circle(import_graph(tmp_path)) is None
    write(tmp_path, {"b": back})
    assert set(circle(import_graph(tmp_path))) == {"autoencoders.a", "autoencoders.b"}


def test_a_circle_of_sub_packages_is_seen(tmp_path):
    write(tmp_path, {"a": "import autoencoders.deep.b\n", "deep/b": "", "deep/c": "", "d": ""})
    write(tmp_path, {"deep/c": "from autoencoders.d import x\n"})
    assert circle(sub_packages(import_graph(tmp_path))) is None
    write(tmp_path, {"deep/c": "import autoencoders.a\n"})
    graph = import_graph(tmp_path)
    assert circle(graph) is None  # none of modules: a → deep.b, deep.c → a
    assert set(circle(sub_packages(graph))) == {"autoencoders.a", "autoencoders.deep"}


def write(root: Path, sources: Mapping[str, str]) -> None:
    for name, text in sources.items():
        path = root / "autoencoders" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


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
