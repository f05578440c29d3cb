"""Ctrl-C and SIGTERM in a training: the step is finished and saved, and then the signal has its usual effect."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Notes the first of SIGNALS inside the block, and raises it again at the end of the block; a second one acts at once."""

    def __init__(self, accelerator: Accelerator) -> None:
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
        if self._number is not None:
            signal.raise_signal(self._number)

    def agreed(self) -> bool:
        """Return whether training stops now. Processes that train together call it after each step and agree, one step later."""
        noted = self._number is not None
        if self._accelerator.num_processes == 1:
            return noted
        before = self._anywhere
        self._anywhere = self._accelerator.reduce(torch.full_like(before, noted), "sum")
        if not before:  # of the step before, for which no process has to wait
            return False
        self._number = self._number or signal.SIGTERM  # of another process
        return True

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)
        self._usual = {}
