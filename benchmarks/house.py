"""Figures of the code's shape: sizes, imports, docstrings, names.

    python -m benchmarks.house [--check] [--root .]

Prints one line for each figure and, for each limit that is passed, the places. With --check the
exit status is 1 if any limit is passed.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.comparison import make_parser
from ldm.tables import text_table

PACKAGES = ("ldm", "autoencoders", "diffusion", "pipelines")
LONG_FILE, LONG_FUNCTION, SHORT_FILE = 450, 60, 60  # lines
INDIRECT = {"What", "How", "Which", "Whose", "Where", "Whether"}
FACES = {"__init__.py", "__main__.py"}
Graph = Mapping[str, set[str]]


@dataclass(frozen=True)
class Source:
    """A source file."""

    path: Path
    """Relative to the root."""
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def module(self) -> str:
        """Dotted name."""
        return ".".join(self.path.with_suffix("").parts).removesuffix(".__init__")

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


@dataclass(frozen=True)
class Figure:
    """One figure, and the places that count towards it."""

    name: str
    value: float
    limit: float | None = None
    """The largest value allowed; None: none."""
    places: tuple[str, ...] = ()

    @property
    def is_passed(self) -> bool:
        """True if the limit is passed."""
        return self.limit is not None and self.value > self.limit


def main(arguments: Sequence[str]) -> int:
    """Print the figures; return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a limit is passed")
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the packages")
    given = parser.parse_args(arguments)
    figures = measure(given.root)
    print("\n".join(report(figures)))
    return int(given.check and any(figure.is_passed for figure in figures))


def measure(root: Path) -> list[Figure]:
    """Measure the packages in a folder."""
    sources = read_sources(root)
    lines = [line for source in sources for line in source.lines]
    filled = [line for line in lines if line.strip()]
    graph = import_graph(sources)
    below_the_cli = {own: needed for own, needed in graph.items() if not is_cli(own)}
    circles = find_circles(graph) + find_circles(sub_packages(below_the_cli))
    return [
        Figure("source files", len(sources), 130),
        Figure("lines", len(lines), 23_000),
        _count(f"files over {LONG_FILE} lines", 0, _files(sources, lambda n: n > LONG_FILE)),
        _count(f"functions over {LONG_FUNCTION} lines", 0, long_functions(sources)),
        _count(f"files under {SHORT_FILE} lines", 12, _files(sources, lambda n: n < SHORT_FILE)),
        _count("circles of imports", 0, dict.fromkeys(map(" ↔ ".join, circles))),
        _count("docstrings that begin with a question word", 0, indirect_docstrings(sources)),
        _count("class names used twice", 0, repeated_classes(sources)),
        Figure("characters in a line, mean", round(_mean(map(len, filled)), 1)),
        Figure("lines of code for a statement", round(lines_per_statement(sources), 2)),
        Figure("blank lines, %", round(100 * (1 - len(filled) / max(1, len(lines))), 1)),
    ]


def report(figures: Sequence[Figure]) -> list[str]:
    """The lines of a table, then the places of the limits that are passed."""
    rows = [
        (f.name, f"{f.value:,}", "" if f.limit is None else f"{f.limit:,}",
         "too many" if f.is_passed else "")
        for f in figures
    ]  # fmt: skip
    lines = text_table(("figure", "value", "limit", ""), rows)
    for figure in figures:
        if figure.is_passed and figure.places:
            lines += ["", f"{figure.name}:", *(f"  {place}" for place in figure.places)]
    return lines


# ----------------------------------------------------------------------------------- imports
def read_sources(root: Path) -> list[Source]:
    """Read the packages in a folder, in the order of their paths."""
    return [
        Source(path.relative_to(root), path.read_text("utf-8"))
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    ]


def imported(source: Source) -> set[str]:
    """Dotted names that a file imports: at its top, inside functions, or for type checkers only."""
    names = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{source.path}: relative imports are not resolved here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def import_graph(sources: Sequence[Source]) -> dict[str, set[str]]:
    """Each module, and those among the sources that it imports."""
    modules = {source.module for source in sources}
    return {
        source.module: {_module_of(name, modules) for name in imported(source)}
        - {source.module, ""}
        for source in sources
    }


def _module_of(name: str, modules: set[str]) -> str:
    """The longest part of a dotted name that is a module; "" if none is."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def sub_packages(graph: Graph) -> dict[str, set[str]]:
    """The graph with every folder below a top-level package as one node.

    The modules directly under a top-level package stay nodes of their own.
    """

    def node(module: str) -> str:
        return ".".join(module.split(".")[:2])

    joined: dict[str, set[str]] = defaultdict(set)
    for own, needed in graph.items():
        joined[node(own)] |= {node(name) for name in needed} - {node(own)}
    return dict(joined)


def find_circles(graph: Graph) -> list[list[str]]:
    """Groups of nodes that import each other, directly or through others."""
    reached = {node: _reachable(graph, node) for node in graph}
    groups = {
        frozenset(other for other in reached[node] if node in reached[other])
        for node in graph
        if node in reached[node]
    }
    return sorted(map(sorted, groups))


def _reachable(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    ahead = [start]
    while ahead:
        new = {needed for needed in graph[ahead.pop()] if needed in graph} - found
        found |= new
        ahead += new
    return found


def is_cli(module: str) -> bool:
    """True for a module of the command line, the top floor."""
    return f"{module}.".startswith("ldm.cli.") or module == "ldm.__main__"


# ------------------------------------------------------------------------------------ others
def _files(sources: Sequence[Source], wanted: Callable[[int], bool]) -> Iterator[str]:
    """Files of a wanted number of lines, packages' faces left out."""
    for source in sources:
        if source.path.name not in FACES and wanted(len(source.lines)):
            yield f"{source.path}: {len(source.lines)}"


def long_functions(sources: Sequence[Source]) -> Iterator[str]:
    """Functions of more than `LONG_FUNCTION` lines, decorators not counted."""
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONG_FUNCTION:
                    yield f"{source.path}:{node.lineno}: {node.name}, {lines}"


def indirect_docstrings(sources: Sequence[Source]) -> Iterator[str]:
    """Docstrings that begin with an indirect question, those of fields and constants too."""
    for source in sources:
        for node in ast.walk(source.tree):
            match node:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    words = text.split()
                    if words and words[0].strip(",:'") in INDIRECT:
                        yield f"{source.path}:{node.lineno}: {' '.join(words[:8])} …"


def repeated_classes(sources: Sequence[Source]) -> Iterator[str]:
    """Names that more than one class has."""
    found: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(f"{source.path}:{node.lineno}")
    for name, places in sorted(found.items()):
        if len(places) > 1:
            yield f"{name}: {', '.join(places)}"


def lines_per_statement(sources: Sequence[Source]) -> float:
    """Lines without blank ones, comments and docstrings, for each statement; packing lowers it."""
    lines = statements = 0
    for source in sources:
        strings: set[int] = set()
        for node in ast.walk(source.tree):
            match node:
                case ast.Expr(value=ast.Constant(value=str()), lineno=first, end_lineno=last):
                    strings.update(range(first, last + 1))
                case ast.stmt():
                    statements += 1
        code = (line.strip() for i, line in enumerate(source.lines, 1) if i not in strings)
        lines += sum(bool(line) and not line.startswith("#") for line in code)
    return lines / max(1, statements)


def _count(name: str, limit: int, places: Iterable[str]) -> Figure:
    found = tuple(places)
    return Figure(name, len(found), limit, found)


def _mean(values: Iterator[int]) -> float:
    numbers = list(values)
    return sum(numbers) / max(1, len(numbers))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
