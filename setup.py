"""Data files of the wheel, and how an editable install works. All other metadata is in pyproject.toml."""

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


# compat: an editable install puts the checkout on sys.path. The default, an import hook, comes after the folders of sys.path,
# so that a script beside the checkout gets the checkout's folder as an empty namespace package.
setup(data_files=shared_files("datasets", "configs"), options={"editable_wheel": {"mode": "compat"}})
