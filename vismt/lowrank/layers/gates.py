"""Gates of rank groups, one row for each sample, that reach every layer by context (per_sample.py)."""

from __future__ import annotations

from torch import Tensor

from vismt.base.errors import UserError
from vismt.lowrank.per_sample import PerSample

UNDER = "run it under 'with vismt.llm.instance_gates(gates):'"


class instance_gates(PerSample):
    """Use `gates` in every gated layer inside the block: `with instance_gates(gates):`.

    Args:
        gates: floating (b, e), one row for each sample of the batch, or (e,), one user's gates for samples of any number.
            They need not be positive nor sum to one. Gradients reach them.

    Blocks may be nested; the inner gates hold. transformers' `generate` repeats the rows as it repeats the samples, for
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
    """Return the gates (b, e) for a batch of b samples, (1, e) where all have the same; UserError where they do not match."""
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
    """Return the one row of gates (e,) that a single weight can hold; UserError for none, or for those of several samples."""
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
    """Return hidden (n, k) times gate (b, k), the row of each sample for its n / b tokens."""
    if gate is None:
        return hidden
    return (by_sample(hidden, gate) * gate[:, None]).view(hidden.shape)


def by_sample(hidden: Tensor, gate: Tensor) -> Tensor:
    """Return (n, k) as (b, n / b, k); b may be zero."""
    return hidden.view(len(gate), len(hidden) // max(len(gate), 1), hidden.shape[1])
