"""Data files of the wheel. All other metadata is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
SUFFIXES = {".yaml", ".json", ".txt", ".py"}


def shared_files(*folders: str) -> list[tuple[str, list[str]]]:
    """Return the cards, split lists and configurations, which a wheel installs under <prefix>/share/vismt."""
    files: dict[str, list[str]] = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                relative = path.relative_to(ROOT)
                files.setdefault(f"share/vismt/{relative.parent.as_posix()}", []).append(str(relative))
    return sorted(files.items())


setup(data_files=shared_files("datasets", "configs"))
