"""A script run as two processes over gloo, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

HELPERS = Path(__file__).resolve().parent


def of_two(script: str, folder: Path) -> list[dict[str, Tensor]]:
    """`python tests/helpers/SCRIPT FOLDER` as rank 0 and 1 of two; what each wrote to FOLDER/RANK.pt, which has to be the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HELPERS.parent), os.environ.get("PYTHONPATH"))))
    call = [sys.executable, HELPERS / script, folder]
    ranks = [subprocess.Popen(call, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    assert [rank.wait(300) for rank in ranks] == [0, 0]
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    assert set(found[0]) == set(found[1]) and all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    return found
