"""`vismt run`, `train`, `evaluate` and `report`: a run folder from its configuration to its report."""

from __future__ import annotations

import argparse
from pathlib import Path

from vismt import console
from vismt.cli.commands import Commands
from vismt.errors import UserError


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    for name, runner, text in (
        ("run", _run, "train, merge, evaluate and report; resumes an interrupted run folder"),
        ("train", _train, "train only; resumes"),
    ):
        parser = commands.add(name, runner, text)
        parser.add_argument("config", type=Path, help="a YAML file, see configs/")
        parser.add_argument(
            "overrides", nargs="*", metavar="key=value", help="dotted overrides, for example train.steps=20"
        )
        parser.add_argument("--out", type=Path, default=Path("runs"), help="parent of the run folder (runs)")
    parser = commands.add("evaluate", _evaluate, "evaluate a run folder and write its report")
    parser.add_argument("run", type=Path, help="a run folder")
    parser = commands.add("report", _report, "write the report of an evaluated run folder again")
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument(
        "--format", choices=("html", "robustbench"), default="html", help="robustbench: model_info of a robustness run"
    )


def _run(options: argparse.Namespace) -> None:
    from vismt.jobs import start

    run = start(options.config, options.overrides, options.out)
    run.train()
    run.evaluate()
    run.on_main(run.report)


def _train(options: argparse.Namespace) -> None:
    from vismt.jobs import start

    run = start(options.config, options.overrides, options.out)
    run.train()
    console.stage("run", str(run.folder))


def _evaluate(options: argparse.Namespace) -> None:
    from vismt.jobs import open_run

    run = open_run(options.run)
    run.evaluate()
    run.on_main(run.report)


def _report(options: argparse.Namespace) -> None:
    from vismt.jobs import open_run

    run = open_run(options.run)
    if options.format == "html":
        run.on_main(run.report)
        return
    from vismt.jobs.robustness.config import RobustnessConfig
    from vismt.jobs.robustness.robustbench import write_model_info

    if not isinstance(run.config, RobustnessConfig):
        raise UserError(
            f"report --format robustbench: '{options.run}' is a run of task '{run.config.task}'; need task robustness."
        )
    for path in write_model_info(run.folder, run.config):
        console.stage("report", str(path))
