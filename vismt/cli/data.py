"""`vismt data`, `assets`, `list` and `config`: data cards, weights, and the keys and names that a configuration may use."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vismt.base import console
from vismt.base.errors import UserError
from vismt.cli.commands import Commands, answer
from vismt.config.typed import Names

if TYPE_CHECKING:
    from vismt.data.check import CheckReport
    from vismt.methods import Method

_GIVEN = ("model", "optimizer", "targets", "rank", "alpha", "seed")  # of every method; their texts are not of options
_LAST = " Further options| Raises| Returns| The other arguments| The adapted model"  # what follows the last option of a text
_ROWS, _COLUMNS = 40, 16  # groups and images of a group that are shown
LISTS = ("methods", "jobs", "configs", "data", "assets", "runs")


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    data = commands.add(
        "data",
        _data,
        "list the data cards, check a set's counts, hashes and images, list its near-duplicates, fetch it, or record the hashes "
        "of its files beside its card; exit code 1 where a named set is missing, or a set is not as its card says",
        answers=True,
    )
    data.add_argument("action", choices=("list", "check", "prepare", "record"))
    data.add_argument("name", nargs="*", help="card names or paths")
    data.add_argument(
        "--no-decode", dest="decode", action="store_false", help="check and prepare: skip decoding the images"
    )
    data.add_argument(
        "--duplicates",
        action="store_true",
        help="check: list the near-duplicates of each set; write them to NAME-groups.json, and a row of images for each group to "
        "NAME-near-duplicates.png",
    )
    assets = commands.add("assets", _assets, "list the weights that have a card, or fetch them", answers=True)
    assets.add_argument("action", choices=("list", "get"))
    assets.add_argument("name", nargs="*", help="asset names")
    config = commands.add(
        "config", _config, "print the keys of a job's configuration, for example `vismt config lm train.lr`"
    )
    config.add_argument("job", nargs="?", help="a job (lists the jobs)")
    config.add_argument("key", nargs="?", help="a dotted key or section (all)")
    config.add_argument(
        "--schema", action="store_true", help="print the JSON schema of all configurations, for editors"
    )
    listing = commands.add(
        "list",
        _list,
        "list methods (with their options), jobs, configurations, data cards, assets, or the runs of a folder",
        answers=True,
    )
    listing.add_argument("what", nargs="?", choices=LISTS, help="one of them (all but runs)")
    listing.add_argument("--runs", type=Path, default=Path("runs"), help="for runs: parent of the run folders (runs)")


def _config(options: argparse.Namespace) -> None:
    from vismt.jobs import JOBS, job_config
    from vismt.jobs.reference import find_keys, keys, schema_text

    if options.schema:
        console.block(schema_text().rstrip())
        return
    if options.job is None:
        for job in JOBS:
            console.stage("config", f"{job:<16}{(job_config(job).__doc__ or '').splitlines()[0]}")
        return
    found = keys(options.job) if options.key is None else find_keys(options.job, options.key)
    for key in found:
        console.block(str(key))
    if options.key is None:
        for name, place in job_config(options.job).ELSEWHERE.items():
            console.block(f"no key '{name}': {place}")


def _data(options: argparse.Namespace) -> int:
    from vismt.data import check

    if options.action == "list":
        rows = check.listing()
        console.table(("card", "kind", "images", "classes", "found"), rows)
        answer(options, {"sets": [row._asdict() for row in rows]})
        return 0
    if options.action == "check":
        rows = check.listing() if not options.name else []
        names = options.name or [row.name for row in rows if row.where != check.NOWHERE]
        reports = [check.check(name, decode=options.decode) for name in names]
        for report in reports:
            console.stage("check", str(report))
        for name in options.name if options.duplicates else ():
            _list_duplicates(name)
        if len(rows) > len(names):
            console.stage("check", f"{len(rows) - len(names)} of {len(rows)} sets are not on this machine")
        return _answer_reports(options, reports)
    if not options.name:
        raise UserError(f"data {options.action}: name a card; `vismt data list` shows them.")
    if options.action == "record":
        texts = [check.record(name) for name in options.name]
        for text in texts:
            console.stage("data", text)
        answer(options, {"sets": [{"name": name, "text": text} for name, text in zip(options.name, texts)]})
        return 0
    reports = [check.prepare(name, decode=options.decode) for name in options.name]
    for report in reports:
        console.stage("data", str(report))
    return _answer_reports(options, reports)


def _answer_reports(options: argparse.Namespace, reports: Sequence[CheckReport]) -> int:
    """Give the answer of a check; return the exit code."""
    answer(options, {"sets": [{"name": report.name, "ok": report.ok, "text": str(report)} for report in reports]})
    return 0 if all(report.ok for report in reports) else 1


def _list_duplicates(name: str) -> None:
    """List the groups of near-duplicates of a set, the largest first, and write a contact sheet of the same rows."""
    from vismt.data.cards import load_card
    from vismt.data.near_duplicates import contact_sheet, find_duplicates
    from vismt.storage.files import atomic_write
    from vismt.storage.outputs import check_outputs

    card = load_card(name).name
    sheet, named = Path(f"{card}-near-duplicates.png"), Path(f"{card}-groups.json")
    check_outputs("data check", [(sheet, ""), (named, "")], option="working folder")
    found = find_duplicates(name)
    if not found.groups:
        console.stage("check", f"{found.name}: no near-duplicates among {found.total:,} images")
        return
    count = sum(map(len, found.groups))
    text = f"{found.name}: {count:,} of {found.total:,} images are near-duplicates, in {len(found.groups):,} groups"
    kinds = {"splits": found.leaking, "classes": found.mixed}
    further = [f"; {number:,} groups lie in several {kind}" for kind, number in kinds.items() if number]
    console.stage("check", text + "".join(further))
    for number, group in enumerate(found.groups[:_ROWS], 1):
        more = f" and {len(group) - _COLUMNS} more" if len(group) > _COLUMNS else ""
        console.block(f"{number:>4}  {', '.join(images.ids[i] for images, i in group[:_COLUMNS])}{more}")
    shown = [group[:_COLUMNS] for group in found.groups[:_ROWS]]
    atomic_write(sheet, contact_sheet(shown))
    console.stage("check", f"{sheet}: a row for each of these {len(shown)} groups, the largest first")
    numbers = {images.ids[i]: number for number, group in enumerate(found.groups, 1) for images, i in group}
    atomic_write(named, json.dumps(numbers, indent=0) + "\n")
    console.stage(
        "check", f"{named}: all groups; beside a card, `groups: {named}` keeps each in one part of a division"
    )


def _assets(options: argparse.Namespace) -> None:
    from vismt.backbones import assets

    if options.action == "list":
        rows = assets.describe()
        console.table(("asset", "kind", "MB", "licence", "cached", "about"), rows)
        answer(options, {"assets": [row._asdict() for row in rows]})
        return
    if not options.name:
        raise UserError("assets get: name an asset; `vismt assets list` shows them.")
    files = {name: assets.get_asset(name) for name in options.name}
    for path in files.values():
        console.stage("asset", str(path))
    answer(options, {"assets": [{"name": name, "path": path} for name, path in files.items()]})


def _list(options: argparse.Namespace) -> None:
    if options.what == "runs":
        from vismt.report.run_list import list_runs

        runs = list_runs(options.runs)
        if not runs:
            raise UserError(
                f"list runs: no run folder in '{options.runs}'; `vismt run` makes one, --runs names another folder."
            )
        rows = [(row.folder.name, row.title, row.job, row.headline, row.state) for row in runs]
        console.table(("run", "title", "job", "result", "state"), rows)
        answer(options, {"runs": [asdict(row) for row in runs]})
        return
    if options.what == "methods":
        answer(options, {"methods": _list_methods()})
        return
    found = {what: list(names) for what, names in _LISTED.items() if options.what in (None, what)}
    for what, names in found.items():
        console.stage(what, ", ".join(names))
    answer(options, found)


def _list_methods() -> list[dict[str, Any]]:
    """Print every method with its options, and return what was printed."""
    from vismt.lowrank.model.inject import COMMON
    from vismt.methods import METHODS

    listed, width = [], max(map(len, (*METHODS, *METHODS.families))) + 5
    texts = dict[str, Any]()
    for name, method in METHODS.items():
        about, options = (method.adapt.__doc__ or "").strip().splitlines()[0], option_texts(method)
        inherits = "inject" in (method.adapt.__doc__ or "")
        shared = [name for name, (default, _) in options.items() if inherits and default == str(COMMON.get(name, ...))]
        texts |= {name: options[name] for name in shared}
        console.stage("method", f"{name:<{width}}{about}")
        for option, (default, text) in options.items():
            if option not in shared:
                console.stage("", f"{'':<{width}}{option} ({default}): {text}")
        if shared:
            console.stage("", f"{'':<{width}}and {', '.join(shared)}")
        abilities = {"merges into stock weights": method.merges, "exports as a plain LoRA": method.exports}
        able = [text for text, has in abilities.items() if has]
        console.stage("", f"{'':<{width}}{'; '.join(able) or 'neither merges nor exports'}")
        rows = [{"name": option, "default": default, "about": text} for option, (default, text) in options.items()]
        listed.append(
            {"name": name, "about": about, "options": rows, "merges": method.merges, "exports": method.exports}
        )
    for prefix, make in METHODS.families.items():
        console.stage("method", f"{prefix + ':...':<{width}}{(make.__doc__ or '').strip().splitlines()[0]}")
    console.stage("options", "that several methods have")
    for option, (default, text) in texts.items():
        console.stage("", f"{'':<{width}}{option} ({default}): {text}")
    return listed


def option_texts(method: Method) -> dict[str, tuple[str, str]]:
    """Return default and meaning of each option of a method.

    Meanings stand in the docstring of the method's function, and in those that it names in backquotes, as "option: meaning.".
    """
    from vismt.lowrank.model.inject import COMMON

    named = sorted(re.findall(r"`(\w+)`", method.adapt.__doc__ or ""), key="inject".__eq__)
    documented = [*filter(None, map(method.adapt.__globals__.get, named)), method.adapt]  # the last text counts
    label = "(?:" + "|".join(map(re.escape, (*method.options, *_GIVEN))) + ")"
    pattern = re.compile(
        rf"(?:^|(?<=[.;:] )|(?<=Args: ))({label}(?:, {label})*): (.*?)(?= {label}(?:, {label})*: |{_LAST}|$)"
    )
    texts: dict[str, str] = {}
    for item in documented:
        for names, text in pattern.findall(" ".join((item.__doc__ or "").split())):
            texts |= dict.fromkeys(names.split(", "), text.strip())
    defaults = COMMON | {name: p.default for name, p in inspect.signature(method.adapt).parameters.items()}
    return {name: (str(defaults[name]), texts.get(name, "")) for name in method.options}


def _methods() -> Iterable[str]:
    from vismt.base.registry import PLACES, with_entry_points

    names = with_entry_points("vismt.methods", PLACES["methods"])  # without an import of torch
    return sorted(f"{name}..." if name.endswith(":") else name for name in names)


# What `vismt list` prints in one line -> its names, imported when they are asked for.
_LISTED: dict[str, Names] = {
    "methods": Names("vismt.cli.data:_methods"),
    "jobs": Names("vismt.jobs:JOBS"),
    "configs": Names("vismt.config.sections:list_configs"),
    "data": Names("vismt.storage.paths:list_cards"),
    "assets": Names("vismt.backbones.asset_cards:list_assets"),
}
