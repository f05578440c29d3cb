"""Formats for papers: LaTeX that a compiler takes, values that a spreadsheet reads, and figures as vectors."""

import csv
import re
import shutil
import subprocess

import pytest
from helpers.results import PGD, cell, comparison, result
from helpers.run_folder import make_folder

from vismt.report import figures, plotting
from vismt.report.comparison import compare_results
from vismt.report.renderers import render_csv, render_latex
from vismt.report.results import ValuesByExample, read_results
from vismt.report.tables import paper_tables


def latex(folder):
    comparisons = compare_results(read_results(folder / "results.jsonl"), ValuesByExample(folder))
    return render_latex(paper_tables(comparisons))


def test_arms_are_rows_and_sets_columns(tmp_path):
    text = latex(make_folder(tmp_path))
    assert text.startswith("% \\usepackage{booktabs}\n")
    assert r"    Condition & Model & digits, n = 4 & crops, n = 4 & average, n = 8 \\" in text
    assert (
        r"    clean & frozen & 50.0 $\pm$ 41.1 $\approx$ & 50.0 $\pm$ 41.1 $\approx$ & 50.0 $\pm$ 22.3 $\approx$ \\"
        in text
    )
    assert (
        r"     & adapted & \textbf{60.0 [18.9, 100.0]} & \textbf{52.5 $\pm$ 37.0} & \textbf{56.2 $\pm$ 21.3} \\" in text
    )
    assert text.count(r"\midrule") == 4 and r"accuracy in \%" in text


def test_names_have_no_markup():
    row = comparison("a_b & c", {"x_y^2": cell(0.5, 0.1, 4), "{z}~\\": cell(0.4, 0.1, 4)})
    text = render_latex(paper_tables([row]))
    assert r"x\_y\textasciicircum{}2" in text and r"\{z\}\textasciitilde{}\textbackslash{}" in text
    assert r"a\_b \& c" in text and not re.search(r"(?<!\\)[_#]", text.split("\n", 1)[1])


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs LaTeX")
def test_latex_compiles(tmp_path):
    body = latex(make_folder(tmp_path))
    document = f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}{body}\\end{{document}}"
    (tmp_path / "a.tex").write_text(document)
    subprocess.run(["pdflatex", "-interaction=batchmode", "-halt-on-error", "a.tex"], cwd=tmp_path, check=True)


def test_values_that_a_spreadsheet_reads():
    rows = [result(), result(arm='a "b", c', condition=PGD, seed=3)]
    read = list(csv.DictReader(render_csv(rows).splitlines()))
    assert [row["arm"] for row in read] == ["frozen", 'a "b", c'] and [row["seed"] for row in read] == ["", "3"]
    assert float(read[0]["value"]) == rows[0].value and read[1]["condition"] == PGD.label


def test_figures_as_vectors_have_their_fonts_inside(tmp_path, painted):
    rows = [comparison("digits", {"frozen": cell(0.5, 0.1, 4)})]
    figures.domain_bars(rows, tmp_path / "plain.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["plain.svg"]
    with plotting.figure_formats(["html", "svg", "pdf", "png"]):
        figures.domain_bars(rows, tmp_path / "a.svg")
        figures.domain_bars(rows, tmp_path / "b.svg")
    assert {path.name for path in tmp_path.glob("a.*")} == {"a.svg", "a.pdf", "a.png"}
    svg, pdf = (tmp_path / "a.svg").read_text(), (tmp_path / "a.pdf").read_bytes()
    assert "<text" not in svg and "<path" in svg  # letters are outlines
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType
    assert pdf == (tmp_path / "b.pdf").read_bytes() and svg == (tmp_path / "b.svg").read_text()
