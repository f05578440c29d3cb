"""A report as one self-contained HTML page, as Markdown, as LaTeX tables (booktabs) and as comma-separated values.

Every text that comes from a file is escaped here.
"""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from html import escape
from pathlib import Path

from vismt.report.comparison import AVERAGE
from vismt.report.results import Result
from vismt.report.tables import KeyFigure, Picture, Report, Section, Table, fitted, is_long

PIXELS = 96 / 72  # of a point of a figure, so that its letters have the size of those around it
LEAST = 0.7  # to which a figure shrinks on a narrow screen before it scrolls

# Characters with a meaning in LaTeX, and signs that it has under a name.
ESCAPED = {character: f"\\{character}" for character in "&%$#_{}"}
ESCAPED |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
ESCAPED |= {"±": r"$\pm$", "−": "$-$", "–": "--", "≈": r"$\approx$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --muted: #5d6775; --line: #dfe3e9; --page: #ffffff; --soft: #f5f7f9;
  --accent: #005f96; --best: #e6f1f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --muted: #9ba6b4; --line: #333b46; --page: #14181d;
  --soft: #1c2229; --accent: #6cb8e6; --best: #17354a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55; font-size: 16px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 1.5rem; }
h2 { font-size: 1.25rem; letter-spacing: -0.01em; margin: 3rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 1.75rem 0 0.5rem; }
p { margin: 0.5rem 0; } .note { color: var(--muted); font-size: 0.875rem; max-width: 48rem; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.3rem 1.5rem; margin: 0; padding: 1.1rem 1.3rem;
  background: var(--soft); border-radius: 10px; font-size: 0.9rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 0.85em; }
.wide { overflow-x: auto; background:
  linear-gradient(to left, var(--page) 40%, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(to left, var(--muted), transparent) right / 0.5rem 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--muted); border-bottom: 2px solid var(--line); }
th, td { padding: 0.45rem 0.9rem 0.45rem 0; white-space: nowrap; vertical-align: top; }
td { border-top: 1px solid var(--line); }
th, td.long { white-space: normal; } th { vertical-align: bottom; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page); }
tr.more td { border-top: 0; padding-top: 0; }
tr.average td { font-weight: 600; } .number { text-align: right; padding-left: 0.9rem; }
td.best span { background: var(--best); border-radius: 5px; padding: 0.12rem 0.4rem; margin-right: -0.4rem; font-weight: 700; }
.key { display: flex; flex-wrap: wrap; gap: 0.5rem 2.5rem; margin: 0.75rem 0 0; } .key div { min-width: 9rem; }
.key strong { display: block; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.headline { margin: 0 0 1.75rem; } .answer { font-size: 1.125rem; margin: 0 0 1.75rem; max-width: 48rem; }
figure { margin: 1rem 0 2rem; } figcaption { color: var(--muted); font-size: 0.875rem; margin-top: 0.5rem; }
.figure { overflow-x: auto; width: fit-content; max-width: 100%; background: #fff; padding: 0.75rem;
  border: 1px solid var(--line); border-radius: 10px; }
img { display: block; max-width: 100%; height: auto; }
.cite { border-left: 4px solid var(--accent); background: var(--soft); border-radius: 0 10px 10px 0; padding: 0.9rem 1.3rem; }
details { margin: 0.75rem 0; } summary { cursor: pointer; color: var(--accent); }
pre { background: var(--soft); border-radius: 10px; padding: 1rem 1.3rem; overflow-x: auto; }
@media (max-width: 40rem) { td.text { white-space: normal; } main { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.5rem; }
  td:first-child { max-width: 7.5rem; overflow-wrap: break-word; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 0.5rem; } }
@media print { main { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
"""


def render_html(report: Report) -> str:
    """Return the page, images as data URIs, readable from disk in light and dark; no script and no other file."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head><body><main>",
        f"<h1>{escape(report.title)}</h1>",
        *([f'<p class="answer">{escape(report.answer)}</p>'] if report.answer else []),
        *(_html_key(key) for key in report.keys),
        *(["<h2>Models</h2>", _html_list(report.models)] if report.models else []),
        *(_html_section(section) for section in report.sections),
    ]
    if report.citation:
        sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in report.citation)
        parts.append(f'<h2>How to cite these numbers</h2><div class="cite">{sentences}</div>')
    parts += ["<h2>Provenance</h2>", _html_list(report.facts)]
    if report.config:
        parts.append(f"<details><summary>config.resolved.yaml</summary><pre>{escape(report.config)}</pre></details>")
    return "\n".join([*parts, "</main></body></html>\n"])


def _html_list(pairs: Sequence[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{_fact(name, value)}</dd>' for name, value in pairs)}</dl>"


def _html_key(key: KeyFigure) -> str:
    numbers = "".join(f"<div><strong>{escape(text)}</strong>{escape(arm)}</div>" for arm, text in key.numbers)
    return f'<div class="headline"><div class="key">{numbers}</div><p class="note">{escape(key.about)}</p></div>'


def _html_section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    for table, note in section.tables:
        parts += [_html_table(table), f'<p class="note">{escape(note)}</p>']
    for number, picture in enumerate(section.pictures):
        title = escape(picture.title)
        if section.folded:
            opened = "" if number else " open"
            parts.append(f"<details{opened}><summary>{title}</summary>{_figure(picture)}</details>")
            continue
        if picture.title != section.title:
            parts.append(f"<h3>{title}</h3>")
        parts.append(_figure(picture))
    return "\n".join(parts)


def render_markdown(report: Report, folder: Path) -> str:
    """Return the same tables and sentences for a paper or a pull request; pictures are linked relative to `folder`."""
    lines = [f"# {_markdown_text(report.title)}", ""]
    if report.answer:
        lines += [_markdown_text(report.answer), ""]
    for key in report.keys:
        numbers = "; ".join(f"{_markdown_text(arm)} **{_markdown_text(text)}**" for arm, text in key.numbers)
        lines += [numbers, "", _markdown_text(key.about), ""]
    if report.models:
        lines += ["## Models", "", *_markdown_list(report.models)]
    for section in report.sections:
        lines += ["", f"## {_markdown_text(section.title)}"]
        for table, note in section.tables:
            parts = [line for part in fitted(table) for line in ("", *_markdown_part(part))]
            lines += ["", f"### {_markdown_text(table.title)}", *parts, "", note]
        for picture in section.pictures:
            if picture.title != section.title:
                lines += ["", f"### {_markdown_text(picture.title)}"]
            target = picture.path.relative_to(folder).as_posix().replace(" ", "%20")
            lines += ["", f"![{_markdown_text(picture.title)}]({target})", "", _markdown_text(picture.caption)]
    lines += ["", "## How to cite these numbers", ""]
    lines += ["\n>\n".join(f"> {_markdown_text(sentence)}" for sentence in report.citation)]
    lines += ["", "## Provenance", "", *_markdown_list(report.facts)]
    return "\n".join(lines) + "\n"


def _markdown_list(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {_markdown_text(name)} | {_markdown_text(value)} |" for name, value in pairs)]


def _html_table(table: Table) -> str:
    parts = "".join(_html_part(part) for part in fitted(table))
    if table.folded:
        return f"<details><summary>{escape(table.title)}</summary>{parts}</details>"
    return f"<h3>{escape(table.title)}</h3>{parts}"


def _html_part(table: Table) -> str:
    kinds = []  # the classes of the cells of each column
    for column in range(len(table.heads)):
        words = "text" if column < table.texts else "number"
        kinds.append("text long" if is_long(table, column) else words)
    columns = zip(kinds, table.heads, strict=True)
    heads = "".join(f'<th class="{kind}">{_breakable(head)}</th>' for kind, head in columns)
    rows = []
    for number, row in enumerate(table.rows):
        again = table.texts > 1 and number > 0 and table.rows[number - 1][0] == row[0]
        average = table.heads[0] == "Data" and row[0] == AVERAGE
        classes = " ".join(name for name, applies in (("more", again), ("average", average)) if applies)
        cells = []
        for i, text in enumerate(row):
            shown = _breakable(text) if "text" in kinds[i] else escape(text)
            if i == 0 and again:
                shown = ""
            if (number, i) in table.best:
                cells.append(f'<td class="number best"><span>{shown}</span></td>')
            else:
                cells.append(f'<td class="{kinds[i]}">{shown}</td>')
        rows.append(f'<tr class="{classes}">{"".join(cells)}</tr>' if classes else f"<tr>{''.join(cells)}</tr>")
    body = "\n".join(rows)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _breakable(text: str) -> str:
    """Return a text that may be broken behind the joints of a name, and not before or behind a sign such as in "n = 60"."""
    joints = re.sub(r"([+:_/])", r"\1<wbr>", escape(text))
    return re.sub(r" (?=[=↑↓])|(?<==) ", "\u00a0", joints)


def _fact(name: str, value: str) -> str:
    return f"<code>{escape(value)}</code>" if name in ("Command", "Git revision", "Config hash") else escape(value)


def _figure(picture: Picture) -> str:
    content = picture.path.read_bytes()
    found = re.search(rb'<svg[^>]* width="([0-9.]+)pt"', content)
    width = round(PIXELS * float(found[1])) if found else 0
    size = f' width="{width}" style="min-width:{round(LEAST * width)}px"' if width else ""
    data = base64.b64encode(content).decode("ascii")
    return (
        f'<figure><div class="figure"><img alt="{escape(picture.title)}"{size} src="data:image/svg+xml;base64,{data}"></div>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _markdown_part(table: Table) -> list[str]:
    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(texts) + " |"

    rules = ["---" if i < table.texts else "---:" for i in range(len(table.heads))]
    rows = []
    for number, row in enumerate(table.rows):
        bold = ["**" if (number, i) in table.best else "" for i in range(len(row))]
        rows.append(line([f"{mark}{_markdown_text(text)}{mark}" for mark, text in zip(bold, row, strict=True)]))
    return [line([_markdown_text(head) for head in table.heads]), line(rules), *rows]


def _markdown_text(text: str) -> str:
    """Return one line in which Markdown sees no markup, table cell or HTML."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", escape(" ".join(text.split()), quote=False))


def render_csv(results: Sequence[Result]) -> str:
    """Return every row of the results, also those of single seeds, under a line with the names of its fields."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Result)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in results)
    return text.getvalue()


def render_latex(tables: Sequence[tuple[Table, str]]) -> str:
    """Return LaTeX tables and their notes; they need booktabs. The best numbers are bold, statistical ties marked by ≈."""
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
