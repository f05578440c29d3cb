"""Jobs by the `task` key of a configuration, loaded when first asked for, and the run folders they work in."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vismt.base.errors import UserError, near
from vismt.config.sections import RunConfig, config_hash, override, read_yaml, resolved, typed
from vismt.storage.files import atomic_write

if TYPE_CHECKING:
    from vismt.jobs.base import EvaluationJob
    from vismt.jobs.run import Run

# task -> module with a dataclass CONFIG (a StudyConfig) and a class JOB (a vismt.jobs.base.EvaluationJob).
JOBS = {
    "dense": "vismt.jobs.dense.job",
    "fewshot": "vismt.jobs.fewshot.job",
    "lm": "vismt.jobs.lm.job",
    "multitask": "vismt.jobs.classification.job",
    "robustness": "vismt.jobs.robustness.job",
}


def load_config(path: Path, overrides: Sequence[str]) -> RunConfig:
    """Return the typed configuration of a YAML file with dotted overrides."""
    raw = override(read_yaml(path), overrides)
    return typed(raw, config_type(raw, str(path)), str(path))


def config_type(raw: Mapping[str, Any], source: str) -> type[RunConfig]:
    """Return the dataclass of the task that a configuration names; `source` names the file in errors."""
    return _module(str(raw.get("task", RunConfig.task)), source).CONFIG


def job_config(job: str) -> type[RunConfig]:
    """Return the dataclass of a job's configuration."""
    return _module(job, "config").CONFIG


def make_job(config: RunConfig, folder: Path) -> EvaluationJob[Any]:
    """Return the job of a configuration in a run folder."""
    return _module(config.task, str(folder)).JOB(config, folder, config_hash(config))


def start(path: Path, overrides: Sequence[str], out: Path) -> Run:
    """Make or find again the run folder of a configuration file, <out>/<file stem>-<hash>."""
    return start_config(load_config(path, overrides), path.stem, out)


def start_config(config: RunConfig, name: str, out: Path, folder: Path | None = None) -> Run:
    """Make or find again the run folder of a configuration: `folder`, by default <out>/<name>-<hash>.

    Raises UserError for what the configuration names and does not exist, and for a folder with another run; no folder is made
    then.
    """
    from vismt.jobs.run import Run
    from vismt.report.results import RESOLVED

    if folder is None:
        folder = out / f"{name}-{config_hash(config)}"
    else:
        refuse_other_run(folder, config_hash(config))
    run = Run(folder, config, make_job(config, folder))
    run.job.check()
    atomic_write(folder / RESOLVED, yaml.safe_dump(resolved(config), sort_keys=False))
    return run


def refuse_other_run(folder: Path, config_hash: str) -> None:
    """Raise UserError where a folder holds a run of another configuration."""
    from vismt.report.results import RESOLVED

    if (folder / RESOLVED).exists() and open_run(folder).hash != config_hash:
        raise UserError(f"run '{folder}': the folder holds a run of another configuration; give another folder.")


def open_run(folder: Path) -> Run:
    """Open a run folder that was made before."""
    from vismt.jobs.run import Run
    from vismt.report.results import RESOLVED

    path = folder / RESOLVED
    if not path.exists():
        seen = f"no {RESOLVED}" if folder.exists() else "no such folder"
        raise UserError(f"run '{folder}': {seen}; give a folder that `vismt run` or `vismt train` made.")
    raw = read_yaml(path)
    config = typed(raw, config_type(raw, str(folder)), str(path))
    return Run(folder, config, make_job(config, folder))


def _module(task: str, source: str) -> Any:
    if task not in JOBS:
        raise UserError(f"{source}: task '{task}' is not known.{near(task, JOBS)}")
    return importlib.import_module(JOBS[task])
