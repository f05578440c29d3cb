"""The `vismt` command. Each command imports what it needs when it runs, so that `vismt list` is quick."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import warnings
from collections.abc import Sequence

import vismt
from vismt.base import console
from vismt.base.errors import UserError
from vismt.cli import attack, data, folders, init, models, runs, verify
from vismt.cli.commands import Commands, explanation

COMMAND_MODULES = (runs, folders, verify, init, attack, models, data)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    arguments: Words after `vismt`. The default is `sys.argv`. The exit codes are 0 (done), 1 (a check failed), 2 (a user error)
    and 130 (interrupted). verify also has 3 (suspicious) and 4 (broken).
    """
    gc.set_threshold(50_000, 20, 20)  # collections take a sixth of the time of importing torch and timm
    options = parse(arguments)
    if options.command is None:
        return 2  # `parse` has printed the commands
    console.set_quiet(options.quiet or getattr(options, "answers", False) or int(os.environ.get("RANK", "0")) > 0)
    disabled = logging.root.manager.disable
    if not options.verbose:
        # The warnings and bars of dependencies are for developers. A user can do nothing about them.
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        # for bars that their caller does not control, such as the bars of GGUF files
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        bad = next((word for word in arguments or sys.argv[1:] if word != console.printable(word)), None)
        if bad is not None:  # reports and run.json hold the command and the names of files
            raise UserError(f"'{bad}' is not UTF-8; rename the file or folder.")
        return options.runner(options) or 0
    except UserError as error:
        if options.debug:
            raise
        if not error.elsewhere:
            console.error(str(error))
        return 2
    except (ModuleNotFoundError, OSError) as error:
        reason = None if options.debug else explanation(error)
        if reason is None:
            raise
        console.error(f"vismt {options.command}: {reason}")
        return 2
    except KeyboardInterrupt as interrupt:
        console.error(f"interrupted. Run the same command again: {str(interrupt) or 'it keeps what is finished'}.")
        return 130
    finally:
        logging.disable(disabled)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of a command line. `runner` is the function that runs the command."""
    parser = argparse.ArgumentParser(
        prog="vismt",
        usage="vismt [-h] [--version] command ...",
        description="Low-rank adaptation methods with numbers that can be trusted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vismt {vismt.__version__}")
    commands = Commands(parser)
    for group in COMMAND_MODULES:
        group.add_commands(commands)
    parser.epilog = commands.overview()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
        import argcomplete

        argcomplete.autocomplete(parser)
    options, rest = parser.parse_known_args(arguments)
    if options.command is None and not rest:
        parser.print_help()
    # argparse takes no positional after an option. `run CONFIG --out runs train.steps=2` leaves the override in `rest`.
    takes_overrides = hasattr(options, "overrides")
    overrides = [word for word in rest if takes_overrides and "=" in word and not word.startswith("-")]
    unrecognised = [word for word in rest if word not in overrides]
    if unrecognised:
        parser.error(f"unrecognised arguments: {' '.join(unrecognised)}")
    if overrides:
        options.overrides = [*options.overrides, *overrides]
    return options
