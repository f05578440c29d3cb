"""A training of two processes, the second of which gets SIGTERM after the step that is named; started by `run_two`."""

import os
import signal
import sys
from pathlib import Path

import torch

from helpers.toy_training import Toy, batches
from vismt.config.sections import TrainConfig
from vismt.engine import loop, runtime

if __name__ == "__main__":
    folder, stop_after = Path(sys.argv[1]), int(sys.argv[2])
    accelerator = runtime.accelerator()

    def after(_: torch.nn.Module, step: int) -> None:
        if step == stop_after and accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    if stop_after:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))  # `run_two` asks for this code
    toy = Toy()
    toy.unused.requires_grad_(False)
    torch.nn.functional.dropout = lambda values, *_: values  # a resumed process draws anew
    config = TrainConfig(steps=8, lr=0.05, checkpoint_every=50)
    loop.train(toy, batches, config, folder, "hash", accelerator, seed=1, after_step=after)
