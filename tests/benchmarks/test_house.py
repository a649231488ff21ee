"""Figures of the code's shape, on a small artificial tree."""

import pytest

from benchmarks.house import main, measure, report

FUNCTION = "def f():\n    x = 1\n"


@pytest.fixture
def tree(tmp_path):
    """Write modules: dotted name → text."""

    def write(sources):
        for name, text in sources.items():
            path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def figures(root):
    return {figure.name: figure for figure in measure(root)}


def test_files_lines_and_blanks_are_counted(tree):
    root = tree({"ldm.a": "x = 1\n\ny = 22\n", "pipelines.deep.b": "z = 333\n", "tests.c": "0\n"})
    found = figures(root)
    assert (found["source files"].value, found["lines"].value) == (2, 4)
    assert found["blank lines, %"].value == 25.0
    assert found["characters in a line, mean"].value == 6.0


def test_lines_for_a_statement_are_those_of_code(tree):
    text = '"""Two\nlines."""\n# why\nx = 1\n\nif x:\n    y = (\n        2\n    )\n'
    found = figures(tree({"ldm.a": text, "ldm.b": "if 1: x = 1; y = 2\n"}))
    # x =, if, y = over three lines; and three statements on one line
    assert found["lines of code for a statement"].value == 1.0


@pytest.mark.parametrize(
    ("lines", "long", "short"), [(59, 0, 1), (60, 0, 0), (450, 0, 0), (451, 1, 0)]
)
def test_long_and_short_files(tree, lines, long, short):
    found = figures(tree({"ldm.a": "x = 1\n" * lines, "ldm.__init__": "", "ldm.__main__": ""}))
    assert found["files over 450 lines"].value == long
    assert found["files under 60 lines"].value == short
    assert found["files over 450 lines"].places == (f"ldm/a.py: {lines}",) * long


@pytest.mark.parametrize(("body", "long"), [(59, 0), (60, 1)])
def test_a_function_is_counted_with_its_head_and_without_its_decorators(tree, body, long):
    text = "class C:\n    @property\n    def f(self):\n" + "        x = 1\n" * body
    figure = figures(tree({"diffusion.a": text}))["functions over 60 lines"]
    assert figure.value == long
    assert figure.places == ("diffusion/a.py:3: f, 61",) * long


def test_circles_of_modules_and_of_sub_packages(tree):
    root = tree({
        "ldm.a": "from ldm import b\n", "ldm.b": "def f():\n    import ldm.a\n",
        "pipelines.one.x": "import pipelines.two.y\n", "pipelines.two.y": "",
        "pipelines.two.z": "import pipelines.one.w\n", "pipelines.one.w": "",
    })  # fmt: skip
    figure = figures(root)["circles of imports"]
    assert figure.places == ("ldm.a ↔ ldm.b", "pipelines.one ↔ pipelines.two")


def test_docstrings_that_begin_with_a_question_word(tree):
    root = tree({
        "ldm.a": '"""How it works."""\n\n\nclass C:\n    """What it is."""\n',
        "ldm.b": '"""However it works."""\n\n\ndef f():\n    """Whether: a word."""\n',
        "ldm.c": 'X = "What?"\n"""Which it is."""\nY = 1\n"""Whichever it is."""\n',
    })  # fmt: skip
    assert figures(root)["docstrings that begin with a question word"].places == (
        "ldm/a.py:1: How it works. …", "ldm/a.py:5: What it is. …",
        "ldm/b.py:5: Whether: a word. …", "ldm/c.py:2: Which it is. …",
    )  # fmt: skip


def test_class_names_used_twice(tree):
    root = tree({
        "ldm.a": "class C:\n    pass\n\n\nclass D:\n    pass\n",
        "autoencoders.b": "def f():\n    class C:\n        pass\n",
    })  # fmt: skip
    assert figures(root)["class names used twice"].places == ("C: ldm/a.py:1, autoencoders/b.py:2",)


def test_check_fails_where_a_limit_is_passed(tree, capsys):
    root = tree({"ldm.a": FUNCTION})
    assert main(["--check", "--root", str(root)]) == 0
    root = tree({"ldm.b": '"""What a module is."""\n'})
    assert main(["--root", str(root)]) == 0
    capsys.readouterr()
    assert main(["--check", "--root", str(root)]) == 1
    printed = capsys.readouterr().out
    assert "too many" in printed and "  ldm/b.py:1: What a module is. …" in printed


def test_places_are_printed_only_where_a_limit_is_passed(tree):
    lines = report(measure(tree({"ldm.a": FUNCTION})))
    assert not any("ldm/a.py" in line for line in lines)
    assert lines[1].split() == ["source", "files", "1", "130"]
