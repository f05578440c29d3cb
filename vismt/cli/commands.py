"""The subcommands of a parser. Each has the common options and the function that runs it."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

EXAMPLES = {
    "assets": "vismt assets get vit_small_patch14_imgfocus",
    "attack": "vismt attack --model resnet18.a1_in1k --data my_images --images 200 --attack strong --epsilon 1/255",
    "clean": "vismt clean --runs runs",
    "compare": "vismt compare runs/a runs/b",
    "config": "vismt config fewshot train.lr",
    "data": "vismt data check digits",
    "evaluate": "vismt evaluate runs/quickstart-HASH",
    "export": "vismt export runs/quickstart-HASH --arm robust --format peft",
    "init": "vismt init fewshot --images my_images",
    "list": "vismt list",
    "merge": "vismt merge runs/emtal_small-1a2b3c4d --arm emtal:1",
    "pool": "vismt pool assemble runs/a runs/b --to pools/both",
    "predict": "vismt predict runs/camvid-1a2b3c4d street.jpg --arm emtal",
    "report": "vismt report runs/quickstart-HASH",
    "run": "vismt run configs/quickstart.yaml train.steps=20",
    "verify": "vismt verify runs/quickstart-HASH/export-peft --base base --json verdict.json",
    "train": "vismt train configs/quickstart.yaml --out runs",
}
# The order of `vismt --help`: the purpose of each group, and its commands.
GROUPS = {
    "begin here": ("init", "run", "list"),
    "runs": ("train", "evaluate", "attack", "report", "compare", "clean"),
    "models": ("predict", "merge", "export", "verify", "pool"),
    "data, weights and keys": ("data", "assets", "config"),
}
EPILOG = """\
Begin with `vismt init fewshot --images my_images`, or with `vismt run quickstart`. `vismt COMMAND --help` has the options
and an example. Completion in the shell: pip install "vismt[complete]", then eval "$(register-python-argcomplete vismt)".
"""
# packages of modules that have another name
_PACKAGES = {"PIL": "pillow", "skimage": "scikit_image", "sklearn": "scikit_learn"}
_SHOWN = 100  # number of characters of a path that is too long
Runner = Callable[[argparse.Namespace], int | None]


class Commands:
    """Subcommands of `parser`. Each is in EXAMPLES."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._subparsers = parser.add_subparsers(dest="command", prog=parser.prog, help=argparse.SUPPRESS)
        self._texts: dict[str, str] = {}
        self._common = argparse.ArgumentParser(add_help=False)
        self._common.add_argument("--quiet", action="store_true", help="print errors only")
        self._common.add_argument("--verbose", action="store_true", help="show the warnings of dependencies")
        self._common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def add(self, name: str, runner: Runner, text: str, *, answers: bool = False) -> argparse.ArgumentParser:
        """Add the command `name` with its help text and return its parser. `runner` returns the exit code, None for 0.

        answers: Whether the command has --json. With --json the runner calls `answer`.
        """
        parser = self._subparsers.add_parser(
            name, description=text, epilog=f"Example: {EXAMPLES[name]}", parents=[self._common]
        )
        self._texts[name] = text
        if answers:
            parser.add_argument(
                "--json", dest="answers", action="store_true", help="print the result as JSON, and nothing else"
            )
        parser.set_defaults(runner=runner)
        return parser

    def overview(self) -> str:
        """Return the commands with their texts up to the first semicolon, group by group."""
        groups = [
            "\n".join([f"{title}:", *(f"  {name:<10}{self._texts[name].partition(';')[0]}" for name in names)])
            for title, names in GROUPS.items()
        ]
        return "\n\n".join([*groups, EPILOG])


def answer(options: argparse.Namespace, content: object) -> None:
    """If --json is given, print what a command found as JSON. The first process of a launch does so."""
    if options.answers and int(os.environ.get("RANK", "0")) == 0:
        sys.stdout.write(json.dumps(content, indent=1, ensure_ascii=False, default=_plain) + "\n")


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, (tuple, set, frozenset)) else str(value)


def explanation(error: Exception) -> str | None:
    """Return what to install for a missing module, or that a path is too long. Return None for any other error."""
    if isinstance(error, OSError):
        if error.errno != errno.ENAMETOOLONG:
            return None
        name = str(error.filename)
        return f"'{name[:_SHOWN]}...' has {len(name):,} characters, too many for a path; give a shorter one."
    module = (getattr(error, "name", None) or "").partition(".")[0]
    try:
        requirements = metadata.requires("vismt") or []
    except metadata.PackageNotFoundError:  # the checkout is not installed
        return None
    for line in requirements:
        package, extra = re.match(r"[\w-]+", line), re.search(r"extra == .([\w-]+)", line)
        if package and extra and package[0].replace("-", "_") == _PACKAGES.get(module, module):
            return f'needs {module}, which is not installed: pip install "vismt[{extra[1]}]".'
    return None
