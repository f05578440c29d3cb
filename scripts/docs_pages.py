"""Hooks of mkdocs for the parts of the site that follow from the package and from generated pages."""

from __future__ import annotations

import argparse
from typing import Any

from mkdocs.structure.files import File

from vismt.cli import GROUPS
from vismt.cli.commands import Commands
from vismt.jobs.reference import files


def on_config(config: Any) -> None:
    """Add the pages of configurations to the section Reference."""
    pages = [f"reference/{name}" for name in files() if name.endswith(".md")]
    next(entry["Reference"] for entry in config.nav if "Reference" in entry).extend(pages)


def on_files(site: Any, config: Any) -> None:
    """Add the content of the pages of configurations and their JSON schema, which follow from the package."""
    for name, content in files().items():
        site.append(File.generated(config, f"reference/{name}", content=content))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the help of every command in the place that a page marks."""
    place = "<!-- commands -->"
    return markdown.replace(place, commands()) if place in markdown else markdown


def commands() -> str:
    """Return the help of every command as Markdown."""
    parser = argparse.ArgumentParser(prog="vismt")
    added = Commands(parser)
    for group in GROUPS:
        group.add_commands(added)
    parsers = next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return "\n\n".join(f"## vismt {name}\n\n```\n{command.format_help()}```" for name, command in parsers.items())
