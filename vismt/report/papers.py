"""Results for papers and spreadsheets: LaTeX tables (booktabs) and comma-separated values."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields

from vismt.report.results import Result
from vismt.report.tables import Table

ESCAPED = {character: f"\\{character}" for character in "&%$#_{}"}
ESCAPED |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
ESCAPED |= {"±": r"$\pm$", "−": "$-$", "–": "--", "≈": r"$\approx$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}


def render_csv(results: Sequence[Result]) -> str:
    """Return every row of the results, also those of single seeds, under a line with the names of its fields."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Result)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in results)
    return text.getvalue()


def render_latex(tables: Sequence[Table]) -> str:
    """Return LaTeX tables; they need the package booktabs. The best numbers are bold, statistical ties marked by ≈."""
    return "% \\usepackage{booktabs}\n" + "\n".join(_latex(table) for table in tables)


def _latex(table: Table) -> str:
    def line(texts: Sequence[str]) -> str:
        return "    " + " & ".join(texts) + r" \\"

    rows = []
    for number, row in enumerate(table.rows):
        cells = [_plain(text) for text in row]
        if table.texts > 1 and number > 0:
            if table.rows[number - 1][0] == row[0]:
                cells[0] = ""
            else:
                rows.append(r"    \midrule")
        rows.append(
            line([rf"\textbf{{{cell}}}" if (number, i) in table.best else cell for i, cell in enumerate(cells)])
        )
    kinds = "l" * table.texts + "r" * (len(table.heads) - table.texts)
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{_plain(table.title)}; mean $\pm$ half width of the 95\,\% confidence interval.}}",
            rf"  \begin{{tabular}}{{{kinds}}}",
            r"    \toprule",
            line([_plain(head) for head in table.heads]),
            r"    \midrule",
            *rows,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _plain(text: str) -> str:
    """Return a text in which LaTeX sees no markup."""
    marked = text.replace(" ★", "")
    return "".join(ESCAPED.get(character, character) for character in " ".join(marked.split()))
