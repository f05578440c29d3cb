"""`vismt data`, `assets`, `list` and `config`: data cards, weights, and the keys and names that a configuration may use."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vismt.base import console
from vismt.base.errors import UserError
from vismt.base.exports import docstring
from vismt.base.registry import PLACES, with_entry_points
from vismt.cli.commands import Commands, answer
from vismt.config.typed import Names
from vismt.storage.cache import make_room
from vismt.storage.files import JsonObject, atomic_write, read_sealed, sealed
from vismt.storage.paths import cache_root

if TYPE_CHECKING:
    from vismt.data.check import CheckReport
    from vismt.methods import Method

# parameters of every method, whose texts are not texts of options
_GIVEN = ("model", "optimizer", "targets", "rank", "alpha", "seed")
# beginnings of what follows the last option in a text
_LAST = " Further options| Raises| Returns| The other arguments| The adapted model"
_LISTINGS = 100_000  # bytes of kept lists of methods
_ROWS, _COLUMNS = 40, 16  # numbers of groups, and of images of a group, that are shown
LISTS = ("methods", "features", "jobs", "configs", "data", "assets", "runs")


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
        "list methods (with their options), features of evaluation (with the jobs that have them), jobs, configurations, data "
        "cards, assets, or the runs of a folder",
        answers=True,
    )
    listing.add_argument("what", nargs="?", choices=LISTS, help="one of them (all but features and runs)")
    listing.add_argument("--runs", type=Path, default=Path("runs"), help="for runs: parent of the run folders (runs)")


def _config(options: argparse.Namespace) -> None:
    from vismt.jobs import JOBS, OTHER_NAMES, job_config
    from vismt.jobs.reference import find_keys, keys, schema_text

    if options.schema:
        console.block(schema_text().rstrip())
        return
    if options.job is None:
        for job in JOBS:
            about = f"Another name of {OTHER_NAMES[job]}." if job in OTHER_NAMES else docstring(job_config(job))
            console.stage("config", f"{job:<16}{about.splitlines()[0]}")
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
    """Give the answer of a check. Return the exit code."""
    answer(options, {"sets": [{"name": report.name, "ok": report.ok, "text": str(report)} for report in reports]})
    return 0 if all(report.ok for report in reports) else 1


def _list_duplicates(name: str) -> None:
    """List the groups of near-duplicates of a set, the largest first, and write a contact sheet of the same rows."""
    from vismt.data.cards import load_card
    from vismt.data.near_duplicates import draw_groups, find_duplicates
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
    atomic_write(sheet, draw_groups(shown))
    console.stage("check", f"{sheet}: a row for each of these {len(shown)} groups, the largest first")
    numbers = {images.ids[i]: number for number, group in enumerate(found.groups, 1) for images, i in group}
    atomic_write(named, json.dumps(numbers, indent=0) + "\n")
    console.stage(
        "check", f"{named}: all groups; beside a card, `groups: {named}` keeps each in one part of a division"
    )


def _assets(options: argparse.Namespace) -> None:
    from vismt.backbones import assets

    if options.action == "list":
        rows = assets.describe_assets()
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
    if options.what == "features":
        answer(options, {"features": _list_features()})
        return
    found = {what: list(names) for what, names in _LISTED.items() if options.what in (None, what)}
    for what, names in found.items():
        console.stage(what, ", ".join(names))
    answer(options, found)


def _list_features() -> dict[str, dict[str, str]]:
    """Print which job has which feature of evaluation, and return why a job does not have one, "" where it has."""
    from vismt.evaluation.sections import FEATURES, refusals
    from vismt.jobs import JOBS, OTHER_NAMES, job_config

    jobs = [job for job in JOBS if job not in OTHER_NAMES]
    by_job = {job: refusals(type(getattr(job_config(job)(), "evaluate", None))) for job in jobs}
    listed = {key: {job: found[key] for job, found in by_job.items()} for key in FEATURES}
    cells = [[key, *("no" if reason else "yes" for reason in of_jobs.values())] for key, of_jobs in listed.items()]
    console.table(("feature", *jobs), cells)
    for key, of_jobs in listed.items():
        for job, reason in of_jobs.items():
            if reason:
                console.stage("no", f"{key} in {job}: {reason}")
    return listed


def _list_methods() -> list[JsonObject]:
    """Print every method with its options. Return what was printed."""
    table = _methods_table()
    listed, families = table["methods"], table["families"]
    width = max(len(row["name"]) for row in listed + families) + 5
    texts: dict[str, str] = {}
    for row in listed:
        lines = {
            option["name"]: f"{option['name']} ({option['default']}): {option['about']}" for option in row["options"]
        }
        shared = row.pop("shared")
        texts |= {name: lines[name] for name in shared}
        console.stage("method", f"{row['name']:<{width}}{row['about']}")
        for name, line in lines.items():
            if name not in shared:
                console.stage("", f"{'':<{width}}{line}")
        if shared:
            console.stage("", f"{'':<{width}}and {', '.join(shared)}")
        abilities = {"merges into stock weights": row["merges"], "exports as a plain LoRA": row["exports"]}
        able = [text for text, has in abilities.items() if has]
        console.stage("", f"{'':<{width}}{'; '.join(able) or 'neither merges nor exports'}")
    for row in families:
        console.stage("method", f"{row['name'] + ':...':<{width}}{row['about']}")
    console.stage("options", "that several methods have")
    for line in texts.values():
        console.stage("", f"{'':<{width}}{line}")
    return list(listed)


def _methods_table() -> JsonObject:
    """Return all methods with their options, from the cache folder unless a file of vismt has changed.

    The declarations import torch, which takes most of the time of the command.
    """
    package = Path(__file__).resolve().parents[1]
    files = [(path.relative_to(package).as_posix(), path.stat()) for path in sorted(package.rglob("*.py"))]
    state = json.dumps([(name, about.st_size, about.st_mtime_ns) for name, about in files])
    path = cache_root() / "listings" / f"{hashlib.blake2b(state.encode(), digest_size=10).hexdigest()}.json"
    own = {*with_entry_points("vismt.methods", PLACES["methods"])} == {*PLACES["methods"]}
    with suppress(UserError):
        if own and path.exists():
            return read_sealed(path, "list methods")
    table = _described_methods()
    with suppress(UserError):  # a folder that cannot be written
        if own:
            atomic_write(path, sealed(table))
            make_room(path, 0, _LISTINGS)
    return table


def _described_methods() -> JsonObject:
    from vismt.lowrank.model.inject import COMMON
    from vismt.methods import METHODS

    listed = []
    for name, method in METHODS.items():
        text, options = docstring(method.adapt), option_texts(method)
        rows = [{"name": option, "default": default, "about": about} for option, (default, about) in options.items()]
        shared = [
            row["name"] for row in rows if "inject" in text and row["default"] == str(COMMON.get(row["name"], ...))
        ]
        row = {"name": name, "about": text.splitlines()[0], "options": rows, "shared": shared}
        listed.append({**row, "merges": method.merges, "exports": method.exports})
    families = [{"name": prefix, "about": docstring(make).splitlines()[0]} for prefix, make in METHODS.families.items()]
    return {"methods": listed, "families": families}


def option_texts(method: Method) -> dict[str, tuple[str, str]]:
    """Return default and meaning of each option of a method.

    Meanings stand as "option: meaning." in the docstring of the method's function, and in the docstrings that it names in
    backquotes.
    """
    from vismt.lowrank.model.inject import COMMON

    named = sorted(re.findall(r"`(\w+)`", docstring(method.adapt)), key="inject".__eq__)
    documented = [*filter(None, map(method.adapt.__globals__.get, named)), method.adapt]  # the last text counts
    label = "(?:" + "|".join(map(re.escape, (*method.options, *_GIVEN))) + ")"
    pattern = re.compile(
        rf"(?:^|(?<=[.;:] )|(?<=Args: ))({label}(?:, {label})*): (.*?)(?= {label}(?:, {label})*: |{_LAST}|$)"
    )
    texts: dict[str, str] = {}
    for item in documented:
        for names, text in pattern.findall(" ".join(docstring(item).split())):
            texts |= dict.fromkeys(names.split(", "), text.strip())
    defaults = COMMON | {name: p.default for name, p in inspect.signature(method.adapt).parameters.items()}
    return {name: (str(defaults[name]), texts.get(name, "")) for name in method.options}


def _methods() -> Iterable[str]:
    names = with_entry_points("vismt.methods", PLACES["methods"])  # without an import of torch
    return sorted(f"{name}..." if name.endswith(":") else name for name in names)


# What `vismt list` prints in one line -> its names, imported on demand.
_LISTED: dict[str, Names] = {
    "methods": Names("vismt.cli.data:_methods"),
    "jobs": Names("vismt.jobs:JOBS"),
    "configs": Names("vismt.config.sections:list_configs"),
    "data": Names("vismt.storage.paths:list_cards"),
    "assets": Names("vismt.backbones.asset_cards:list_assets"),
}
