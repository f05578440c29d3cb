"""`vismt run`, `train`, `evaluate` and `report`: a run folder from its configuration to its report."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from glob import escape, glob
from pathlib import Path
from typing import TYPE_CHECKING

from vismt.base import console
from vismt.base.errors import UserError
from vismt.cli.commands import Commands, answer
from vismt.cli.folders import add_format, formats_of
from vismt.storage.files import JsonObject

_ROBUSTBENCH = "robustbench"  # format of reports that only robustness runs have

if TYPE_CHECKING:
    from vismt.jobs.run import Run


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    for name, runner, text in (
        ("run", _run, "train, merge, evaluate and report; resumes an interrupted run folder"),
        ("train", _train, "train only; resumes"),
    ):
        parser = commands.add(name, runner, text, answers=name == "run")
        config = parser.add_argument("config", help="a YAML file, or the name of one that `vismt list configs` shows")
        config.completer = _completions  # type: ignore[attr-defined]  # read by argcomplete
        parser.add_argument(
            "overrides", nargs="*", metavar="key=value", help="dotted overrides, for example train.steps=20"
        )
        parser.add_argument("--out", type=Path, default=Path("runs"), help="parent of the run folder (runs)")
        if name == "run":
            parser.add_argument(
                "--workers",
                metavar="N|ray[:ADDRESS]",
                help="trainings and evaluations in N processes or on a Ray cluster",
            )
            parser.add_argument("--part", metavar="i/n", help="one share of n, for job arrays; then `vismt report RUN`")
    parser = commands.add("evaluate", _evaluate, "evaluate a run folder and write its report")
    parser.add_argument("run", type=Path, help="a run folder")
    parser = commands.add(
        "report", _report, "write the report of a run folder, also of one that is not finished", answers=True
    )
    parser.add_argument("run", type=Path, help="a run folder")
    add_format(parser, ", robustbench (model_info of a robustness run)")


def _completions(prefix: str, **_: object) -> list[str]:
    """Return the configurations and folders that begin with `prefix`."""
    from vismt.config.sections import list_configs

    files = [
        path for path in map(Path, glob(f"{escape(prefix)}*")) if path.is_dir() or path.suffix in (".yaml", ".yml")
    ]
    return [*list_configs(), *(f"{path}/" if path.is_dir() else str(path) for path in files)]


def _run(options: argparse.Namespace) -> None:
    from vismt.config.sections import find_config
    from vismt.jobs import started
    from vismt.report.plotting import need_matplotlib

    need_matplotlib()
    part = _part(options.part)
    # Workers may have another working folder.
    out = options.out.resolve() if options.workers else options.out
    with started(find_config(options.config), options.overrides, out) as run:
        if part or options.workers:
            _run_units(run, part, options.workers)
        else:
            with run.owned():
                run.evaluate_references()
                run.train()
                run.evaluate()
                run.on_main(run.report)
        answer(options, _found(run))


def _found(run: Run) -> JsonObject:
    """Return a run folder with its report and results. They are null and none before they are written."""
    from vismt.report.results import RESULTS, read_results

    page, results = run.folder / "report.html", run.folder / RESULTS
    rows = [asdict(row) for row in read_results(results, run.hash)] if results.exists() else []
    about = {"folder": run.folder, "config_hash": run.hash, "report": page if page.exists() else None}
    return {**about, "results": rows}


def _run_units(run: Run, part: tuple[int, int] | None, workers: str | None) -> None:
    """Run the units of a study in several processes: by workers, or one part of a job array."""
    from vismt.engine import runtime
    from vismt.jobs.units import run_part, run_with_workers

    if part and workers:
        raise UserError("run: --part and --workers exclude each other; start every part alone.")
    if runtime.processes().num_processes > 1:
        raise UserError("run: --part and --workers start under one process, not under torchrun or accelerate launch.")
    if part:
        run_part(run, *part)
    elif workers:
        with run.owned():
            run_with_workers(run, workers)


def _part(text: str | None) -> tuple[int, int] | None:
    """Return (i, n) from "i/n"."""
    if text is None:
        return None
    words = text.split("/")
    if len(words) != 2 or not all(word.isascii() and word.isdecimal() for word in words):
        raise UserError(f"run --part: '{text}'; give i/n, for example 1/4.")
    part, parts = map(int, words)
    if not 1 <= part <= parts:
        raise UserError(f"run --part: {part} of {parts}; the parts of {parts} are 1 to {parts}.")
    return part, parts


def _train(options: argparse.Namespace) -> None:
    from vismt.config.sections import find_config
    from vismt.jobs import started

    with started(find_config(options.config), options.overrides, options.out) as run, run.owned():
        run.train()
    console.stage("run", str(run.folder))


def _evaluate(options: argparse.Namespace) -> None:
    from vismt.jobs import open_run

    with open_run(options.run).owned() as run:
        run.evaluate()
        run.on_main(run.report)


def _report(options: argparse.Namespace) -> None:
    from vismt.jobs import open_run

    run = open_run(options.run)
    from vismt.jobs.units import PARTS_FOLDER
    from vismt.report.results import RESULTS
    from vismt.storage.locks import is_locked

    formats, files = formats_of(options, _ROBUSTBENCH), list[Path]()
    if _ROBUSTBENCH in formats:
        files += _robustbench(run)
        formats.remove(_ROBUSTBENCH)
    if formats and is_locked(options.run):  # a process is working in it, so the report shows how far it is
        files += run.report(formats)
    elif formats:
        with run.owned():
            if (options.run / PARTS_FOLDER).is_dir() and not (options.run / RESULTS).exists():
                run.evaluate()  # from the records of the parts
            run.on_main(lambda: files.extend(run.report(formats)))
    answer(options, {"folder": run.folder, "files": files})


def _robustbench(run: Run) -> list[Path]:
    from vismt.jobs.robustness.config import RobustnessConfig
    from vismt.jobs.robustness.report import write_model_info

    if not isinstance(run.config, RobustnessConfig):
        raise UserError(
            f"report --format robustbench: '{run.folder}' is a run of task '{run.config.task}'; need task robustness."
        )
    files = write_model_info(run.folder, run.config, run.hash)
    for path in files:
        console.stage("report", str(path))
    return files
