"""Data files of the wheel, the text of its index page, and the editable install. All other metadata is in pyproject.toml."""

import contextlib
import re
from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
# The address of the repository on its code host, which CONTRIBUTING.md asks the owner for. It makes links of README.md absolute.
REPOSITORY = ""
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
    """Return the cards, split lists and configurations, which a wheel installs under <prefix>/share/vismt."""
    files: dict[str, list[str]] = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                relative = path.relative_to(ROOT)
                files.setdefault(f"share/vismt/{relative.parent.as_posix()}", []).append(str(relative))
    return sorted(files.items())


def index_page(text: str, repository: str = REPOSITORY) -> str:
    """Return README.md for a page elsewhere: with absolute links, or without links and pictures if there is no address."""
    picture, link = r"!\[([^\]]*)\]\((?!\w+:)([^)]+)\)", r"(?<!!)\[([^\]]*)\]\((?!\w+:|#)([^)]+)\)"
    if not repository:
        return re.sub(link, r"\1", re.sub(rf"^{picture}\n\n\*[^\n]*\*\n\n", "", text, flags=re.M))
    text = re.sub(picture, rf"![\1]({repository}/raw/main/\2)", text)
    return re.sub(link, rf"[\1]({repository}/blob/main/\2)", text)


setup(
    long_description=index_page((ROOT / "README.md").read_text(encoding="utf8")),
    long_description_content_type="text/markdown",
    data_files=shared_files("datasets", "configs"),
    cmdclass={"editable_wheel": EditableWheel},
)
