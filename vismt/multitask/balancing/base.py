"""Task balancing: from T losses to one scalar with the gradient that a balancing method defines.

    d = sum_t alpha_t g_t,    g_t = gradient of L_t with respect to the given parameters (the adapter's), flattened to one vector

All methods of this package have this form and differ in alpha. `combine` returns a scalar to call backward on. The scalar works
with accumulation, clipping, loss scaling and DistributedDataParallel like any loss. losses.py computes alpha from the losses.
gradients.py computes alpha from the Gram matrix <g_s, g_t>. That costs a backward pass for each task instead of the usual one,
and memory for T gradients of the given parameters. torchjd_methods.py takes alpha from a method of torchjd.

With several processes, L_t is the mean over the processes whose batch has the task, and g_t is the mean of the gradients (not
of Gram matrices). alpha is therefore equal on all processes. The scalar is scaled so that DistributedDataParallel's mean of
gradients is d. The result equals the result of one process on the concatenated batch if the processes hold equally many labels
of a task. Parameters outside the given ones (heads) must be in the graph of every process, or find_unused_parameters must
handle them.

With partial labels, a task without labels in the batch is left out of `losses`. It has no weight, its state does not change,
and every formula runs over the present tasks unless the method states otherwise. With gradient accumulation each batch is
balanced on its own. Buffers and parameters hold the state. Parameters (of uncertainty weighting) train with the model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vismt.base.errors import UserError, require_known, shown_value
from vismt.base.registry import Registry

BALANCERS: Registry[type[Balancer]] = Registry(
    "balancing: no method",
    dict.fromkeys(("dwa", "ew", "famo", "uncertainty"), "vismt.multitask.balancing.losses")
    | dict.fromkeys(("fairgrad", "nash"), "vismt.multitask.balancing.gradients")
    | {"torchjd:": "vismt.multitask.balancing.torchjd_methods"},
)


def make_balancer(name: str, tasks: Sequence[str], **options: Any) -> Balancer:
    """Return a new balancer.

    Args:
        name: Name of the method, a key of `BALANCERS`, or "torchjd:NAME" for a method of the installed torchjd.
        tasks: Names of the tasks, in the order of every vector of the balancer.
        options: Options of the method's class, of `Balancer` and of `GradientBalancer`.

    Raises:
        UserError: If a method or option is unknown, a value is out of range, or task names are repeated or missing.
    """
    method = BALANCERS[name]
    require_known(f"balancing: '{name}' has no option", options, method.options())
    return method(tasks, **options)


@dataclass(frozen=True)
class TaskLosses:
    """Losses of one batch.

    Attributes:
        losses: Losses of this process by task number, scaled so that their mean over the processes is L_t.
        means: L_t of every task (T,), 0 for absent tasks, without gradient.
        present: Tensor (T,) bool on the CPU, whether any process has the task.
        retain_graph: Whether the graph of the losses has to be kept.
    """

    losses: dict[int, Tensor]
    means: Tensor
    present: Tensor
    retain_graph: bool = True

    def host(self) -> Tensor:
        """Return L_t (T,) in float64 on the CPU."""
        return self.means.cpu().double()


class Balancer(nn.Module):
    """Base class of all methods: checks of the input, partial labels, several processes.

    Args:
        tasks: Names of the tasks, in the order of every vector.
        weights: Fixed factors of the losses, applied before balancing. A task without an entry has 1.
    """

    calls: Tensor
    alpha: Tensor

    @classmethod
    def options(cls) -> list[str]:
        """Return the names of the method's options, including the options of its base classes."""
        initialisers = [
            vars(base)["__init__"] for base in cls.__mro__[: cls.__mro__.index(nn.Module)] if "__init__" in vars(base)
        ]
        parameters = [p for item in initialisers for p in inspect.signature(item).parameters.values()]
        return list(dict.fromkeys(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY))

    def __init__(self, tasks: Sequence[str], *, weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks) or isinstance(tasks, str):
            raise UserError(f"balancing: tasks {shown_value(tasks)}; need one or more different names.")
        for task, weight in (weights or {}).items():
            self._number(task, "weights")
            check_range(f"weights.{task}", weight, 0 < weight < math.inf, "positive")
        self.weights = tuple(float((weights or {}).get(task, 1.0)) for task in self.tasks)
        # number of calls of `combine` in training mode
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("alpha", torch.zeros(len(self.tasks)), persistent=False)

    def last_alpha(self) -> dict[str, Tensor]:
        """Return alpha_t of the last call by task, as scalars for the log. Absent tasks have 0."""
        return {task: self.alpha[number].clone() for number, task in enumerate(self.tasks)}

    def combine(
        self, losses: Mapping[str, Tensor], parameters: Sequence[Tensor], *, retain_graph: bool = True
    ) -> Tensor:
        """Return one scalar to call backward on, once.

        In eval mode and under no_grad it is the sum of the losses, and no state changes.

        Args:
            losses: Scalars by task, over the batch of this process, without the absent tasks.
            parameters: Parameters whose gradients are balanced, in the graph or not. Frozen parameters and parameters of the
                balancer are ignored.
            retain_graph: Whether the graph of the losses is kept. False lets a method that takes gradients free the graph, for
                less memory, if no other loss needs it.

        Raises:
            UserError: If a task is unknown, a loss is not a scalar or has no graph, or no parameter is trainable.
        """
        weighted = {number: self.weights[number] * loss for number, loss in self._checked(losses).items()}
        parameters = self.balanced(parameters)
        # Parameters that only other processes reach must also take part in the mean of gradients here, with a gradient
        # of 0.
        tied = parameters if count_processes() > 1 or not weighted else ()
        zero = sum((p.flatten()[:0].sum() for p in (*tied, *self.parameters())), parameters[0].new_zeros(()))
        if not (self.training and torch.is_grad_enabled()):
            return sum(weighted.values(), zero)
        for number, loss in weighted.items():
            if not loss.requires_grad:
                raise UserError(
                    f"balancing: the loss of '{self.tasks[number]}' has no graph; leave an absent task out."
                )
        with torch.autocast(parameters[0].device.type, enabled=False):
            batch = replace(self._gather(weighted, parameters[0]), retain_graph=retain_graph)
            result = zero + self.surrogate(batch, parameters) if batch.present.any() else zero
        self.calls += 1
        return result

    def balanced(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the parameters that are balanced: trainable, and not parameters of the balancer.

        Raise UserError if there are none.
        """
        ignored = {id(parameter) for parameter in self.parameters()}
        chosen = [p for p in parameters if p.requires_grad and id(p) not in ignored]
        if not chosen:
            raise UserError(
                "balancing: none of the parameters to balance is trainable; name a method in the adapt section."
            )
        return chosen

    def update(self, losses: Mapping[str, Tensor]) -> None:
        """Take the losses of the latest batch after the optimiser's step. Call it on every process.

        Raises:
            UserError: If `combine` would raise it.
        """

    def surrogate(self, batch: TaskLosses, parameters: Sequence[Tensor]) -> Tensor:
        """Return the scalar sum_t alpha_t L_t of a batch with at least one task."""
        alpha = self.weigh(batch)
        self.alpha.copy_(alpha)
        return weighted_sum(batch, alpha)

    def weigh(self, batch: TaskLosses) -> Tensor:
        """Return alpha (T,), float64 on the CPU, 0 for absent tasks."""
        return batch.present.double()

    def rescale(self, number: int, loss: Tensor) -> Tensor:
        """Return the loss of task `number` with factors that are learned with the model. In this class it is the loss itself."""
        return loss

    def _number(self, task: str, where: str) -> int:
        require_known(f"balancing.{where}: no task", [task], self.tasks)
        return self.tasks.index(task)

    def _checked(self, losses: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Return the losses by task number, in the order of the tasks, in at least float32."""
        checked: dict[int, Tensor] = {}
        for task, loss in losses.items():
            number = self._number(task, "losses")
            if loss.numel() != 1:
                raise UserError(f"balancing: the loss of '{task}' has shape {tuple(loss.shape)}; it must be a scalar.")
            checked[number] = loss.reshape(()) if loss.dtype == torch.float64 else loss.reshape(()).float()
        return dict(sorted(checked.items()))

    def _gather(self, losses: dict[int, Tensor], like: Tensor) -> TaskLosses:
        # The dtype does not follow the losses, because it must be equal on a process without any task.
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        # Sums of losses, and numbers of processes.
        totals = torch.zeros(2, len(self.tasks), dtype=dtype, device=like.device)
        for number, loss in losses.items():
            totals[0, number] = loss.detach()
            totals[1, number] = 1
        present = torch.tensor([number in losses for number in range(len(self.tasks))])
        rescaled = {number: self.rescale(number, loss) for number, loss in losses.items()}
        if count_processes() > 1:
            dist.all_reduce(totals)
            rescaled = {number: loss * (count_processes() / totals[1, number]) for number, loss in rescaled.items()}
            present = (totals[1] > 0).cpu()
        return TaskLosses(rescaled, totals[0] / totals[1].clamp_min(1), present)


def weighted_sum(batch: TaskLosses, alpha: Tensor) -> Tensor:
    """Return sum_t alpha_t L_t over this process's losses."""
    return sum((alpha[number].item() * loss for number, loss in batch.losses.items()), batch.means.new_zeros(()))


def count_processes() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_range(option: str, value: float, valid: bool, requirement: str) -> None:
    """Raise UserError unless `valid`."""
    if not valid:
        raise UserError(f"balancing.{option}: {value}; it must be {requirement}.")
