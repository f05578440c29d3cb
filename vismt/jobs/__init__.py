"""The jobs by the key `task` of a configuration, and the run folders that they work in.

A job is loaded when it is first asked for. Every run takes the same way. A YAML file with overrides, or plain values from
Python, become the typed configuration of the task (`load_config`, `typed_config`). A run folder then holds this configuration
together with its job (`started`, `open_run`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vismt.base import console
from vismt.base.errors import UserError, near, require_known
from vismt.base.registry import import_own, with_entry_points
from vismt.config.sections import (
    RESOLVED,
    RunConfig,
    config_hash,
    from_working_folder,
    override,
    read_config_file,
)
from vismt.config.typed import build
from vismt.storage.files import atomic_write
from vismt.storage.outputs import check_folder

if TYPE_CHECKING:
    from vismt.jobs.evaluation_job import EvaluationJob
    from vismt.jobs.init_files import Init
    from vismt.jobs.run import Run

# Package of each task. Its config.py has a dataclass CONFIG (a StudyConfig), its job.py a class JOB (an EvaluationJob), and
# start.yaml is what `vismt init` writes. Installed packages add jobs by entry points of the group "vismt.jobs".
JOBS = with_entry_points(
    "vismt.jobs",
    {
        "classification": "vismt.jobs.multitask",
        "dense": "vismt.jobs.multitask",
        "fewshot": "vismt.jobs.fewshot",
        "lm": "vismt.jobs.lm",
        "multitask": "vismt.jobs.multitask",
        "robustness": "vismt.jobs.robustness",
    },
)
OTHER_NAMES = {"classification": "multitask", "dense": "multitask"}  # of jobs


def job_config(task: str, source: str = "config") -> type[RunConfig]:
    """Return the dataclass of a task's configuration. `source` names the file in the error for an unknown task."""
    if task not in JOBS:
        raise UserError(f"{source}: task '{task}' is not known.{near(task, JOBS)}")
    return _part(task, "config", "CONFIG")


def job_init(task: str) -> Init:
    """Return how `vismt init` begins a job: by INIT in its init.py, or else by its start.yaml as it is.

    Raises UserError if the job is unknown.
    """
    require_known("init: no job", [task], JOBS)
    with suppress(ModuleNotFoundError):  # `_part` reports the missing package
        if find_spec(f"{JOBS[task]}.init") is None:
            from vismt.jobs.init_files import Init, config

            return Init(lambda job, folder, data: config(job), takes="")
    return _part(task, "init", "INIT")


def _part(task: str, file: str, name: str) -> Any:
    module = import_own(f"{JOBS[task]}.{file}", f"task '{task}'")
    if not hasattr(module, name):
        raise UserError(f"task '{task}': '{module.__name__}' has no {name}.")
    return getattr(module, name)


def typed_config(raw: Mapping[str, Any], source: str) -> RunConfig:
    """Return the typed configuration of plain values. `source` names the file in errors."""
    return build(job_config(str(raw.get("task", RunConfig.task)), source), raw, source)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the typed configuration of a YAML file with dotted overrides.

    Relative paths are relative to the folder of the file if they exist there, else to the working folder.
    """
    raw, source = read_config_file(path), str(path)
    if path.name != RESOLVED:
        raw = from_working_folder(raw, path.parent)
    return typed_config(override(raw, overrides), source)


def make_job(config: RunConfig, folder: Path, run_hash: str | None = None) -> EvaluationJob[Any]:
    """Return the job of a configuration in a run folder.

    run_hash: Hash of the folder. The default is the hash of the configuration.
    """
    job = _part(config.task, "job", "JOB")
    from vismt.engine.study import StudyConfig, settled

    run_hash = run_hash or config_hash(config)
    if isinstance(config, StudyConfig) and not config.arms:
        config = settled(config)
    return job(config, folder, run_hash)


@contextmanager
def started(path: Path, overrides: Sequence[str], out: Path) -> Iterator[Run]:
    """Yield the run of a configuration file in <out>/<file stem>-<hash>, as `started_config` does."""
    config = load_config(path, overrides)
    with started_config(config, run_folder(config, path.stem, out)) as run:
        yield run


@contextmanager
def started_config(config: RunConfig, folder: Path) -> Iterator[Run]:
    """Yield the run of a configuration in a folder. A missing folder is made.

    Raise UserError if the configuration names something that does not exist, or the folder holds anything but this run. If a
    UserError ends the block before anything was done, a new folder is removed again.
    """
    from vismt.base import ranks
    from vismt.jobs.run import Run
    from vismt.report.run_list import stub

    if (folder / RESOLVED).exists():
        refuse_other_run(folder, config)
    else:
        check_folder("run", folder, "--out")
    run = Run(folder, config)
    run.job.check()
    run.job.check_model_names()
    from vismt.engine.study import StudyConfig, ignored

    for line in ignored(config) if isinstance(config, StudyConfig) else ():
        console.stage("adapt", line)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    atomic_write(folder / RESOLVED, yaml.safe_dump(asdict(config), sort_keys=False))
    try:
        yield run
    except UserError:
        nothing_done = stub(folder) if folder in new and ranks.rank() == 0 else None
        if nothing_done is not None:
            nothing_done.delete()
            for parent in new[1:]:
                with suppress(OSError):  # another run is in it
                    parent.rmdir()
        raise


def run_folder(config: RunConfig, name: str, out: Path) -> Path:
    """Return <out>/<name>-<hash>."""
    return out / f"{name}-{config_hash(config)}"


def refuse_other_run(folder: Path, config: RunConfig) -> None:
    """Raise UserError if a folder holds a run of another configuration."""
    if config_hash(read_resolved(folder)) != config_hash(config):
        raise UserError(f"run '{folder}': the folder holds a run of another configuration; give another folder.")


def resolved_path(folder: Path) -> Path:
    """Return the file with the configuration of a run folder. Raise UserError for any other folder."""
    path = folder / RESOLVED
    if not path.exists():
        seen = f"no {RESOLVED}" if folder.exists() else "no such folder"
        raise UserError(f"run '{folder}': {seen}; give a folder that `vismt run` or `vismt train` made.")
    return path


def read_resolved(folder: Path) -> RunConfig:
    """Return the configuration of a run folder."""
    return load_config(resolved_path(folder))


def open_run(folder: Path) -> Run:
    """Open a run folder that was made before."""
    config = read_resolved(folder)  # before the imports, so that a wrong folder is answered at once
    from vismt.jobs.run import Run

    return Run(folder, config)
