"""`pyproject.toml` agrees with the documentation and the sources."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
HATCH = PYPROJECT["tool"]["hatch"]
TARGETS = HATCH["build"]["targets"]
EXTRAS = PROJECT["optional-dependencies"]
INSTALLING = (ROOT / "docs/getting_started.md").read_text("utf-8").partition("\n## Run")[0]


def lowest(requirements: list[str]) -> dict[str, str]:
    """The lowest version of each requirement; one without a lower bound is an error."""
    found = [re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", text) for text in requirements]
    assert all(found), requirements
    return {match[1]: match[2] for match in found if match}


def test_the_lowest_versions_in_the_docs_are_the_bounds():
    listed = dict(re.findall(r"([\w-]+) (\d[\d.]*\d|\d)[,;.]", INSTALLING.partition("\n- ")[2]))
    assert listed == lowest(PROJECT["dependencies"] + EXTRAS["test"])


def test_extras_have_the_bounds_of_the_tests():
    tried = lowest(EXTRAS["test"])
    for extra in ("diffusers", "hf"):
        assert lowest(EXTRAS[extra]).items() <= tried.items()


def test_the_docs_name_the_pythons_of_the_classifiers_and_of_ci():
    prefix = "Programming Language :: Python :: "
    versions = re.findall(rf"{prefix}(3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert f"Python {', '.join(versions[:-1])} and {versions[-1]}" in INSTALLING
    assert PROJECT["requires-python"] == f">={versions[0]}"
    workflow = (ROOT / ".github/workflows/ci.yml").read_text("utf-8")
    assert re.findall(r'"(3\.\d+)"', workflow) == versions


def test_the_description_of_the_package_has_no_links_into_the_repository():
    text = (ROOT / "README.md").read_text("utf-8")
    for step in HATCH["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(step["pattern"], step["replacement"], text)
    assert set(re.findall(r"\]\((\w*:?)", text)) == {"https:"}
    assert not re.search(r"\]\[|^\[.*\]: ", text, re.MULTILINE)
    assert "\n[Getting started]" not in text and "\nGetting started" in text


def test_the_sdist_holds_what_its_build_and_its_tests_read():
    included = set(TARGETS["sdist"]["include"])
    assert included >= {*TARGETS["wheel"]["packages"], "benchmarks", "examples", "tests", "docs"}
    assert included >= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", ".github"}
    assert [name for name in included if not (ROOT / name).exists()] == []
