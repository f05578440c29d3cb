"""`vismt data`, `assets` and `list`: data cards, weights, and the names that a configuration may use."""

from __future__ import annotations

import argparse

from vismt import console
from vismt.cli.commands import Commands
from vismt.errors import UserError


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    data = commands.add(
        "data",
        _data,
        "list the data cards, check a set's counts, hashes and images, or fetch it; exit code 1 where a named set is missing, or "
        "a set is not as its card says",
    )
    data.add_argument("action", choices=("list", "check", "prepare"))
    data.add_argument("name", nargs="*", help="card names or paths")
    data.add_argument(
        "--no-decode", dest="decode", action="store_false", help="check and prepare: skip decoding the images"
    )
    assets = commands.add("assets", _assets, "list the weights that have a card, or fetch them")
    assets.add_argument("action", choices=("list", "get"))
    assets.add_argument("name", nargs="*", help="asset names")
    commands.add("list", _list, "list methods, jobs, data cards and assets")


def _data(options: argparse.Namespace) -> int:
    from vismt.data import check

    if options.action == "list":
        console.table(("card", "kind", "images", "classes", "found"), check.listing())
        return 0
    if options.action == "check":
        rows = check.listing() if not options.name else []
        names = options.name or [row.name for row in rows if row.where != check.NOWHERE]
        reports = [check.check(name, decode=options.decode) for name in names]
        for report in reports:
            console.stage("check", str(report))
        if len(rows) > len(names):
            console.stage("check", f"{len(rows) - len(names)} of {len(rows)} sets are not on this machine")
        return 0 if all(report.ok for report in reports) else 1
    if not options.name:
        raise UserError("data prepare: name a card; `vismt data list` shows them.")
    reports = [check.prepare(name, decode=options.decode) for name in options.name]
    for report in reports:
        console.stage("data", str(report))
    return 0 if all(report.ok for report in reports) else 1


def _assets(options: argparse.Namespace) -> None:
    from vismt.backbones import assets

    if options.action == "list":
        console.table(("asset", "kind", "MB", "licence", "cached", "about"), assets.describe())
        return
    if not options.name:
        raise UserError("assets get: name an asset; `vismt assets list` shows them.")
    for name in options.name:
        console.stage("asset", str(assets.get_asset(name)))


def _list(options: argparse.Namespace) -> None:
    from vismt.backbones.assets import list_assets
    from vismt.data.cards import list_cards
    from vismt.jobs import JOBS
    from vismt.methods import METHODS

    for name, method in METHODS.items():
        console.stage("method", f"{name:<10}{(method.adapt.__doc__ or '').strip().splitlines()[0]}")
        console.stage("", f"{'':<10}options: {', '.join(method.options)}")
        abilities = {"merges into stock weights": method.merges, "exports as a plain LoRA": method.exports}
        console.stage(
            "", f"{'':<10}{'; '.join(text for text, able in abilities.items() if able) or 'neither merges nor exports'}"
        )
    console.stage("jobs", ", ".join(JOBS))
    console.stage("data", ", ".join(list_cards()))
    console.stage("assets", ", ".join(list_assets()))
