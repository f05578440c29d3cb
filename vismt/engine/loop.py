"""The one training loop. A job gives it an objective and a function from batch number to batch; the rest is here.

The objective is a module: objective(batch) -> {"loss": scalar, ...other scalars to log}. Batch k is a function of k, so a
resumed run sees what an uninterrupted one would have seen, whatever the number of workers. With several processes batch
k goes to process k mod world, so one step of w processes sees w batches.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vismt import console
from vismt.config import TrainConfig
from vismt.engine import checkpoint
from vismt.engine.log import MetricsLog
from vismt.errors import UserError, near
from vismt.registry import method_optimizer, schedules

OPTIMIZERS = ("adamw", "sgd")
Batches = Callable[[int], Any]


class Diverged(UserError):
    """A loss or gradient that is not finite."""


class _Numbered(Dataset):
    """Batch by number, so that workers may prepare them."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, number: int) -> Any:
        return self.batches(number)


def train(
    objective: nn.Module,
    batches: Batches,
    config: TrainConfig,
    folder: Path,
    config_hash: str,
    accelerator: Accelerator,
    *,
    seed: int,
    after_step: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Train the objective's parameters that require a gradient; resumes from the run folder. Returns the last metrics.

    seed: of dropout and the like, one stream a process; the random state outside is left as it was. after_step(step) is
    called after every optimiser step (schedules of a method). Raises Diverged on a loss that is not finite: the
    checkpoint before it stays.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed + accelerator.process_index)
        return _train(objective, batches, config, folder, config_hash, accelerator, after_step)


def _train(
    objective: nn.Module,
    batches: Batches,
    config: TrainConfig,
    folder: Path,
    config_hash: str,
    accelerator: Accelerator,
    after_step: Callable[[int], None] | None,
) -> dict[str, float]:
    # ---- objective, optimiser, schedule -------------------------------------------------------------------------------
    check(config)
    objective.to(accelerator.device).train()
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    if not trained:
        raise UserError("train: nothing is trainable; name a method in the adapt section.")
    optimizer = method_optimizer(make_optimizer(trained, config, with_own_prior(objective)), objective)
    parameters, own_metrics = list(trained.values()), getattr(optimizer, "metrics", dict)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, config) / config.lr)

    # ---- resume: 1. the run folder's own checkpoint, 2. the start values --------------------------------------------------
    finished = checkpoint.load(folder, objective, optimizer, schedule, accelerator.scaler, config_hash)
    log = MetricsLog(folder, finished, accelerator.is_main_process)
    if finished:
        console.stage("resume", f"{folder} at step {finished} of {config.steps}")
    started = time.monotonic() - log.elapsed()
    makers = schedules(objective)
    if makers:  # the processes are wrapped for every parameter that may train, and then not all of them do
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    scheduled = [make(optimizer) for make in makers]
    for one in scheduled:
        one.on_step(finished)
    stream = _stream(batches, config, finished, accelerator)
    first_bad = torch.zeros(
        (), device=accelerator.device
    )  # number of the first step whose loss or gradient was not finite
    last: dict[str, float] = {}

    # ---- steps ---------------------------------------------------------------------------------------------------------
    with console.bar("train", "steps", config.steps, finished) as progress:
        for step in range(finished + 1, config.steps + 1):
            logged, norm = _step(wrapped, stream, config, optimizer, parameters, accelerator)
            # fp16's scaler finds its scale by overflowing: it skips that step, which is no fault and moves no schedule.
            skipped = optimizer.step_was_skipped
            bad = ~torch.isfinite(logged["loss"]) | (~torch.isfinite(norm).to(first_bad.device) & (not skipped))
            first_bad = torch.where(bad & (first_bad == 0), float(step), first_bad)
            now = rate(schedule.last_epoch, config)
            if not skipped:
                schedule.step()
            for one in scheduled:
                one.on_step(step)
            if after_step is not None:
                after_step(step)
            due = step % config.checkpoint_every == 0 or step == config.steps
            if due or step % config.log_every == 0:
                worst = int(accelerator.gather(first_bad.reshape(1)).max())
                if worst:
                    raise Diverged(
                        f"train: the loss or its gradient is not finite at step {worst}; {_last_good(folder)} "
                        "Lower train.lr, raise train.warmup or set train.clip."
                    )
                means = {name: float(accelerator.reduce(value, "mean")) for name, value in logged.items()}
                own = {name: float(value) for name, value in own_metrics().items()}
                last = {"step": step, **means, "lr": now, "grad_norm": float(norm), **own}
                last["elapsed_s"] = time.monotonic() - started
                log.add(last)
                if config.trackers:
                    accelerator.log({name: value for name, value in last.items() if name != "step"}, step=step)
                progress.note("  ".join(f"{name} {last[name]:.3g}" for name in means))
            # ---- checkpoint: only what was found finite
            if due and accelerator.is_main_process:
                checkpoint.save(
                    folder, step, objective, optimizer, schedule, accelerator.scaler, config_hash, parameters
                )
            progress.advance()
    return last


def _step(
    wrapped: nn.Module,
    stream: Iterator[Any],
    config: TrainConfig,
    optimizer: Any,
    parameters: list[Tensor],
    accelerator: Accelerator,
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimiser step over `accumulate` batches: mean metrics and the gradient norm before clipping."""
    sums: dict[str, Tensor] = {}
    for part in range(config.accumulate):
        batch = next(stream)
        last = part == config.accumulate - 1
        with nullcontext() if last else accelerator.no_sync(wrapped):
            with accelerator.autocast():
                losses = wrapped(batch)
            accelerator.backward(losses["loss"] / config.accumulate)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach() / config.accumulate
    norm = accelerator.clip_grad_norm_(parameters, config.clip if config.clip is not None else math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums, torch.as_tensor(norm)


def _stream(batches: Batches, config: TrainConfig, finished: int, accelerator: Accelerator) -> Iterator[Any]:
    """This process's batches from the first unfinished step on, on its device."""
    world, rank = accelerator.num_processes, accelerator.process_index
    numbers = range(finished * config.accumulate * world + rank, config.steps * config.accumulate * world, world)
    # A generator of its own: the loader draws a seed when it starts, which would move the state a resumed run restored.
    own = torch.Generator().manual_seed(0)
    loader = DataLoader(_Numbered(batches), batch_size=None, sampler=numbers, num_workers=config.workers, generator=own)
    return (_to(batch, accelerator.device) for batch in loader)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: _to(value, device) for name, value in batch.items()}
    return type(batch)(_to(value, device) for value in batch) if isinstance(batch, tuple | list) else batch


def with_own_prior(objective: nn.Module) -> set[str]:
    """Names of parameters in modules that say `own_prior`: their loss holds their prior, so weight decay would be another."""
    return {
        f"{path}.{name}" if path else name
        for path, module in objective.named_modules()
        if getattr(module, "own_prior", False)
        for name, _ in module.named_parameters()
    }


def make_optimizer(
    parameters: Mapping[str, Tensor], config: TrainConfig, undecayed: Collection[str] = ()
) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum, over parameters by name: a group for each rate, matrices and the rest apart.

    undecayed: names of matrices without weight decay.
    Raises UserError for a pattern of train.rates that is no regular expression or is found in no name.
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    found = set()
    for name, parameter in parameters.items():
        pattern = next((one for one in config.rates if _search(one, name)), None)
        found.add(pattern)
        groups.setdefault((config.rates.get(pattern, 1.0), parameter.ndim > 1 and name not in undecayed), []).append(
            parameter
        )
    for pattern in config.rates:
        if pattern not in found:
            raise UserError(f"train.rates: '{pattern}' is found in no trained parameter.{near(pattern, parameters)}")
    settings = [
        {"params": group, "lr": config.lr * factor, "weight_decay": config.weight_decay * decays}
        for (factor, decays), group in groups.items()
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(settings, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(settings, lr=config.lr)


def _search(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise UserError(f"train.rates: '{pattern}' is no regular expression ({error}).") from error


def rate(step: int, config: TrainConfig) -> float:
    """Learning rate of step 0, 1, ...: linear over `warmup` steps up to lr, a half cosine down to min_lr, then `cooldown`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, config.steps - config.warmup - config.cooldown)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def check(config: TrainConfig) -> None:
    """Values that no type can exclude."""
    if config.optimizer not in OPTIMIZERS:
        raise UserError(f"train.optimizer: '{config.optimizer}'.{near(config.optimizer, OPTIMIZERS)}")
    for low, names in (
        (1, ("steps", "accumulate", "log_every", "checkpoint_every")),
        (0, ("warmup", "cooldown", "workers")),
    ):
        for name in names:
            if getattr(config, name) < low:
                raise UserError(f"train.{name}: {getattr(config, name)}; it must be at least {low}.")
    if config.warmup + config.cooldown > config.steps:
        raise UserError(
            f"train: warmup {config.warmup} and cooldown {config.cooldown} do not fit into {config.steps} steps."
        )
    for name in ("momentum", "weight_decay", "min_lr"):
        if not getattr(config, name) >= 0:
            raise UserError(f"train.{name}: {getattr(config, name)}; it must not be negative.")
    for pattern, factor in config.rates.items():
        if not 0 <= factor < math.inf:
            raise UserError(f"train.rates: {pattern}: {factor}; it must be 0 or more.")
    if not config.lr > 0:
        raise UserError(f"train.lr: {config.lr}; it must be positive.")
    if config.clip is not None and not config.clip > 0:
        raise UserError(f"train.clip: {config.clip}; it must be positive, or null for none.")


def _last_good(folder: Path) -> str:
    path = folder / checkpoint.NAME
    return f"the last good checkpoint is kept in {path}." if path.exists() else "no checkpoint had been written yet."
