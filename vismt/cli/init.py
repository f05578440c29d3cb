"""`vismt init`: write a commented configuration that runs as it is, and a card for own images."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from vismt.base import console
from vismt.base.errors import UserError
from vismt.cli.commands import Commands


def add_commands(commands: Commands) -> None:
    """Add the command of this file."""
    parser = commands.add("init", _init, "write a commented configuration, and a card for your own images")
    parser.add_argument("job", help="a job; `vismt config` lists them")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="a folder with a folder of images for each class; for dense, one with the folders images and label, depth_m, ...",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="for lm: a .jsonl, .json or .csv file of prompts and answers, chats, questions with choices, texts, or texts with "
        "labels",
    )
    parser.add_argument("--to", type=Path, default=Path(), metavar="FOLDER", help="where to write (the current folder)")


def _init(options: argparse.Namespace) -> None:
    from vismt.jobs import job_init
    from vismt.storage.files import atomic_write
    from vismt.storage.outputs import check_outputs

    init = job_init(options.job)
    for name, path, exists, what in (
        ("images", options.images, Path.is_dir, "folder"),
        ("texts", options.texts, Path.is_file, "file"),
    ):
        if path is not None and name != init.takes:
            raise UserError(
                f"init: {options.job} takes {f'--{init.takes}' if init.takes else 'no data'}, not --{name}."
            )
        if path is not None and not exists(path):
            raise UserError(f"init: --{name} {path}: no such {what}.")
    folder, given = options.to.resolve(), getattr(options, init.takes or "images")
    files = init.files(options.job, folder, given and given.resolve())
    # The card of a set serves several jobs, so one with the same content is kept.
    kept = [
        name
        for name, text in files.items()
        if name.endswith(".card.yaml") and (folder / name).is_file() and (folder / name).read_bytes() == text.encode()
    ]
    check_outputs("init", [(options.to / name, "") for name in files if name not in kept])
    for name, content in files.items():
        atomic_write(folder / name, content)
        console.stage("init", str(options.to / name))
    there = "" if folder == Path.cwd() else f"cd {shlex.quote(str(options.to))} && "
    console.stage("next", f"{there}vismt run {options.job}.yaml")
