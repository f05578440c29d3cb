"""`vismt verify`: check an adapter or a merged checkpoint. Exit codes: 0 ok, 3 suspicious, 4 broken."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from pathlib import Path

from vismt.base import console
from vismt.base.errors import UserError
from vismt.cli.commands import Commands


def add_commands(commands: Commands) -> None:
    """Add the command of this file."""
    parser = commands.add(
        "verify", _verify, "check an adapter or a merged checkpoint; exit code 0 ok, 3 suspicious, 4 broken"
    )
    parser.add_argument("folder", type=Path, help="a folder that vismt or peft wrote, or a checkpoint")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the model it was trained on: a folder, file, asset, or a hub name, which is fetched",
    )
    parser.add_argument("--merged", metavar="CHECKPOINT", help="a checkpoint that holds base and adapter; needs --base")
    parser.add_argument(
        "--probe", metavar="DATA", help="a .txt file of examples, or a card or folder of images; needs --base"
    )
    parser.add_argument(
        "--reader",
        action="append",
        default=[],
        help="peft, transformers or timm: let what it does decide, too; may be repeated",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdict with stable keys")


def _verify(options: argparse.Namespace) -> int:
    from vismt.storage.files import atomic_write
    from vismt.verification.verify import verify

    if options.json:
        _check_output(options)
    verdict = verify(
        options.folder, base=options.base, merged=options.merged, probe=options.probe, readers=options.reader
    )
    console.block(str(verdict))
    if options.json:
        atomic_write(options.json, json.dumps(verdict.as_json(), indent=1) + "\n")
    return verdict.exit_code


def _check_output(options: argparse.Namespace) -> None:
    """Raise UserError if the verdict would replace a file that is verified. An earlier verdict may be replaced."""
    from vismt.storage.files import read_json
    from vismt.storage.outputs import check_outputs

    given = [Path(name) for name in (options.folder, options.base, options.merged, options.probe) if name is not None]
    read = {file for path in given for file in (path.rglob("*") if path.is_dir() else [path])}
    if options.json in read:
        with suppress(UserError):
            held = read_json(options.json, "verify")
            read -= {options.json} if isinstance(held, dict) and "findings" in held else set()
    check_outputs("verify", [(options.json, "--json")], read, own=[options.json], option="FILE")
