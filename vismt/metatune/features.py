"""Features that are computed once: f(x; W) is a function of the image and of weights that no task changes.

Episodes draw the same images again and again. `number` marks a batch with the rows of its images in their set. `features` then
takes the features of rows that were seen before from a store. An image that was changed (attacked, shifted, augmented) is another
tensor without a mark, so its features are computed. They are also computed under gradients, and for the weights of a single task
(`WithWeights.lasting`).

A store computes the identity of a backbone once, because this takes longer than a small forward pass. It computes the identity
again after a change that can be seen without reading the weights: another version or place of a tensor, or another attribute of a
module. A store does not see a change through `.data` or of a class while it is open. Another store sees it.

On a CPU a stored feature has the same bits in every run. The first batch of every backbone is computed in two ways and
compared. If the order of sums depends on the size of the batch (some CPUs with several threads), stored features are computed
in batches of EQUAL images. They then differ by rounding from features that are not stored. A feature that depends on the other
images is not stored. On a GPU, kernels depend on the shape of the batch, and features may differ by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vismt.backbones.vit import PixelBackbone, classifiers
from vismt.base import console
from vismt.base.identity import Identity
from vismt.metatune.functional import WithWeights
from vismt.storage.stored_tensors import has_hooks, machine, path_of, read_stored, write_stored

_MARK = "_vismt_rows"
_ROUNDING = 1e-3  # largest difference between two orders of sums, as a share of the largest feature
EQUAL = 8  # images of a batch where the size decides the order of sums
_IMAGES = 256  # in one forward pass
STATES = 256  # of backbones of one store


@dataclass(frozen=True)
class BatchRows:
    """The rows of a batch's images in the set of a store. version: Version of the batch when it was marked."""

    store: FeatureStore
    index: list[int]
    version: int


def number(images: Tensor, store: FeatureStore | None, index: Tensor) -> Tensor:
    """Mark images (b, 3, h, w) as the rows `index` (b,) of the set of a store, and return them. Without a store, mark nothing."""
    if store is not None and not images.is_inference():
        setattr(images, _MARK, BatchRows(store, index.tolist(), images._version))
    return images


def features(backbone: nn.Module, images: Tensor) -> Tensor:
    """Return the features (b, d) of images (b, 3, h, w), from a store if it has them, with _IMAGES in a forward pass."""
    rows: BatchRows | None = getattr(images, _MARK, None)
    table = None
    if rows is not None and rows.version == images._version and not torch.is_grad_enabled():
        table = rows.store.table(backbone)
    if rows is None or table is None:
        return _computed(backbone, images, _IMAGES)
    return table.look_up(backbone, images, rows.index)


def _computed(backbone: nn.Module, images: Tensor, batch: int) -> Tensor:
    return torch.cat([backbone(part) for part in images.split(batch)]) if len(images) > batch else backbone(images)


class FeatureStore:
    """Features of the images of one set, by row, for every backbone that asks.

    Use as a context manager: at its end, features of stock models are written to the cache folder (vismt.storage.stored_tensors).

    Args:
        data: Text that differs for any other images. None keeps all features in memory only.
    """

    def __init__(self, data: str | None = None) -> None:
        self.data = data
        self._tables: dict[str, _Table] = {}
        self._watched: dict[int, _Watched] = {}  # by the id of a module, which it keeps
        self._states: dict[tuple[object, ...], tuple[_Table | None, _Watched, list[Tensor]]] = {}

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *error: object) -> None:
        for table in self._tables.values():
            table.save()

    def table(self, backbone: nn.Module) -> _Table | None:
        """Return the features of a backbone as it is now. None if they cannot be kept."""
        if isinstance(backbone, WithWeights) and not backbone.lasting:
            return None
        module, weights = (backbone.module, backbone.weights) if isinstance(backbone, WithWeights) else (backbone, {})
        device = next((tensor.device for tensor in weights.values() or module.parameters()), torch.device("cpu"))
        where, given = machine(device), [*weights.values()]
        watched = self._watched.get(id(module)) or _Watched(module)
        if has_hooks(watched.parts):
            return None
        state = (where, *watched.state(), *_versions(given))
        if state not in self._states or 0 in state:
            watched = self._watched[id(module)] = _Watched(module)
            if any(part.training for part in watched.parts) or has_hooks(watched.parts):
                return None
            state = (where, *watched.state(), *_versions(given))
            if len(self._states) == STATES:
                self._states.clear()
            table = self._table_of(Identity(module, weights, skip=watched.unused), where, device)
            self._states[state] = table, watched, given
        table = self._states[state][0]
        return table if table is not None and table.usable else None

    def _table_of(self, model: Identity, where: str, device: torch.device) -> _Table | None:
        if model.unknown:
            return None
        key = f"{model} {where}"
        if key not in self._tables:
            path = path_of(self.data, model, where) if self.data is not None else None
            self._tables[key] = _Table(path, device)
        return self._tables[key]


class _Watched:
    """The modules of a backbone that run for features, and their state. They are kept, so that no other object gets their ids."""

    def __init__(self, module: nn.Module) -> None:
        # What maps features to classes does not run for the features.
        heads = classifiers(module.vit) if isinstance(module, PixelBackbone) else []
        self.unused = {part for head in heads for part in head.modules()}
        self.parts = [part for part in module.modules() if part not in self.unused]
        self._found = self._objects()
        own = [value for part in self.parts for kind in (part._parameters, part._buffers) for value in kind.values()]
        self._tensors = [value for value in own if value is not None]

    def _objects(self) -> list[object]:
        return [
            value
            for part in self.parts
            for kind in (part.__dict__, part._parameters, part._buffers, part._modules)
            for value in kind.values()
        ]

    def state(self) -> list[int]:
        """Return values that change if a module, an attribute or a tensor is replaced, or a tensor is changed in place."""
        return [*map(id, self._objects()), *_versions(self._tensors)]


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return the address and the autograd version of each tensor. A tensor without memory of its own has the address 0."""
    return [tensor.data_ptr() for tensor in tensors] + [-1 - tensor._version for tensor in tensors]


class _Table:
    """Features by row of one identity of a backbone. If there is a file `path`, its features are included."""

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self.path = path
        self.usable = True
        # Whether features are computed in batches of EQUAL images; None before the first.
        self.equal: bool | None = None
        self.rows: dict[int, Tensor] = {} if path is None else _stored_rows(path, device)
        self._saved = len(self.rows)

    def look_up(self, backbone: nn.Module, images: Tensor, index: list[int]) -> Tensor:
        missing = [place for place, row in enumerate(index) if row not in self.rows]
        if missing:
            # A single image is computed twice: the kernels of a batch of one sum in another order.
            places = missing * 2 if len(missing) == 1 < len(index) else missing
            part = images if len(places) == len(index) else images[places]
            new = self._compute(backbone, part)
            if self.equal is None:
                new = self._checked(backbone, part, new)
                if not self.usable:
                    return new
            self.rows |= zip((index[place] for place in places), new.unbind())
            if part is images:
                return new
        return torch.stack([self.rows[row] for row in index])

    def _compute(self, backbone: nn.Module, images: Tensor) -> Tensor:
        if not self.equal:
            return _computed(backbone, images, _IMAGES)
        filled = images[torch.arange(-(-len(images) // EQUAL) * EQUAL) % len(images)]
        return _computed(backbone, filled, EQUAL)[: len(images)]

    def _checked(self, backbone: nn.Module, images: Tensor, new: Tensor) -> Tensor:
        """Return the features to keep of a first batch, given as `new`, and choose how later batches are computed."""
        if isinstance(new, Tensor) and new.ndim == 2 and len(new) == len(images):
            self.equal = False
            if self._repeatable(backbone, images, new):
                return new
            self.equal = True
            equal = self._compute(backbone, images)
            if _close(equal, new) and self._repeatable(backbone, images, equal):
                return equal
        self.usable = False
        console.stage("cache", "features depend on the other images of their batch: each episode computes its own")
        return new

    def _repeatable(self, backbone: nn.Module, images: Tensor, expected: Tensor) -> bool:
        """Return whether features are the same in another batch: one half of the images, in the other order."""
        half = len(images) // 2 + 1
        again, first = self._compute(backbone, images[:half].flip(0)).flip(0), expected[:half]
        return torch.equal(again, first) if expected.device.type == "cpu" else _close(again, first)

    def save(self) -> None:
        if self.path is not None and len(self.rows) > self._saved:
            written = _stored_rows(self.path, torch.device("cpu"))  # also by other processes
            known = {**written, **self.rows}
            rows = torch.tensor(sorted(known))
            write_stored(self.path, {"rows": rows, "features": torch.stack([known[int(row)].cpu() for row in rows])})
            self._saved = len(self.rows)


def _stored_rows(path: Path, device: torch.device) -> dict[int, Tensor]:
    stored = read_stored(path)
    return {} if stored is None else dict(zip(stored["rows"].tolist(), stored["features"].to(device).unbind()))


def _close(features: Tensor, expected: Tensor) -> bool:
    return bool((features - expected).abs().max() <= _ROUNDING * expected.abs().max())
