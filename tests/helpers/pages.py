"""The Markdown pages of the repository, their fenced blocks and their links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?:<!-- no test: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.S | re.M)


INCLUDED = {"--8<-": "an included file"}


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


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """Return the tested blocks of a language, or all blocks of a page. Included files have tests of their own."""
    found = [
        Block(match["language"], match["code"], match["reason"] or INCLUDED.get(match["code"][:5]))
        for match in FENCE.finditer(read(page))
    ]
    return [block for block in found if language is None or (block.language == language and block.reason is None)]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", read(page))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
