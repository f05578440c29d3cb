"""Ctrl-C and SIGTERM in a training: the step is finished and saved, and then the signal has its usual effect."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from vismt.base import console

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Record the first of SIGNALS inside the block, and raise it again at the end of the block. A second signal acts at once.

    Before SIGTERM acts, and in the KeyboardInterrupt of Ctrl-C, a line says where the training continues.

    Args:
        accelerator: Accelerator of the training.
        folder: Folder of the training's checkpoints.
        steps: Number of steps of the whole training.
        saved: Last step with a checkpoint, 0 for none. The training sets it again after each checkpoint.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, steps: int, saved: int) -> None:
        self.saved = saved
        self._folder = folder
        self._steps = steps
        self._accelerator = accelerator
        self._number: int | None = None
        self._usual: dict[int, Any] = {}
        self._anywhere = torch.zeros((), device=accelerator.device)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            usual = {number: signal.getsignal(number) for number in SIGNALS}
            self._usual = {
                number: handler for number, handler in usual.items() if handler not in (None, signal.SIG_IGN)
            }
            for number in self._usual:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        if self._number is None:
            return
        place = f"after step {self.saved:,} of {self._steps:,}" if self.saved else "at its first step"
        line = f"training '{self._folder}' continues {place}"
        if self._number != signal.SIGINT:
            console.stage("train", f"stopped: {line}")
        try:
            signal.raise_signal(self._number)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(line) from interrupt

    def agreed(self) -> bool:
        """Return whether training stops now. Processes that train together call it after each step and agree, one step later."""
        noted = self._number is not None
        if self._accelerator.num_processes == 1:
            return noted
        before = self._anywhere
        self._anywhere = self._accelerator.reduce(torch.full_like(before, noted), "sum")
        if not before:  # the number of the step before, for which no process has to wait
            return False
        self._number = self._number or signal.SIGTERM  # another process has the signal
        return True

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)
        self._usual = {}
