"""A report as one self-contained HTML page, as Markdown, as LaTeX tables (booktabs) and as comma-separated values.

The page and the Markdown are templates of templates/. Every text that comes from a file is escaped: by the template engine in the
page, by the filter `text` in Markdown.
"""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from vismt.report.results import Result
from vismt.report.tables import Report, Table, is_long, split_wide_table

if TYPE_CHECKING:
    from jinja2 import Environment

_PIXELS = 96 / 72  # pixels of a point of a figure, so that its letters have the size of the letters around it

# Characters with a meaning in LaTeX, and signs that have a name there.
ESCAPED = {character: f"\\{character}" for character in "&%$#_{}"}
ESCAPED |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
ESCAPED |= {"±": r"$\pm$", "−": "$-$", "–": "--", "≈": r"$\approx$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}


def render_html(report: Report) -> str:
    """Return the page with images as data URIs, readable from disk in light and dark, without scripts and other files."""
    return _environment().get_template("page.html").render(report=report).lstrip()


def render_markdown(report: Report, folder: Path) -> str:
    """Return the same tables and sentences for a paper or a pull request. Pictures are linked relative to `folder`."""
    environment = _environment()
    environment.filters["link"] = lambda path: path.relative_to(folder).as_posix().replace(" ", "%20")
    text = environment.get_template("report.md").render(report=report)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def fill_page(path: Path, **values: object) -> str:
    """Return the text of a template file with values filled in."""
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader(path.parent, encoding="utf8")
    page = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return page.get_template(path.name).render(values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates", encoding="utf8"),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "anchor": lambda title: re.sub(r"\W+", "-", title.lower()).strip("-"),
        "breakable": _breakable,
        "fitted": split_wide_table,
        "image": _image,
        "kinds": _kinds,
        "text": _markdown_text,
    }
    return environment


def _kinds(table: Table) -> list[str]:
    """Return the classes of the cells of each column."""
    words = ["text" if column < table.texts else "number" for column in range(len(table.heads))]
    return ["text long" if is_long(table, column) else word for column, word in enumerate(words)]


def _breakable(text: str) -> str:
    """Return a text as HTML that may be broken behind the joints of a name, but not before or behind a sign as in "n = 60"."""
    from markupsafe import Markup, escape

    joints = re.sub(r"([+:_/])", r"\1<wbr>", str(escape(text)))
    return Markup(re.sub(r" (?=[=↑↓])|(?<==) ", "\u00a0", joints))


def _image(path: Path) -> dict[str, object]:
    """Return the SVG of a picture in base64, and its width in pixels (0 if the file does not say it)."""
    content = path.read_bytes()
    found = re.search(rb'<svg[^>]* width="([0-9.]+)pt"', content)
    return {
        "data": base64.b64encode(content).decode("ascii"),
        "width": round(_PIXELS * float(found[1])) if found else 0,
    }


def _markdown_text(text: str) -> str:
    """Return one line in which Markdown sees no markup, table cell or HTML."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", plain)


def render_csv(results: Sequence[Result]) -> str:
    """Return every row of the results, also rows of single seeds, under a line with the names of its fields."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Result)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in results)
    return text.getvalue()


def render_latex(tables: Sequence[tuple[Table, str]]) -> str:
    """Return LaTeX tables and their notes.

    They need booktabs. The best numbers are bold, and statistical ties are marked by ≈.
    """
    return "% \\usepackage{booktabs}\n" + "\n".join(_latex_table(table, note) for table, note in tables)


def _latex_table(table: Table, note: str) -> str:
    def line(texts: Sequence[str]) -> str:
        return "    " + " & ".join(texts) + r" \\"

    rows = []
    for number, row in enumerate(table.rows):
        cells = [_latex_text(text) for text in row]
        if table.texts > 1 and number > 0:
            if table.rows[number - 1][0] == row[0]:
                cells[0] = ""
            else:
                rows.append(r"    \midrule")
        shown = [rf"\textbf{{{cell}}}" if (number, i) in table.best else cell for i, cell in enumerate(cells)]
        rows.append(line(shown))
    kinds = "l" * table.texts + "r" * (len(table.heads) - table.texts)
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{_latex_text(f'{table.title}. {note}')}}}",
            rf"  \begin{{tabular}}{{{kinds}}}",
            r"    \toprule",
            line([_latex_text(head) for head in table.heads]),
            r"    \midrule",
            *rows,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _latex_text(text: str) -> str:
    """Return a text in which LaTeX sees no markup."""
    marked = text.replace(" ★", "")
    return "".join(ESCAPED.get(character, character) for character in " ".join(marked.split()))
