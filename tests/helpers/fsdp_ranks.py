"""Train the configurations FOLDER/*.yaml under FSDP2, as one of two processes: `python fsdp_ranks.py FOLDER`.

Each is trained into FOLDER/sharded. Those of RESUMED are trained into FOLDER/resumed as well, with an interruption of every arm
after the checkpoint of step 2. What the first interruption left is copied to FOLDER/cut. Overrides of refused.yaml end with exit
code 2.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from vismt.cli import main
from vismt.engine import loop, runtime

RESUMED = ("drawn", "half", "dense")  # what has state beside that of the optimiser, and a half precision
REFUSED = ("train.compile=true", "train.precision=fp16")


def train(path: Path, out: str, *overrides: str) -> int:
    return main(["train", str(path), "--out", str(path.parent / out / path.stem), "--quiet", *overrides])


def train_twice(path: Path) -> list[int]:
    """Return the exit codes of a training, and of the calls of an interrupted one."""
    codes = [train(path, "sharded")]
    if path.stem not in RESUMED:
        return codes
    save = loop._Training._save

    def interrupted(self: loop._Training, step: int) -> None:
        save(self, step)
        if step == 2:
            self.accelerator.wait_for_everyone()
            raise KeyboardInterrupt

    loop._Training._save = interrupted
    codes.append(train(path, "resumed"))
    if runtime.processes().is_main_process:
        shutil.copytree(path.parent / "resumed" / path.stem, path.parent / "cut" / path.stem)
    runtime.processes().wait_for_everyone()
    while codes[-1] == 130:
        codes.append(train(path, "resumed"))
    loop._Training._save = save
    return codes


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    refused = folder / "refused.yaml"
    results = {path.stem: train_twice(path) for path in sorted(folder.glob("*.yaml")) if path != refused}
    results["refused"] = [train(refused, "refused", override) for override in REFUSED]
    assert runtime.sharded()
    torch.save(
        {name: torch.tensor(codes) for name, codes in results.items()},
        folder / f"{runtime.processes().process_index}.pt",
    )
    runtime.leave()
