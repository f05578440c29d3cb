"""Evaluate the run folders below FOLDER/two as one of several processes: `python evaluation_ranks.py FOLDER`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from vismt.base import console, ranks
from vismt.engine import runtime
from vismt.jobs import open_run


def evaluate(folder: Path) -> int:
    """Evaluate a run folder; return how many batches, of all that are shared, this process ran."""
    share = ranks.share
    ran: list[Any] = []

    def counted(items: Iterable[Any], run: Callable[[Any], Any]) -> Iterator[Any]:
        return share(items, lambda item: (ran.append(item), run(item))[1])

    ranks.share = counted
    try:
        open_run(folder).evaluate()
    finally:
        ranks.share = share
    return len(ran)


if __name__ == "__main__":
    torch.set_num_threads(1)
    console.set_quiet(True)
    rank = runtime.processes().process_index
    parent = Path(sys.argv[1])
    counts = {folder.name: evaluate(folder) for folder in sorted((parent / "two").iterdir())}
    (parent / f"counts-{rank}.json").write_text(json.dumps(counts))
    torch.save({}, parent / f"{rank}.pt")
    runtime.leave()
