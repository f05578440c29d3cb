"""Balancing of tasks: from T losses to one scalar whose gradient is the direction a method asks for.

    d = sum_t alpha_t g_t,    g_t = gradient of L_t on the given parameters (the adapter's), one flat vector a task

Every method known here has this form, so that all one needs is alpha. `combine` returns a scalar to call backward on, which
goes with accumulation, clipping, loss scaling and DistributedDataParallel as any loss does. loss_weighting.py: alpha from
the losses. gradient_balancing.py: alpha from the Gram matrix <g_s, g_t> (T x T, float64, solved on the CPU); this costs a
backward pass for each task beside the usual one, and memory for T gradients of the given parameters (task_gradients.py).

Several processes: L_t is the mean over the processes whose batch has the task, g_t the mean of gradients and not of Gram
matrices, so that alpha is the same everywhere; the scalar is scaled so that the mean of gradients which
DistributedDataParallel takes is d. The same as one process on the concatenated batch where processes hold equally many
labels of a task. Parameters outside the given ones (heads) must be in the graph of every process or found as unused.

Partial labels: a task without labels in the batch is left out of `losses`; it has no weight and moves no state, and every
formula is taken over the present tasks unless the method says otherwise. With gradient accumulation each batch is balanced
by itself. The state is in buffers and parameters: parameters (uncertainty, IMTL) train with the model.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vismt.errors import UserError, near, require_known

METHOD_FILES = ("vismt.multitask.loss_weighting", "vismt.multitask.gradient_balancing")

_balancers: dict[str, type[Balancer]] = {}


def register_balancer(name: str) -> Callable[[type[Balancer]], type[Balancer]]:
    """Decorator: the class is known to `make_balancer` as `name`."""

    def keep(kind: type[Balancer]) -> type[Balancer]:
        kind.name = name
        _balancers[name] = kind
        return kind

    return keep


def balancers() -> dict[str, type[Balancer]]:
    """Every balancing method by name."""
    for path in METHOD_FILES:
        importlib.import_module(path)
    return dict(sorted(_balancers.items()))


def make_balancer(name: str, tasks: Sequence[str], **options: Any) -> Balancer:
    """The balancer `name` for these tasks. options: see the method's class, `Balancer` and `GradientBalancer`.

    Raises UserError for an unknown method or option, a value out of range and repeated or missing task names.
    """
    known = balancers()
    require_known("balancing: no method", [name], known)
    require_known(f"balancing: '{name}' has no option", options, balancer_options(known[name]))
    return known[name](tasks, **options)


def balancer_options(kind: type[Balancer]) -> list[str]:
    """Names of a method's options, those of its base classes included."""
    inits = [vars(base)["__init__"] for base in kind.__mro__ if issubclass(base, Balancer) and "__init__" in vars(base)]
    parameters = [parameter for init in inits for parameter in inspect.signature(init).parameters.values()]
    return list(dict.fromkeys(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY))


@dataclass(frozen=True)
class TaskLosses:
    """losses: this process's, by task number, scaled so that their mean over the processes is L_t. means: L_t of every task
    (T,), 0 where absent, without gradient. present: (T,) bool on the CPU, whether any process has the task.
    """

    losses: dict[int, Tensor]
    means: Tensor
    present: Tensor

    def host(self) -> Tensor:
        """L_t (T,) in float64 on the CPU."""
        return self.means.cpu().double()


class Balancer(nn.Module):
    """Base of all methods: checks, partial labels, several processes.

    tasks: names, in the order of every vector. weights: fixed factors of the losses before any balancing, 1 where unnamed.
    """

    name: str
    calls: Tensor
    alpha: Tensor

    def __init__(self, tasks: Sequence[str], *, weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks) or isinstance(tasks, str):
            raise UserError(f"balancing: tasks {tasks!r}; need one or more different names.")
        for task, weight in (weights or {}).items():
            self._number(task, "weights")
            in_range(f"weights.{task}", weight, 0 < weight < math.inf, "positive")
        self.weights = tuple(float((weights or {}).get(task, 1.0)) for task in self.tasks)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))  # of combine while training
        self.register_buffer("alpha", torch.zeros(len(self.tasks)), persistent=False)

    def last_alpha(self) -> dict[str, Tensor]:
        """alpha_t of the last call by task, scalars to log; 0 for a task that was absent."""
        return {task: self.alpha[number].clone() for number, task in enumerate(self.tasks)}

    def combine(self, losses: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """One scalar to call backward on, once. losses: scalars by task, absent ones left out, over this process's batch.

        parameters: those whose gradients are balanced, in the graph or not; frozen ones and the balancer's own are passed
        over. In eval mode and under no_grad it is the sum of the losses and no state moves. Raises UserError for an unknown
        task, a loss that is no scalar or has no graph, and when nothing is trainable.
        """
        weighted = {number: self.weights[number] * loss for number, loss in self._checked(losses).items()}
        own = {id(parameter) for parameter in self.parameters()}
        parameters = [parameter for parameter in parameters if parameter.requires_grad and id(parameter) not in own]
        if not parameters:
            raise UserError(
                "balancing: none of the parameters to balance is trainable; name a method in the adapt section."
            )
        # A parameter that only other processes reach must take part in the mean of gradients here, too: 0, with a gradient of 0.
        tied = parameters if processes() > 1 or not weighted else ()
        nothing = sum((p.flatten()[:0].sum() for p in (*tied, *self.parameters())), parameters[0].new_zeros(()))
        if not (self.training and torch.is_grad_enabled()):
            return sum(weighted.values(), nothing)
        for number, loss in weighted.items():
            if not loss.requires_grad:
                raise UserError(
                    f"balancing: the loss of '{self.tasks[number]}' has no graph; leave an absent task out."
                )
        with torch.autocast(parameters[0].device.type, enabled=False):
            batch = self._gather(weighted, parameters[0])
            result = nothing + self.surrogate(batch, parameters) if batch.present.any() else nothing
        self.calls += 1
        return result

    def surrogate(self, batch: TaskLosses, parameters: Sequence[Tensor]) -> Tensor:
        """The scalar for a batch with at least one task: sum_t alpha_t L_t."""
        alpha = self.weigh(batch)
        self.alpha.copy_(alpha)
        return sum((alpha[number].item() * loss for number, loss in batch.losses.items()), batch.means.new_zeros(()))

    def weigh(self, batch: TaskLosses) -> Tensor:
        """Alpha (T,), float64 on the CPU, 0 for absent tasks."""
        return batch.present.double()

    def rescale(self, number: int, loss: Tensor) -> Tensor:
        """Task `number`'s loss under factors that are learned with the model; here the loss itself."""
        return loss

    def _number(self, task: str, what: str) -> int:
        if task not in self.tasks:
            raise UserError(f"balancing.{what}: no task '{task}'.{near(str(task), self.tasks)}")
        return self.tasks.index(task)

    def _checked(self, losses: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Losses by task number, in the order of the tasks, in float32 at least."""
        found: dict[int, Tensor] = {}
        for task, loss in losses.items():
            number = self._number(task, "losses")
            if loss.numel() != 1:
                raise UserError(f"balancing: the loss of '{task}' has shape {tuple(loss.shape)}; it must be a scalar.")
            found[number] = loss.reshape(()) if loss.dtype == torch.float64 else loss.reshape(()).float()
        return dict(sorted(found.items()))

    def _gather(self, losses: dict[int, Tensor], like: Tensor) -> TaskLosses:
        kind = torch.float64 if like.dtype == torch.float64 else torch.float32  # the same on a process without any task
        totals = torch.zeros(2, len(self.tasks), dtype=kind, device=like.device)
        for number, loss in losses.items():
            totals[0, number], totals[1, number] = loss.detach(), 1
        present = torch.tensor([number in losses for number in range(len(self.tasks))])
        rescaled = {number: self.rescale(number, loss) for number, loss in losses.items()}
        if processes() > 1:
            dist.all_reduce(totals)
            rescaled = {number: loss * (processes() / totals[1, number]) for number, loss in rescaled.items()}
            present = (totals[1] > 0).cpu()
        return TaskLosses(rescaled, totals[0] / totals[1].clamp_min(1), present)


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def one_of(option: str, value: str, known: Sequence[str]) -> None:
    """A choice of a method, or a UserError."""
    if value not in known:
        raise UserError(f"balancing.{option}: '{value}'.{near(str(value), known)}")


def in_range(option: str, value: float, fits: bool, need: str) -> None:
    """A number of a method, or a UserError."""
    if not fits:
        raise UserError(f"balancing.{option}: {value}; it must be {need}.")
