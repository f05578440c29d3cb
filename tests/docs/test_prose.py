"""Signs of prose that has to be read twice: semicolons, words that point back, and glosses without a noun.

The reason stands in CONTRIBUTING.md (Style).
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from helpers import pages
from helpers.pages import PAGES, ROOT

PACKAGE = ROOT / "vismt"
CODE = re.compile(r"```.*?```|`[^`]*`|https?:\S+", re.S)
POINTING = re.compile(r"\b(?:those (?:of|that|with|in|for|which)|that of|theirs|the latter|the former)\b", re.I)
GLOSS = re.compile(r"^[ \t]+(?:\w+(?:, \w+)*|`[^`]+`)(?: \([^)]*\))?: (\w+)", re.M)
NO_NOUN = {
    *("of", "for", "in", "by", "with", "from", "to", "at", "on", "as", "per", "where", "whether", "how", "after"),
    *("before", "under", "without", "over", "if", "when", "what", "which", "see", "that", "into", "between", "than"),
}


def docstrings(path: Path) -> str:
    """Return the docstrings of a file, one after the other."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    places = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node, clean=True) for node in ast.walk(tree) if isinstance(node, places))
    return "\n\n".join(text for text in found if text)


def counts(texts: list[str]) -> tuple[int, int, int]:
    """Return the words, the semicolons and the words that point back of some texts, without code."""
    text = CODE.sub("code", "\n".join(texts))
    return len(text.split()), text.count(";"), len(POINTING.findall(text))


# What is written by the rules: at most so many semicolons and words that point back per 1,000 words, and glosses in all.
SEMICOLONS, POINTERS, GLOSSES = 2.0, 0.3, 20


def parts() -> dict[str, list[str]]:
    """Return the texts of the package by folder, and the texts of the pages by folder."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(f"vismt/{path.relative_to(PACKAGE).parts[0]}", []).append(docstrings(path))
    for page in PAGES:
        folder = page.parent.relative_to(ROOT).as_posix()
        if folder == "docs/reference":  # made of docstrings
            continue
        part = folder if folder in ("docs/guides", "docs/methods", "docs/results") else "pages"
        found.setdefault(part, []).append(pages.prose(page))
    return found


PARTS = parts()


def bare_glosses(texts: list[str]) -> int:
    """Return the number of attributes and arguments whose gloss begins with no noun, as in "rank: of each block"."""
    return sum(word in NO_NOUN for text in texts for word in GLOSS.findall(text))


@pytest.mark.parametrize("part", PARTS)
def test_sentences_are_whole_and_name_things_again(part: str) -> None:
    words, semicolons, pointers = counts(PARTS[part])
    # One of a kind is allowed in a short text.
    assert semicolons <= max(1, SEMICOLONS * words / 1000), f"{part}: {semicolons} semicolons in {words} words"
    assert pointers <= max(1, POINTERS * words / 1000), f"{part}: {pointers} words that point back in {words} words"


def test_glosses_begin_with_a_noun() -> None:
    assert (
        bare_glosses([text for part, texts in PARTS.items() if part.startswith("vismt") for text in texts]) <= GLOSSES
    )


def torn_entries(text: str) -> list[str]:
    """Return the lines that stand where an argument begins and name none."""
    lines = [
        line for block in re.findall(r"^ *Args:\n(.*?)(?:\n\n|\Z)", text, re.S | re.M) for line in block.splitlines()
    ]
    first = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    return [line for line in lines if line[first] != " " and not re.match(r" *\*{0,2}[\w, ]+: ", line)]


def test_every_argument_has_a_line_of_its_own() -> None:
    assert not [line for path in sorted(PACKAGE.rglob("*.py")) for line in torn_entries(docstrings(path))]
    assert torn_entries("Args:\n    groups: Scores of a\n    group of\n        one score.\n") == ["    group of"]


def test_the_signs_are_seen() -> None:
    text = "Return the rank; those of others differ.\n\nArgs:\n    rank: of each block.\n    alpha: Scale times rank.\n"
    assert counts([text])[1:] == (1, 1) and bare_glosses([text]) == 1
    assert counts(["A list `a; b` of code\n```\nx; y\n```\n"])[1] == 0
