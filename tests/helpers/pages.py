"""The Markdown pages of the repository, their fenced blocks and their links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
COPIES = {ROOT / "docs" / f"{name}.md" for name in ("changelog", "contributing", "security")}  # of pages at the root
PAGES = [
    README,
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md")),
    *sorted({*(ROOT / "docs").rglob("*.md")} - COPIES),
]
FENCE = re.compile(r"^(?:<!-- no test: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.S | re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block. reason: why it is not tested, None where it is."""

    language: str
    code: str
    reason: str | None


def read(page: Path) -> str:
    return page.read_text(encoding="utf8")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str | None = None, heading: str = "") -> list[Block]:
    """Return the tested blocks of a language, or all blocks, of a page or of what follows a heading to the next of its level."""
    text = read(page)
    if heading:
        (start,) = re.finditer(rf"^(#+) {re.escape(heading)}$", text, re.M)
        text = re.split(rf"^#{{1,{len(start[1])}}} ", text[start.end() :], maxsplit=1, flags=re.M)[0]
    found = [Block(match["language"], match["code"], match["reason"]) for match in FENCE.finditer(text)]
    return [block for block in found if language is None or (block.language == language and block.reason is None)]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", read(page))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def commands(code: str) -> list[list[str]]:
    """Return the words of each command of a block, without comments and without assignments before it."""
    lines = re.sub(r"\\\n\s*", " ", code).splitlines()
    parts = [part for line in lines for part in line.split(" && ")]
    found = [shlex.split(part, comments=True) for part in parts]
    without_assignments = [list(dropwhile(re.compile(r"[A-Z_]+=").match, words)) for words in found]
    return [words for words in without_assignments if words]
