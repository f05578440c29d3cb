"""The README.md of an exported folder: the lines that load it without vismt, and what its numbers are (export_readme.md)."""

from __future__ import annotations

from pathlib import Path

from vismt.jobs.graphs import NAMES, PREPROCESSING, SQUARE
from vismt.storage.files import JsonObject, read_json


def readme(folder: Path, form: str, title: str, base: str, adapted: str) -> str:
    """Return the README.md of an export.

    Args:
        folder: The written export.
        form: One of the formats of `vismt export`.
        title: What was exported, for the heading.
        base: Expression that builds the model below a peft adapter.
        adapted: Name of the model that was adapted.
    """
    from jinja2 import Environment, FileSystemLoader

    about: JsonObject = {}
    if form != "peft":
        about = read_json(folder / (PREPROCESSING if form in NAMES else "config.json"), f"export '{folder}'")
    output, known = next(iter(about["outputs"].items())) if form in NAMES else ("", about)
    loader = FileSystemLoader(Path(__file__).parent, encoding="utf8")
    page = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return page.get_template("export_readme.md").render(
        form=form,
        title=title,
        base=base,
        adapted=adapted,
        about=about,
        output=output,
        known=known,
        square=SQUARE,
        files=[path.name for path in folder.iterdir()],
    )
