"""Errors of one process, the choice of a rate, and a training, as one of two processes: `python error_ranks.py FOLDER`.

FOLDER/run is locked by the test. Writes what both processes found: messages, and who prints them; and the trained weight.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from vismt import cli
from vismt.base import console, ranks
from vismt.base.errors import UserError
from vismt.config.sections import TrainConfig
from vismt.engine import loop, runtime
from vismt.engine.study import ALONE, Study, StudyConfig, Training, TuneConfig
from vismt.jobs.fewshot.config import EvaluateConfig, FewShotConfig
from vismt.jobs.run import Run

CONFIG = FewShotConfig(adapt=None, train=None, evaluate=EvaluateConfig(data=["digits"], models=["frozen"]))


def refuse(number: int) -> int:
    if number == 3:
        raise UserError(f"item {number} of rank {runtime.processes().process_index}")
    return number


class Validating:
    """A job whose validation adds up numbers, shared; it counts those of this process."""

    ran = 0

    def train_one(self, training: Training) -> None:
        raise AssertionError("nothing is trained")

    def validate(self, training: Training) -> float:
        def add(number: int) -> float:
            self.ran += 1
            return number * training.lr

        return sum(ranks.share(range(4), add))


def printed(call: Callable[[], object]) -> list[str]:
    """Return the exit code of `vismt` around a call, and the lines that it prints as errors."""
    error = io.StringIO()
    parse, cli.parse = cli.parse, lambda arguments: options
    options = SimpleNamespace(command="run", quiet=True, verbose=True, debug=False, runner=lambda _: call() and None)
    with redirect_stderr(error):
        code = cli.main([])
    cli.parse = parse
    return [str(code), *error.getvalue().splitlines()]


def owned(folder: Path) -> None:
    with Run(folder, CONFIG).owned():
        raise AssertionError("another process has the lock")


class Weighed(nn.Module):
    """A regression whose batches have different numbers of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 1))

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": (batch @ self.weight - batch.sum(1, keepdim=True)).square().mean()}

    def examples(self, batch: Tensor) -> Tensor:
        return torch.tensor(len(batch))


def rows_of(*sizes: int) -> list[Tensor]:
    """Return batches with these numbers of rows."""
    return [torch.randn(size, 4, generator=torch.Generator().manual_seed(size)) for size in sizes]


def weighed(folder: Path, batches: Sequence[Tensor]) -> Tensor:
    """Return the weight after one step of SGD on all batches, of which every process takes as many."""
    accumulate = len(batches) // runtime.processes().num_processes
    config = TrainConfig(steps=1, lr=0.1, optimizer="sgd", momentum=0, clip=None, warmup=0, accumulate=accumulate)
    objective = Weighed()
    loop.train(objective, batches.__getitem__, config, folder, "hash", runtime.accelerator(), seed=0)
    return objective.weight.detach()


if __name__ == "__main__":
    console.set_quiet(True)
    folder = Path(sys.argv[1])
    rank = runtime.processes().process_index
    study = Study(StudyConfig(tune=TuneConfig([0.1, 0.2])), folder / "study")
    job = Validating()
    with ranks.shared():
        found = {
            "share": printed(lambda: list(ranks.share(range(8), refuse))),
            "first": printed(lambda: ranks.on_first(lambda: refuse(3))),
            "after": list(ranks.share(range(3), refuse)),
        }
        study.choose(job, ALONE)
    found["ran"] = job.ran
    found["locked"] = printed(lambda: owned(folder / "run"))
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.save({"weight": weighed(folder / "trained", rows_of(2, 40, 3, 9))}, folder / f"{rank}.pt")
    runtime.leave()
