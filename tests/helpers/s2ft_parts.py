"""S2FT in a plain loop on the tiny Llama; as a script, a rank of two processes: python s2ft_parts.py FOLDER."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import vismt
from helpers.lisa_parts import Objective, case, tokens
from helpers.tiny import snapshot
from vismt.base.errors import UserError


def sliced(seed: int = 3) -> nn.Module:
    model = case("llama").model
    vismt.adapt(model, "s2ft", ratio=0.4, parts=("v", "o", "u", "d"), seed=seed)
    return model


def steps(model: nn.Module, numbers: Callable[[int], list[int]]) -> None:
    """Take five optimiser steps, each on the mean loss of its batches."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for step in range(5):
        for number in numbers(step):
            batch = tokens(number)
            (model(input_ids=batch, labels=batch).loss / len(numbers(step))).backward()
        optimizer.step()
        optimizer.zero_grad()


def rank_main(folder: Path) -> None:
    """Train under DDP and the engine's loop."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from vismt.config.sections import TrainConfig
    from vismt.engine import loop, runtime

    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), {}
    model = sliced()
    steps(DistributedDataParallel(model), lambda step: [2 * step + rank])
    results.update(snapshot(model))
    vismt.merge(model)
    results.update({f"merged.{name}": value for name, value in snapshot(model).items()})

    model = sliced()
    config = TrainConfig(steps=5, lr=1e-2, weight_decay=0.1, clip=None, checkpoint_every=5)
    loop.train(Objective(model), tokens, config, folder / "loop", "hash", runtime.accelerator(), seed=0)
    results.update({f"loop.{name}": value for name, value in snapshot(model).items()})
    try:
        sliced(seed=rank)
    except UserError as error:
        results["refused"] = torch.tensor("the processes chose different units" in str(error))
    torch.save(results, folder / f"{rank}.pt")
    del model
    runtime.leave()


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
