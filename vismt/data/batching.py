"""Several pixel stores behind one running index, and batches of them as a function of the batch's number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.base.identity import Identity
from vismt.base.seeds import mix_seed
from vismt.data.image_set import named_groups
from vismt.data.pixels import Pixels


class Images(Protocol):
    """Images with labels int64 (n,). `images[index]` is float32 (b, 3, h, w) in [0, 1] for an int64 index (b,).

    `content` differs for images of the same ids that are stored otherwise. It is "" if that is not known. `groups(index)`
    returns the groups of images, see `vismt.data.image_set.named_groups`.
    """

    labels: Tensor
    ids: list[str]

    @property
    def content(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> Tensor: ...

    def groups(self, index: Tensor) -> tuple[dict[str, str], str]: ...


def joint_content(sets: Iterable[Images]) -> str:
    """Return the content of several sets, or "" if the content of one of them is not known."""
    contents = [images.content for images in sets]
    return " ".join(contents) if all(contents) else ""


class Gathered:
    """Several stores as one: `gathered[index]` is float32 (b, 3, h, w) in [0, 1] for an int64 index (b,), b >= 1.

    The images are numbered consecutively in the order of `parts`, (store, labels int64 of its images). `ids` are "store:name"
    of each image. `key` is a text that differs for any other images, or None if a store has no key. Raise UserError for stores
    of different image sizes.
    """

    def __init__(self, parts: Sequence[tuple[Pixels, Tensor]]) -> None:
        sizes = {pixels.size for pixels, _ in parts}
        if len(sizes) != 1:
            raise UserError(f"data: images of {sorted(sizes)} px in one mixture; give all of them one size.")
        self._mark: Callable[[Tensor, Tensor], Tensor] | None = None
        self._stores = [pixels for pixels, _ in parts]
        self._store = torch.cat([torch.full((len(pixels),), number) for number, (pixels, _) in enumerate(parts)])
        self._row = torch.cat([torch.arange(len(pixels)) for pixels, _ in parts])
        self.labels = torch.cat([labels for _, labels in parts])
        self.ids = [f"{pixels.name}:{name}" for pixels, _ in parts for name in pixels.ids]

    def __len__(self) -> int:
        return len(self.labels)

    def marked(self, mark: Callable[[Tensor, Tensor], Tensor]) -> Gathered:
        """Return the same images. Each batch of them is passed through mark(images, index)."""
        marked = copy.copy(self)
        marked._mark = mark
        return marked

    @cached_property
    def key(self) -> str | None:
        keys = [pixels.key for pixels in self._stores]
        return None if None in keys else " ".join(map(str, keys))

    @property
    def content(self) -> str:
        return joint_content(self._stores)

    def groups(self, index: Tensor) -> tuple[dict[str, str], str]:
        """Return the group of each image by its id, as `named_groups` does."""
        places = zip(self._store[index].tolist(), self._row[index].tolist())
        return named_groups(
            [self.ids[i] for i in index.tolist()], [(self._stores[store].images, row) for store, row in places]
        )

    def __getitem__(self, index: Tensor) -> Tensor:
        size = self._stores[0].size
        images = torch.empty(len(index), 3, size, size)
        stores, rows = self._store[index], self._row[index]
        for number in stores.unique().tolist():
            in_store = stores == number
            images[in_store] = self._stores[number][rows[in_store]]
        return images if self._mark is None else self._mark(images, index)


def names_digest(images: Images) -> str:
    """Return a digest of the ids and labels of images. Values that are fitted on the images belong to it."""
    return str(Identity(images.ids, images.labels))


class Passes:
    """Shuffled passes over `count` examples: passes(k) -> indices (batch,), int64, of batch k.

    A pass has count // batch batches, and the remaining examples are dropped. The order of pass p is a function of (seed, p).
    Raise UserError for fewer examples than a batch.

    unit: Name of the examples in the error. key: Name of the size of a batch in the error.
    """

    def __init__(self, count: int, batch: int, *, seed: int, unit: str = "images", key: str = "batch") -> None:
        if not 1 <= batch <= count:
            raise UserError(f"{key}: {batch}, with {count} training {unit}; it must be from 1 to that number.")
        self.count, self.batch, self.seed = count, batch, seed
        self._pass: tuple[int, Tensor] = (-1, torch.empty(0))

    def __call__(self, number: int) -> Tensor:
        turn, place = divmod(number, self.count // self.batch)
        if self._pass[0] != turn:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, "pass", turn))
            self._pass = (turn, torch.randperm(self.count, generator=generator))
        return self._pass[1][place * self.batch : (place + 1) * self.batch]


class ShuffledBatches:
    """Training batches: batches(k) -> {"images" (b, 3, h, w), "labels" (b,)} of the images that Passes gives for batch k.

    augment: Function augment(images, seed) -> images. The seed of batch k is a function of (seed, k).
    """

    def __init__(
        self, images: Gathered, batch: int, *, seed: int, augment: Callable[[Tensor, int], Tensor] | None = None
    ) -> None:
        self.images, self.seed, self.augment = images, seed, augment
        self._passes = Passes(len(images), batch, seed=seed)

    def __call__(self, number: int) -> dict[str, Tensor]:
        index = self._passes(number)
        images = self.images[index]
        if self.augment is not None:
            images = self.augment(images, mix_seed(self.seed, "augment", number))
        return {"images": images, "labels": self.images.labels[index]}


class InOrder:
    """A sequence of the batches (images (b, 3, h, w), labels (b,), ids) of images in their order.

    order: Indices int64 of the images to take. None takes all. labels: Labels of all images. None takes their own labels.
    """

    def __init__(self, images: Images, batch: int, order: Tensor | None = None, labels: Tensor | None = None) -> None:
        self.images, self.batch = images, batch
        self.labels = images.labels if labels is None else labels
        order = torch.arange(len(images)) if order is None else order
        self.parts = order.split(batch) if len(order) else ()

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, list[str]]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        index = self.parts[number]
        return self.images[index], self.labels[index], [self.images.ids[i] for i in index.tolist()]

    @property
    def groups(self) -> tuple[dict[str, str], str]:
        """The group of each image by its id, as of `named_groups`."""
        return self.images.groups(torch.cat(list(self.parts)))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        return (self[number] for number in range(len(self)))
