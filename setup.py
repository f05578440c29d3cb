"""Data files of the wheel, and the editable install. All other metadata is in pyproject.toml."""

import contextlib
from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
SUFFIXES = {".yaml", ".json", ".jsonl", ".txt", ".py"}
# The only module of an editable install. Neither way of setuptools gives that: the checkout on sys.path makes datasets/, tests/
# and the rest importable too, so that datasets/ hides Hugging Face's package; an import hook comes after the folders of
# sys.path, so that a script beside a clone named vismt gets the clone's folder as an empty namespace package.
FORWARD = f'''"""Import vismt from its checkout."""

import sys
from importlib.util import module_from_spec, spec_from_file_location

spec = spec_from_file_location("vismt", {str(ROOT / "vismt" / "__init__.py")!r})
sys.modules["vismt"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["vismt"])
'''


class Forwarding(contextlib.nullcontext):
    """A strategy of setuptools: what an editable wheel holds beside its metadata."""

    def __call__(self, wheel, files, mapping):
        wheel.writestr("vismt/__init__.py", FORWARD)


class EditableWheel(editable_wheel):
    """The editable wheel with one module, which forwards to the checkout."""

    def _select_strategy(self, *_):
        return Forwarding()


def shared_files(*folders: str) -> list[tuple[str, list[str]]]:
    """Return the cards, split lists, configurations and rows of studies, which a wheel installs under <prefix>/share/vismt."""
    files: dict[str, list[str]] = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                relative = path.relative_to(ROOT)
                files.setdefault(f"share/vismt/{relative.parent.as_posix()}", []).append(str(relative))
    return sorted(files.items())


setup(data_files=shared_files("datasets", "configs", "docs/results/rows"), cmdclass={"editable_wheel": EditableWheel})
