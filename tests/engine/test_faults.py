"""A run that is killed before any of its file operations goes on, and ends with the files of one that was not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vismt.config.sections import TrainConfig
from vismt.engine import checkpoint, loop, runtime
from vismt.storage.files import PARTIAL, remove_partial, write_tensors
from vismt.storage.lines import LineFile, read_lines, write_lines
from vismt.storage.locks import locked
from vismt.storage.records import SHARE, Header, Records


class Toy(nn.Module):
    """A regression with dropout, so that the random state matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layer(nn.functional.dropout(batch, 0.3)) - batch.sum(1, keepdim=True)).square().mean()}


def batch(number: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(number))


def work(folder: Path) -> None:
    """Train, evaluate and write results, each where it is not done yet, as a run does."""
    with locked(folder):
        remove_partial(folder)
        toy = Toy()
        config = TrainConfig(steps=5, lr=0.05, checkpoint_every=2)
        loop.train(toy, batch, config, folder / "training", "hash", runtime.accelerator(), seed=1)
        write_tensors(folder / "model.safetensors", toy.state_dict())
        records = Records(folder / "records.jsonl", Header(examples="toy"), {"error": SHARE}, key="episode")

        def evaluate(number: int) -> list[dict[str, Any]]:
            torch.manual_seed(number)  # rows on record are not computed again
            error = toy.eval()(batch(100 + number))["loss"].item()
            return [{"episode": number, "error": error / (1 + error)}]

        rows = records.complete([[number] for number in range(3)], evaluate, "toy")
        write_lines(folder / "results.jsonl", [{"mean": sum(row["error"] for row in rows)}])


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on whether a run was killed: every file's content but for times."""
    files: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        assert PARTIAL not in path.name
        if path.suffix == ".safetensors":
            files[str(path.relative_to(folder))] = path.read_bytes()
        elif path.suffix == ".jsonl":
            rows = read_lines(path)
            files[str(path.relative_to(folder))] = [
                {k: v for k, v in row.items() if k not in ("elapsed_s", "memory_mb")} for row in rows
            ]
    return files


def child(folder: Path, operation: str, number: int) -> None:
    """Work, but kill this process before call `number` of an operation; "line": after half of the line."""
    calls = 0

    def die_in_turn() -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)

    if operation == "line":
        add = LineFile.add

        def torn(self: LineFile, *rows: dict[str, Any]) -> None:
            before = self.path.read_bytes()
            add(self, *rows)
            whole = self.path.read_bytes()
            if calls == number - 1:
                self.path.write_bytes(whole[: (len(before) + len(whole)) // 2])
            die_in_turn()

        LineFile.add = torn  # type: ignore[method-assign]
    else:
        real: Callable[..., Any] = getattr(os, operation)

        def hooked(*arguments: Any, **options: Any) -> Any:
            die_in_turn()
            return real(*arguments, **options)

        setattr(os, operation, hooked)
    work(folder)


@pytest.mark.parametrize(
    "operation,numbers",
    [("replace", range(1, 9, 2)), ("fsync", range(1, 24, 4)), ("unlink", range(1, 4)), ("line", range(1, 9, 3))],
)
def test_a_run_killed_before_a_file_operation_goes_on(tmp_path: Path, operation: str, numbers: range) -> None:
    work(tmp_path / "whole")
    expected = outcome(tmp_path / "whole")
    assert len(expected) == 6  # two checkpoints, metrics, model, records, results
    killed = 0
    for number in numbers:
        folder = tmp_path / str(number)
        process = get_context("fork").Process(target=child, args=(folder, operation, number))
        process.start()
        process.join(60)
        killed += process.exitcode == -signal.SIGKILL
        work(folder)
        assert outcome(folder) == expected, number
        assert len(checkpoint.checkpoints(folder / "training")) == 2
    assert killed >= len(numbers) - 1
