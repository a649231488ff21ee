"""The house has floors, and imports point down only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOF, JOBS, MODELS, GROUND = 3, 2, 1, 0


def floor(module: str) -> int | None:
    if module == "ldm.cli" or module.startswith("ldm.cli.") or module == "ldm.__main__":
        return ROOF
    floors = {"pipelines": JOBS, "autoencoders": MODELS, "diffusion": MODELS, "ldm": GROUND}
    return floors.get(module.partition(".")[0])


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


SOURCES = [
    path
    for package in ("ldm", "autoencoders", "diffusion", "pipelines")
    for path in sorted((ROOT / package).rglob("*.py"))
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    siblings = {"autoencoders": "diffusion", "diffusion": "autoencoders"}
    for name in imported(path):
        if floor(name) is None:
            continue
        assert floor(name) <= floor(own), f"{own} imports {name}, which stands above it"
        assert name.partition(".")[0] != siblings.get(own.partition(".")[0]), f"{own} ↔ {name}"


def test_the_check_sees_an_import_that_points_up(tmp_path):
    culprit = tmp_path / "culprit.py"
    culprit.write_text("def f():\n    from pipelines import fid\n")
    assert "pipelines" in imported(culprit)
    assert floor("pipelines") > floor("diffusion.edm")


def test_help_imports_no_torch():
    """`ldm --help` must answer at once: torch alone takes longer than that to import."""
    import subprocess
    import sys

    code = "import sys, ldm.cli; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
