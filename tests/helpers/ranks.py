"""Run a command as two processes over gloo, with the environment of torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

HELPERS = Path(__file__).resolve().parent


def run_two(*call: object, **variables: str) -> None:
    """Run `python CALL` as ranks 0 and 1. variables: further ones of the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # One thread, as the tests have (conftest.py): the number of threads decides how a sum is rounded.
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    common.update(variables)
    common["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HELPERS.parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, *map(str, call)]
    ranks = [subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    assert [rank.wait(900) for rank in ranks] == [0, 0]


def of_two(script: str, folder: Path, **variables: str) -> list[dict[str, Tensor]]:
    """Run `python tests/helpers/SCRIPT FOLDER` twice; return the equal results that the ranks wrote to FOLDER/RANK.pt."""
    run_two(HELPERS / script, folder, **variables)
    results = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    assert set(results[0]) == set(results[1]) and all(
        torch.equal(results[0][name], results[1][name]) for name in results[0]
    )
    return results
