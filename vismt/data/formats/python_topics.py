"""Texts inside every Python installation: the topics of the language reference that `help()` shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vismt.data.copies import shown_path, verify_counts
from vismt.data.manifest import digest
from vismt.data.source_types import Card, Files, PackagedSource, file_groups, source_kind
from vismt.data.texts.text_set import TextSet, TextSource

FILE = "topics.py"
TEST_EVERY = 4  # of the topics in alphabetical order, the last of so many is a test text


@source_kind("python_topics")
@dataclass(frozen=True, kw_only=True)
class PythonTopicsSource(PackagedSource, TextSource):
    """Rows with the fields `topic` and `text`."""

    package: ClassVar[str | None] = "pydoc_data"

    def list_files(self, base: Path) -> Files:
        """Return the module with the texts."""
        return file_groups(base, [FILE])

    def load(self, card: Card, base: Path, split: str) -> TextSet:
        """Return the topics of `split` in alphabetical order."""
        from pydoc_data.topics import topics

        parts: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
        for number, (topic, text) in enumerate(sorted(topics.items()), 1):
            parts["train" if number % TEST_EVERY else "test"].append({"topic": topic, "text": text.strip()})
        names = self.wanted(split)
        verify_counts(card, self, base, {name: len(parts[name]) for name in names})
        return TextSet(
            name=card.name,
            split=split,
            rows=[row for name in names for row in parts[name]],
            ids=[f"{name}:{row['topic']}" for name in names for row in parts[name]],
            content=lambda: f"{digest([(FILE, base / FILE)]).sha256}:{split}",
            where=shown_path(base),
        )
