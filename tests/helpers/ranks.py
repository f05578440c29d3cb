"""Run code as two processes over gloo, with the environment of torchrun."""

from __future__ import annotations

import os
import runpy
import socket
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from vismt.engine import runtime

HELPERS = Path(__file__).resolve().parent


def run_two(*call: object, **variables: str) -> str:
    """Run `python CALL` as ranks 0 and 1; return what they print. variables: further ones of the environment.

    Both are forks of this process, which has imported torch, timm and vismt: their imports take longer than most trainings.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **variables}
    with tempfile.TemporaryFile("w+") as printed:
        context = get_context("fork")
        ranks = [context.Process(target=_rank, args=(rank, common, printed.fileno(), *call)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(900)
        printed.seek(0)
        text = printed.read()
    assert [rank.exitcode for rank in ranks] == [0, 0], text[-4000:]
    return text


def _rank(rank: int, variables: dict[str, str], printed: int, *call: object) -> None:
    for stream in (1, 2):
        os.dup2(printed, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)  # of what this process has run alone
    runtime.sharded.cache_clear()
    first, *words = map(str, call)
    try:
        if first == "-c":
            code, *words = words
            sys.argv = ["-c", *words]
            exec(code, {"__name__": "__main__"})
        else:
            sys.argv = [first, *words]
            runpy.run_path(first, run_name="__main__")
    finally:
        runtime.leave()


def of_two(script: str, folder: Path, **variables: str) -> list[dict[str, Tensor]]:
    """Run `python tests/helpers/SCRIPT FOLDER` twice; return the equal results that the ranks wrote to FOLDER/RANK.pt."""
    run_two(HELPERS / script, folder, **variables)
    results = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    assert set(results[0]) == set(results[1]) and all(
        torch.equal(results[0][name], results[1][name]) for name in results[0]
    )
    return results
