"""A study as units: trainings and evaluations of one arm and seed, which several processes may run at the same time.

A round holds the units that need no other unit of it: the tried rates and single rates, the remaining seeds, the evaluations.
Units write checkpoints, adapters and records. The ordinary run then finds every unit finished, and makes what depends on all of
them: the choice of rates, pools, results and the report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from vismt.base import console
from vismt.base.errors import UserError
from vismt.engine.study import Training, has_diverged
from vismt.engine.training_files import read_done
from vismt.engine.workers import make_workers
from vismt.jobs import open_run
from vismt.jobs.evaluation_job import EvaluationJob
from vismt.jobs.run import Run
from vismt.jobs.training_job import TrainingJob
from vismt.storage.locks import is_locked, locked

PARTS_FOLDER = "parts"  # holds the locks of a run's parts
POLL_S = 2.0
ABSENT_S = 600.0  # a part that starts later, or again, has this time
_Share = Callable[[Sequence[Training]], None]


def run_with_workers(run: Run, workers: str) -> None:
    """Train, evaluate and report as `vismt run` does in one process. workers: Argument of `make_workers`."""
    job, study = run.job, run.job.study
    tried = sum(len(study.tried(arm)) for arm in study.arms) if job.trains else 0
    with make_workers(workers, max(tried, len(job.evaluated()) * len(study.seeds))) as pool:

        def run_all(stage: str, function: Callable[[Path, Training], None], trainings: Sequence[Training]) -> None:
            calls = {f"{stage} {training}": (function, (run.folder, training)) for training in trainings}
            pool.run({" ".join(name.split()): call for name, call in calls.items()})

        _train(job, lambda trainings: run_all("train", train_unit, trainings))
        run.train()
        run_all("evaluate", evaluate_unit, _evaluations(job))
    run.evaluate()
    run.report()


def run_part(run: Run, part: int, parts: int) -> None:
    """Run the share of one of `parts` parts of a study, and wait between rounds for the others. `vismt report` finishes the run.

    Raises UserError if another process runs this part, and if parts that this part waits for have not run for ABSENT_S.
    """
    job = run.job

    def share(trainings: Sequence[Training]) -> None:
        def unfinished() -> list[int]:
            left = (place for place, one in enumerate(trainings) if read_done(one) is None and not has_diverged(one))
            return [place % parts + 1 for place in left]

        for training in trainings[part - 1 :: parts]:
            _attempt(job, training)
        _wait(run.folder, parts, unfinished, "training(s)")

    with locked(_place(run.folder, part, parts), wait_s=POLL_S):  # `_wait` of another part may be looking at it
        _train(job, share)
        if part == 1:
            run.train()
        _wait(run.folder, parts, lambda: [1] * (job.trains and "adapt" not in run.facts), "list of what is trained")
        for training in _evaluations(job)[part - 1 :: parts]:
            job.evaluate_one(training)


def train_unit(folder: Path, training: Training) -> None:
    """Train one training of a run folder, in a worker."""
    _attempt(_opened(folder), training)


def evaluate_unit(folder: Path, training: Training) -> None:
    """Write the records of one training or reference, in a worker."""
    _opened(folder).evaluate_one(training)


def _attempt(job: EvaluationJob[Any], training: Training) -> None:
    if isinstance(job, TrainingJob):
        job.study.attempt(job, training)


def _train(job: EvaluationJob[Any], share: _Share) -> None:
    """Train in rounds: trainings that need no chosen rate, then further seeds of other arms, then arms made of other arms."""
    study = job.study
    if not isinstance(job, TrainingJob):
        return
    job.check_training()
    derived = [arm for arm in study.arms if study.arms[arm].derived]
    first = [arm for arm in study.arms if arm not in derived]
    tried = [training for arm in first for training in study.tried(arm)]
    share(tried)
    for arm in study.arms:
        study.choose(job, arm)
    share([training for arm in first for training in study.trainings(arm) if training not in tried])
    if derived:
        share([training for arm in derived for training in study.trainings(arm)])


def _evaluations(job: EvaluationJob[Any]) -> list[Training]:
    """Return the evaluations, each a unit. Models that are composed of others have no records of their own."""
    job.check_evaluation(None)
    return [training for arm in job.evaluated() if arm not in job.composed for training in job.trainings(arm)]


def _place(folder: Path, part: int, parts: int) -> Path:
    return folder / PARTS_FOLDER / f"{part}-of-{parts}"


def _wait(folder: Path, parts: int, owing: Callable[[], list[int]], what: str) -> None:
    """Wait until no part owes anything. owing: Function that returns the number of a part for each missing result."""
    shown, seen = None, time.monotonic()
    while owed := owing():
        absent = [part for part in sorted(set(owed)) if not is_locked(_place(folder, part, parts))]
        names = ", ".join(f"{part}/{parts}" for part in absent)
        if absent != shown:
            shown = absent
            console.stage(
                "wait", f"for {len(owed)} {what} of other parts" + (f"; not running: {names}" if absent else "")
            )
        if len(absent) < len(set(owed)):
            seen = time.monotonic()
        if time.monotonic() - seen > ABSENT_S:
            raise UserError(
                f"run --part: {len(owed)} {what} of part {names} missing, and no process has run there for "
                f"{ABSENT_S / 60:.0f} minutes; start --part {names}, then this part again: what is done is kept."
            )
        time.sleep(POLL_S)


@lru_cache(maxsize=1)
def _opened(folder: Path) -> EvaluationJob[Any]:
    """Return the job of a run folder, which a worker keeps with its data for its next unit."""
    return open_run(folder).job
