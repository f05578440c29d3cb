"""Values for each sample of a batch that reach every layer by a context: gates of rank groups.

The values do not pass through the model's calls. The context is a ContextVar. Threads and tasks that run at the same time see
their own values, and nothing stays behind when the block ends. torch.compile cannot trace a ContextVar, so compiled code reads
a copy that each thread has. With compiled models, do not let asynchronous tasks of one thread interleave inside their blocks.
"""

from __future__ import annotations

import copy
import inspect
import threading
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.contexts import Repeatable

S = TypeVar("S", bound="PerSample")
EXPAND = "_expand_inputs_for_generation"  # method of transformers' generate
UNDER = "run it under 'with vismt.llm.instance_gates(gates):'"


class PerSample:
    """Base class of such contexts. Blocks may be nested. The inner block holds.

    repeats: How often each sample is in the batch, one copy after the other.
    """

    _current: ClassVar[ContextVar[Any]]
    _traced: ClassVar[threading.local]

    def __init_subclass__(cls) -> None:
        cls._current, cls._traced = ContextVar(f"vismt_{cls.__name__}", default=None), threading.local()

    def __init__(self) -> None:
        self.repeats = 1
        self._before: list[tuple[Token, PerSample | None]] = []

    def __enter__(self: S) -> S:
        self._before.append((self._current.set(self), getattr(self._traced, "scope", None)))
        self._traced.scope = self
        return self

    def __exit__(self, *error: object) -> None:
        token, self._traced.scope = self._before.pop()
        self._current.reset(token)

    @classmethod
    def scope(cls: type[S]) -> S | None:
        """Return the context in force."""
        return getattr(cls._traced, "scope", None) if torch.compiler.is_compiling() else cls._current.get()


class instance_gates(PerSample):
    """Use `gates` in every gated layer inside the block: `with instance_gates(gates):`.

    Args:
        gates: Floating tensor (b, e) with one row for each sample of the batch, or (e,) with one user's gates for any number of
            samples. Gates may be negative and need not sum to one. Gradients reach them.

    Blocks may be nested, and the inner gates hold. transformers' `generate` repeats the rows as it repeats the samples, for
    beams and num_return_sequences.
    """

    def __init__(self, gates: Tensor) -> None:
        if not isinstance(gates, Tensor) or gates.ndim not in (1, 2) or not gates.is_floating_point():
            shown = f"{gates.dtype} {tuple(gates.shape)}" if isinstance(gates, Tensor) else type(gates).__name__
            raise UserError(
                f"instance_gates: gates are {shown}, needed a floating tensor (samples, experts) or (experts,)."
            )
        super().__init__()
        self.gates = gates


def sample_gates(batch: int, experts: int) -> Tensor:
    """Return the gates (b, e) for a batch of b samples, or (1, e) if all samples have the same gates.

    Raise UserError if the gates do not match the batch.
    """
    scope = _need(experts, "forward")
    gates = scope.gates
    if gates.ndim == 1:
        return gates[None]
    if len(gates) == batch:
        return gates
    if scope.repeats > 1 and len(gates) * scope.repeats == batch:
        return gates.repeat_interleave(scope.repeats, 0)
    raise UserError(
        f"forward: gates of {len(gates)} samples for a batch of {batch}; give one row for each sample, in its order, or (e,)."
    )


def fixed_gates(what: str, experts: int) -> Tensor:
    """Return the one row of gates (e,) that a single weight can hold. Raise UserError without gates, and for several rows."""
    gates = _need(experts, what).gates
    if gates.ndim == 2 and len(gates) != 1:
        raise UserError(
            f"{what}: gates of {len(gates)} samples; one weight holds the gates of one user, so give one row (e,)."
        )
    return gates.reshape(experts)


def _need(experts: int, what: str) -> instance_gates:
    scope = instance_gates.scope()
    if scope is None:
        needed = "gates (samples, experts)" if what == "forward" else "one user's gates (experts,)"
        hint = "; checkpointed blocks need context_fn=vismt.llm.recompute_gates" if what == "forward" else ""
        raise UserError(
            f"{what}: the rank groups of this model are gated and no gates are given; {UNDER}, {needed}{hint}."
        )
    if scope.gates.shape[-1] != experts:
        raise UserError(f"{what}: gates are {tuple(scope.gates.shape)}, this model has {experts} experts.")
    return scope


def gated(hidden: Tensor, gate: Tensor | None) -> Tensor:
    """Return hidden (n, k) times gate (b, k). The row of a sample applies to its n / b tokens."""
    if gate is None:
        return hidden
    return (by_sample(hidden, gate) * gate[:, None]).view(hidden.shape)


def by_sample(hidden: Tensor, gate: Tensor) -> Tensor:
    """Return (n, k) as (b, n / b, k). b may be zero."""
    return hidden.view(len(gate), len(hidden) // max(len(gate), 1), hidden.shape[1])


def recompute_gates() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts that torch.utils.checkpoint (not reentrant) takes as `context_fn`.

    Blocks that are recomputed in the backward pass then see the gates and tasks of their forward pass. This holds on any
    thread, and after the `with` block has ended.
    """
    in_force = [kind.scope() for kind in PerSample.__subclasses__()]
    scopes = [copy.copy(scope) for scope in in_force if scope is not None]
    for scope in scopes:
        scope._before = []
    return nullcontext(), Repeatable(lambda: scopes)


class Expansion:
    """Record how transformers' `generate` repeats the samples (beams, num_return_sequences)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, expand_size: int = 1, *rest: object, **named: object) -> object:
        for kind in PerSample.__subclasses__():
            scope = kind._current.get()
            if scope is not None:  # batches may repeat each sample this often until the block of the context ends
                scope.repeats = expand_size
        owner = type(self.model)
        # a method or a static method, depending on the version
        stock = inspect.getattr_static(owner, EXPAND).__get__(self.model, owner)
        return stock(expand_size, *rest, **named)


def watch_expansion(model: nn.Module) -> None:
    """Record how `generate` of the model and its parts repeats the samples."""
    for module in model.modules():
        if hasattr(type(module), EXPAND):
            setattr(module, EXPAND, Expansion(module))


def unwatch_expansion(model: nn.Module) -> None:
    """Undo `watch_expansion`."""
    for module in model.modules():
        if isinstance(module.__dict__.get(EXPAND), Expansion):
            delattr(module, EXPAND)
