"""Balancing methods of the installed torchjd: `balancing: {method: "torchjd:UPGrad"}`, "torchjd:MGDA", "torchjd:CAGrad", ...

    aggregators (torchjd.aggregation)       d = sum_t alpha_t g_t, alpha a function of the Gram matrix M: torchjd gets a T x T
                                            matrix with this M in place of the gradients, and the balanced gradient is its own
    scalarizers (torchjd.scalarization)     a function F(L_1, ..., L_T): alpha_t = dF / dL_t at the mean losses of the processes

Options are the arguments of torchjd's class, with lists for tensors, and the options of `GradientBalancer` (aggregators) or
`Balancer` (scalarizers). If both have an option of one name, the option of the balancer counts. Absent tasks are left out, as
in the other methods. If torchjd draws random numbers, they are a function of (seed, number of the call). A name that is both
means the scalarizer, which needs no gradient of a single task. Left out: methods with state, which no checkpoint would hold
(GradVac, and NashMTL, which is `nash` here), methods that do not weigh gradients (ConFIG, GradDrop, TrimmedMean), and methods
that need `weights`, the fixed factors of `Balancer`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vismt.base.errors import UserError, require_known
from vismt.multitask.balancing.base import BALANCERS, Balancer, TaskLosses, check_range
from vismt.multitask.balancing.gradients import GradientBalancer

_PREFIX = "torchjd"


class TorchJdMethod(Balancer):
    """Base class of the methods of torchjd.

    Args:
        tasks: Names of the tasks.
        seed: Seed of random numbers, if the method draws some.
        options: Arguments of the class in torchjd, and of the base class.
    """

    theirs: ClassVar[type]

    def __init__(self, tasks: Sequence[str], *, seed: int = 0, **options: Any) -> None:
        given = {name: options.pop(name) for name in _arguments(type(self)) if name in options}
        super().__init__(tasks, **options)
        check_range("seed", seed, seed >= 0, "0 or more")
        self.seed = seed
        lists = {name: value for name, value in given.items() if isinstance(value, list | tuple)}
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in lists.items()}
        with self.drawn():
            # The vector is in a tuple, so that it stays on the CPU in float64, where alpha is computed.
            self.method = (self.theirs(**{**given, **tensors}),)

    @classmethod
    def options(cls) -> list[str]:
        return [*super().options(), *_arguments(cls)]

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Seed torch's random numbers inside the block, and raise UserError for anything that torchjd refuses."""
        calls = int(self.calls)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(np.random.default_rng([self.seed, calls]).integers(2**62)))
                yield
        except (ImportError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"balancing: '{_PREFIX}:{self.theirs.__name__}': {reason}") from error


class TorchJdAggregator(TorchJdMethod, GradientBalancer):
    """A method that weighs the gradients of the tasks."""

    def solve(self, gram: Tensor, tasks: Tensor, losses: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(gram)
        rows = vectors * values.clamp_min(0).sqrt()  # vectors with this Gram matrix
        with self.drawn(), torch.no_grad():
            return self.method[0].weighting(rows)


class TorchJdScalarizer(TorchJdMethod):
    """A method that weighs the losses of the tasks."""

    def weigh(self, batch: TaskLosses) -> Tensor:
        losses = batch.host()[batch.present].requires_grad_()
        with self.drawn():
            (slopes,) = torch.autograd.grad(self.method[0](losses), losses)
        return torch.zeros(len(self.tasks), dtype=torch.float64).masked_scatter(batch.present, slopes)


def methods() -> dict[str, type]:
    """Return the classes of the installed torchjd that can be hosted, by name. Raise UserError without torchjd."""
    try:
        aggregation = importlib.import_module("torchjd.aggregation")
        scalarization = importlib.import_module("torchjd.scalarization")
        stateful = importlib.import_module("torchjd").Stateful
    except (ImportError, AttributeError) as error:
        raise UserError(
            f'balancing: the methods of torchjd need torchjd 0.18 ({error}): pip install "vismt[torchjd]".'
        ) from error
    bases = (aggregation.WeightedAggregator, aggregation.GramianWeightedAggregator, scalarization.Scalarizer)
    found = {}
    for name, item in {**vars(aggregation), **vars(scalarization)}.items():
        if not inspect.isclass(item) or not issubclass(item, bases) or item in bases or issubclass(item, stateful):
            continue
        weights = inspect.signature(item).parameters.get("weights")
        if weights is None or weights.default is not inspect.Parameter.empty:
            found[name] = item
    return found


@functools.cache
def host_balancer(name: str) -> type[Balancer]:
    """Use a method of the installed torchjd (torchjd:UPGrad, torchjd:IMTLG, ...). Options are the arguments of its class."""
    known = methods()
    require_known("balancing: torchjd has no method", [name], known)
    scalarizer = issubclass(known[name], importlib.import_module("torchjd.scalarization").Scalarizer)
    return type(name, (TorchJdScalarizer if scalarizer else TorchJdAggregator,), {"theirs": known[name]})


def _arguments(method: type[TorchJdMethod]) -> list[str]:
    """Return the arguments of a method's class in torchjd, without the arguments that the base classes have."""
    own = super(TorchJdMethod, method).options()
    return [name for name in inspect.signature(method.theirs).parameters if name not in own]


BALANCERS.family(_PREFIX, host_balancer)
