"""The table writer: aligned text, Markdown that renders, LaTeX that compiles."""

import pytest

from ldm.tables import latex_table, markdown_table, text_table

HEADER = ["model", "PSNR ↑", "FID"]
ROWS = [["litevae_b|x", "28.1", "0.7"], ["sd", "9", "100"]]


def test_text_aligns_words_left_and_numbers_right():
    assert text_table(HEADER, ROWS) == [
        "model        PSNR ↑  FID",
        "litevae_b|x    28.1  0.7",
        "sd                9  100",
    ]


def test_markdown_escapes_pipes_and_marks_the_alignment():
    header, rule, first, _ = markdown_table(HEADER, ROWS, left=1)
    assert [cell.strip() for cell in header.strip("|").split("|")] == HEADER
    assert [cell[0] + cell[-1] for cell in rule.strip("|").split("|")] == [":-", "-:", "-:"]
    assert "litevae_b&#124;x" in first and len({len(header), len(rule), len(first)}) == 1


def test_latex_escapes_special_characters_and_signs():
    lines = latex_table(["a", "b ↑"], [["50% of x_1 & {y}", "1 ± 2"]], left=1)
    assert lines[0] == r"\begin{tabular}{lr}" and lines[-1] == r"\end{tabular}"
    assert lines[2] == r"a & b $\uparrow$ \\"
    assert lines[4] == r"50\% of x\_1 \& \{y\} & 1 $\pm$ 2 \\"


@pytest.mark.parametrize("write", [text_table, markdown_table])
def test_rows_of_another_length_are_refused(write):
    with pytest.raises(ValueError, match="shorter"):
        write(HEADER, [["one", "two"]])
