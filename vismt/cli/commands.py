"""The subcommands of a parser: each has the common options and the function that runs it."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Runner = Callable[[argparse.Namespace], int | None]


class Commands:
    """Subcommands of `parser`."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
        self._common = argparse.ArgumentParser(add_help=False)
        self._common.add_argument("--quiet", action="store_true", help="print errors only")
        self._common.add_argument("--verbose", action="store_true", help="show the warnings of dependencies")
        self._common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def add(self, name: str, runner: Runner, text: str) -> argparse.ArgumentParser:
        """Add the command `name` with its help text and return its parser; `runner` returns the exit code, None for 0."""
        parser = self._subparsers.add_parser(name, help=text, description=text, parents=[self._common])
        parser.set_defaults(runner=runner)
        return parser
