"""The adapters of each sample of a batch, which mixed layers (mixed_layer.py) read by context (per_sample.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from numbers import Real
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.per_sample import PerSample


class Together:
    """Names of adapters that are active together on a model, in the order of its banks."""

    alive: ClassVar[WeakSet[Together]] = WeakSet()

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.alive.add(self)

    def __reduce__(self) -> tuple[type[Together], tuple[Any]]:
        return Together, (self.names,)  # a copy is alive, too


@dataclass(frozen=True)
class Choice:
    """Adapters of groups of samples, as numbers of a bank whose last entry is zero: no adapter.

    index: int64 (g, e), e for each group; None where group n has adapter n alone. weight: (g, e); None where all are 1.
    """

    index: Tensor | None
    weight: Tensor | None

    def of(self, bank: Tensor, weighted: bool) -> Tensor:
        """Return what each group has of a bank (e + 1, ...), (g, e, ...); `weighted` by its mixture."""
        picked = bank[:-1, None] if self.index is None else bank[self.index.to(bank.device)]
        if self.weight is None or not weighted:
            return picked
        weight = self.weight.to(picked)
        return picked * weight.view(*weight.shape, *[1] * (picked.ndim - 2))


class adapters_per_sample(PerSample):
    """Use the named adapters for each sample of a batch inside the block: `with vismt.adapters_per_sample(names):`.

    Args:
        names: one entry for each sample, in the order of the batch: the name of an adapter, None for the base, or a mixture
            {name: weight}. All of them have to be active together, by `vismt.activate(model, [...])` before the block.

    Neighbours with the same entry are computed as one product: batches that are sorted by adapter are the fastest. Gradients
    reach the inputs, not the adapters. Blocks may be nested; the inner one holds. transformers' `generate` repeats the
    entries as it repeats the samples, for beams and num_return_sequences. Checkpointed parts of a model that run again in a
    backward pass after the block need use_reentrant=False and context_fn=vismt.llm.recompute_gates.

    Raises:
        UserError: for entries of another kind, names that no model has active together, and, in the forward pass, a batch of
            another number of samples.
    """

    def __init__(self, names: Sequence[str | Mapping[str, float] | None]) -> None:
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise UserError(f"adapters_per_sample: {names!r}; give a list with one entry for each sample.")
        super().__init__()
        entries = [_weights(entry) for entry in names]
        self.samples = len(entries)
        run = math.gcd(*(len(list(same)) for _, same in groupby(entries)))
        self.groups = entries[::run]
        self.choices: dict[tuple[str, ...], Choice] = {}
        self.kept: WeakKeyDictionary[nn.Module, tuple[Tensor, ...]] = WeakKeyDictionary()

    opened: ClassVar[dict[int, adapters_per_sample]] = {}  # blocks that run, of all threads

    def __enter__(self) -> adapters_per_sample:
        used = {name: None for group in self.groups for name in group}
        alive = {together.names for together in Together.alive}
        self.choices = {names: _choice(self.groups, names) for names in alive if used.keys() <= set(names)}
        if not self.choices:
            raise UserError(
                f"adapters_per_sample: no model has {', '.join(map(repr, used)) or 'adapters'} active; call "
                "vismt.activate(model, [names]) with all of the batch first."
            )
        self.opened[id(self)] = self
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if not self._before:
            del self.opened[id(self)]

    @classmethod
    def refuse_lost(cls, names: tuple[str, ...], used: bool) -> None:
        """Raise UserError for a forward without a block that was to have one: all adapters would be added.

        names: of the active adapters. used: whether the layer had a block before.
        """
        if used and torch._C._current_graph_task_id() >= 0:
            raise UserError(
                "forward: a backward pass runs it again and does not see its adapters_per_sample; checkpoint with "
                "use_reentrant=False and context_fn=vismt.llm.recompute_gates."
            )
        if any(names in scope.choices for scope in list(cls.opened.values())):
            raise UserError(
                "forward: adapters_per_sample is in force in another thread or task, and not here; open a block here, too "
                "(an entry {name: 1, ...} adds adapters)."
            )

    def choice(self, names: tuple[str, ...], batch: int) -> Choice:
        """Return the choice among `names` for a batch of b samples; UserError where they do not match."""
        if names not in self.choices:
            raise UserError(
                f"forward: adapters_per_sample does not name the active adapters {', '.join(names)}; activate before the block."
            )
        if batch not in (self.samples, self.samples * self.repeats):
            raise UserError(
                f"forward: adapters_per_sample names adapters for {self.samples} samples, the batch has {batch}; give one entry "
                "for each sample, in its order."
            )
        return self.choices[names]


def _weights(entry: Any) -> dict[str, float]:
    """Return an entry as weights by name."""
    if entry is None or isinstance(entry, str):
        return {} if entry is None else {entry: 1.0}
    numbers = isinstance(entry, Mapping) and all(isinstance(w, Real) and math.isfinite(w) for w in entry.values())
    if not numbers:
        raise UserError(
            f"adapters_per_sample: {entry!r}; give a name, None, or a mapping from names to finite weights."
        )
    return {name: float(weight) for name, weight in entry.items() if weight}


def _choice(groups: Sequence[Mapping[str, float]], names: tuple[str, ...]) -> Choice:
    """Return the entries of groups of samples as numbers and weights."""
    if list(groups) == [{name: 1.0} for name in names]:
        return Choice(None, None)
    most = max(1, *map(len, groups))
    index, weight = torch.full((len(groups), most), -1), torch.ones(len(groups), most)
    for row, group in enumerate(groups):
        for column, (name, share) in enumerate(group.items()):
            index[row, column], weight[row, column] = names.index(name), share
    return Choice(index, weight if bool((weight != 1).any()) else None)
