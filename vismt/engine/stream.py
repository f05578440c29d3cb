"""The batches of one process by number, prepared by a thread or by loader processes while the step before is computed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vismt.config.sections import TrainConfig

Batches = Callable[[int], object]


class _Numbered(Dataset):
    """Batches by number, so that workers can prepare them."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, number: int) -> object:
        return self.batches(number)


def stream_batches(batches: Batches, config: TrainConfig, finished: int, accelerator: Accelerator) -> Iterator[object]:
    """Yield the batches of this process from the first unfinished step on, on its device."""
    world = accelerator.num_processes
    rank = accelerator.process_index
    numbers = range(finished * config.accumulate * world + rank, config.steps * config.accumulate * world, world)
    if not config.workers:
        return (_to(batch, accelerator.device) for batch in prepared_ahead(batches, numbers))
    # The loader draws a seed when it starts. From the global generator this would move the state that a resumed run
    # restored.
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(
        _Numbered(batches),
        batch_size=None,
        sampler=numbers,
        num_workers=config.workers,
        generator=generator,
        worker_init_fn=_ignore_ctrl_c,
    )
    return (_to(batch, accelerator.device) for batch in loader)


def _ignore_ctrl_c(worker: int) -> None:
    """Leave Ctrl-C to the training, which finishes its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def prepared_ahead(batches: Batches, numbers: Sequence[int]) -> Iterator[object]:
    """Yield the batches of some numbers in order. A thread prepares the next batch while the caller works on the last."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for number in numbers:
            batch, coming = coming, pool.submit(batches, number)
            if batch is not None:
                yield batch.result()
        if coming is not None:
            yield coming.result()


def _to(batch: object, device: torch.device) -> object:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: _to(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_to(value, device) for value in batch)
    return batch
