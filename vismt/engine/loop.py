"""The training loop of all jobs. A job passes an objective and a function from batch number to batch.

The objective is a module: objective(batch) -> {"loss": scalar, ...other scalars to log}. Batch k is a function of k, so a
resumed run gets the same batches as an uninterrupted run, for any number of workers. With several processes, batch k goes to
process k mod world, so one step of w processes takes w batches.

A step of several batches (`accumulate`, processes) takes the mean of their losses. If "loss" is a mean over examples or tokens
whose number n differs between batches, objective.examples(batch) returns n as a scalar tensor, and the batches are weighted by
it:

    gradient = sum_k n_k grad loss_k / sum_k n_k          the gradient of one batch of all these examples
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from vismt.base import console
from vismt.base.errors import Diverged, UserError
from vismt.base.seeds import mix_seed
from vismt.config.sections import TrainConfig, flat
from vismt.engine import checkpoint, runtime
from vismt.engine.blocks import running_blocks
from vismt.engine.log import MetricsLog
from vismt.engine.optimizer import make_optimizer, make_schedule, rate, with_own_prior
from vismt.engine.sharding import Shards, check_sharded
from vismt.engine.stopping import StopRequest
from vismt.engine.stream import Batches, stream_batches
from vismt.lowrank.recompute import recompute
from vismt.lowrank.tensors import whole
from vismt.methods import freezes, method_optimizer, schedules


def train(
    objective: nn.Module,
    batches: Batches,
    config: TrainConfig,
    folder: Path,
    config_hash: str,
    accelerator: Accelerator,
    *,
    seed: int,
    after_step: Callable[[nn.Module, int], None] | None = None,
    after_save: Callable[[int], object] | None = None,
    sections: Any = None,
    name: str = "",
) -> dict[str, float]:
    """Train the parameters of the objective that require a gradient, from the run folder's checkpoint if there is one.

    Ctrl-C and SIGTERM finish the step and write its checkpoint before they have their usual effect.

    Args:
        objective: Module with objective(batch) -> {"loss": scalar, ...other scalars to log}, and examples(batch) if it differs
            between batches.
        batches: Function from number to batch.
        config: Section `train` of the run.
        folder: Folder for checkpoints and log.
        config_hash: Hash of the run. A checkpoint of another configuration is refused.
        accelerator: Accelerator, see engine/runtime.py. Its trackers get the same values as metrics.jsonl.
        seed: Seed of dropout and other random draws, with one stream for each process. The outer random state is restored.
        after_step: Function that is called with the running objective and the number of finished steps after every optimiser
            step.
        after_save: Function that is called after every checkpoint.
        sections: Configuration of the run, for schedules of methods and for trackers.
        name: Name of the training, for trackers.

    Returns:
        The last logged metrics.

    Raises:
        Diverged: If a loss or gradient is not finite. The latest checkpoint is kept.
    """
    if runtime.sharded():
        check_sharded(objective, config)
    with torch.random.fork_rng(), running_blocks(objective, config):
        torch.manual_seed(seed + accelerator.process_index)
        training = _Training(objective, batches, config, folder, config_hash, accelerator, sections)
        if config.trackers:
            values = flat(asdict(sections))
            settings = {key: value if isinstance(value, int | float) else str(value) for key, value in values.items()}
            begun = {"mlflow": {"run_name": name}, "wandb": {"name": name, "dir": str(folder)}}
            accelerator.init_trackers("vismt", settings, begun)
        try:
            return training.run(after_step, after_save)
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()


@dataclass(eq=False)
class _Training:
    """Objective, optimiser, schedules, checkpoint and log of one training."""

    objective: nn.Module
    batches: Batches
    config: TrainConfig
    folder: Path
    config_hash: str
    accelerator: Accelerator
    sections: Any

    def __post_init__(self) -> None:
        objective, config, folder, accelerator = self.objective, self.config, self.folder, self.accelerator
        objective.to(runtime.net_device()).train()
        self.kept = self._make_optimizer(objective)

        # Training starts from 1. the run folder's newest sound checkpoint, 2. the start values.
        own_seed = torch.initial_seed()
        self.finished, updates = checkpoint.load(folder, objective, self.kept, accelerator.scaler, self.config_hash)
        if self.finished and accelerator.process_index:  # a checkpoint has the random state of the first process
            torch.manual_seed(mix_seed(own_seed, "resumed", self.finished))
        self.shards: Shards | None = None
        self.running, optimizer = objective, self.kept
        if runtime.sharded():
            self.shards = Shards(objective, self.kept, self._make_optimizer, accelerator.device)
            self.running, optimizer = self.shards.module, self.shards.optimizer
        self.parameters = [parameter for parameter in self.running.parameters() if parameter.requires_grad]
        clipped = getattr(self.running, "clipped", None)
        self.clipped = self.parameters if clipped is None else [p for p in clipped if p.requires_grad]
        self.schedule = make_schedule(optimizer, config, updates)
        logged = max(self.finished - self.finished % every for every in (config.log_every, config.checkpoint_every))
        self.log = MetricsLog(folder, self.finished, logged, accelerator.is_main_process)
        if self.finished:
            console.stage("resume", f"{folder} at step {self.finished} of {config.steps}")
        self.started = time.monotonic() - self.log.elapsed_s
        runtime.reset_peak_memory()
        if freezes(objective):  # DDP wraps every parameter that may train, and not every step trains all of them
            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        if self.shards:
            self.wrapped, self.optimizer = self.running, accelerator.prepare_optimizer(optimizer, False)
        else:
            self.wrapped, self.optimizer = accelerator.prepare(objective, optimizer)
        self.method_schedules = schedules(self.running, self.optimizer, config.steps, self.sections)
        for schedule in self.method_schedules:
            schedule.on_step(self.finished)
        self.measured = [optimizer, *self.method_schedules]
        self.stream = stream_batches(self.batches, config, self.finished, accelerator)
        # Number of the first step whose loss or gradient was not finite. It is read when something is logged.
        self.first_bad = torch.zeros((), device=accelerator.device)

    def _make_optimizer(self, objective: nn.Module) -> torch.optim.Optimizer:
        """Return the optimiser of an objective's trainable parameters, with what its methods add."""
        trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        if not trained:
            raise UserError("train: nothing is trainable; name a method in the adapt section.")
        return method_optimizer(make_optimizer(trained, self.config, with_own_prior(objective)), objective)

    def run(
        self,
        after_step: Callable[[nn.Module, int], None] | None,
        after_save: Callable[[int], object] | None,
    ) -> dict[str, float]:
        config = self.config
        last: dict[str, float] = {}
        with (
            StopRequest(self.accelerator, self.folder, config.steps, self.finished) as stop,
            console.bar("train", "step", config.steps, self.finished) as progress,
        ):
            for step in range(self.finished + 1, config.steps + 1):
                logged, norm, lr = self._step(step)
                due = step % config.checkpoint_every == 0 or step == config.steps
                logs = due or step % config.log_every == 0
                measured = [source.metrics() for source in self.measured if logs and hasattr(source, "metrics")]
                metrics = {name: float(value) for values in measured for name, value in values.items()}
                for schedule in self.method_schedules:
                    schedule.on_step(step)
                if after_step is not None:
                    after_step(self.running, step)
                if logs:
                    last = self._write_log(step, logged, {"lr": lr, "grad_norm": float(norm), **metrics})
                    self.accelerator.log({name: value for name, value in last.items() if name != "step"}, step)
                    progress.note("  ".join(f"{name} {last[name]:.3g}" for name in logged))
                stopping = stop.agreed()
                if stopping and not logs:
                    self._need_finite()
                if due or stopping:  # the step is finished
                    self._save(step)
                    stop.saved = step
                    if after_save is not None:
                        after_save(step)
                progress.advance()
                if stopping:
                    break
        return last

    def _save(self, step: int) -> None:
        if self.shards:
            self.shards.gather()
        if self.accelerator.is_main_process:
            self.log.sync()
            updates, scaler = self.schedule.last_epoch, self.accelerator.scaler
            every = self.config.checkpoint_every
            checkpoint.save(self.folder, step, self.objective, self.kept, updates, scaler, self.config_hash, every)

    def _step(self, step: int) -> tuple[dict[str, Tensor], Tensor, float]:
        """Run optimiser step `step`. Return the mean metrics, the gradient norm before clipping, and the rate."""
        logged, norm = self._update()
        # fp16's scaler finds its scale by overflowing. It skips such a step. The skip is not an error, and the schedules stay.
        skipped = self.optimizer.step_was_skipped
        bad = ~torch.isfinite(logged["loss"]) | (~torch.isfinite(norm).to(self.first_bad.device) & (not skipped))
        self.first_bad = torch.where(bad & (self.first_bad == 0), float(step), self.first_bad)
        lr = rate(self.schedule.last_epoch, self.config)
        if not skipped:
            self.schedule.step()
        return logged, norm, lr

    def _update(self) -> tuple[dict[str, Tensor], Tensor]:
        """Run one optimiser step over `accumulate` batches. Return mean metrics and the gradient norm before clipping."""
        config, accelerator = self.config, self.accelerator
        sums: dict[str, Tensor] = {}
        batches = [next(self.stream) for _ in range(config.accumulate)]
        for part, (batch, share) in enumerate(zip(batches, self._shares(batches))):
            last = part == config.accumulate - 1
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                cheap = recompute(self.wrapped) if config.recompute == "cheap" else nullcontext()
                with cheap, accelerator.autocast():
                    losses = self.wrapped(batch)
                accelerator.backward(losses["loss"] * share)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() * (share if name == "loss" else 1 / config.accumulate)
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sums, whole(norm)

    def _shares(self, batches: Sequence[object]) -> Sequence[float | Tensor]:
        """Return the weight of each batch's loss in this process. The mean of the weights over the processes adds up to 1."""
        examples: Callable[[object], Tensor] | None = getattr(self.running, "examples", None)
        if examples is None:
            return [1 / len(batches)] * len(batches)
        counts = torch.stack([examples(batch) for batch in batches]).float()
        return counts / self.accelerator.reduce(counts.sum(), "mean")

    def _clip(self) -> Tensor:
        """Clip the gradient of the parameters that the objective names. Return the norm of the whole gradient before that."""
        limit = math.inf if self.config.clip is None else self.config.clip
        if self.clipped is self.parameters:
            return torch.as_tensor(self.accelerator.clip_grad_norm_(self.parameters, limit))
        norm = self.accelerator.clip_grad_norm_(self.parameters, math.inf)  # takes the scale of fp16 out
        if self.config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.clipped, limit)
        return torch.as_tensor(norm)

    def _write_log(self, step: int, logged: Mapping[str, Tensor], further: Mapping[str, float]) -> dict[str, float]:
        """Write a line of metrics averaged over the processes. Raise Diverged if a step was not finite."""
        accelerator = self.accelerator
        self._need_finite()
        means = {name: float(accelerator.reduce(value, "mean")) for name, value in logged.items()}
        line = {"step": step, **means, **further, "elapsed_s": time.monotonic() - self.started}
        line |= runtime.peak_memory()
        self.log.add(line)
        return line

    def _need_finite(self) -> None:
        """Raise Diverged if a step of any process was not finite."""
        worst = int(self.accelerator.gather(self.first_bad.reshape(1)).max())
        if worst:
            paths = checkpoint.checkpoints(self.folder)
            kept = f"the last good checkpoint is kept in {paths[0]}" if paths else "no checkpoint had been written yet"
            raise Diverged(
                f"train: the loss or its gradient is not finite at step {worst}; {kept}. "
                "Lower train.lr, raise train.warmup or set train.clip."
            )
