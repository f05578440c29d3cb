"""Write the parts of pages that follow from other files, so that a code host shows them without a build.

    python -m scripts.pages            write those that have changed
    python -m scripts.pages --check    exit code 1 with the name of a page that is not up to date

A page marks such a part, which ends with `<!-- end -->`:

    <!-- file: examples/plain_loop.py -->          a file as a block of code
    <!-- copy: CONTRIBUTING.md -->                 a page as it is
    <!-- api: vismt.methods.adapt as vismt.adapt -->
    <!-- api: vismt.llm -->                        signature and docstring of an object, or of every public name of a package
    <!-- commands -->                              the help of every command
"""

from __future__ import annotations

import argparse
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vismt.base import console
from vismt.cli import COMMAND_MODULES
from vismt.cli.commands import Commands
from vismt.jobs import JOBS, OTHER_NAMES, job_config
from vismt.jobs.reference import Key, keys
from vismt.storage.files import atomic_write
from vismt.storage.paths import CHECKOUT

DOCS = CHECKOUT / "docs"
MARKED = re.compile(r"^<!-- (file|copy|api|commands)(?:: (\S+)(?: as (\S+))?)? -->\n.*?^<!-- end -->$", re.M | re.S)
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Example|Examples):\n((?:    .*\n|\n)+)", re.M)
ENTRY = re.compile(r"(\*{0,2}\w+(?:, \w+)*): ")
WIDTH = 100
PAGE_NOTE = (
    "The same in the terminal: `vismt config {job}`. Editors check and complete a file that begins with "
    "`# yaml-language-server: $schema=config.schema.json`; `vismt config --schema > config.schema.json` writes the schema."
)


def rewritten(match: re.Match[str]) -> str:
    """Return a marked part with its present content."""
    kind, name, title = match.groups()
    first = match[0].partition("\n")[0]
    return f"{first}\n{PARTS[kind](name, title).strip()}\n<!-- end -->"


def configuration_page(job: str) -> str:
    """Return the Markdown page of a job's configuration."""
    cls = job_config(job)
    summary = inspect.cleandoc(cls.__doc__ or "").splitlines()[0]
    lines = [f"# Configuration of `task: {job}`", "", summary, "", PAGE_NOTE.format(job=job), ""]
    every = keys(job)
    sections: dict[str, list[Key]] = {"": [], **{key.path: [] for key in every if key.section}}
    for key in every:
        sections[key.path.rpartition(".")[0].removesuffix("[]")].append(key)
    about = {key.path: key.meaning for key in every}
    for path, below in sections.items():
        if path:
            lines += [f"## `{path}`", "", about[path][:1].upper() + about[path][1:], ""]
        lines += ["| Key | Type | Default | Meaning |", "| --- | --- | --- | --- |"]
        lines += [f"| {' | '.join(cell_of(text) for text in row_of(key))} |" for key in below]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def row_of(key: Key) -> list[str]:
    known = f" Known: {', '.join(f'`{name}`' for name in key.names)}." if key.names else ""
    return [f"`{key.path}`", key.type, f"`{key.default}`", key.meaning + known]


def cell_of(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")


def file(name: str, _: str | None) -> str:
    """Return a file as a block of code, which has a test of its own."""
    text = (CHECKOUT / name).read_text(encoding="utf8")
    return f"<!-- no test: tests/test_examples.py runs this file -->\n```python\n{text}```"


def copy(name: str, _: str | None) -> str:
    """Return a page without comments; links from the root of the repository lead to other pages of docs/."""
    text = (CHECKOUT / name).read_text(encoding="utf8")
    return re.sub(r"\]\(docs/", "](", text)


def api(name: str, title: str | None) -> str:
    """Return what a reader needs of an object, or of every public name of a package."""
    found = pkgutil.resolve_name(name)
    if inspect.ismodule(found):
        return "\n".join(described(f"{name}.{public}", getattr(found, public)) for public in found.__all__)
    return described(title or name, found)


def described(name: str, found: Any) -> str:
    """Return heading, signature and docstring of an object, and those of the methods of a class that is no dataclass."""
    lines = [f"### {name}", ""]
    if callable(found):
        lines += ["```", *signature(name, found), "```", ""]
    lines.append(markdown(inspect.getdoc(found) or ""))
    if inspect.isclass(found):
        for key, member in vars(found).items():
            if not key.startswith("_") and inspect.isfunction(member) and member.__doc__:
                lines += ["```", *signature(f".{key}", member), "```", "", markdown(inspect.getdoc(member) or "")]
    return "\n".join(lines)


def signature(name: str, found: Any) -> list[str]:
    """Return the call of a function or class with types and defaults, one argument a line if it is long."""
    try:
        given = inspect.signature(found)
    except ValueError:
        return [name]
    values = [value for value in given.parameters.values() if value.name not in ("self", "cls", "_temporary")]
    end = "" if inspect.isclass(found) or given.return_annotation is given.empty else f" -> {given.return_annotation}"
    rows, named = [], any(value.kind is value.VAR_POSITIONAL for value in values)
    for value in values:
        if value.kind is value.KEYWORD_ONLY and not named:
            rows.append("*")
            named = True
        rows.append(unquoted(value))
    text = f"{name}({', '.join(rows)}){end}"
    return [text] if len(text) <= WIDTH else [f"{name}(", *(f"    {row}," for row in rows), f"){end}"]


def unquoted(value: inspect.Parameter) -> str:
    """Return a parameter with its type as it is written, without the quotes that postponed evaluation adds."""
    kind = {value.VAR_POSITIONAL: "*", value.VAR_KEYWORD: "**"}.get(value.kind, "")
    note = "" if value.annotation is value.empty else f": {value.annotation}"
    default = "" if value.default is value.empty else f" = {shown(value.default)}"
    return f"{kind}{value.name}{note}{default}"


def shown(default: Any) -> str:
    """Return a default as code, of a function its name."""
    return getattr(default, "__name__", None) or repr(default)


def markdown(text: str) -> str:
    """Return a docstring of Google's form as Markdown."""
    parts, end = [], 0
    text += "\n"
    for match in SECTION.finditer(text):
        parts += [prose(text[end : match.start()]), *section(match[1], inspect.cleandoc("\n" + match[2]))]
        end = match.end()
    return "\n\n".join(part for part in [*parts, prose(text[end:])] if part.strip()) + "\n"


def section(name: str, body: str) -> Iterator[str]:
    """Yield the heading of a section and its entries as a list, or its code."""
    yield f"**{name}**"
    if name.startswith("Example"):
        yield code(body)
    elif name == "Returns":
        yield body
    else:
        entries: list[str] = []
        for line in body.splitlines():
            if line.startswith(" ") and entries:
                entries[-1] += f" {line.strip()}"
            else:
                entries.append(f"- {ENTRY.sub(bold, line, count=1)}")
        yield "\n".join(entries)


def bold(match: re.Match[str]) -> str:
    """Return the name of an entry as code."""
    return f"`{match[1]}`: "


def code(text: str) -> str:
    """Return a block of Python, which a test runs where it stands in the docstring."""
    return f"<!-- no test: tests/docs/test_docstrings.py runs the docstring -->\n```python\n{text.strip()}\n```"


def prose(text: str) -> str:
    """Return paragraphs; indented ones are equations or code."""
    paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
    return "\n\n".join(
        f"```\n{inspect.cleandoc(chr(10) + part)}\n```" if part.startswith("    ") else part for part in paragraphs
    )


def commands(*_: Any) -> str:
    """Return the help of every command."""
    os.environ["COLUMNS"] = "100"
    parser = argparse.ArgumentParser(prog="vismt")
    added = Commands(parser)
    for group in COMMAND_MODULES:
        group.add_commands(added)
    parsers = next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return "\n\n".join(f"## vismt {name}\n\n```\n{command.format_help()}```" for name, command in parsers.items())


PARTS = {"file": file, "copy": copy, "api": api, "commands": commands}


def contents() -> Iterator[tuple[Path, str]]:
    """Yield every page with such parts, and the pages of configurations, with their present content."""
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text(encoding="utf8")
        if MARKED.search(text):
            yield path, MARKED.sub(rewritten, text)
    for job in JOBS:
        if job not in OTHER_NAMES:
            yield DOCS / f"reference/config_{job}.md", configuration_page(job)


def stale() -> list[tuple[Path, str]]:
    """Return the pages whose file differs from their present content, with this content."""
    return [(path, text) for path, text in contents() if not path.exists() or path.read_text(encoding="utf8") != text]


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or name those that are not up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is not up to date")
    check = parser.parse_args(arguments).check
    for path, text in (old := stale()):
        if not check:
            atomic_write(path, text)
        console.stage("stale" if check else "written", str(path.relative_to(CHECKOUT)))
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main())
