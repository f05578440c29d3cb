"""Data sets and models given as Python objects: a configuration holds a name for each, such as "<CIFAR10 1a2b3c4d>".

`named` replaces the objects in a configuration by names, and inside `holding` the functions that open a name find its object.
The digits are a digest of the object's content, so that a run folder is not continued with another object. A run whose
configuration has such names is reported anywhere, and trained and evaluated where the objects are given.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.seeds import digest

NAME = re.compile(r"<([^<>]+) [0-9a-f]{8}>")
PLAIN = (str, int, float, bool, type(None))
EXAMPLES = 16  # of a data set that its digest is made of
HEAD = 1024  # values of a tensor

_held: ContextVar[Mapping[str, Any] | None] = ContextVar("held", default=None)


def named(value: Any, objects: dict[str, Any]) -> Any:
    """Return a configuration with a name in the place of each object that YAML could not hold, which goes into `objects`."""
    if isinstance(value, PLAIN):
        return value
    if type(value) is dict:
        return {key: named(item, objects) for key, item in value.items()}
    if type(value) in (list, tuple):
        return [named(item, objects) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return name_of(value, objects)


def name_of(given: Any, objects: dict[str, Any], title: str | None = None) -> str:
    """Put an object into `objects` under a name, and return the name; title: in reports, by default the type's name."""
    title = re.sub(r"[^\w.+-]+", "-", title or type(given).__name__)
    state = hashlib.blake2b(digest_size=4)
    with torch.random.fork_rng(devices=[]):  # a data set may draw an augmentation
        _update(state, given)
    name = f"<{title} {state.hexdigest()}>"
    objects[name] = given
    return name


@contextmanager
def holding(objects: Mapping[str, Any]) -> Iterator[None]:
    """Let `held` find these objects."""
    token = _held.set({**(_held.get() or {}), **objects})
    try:
        yield
    finally:
        _held.reset(token)


def held(name: str) -> Any:
    """Return the object of a name, None for a name that is not one of an object.

    Raises UserError for the name of an object that was not given.
    """
    if not is_object(name):
        return None
    objects = _held.get() or {}
    if name not in objects:
        raise UserError(
            f"'{name}' is a Python object, which is not given here; call the function that made the run again with the same "
            "object and folder."
        )
    return objects[name]


def is_object(name: str) -> bool:
    """Return whether a name is one of an object."""
    return NAME.fullmatch(name) is not None


def title_of(name: str) -> str:
    """Return the title in the name of an object, and any other name as it is."""
    match = NAME.fullmatch(name)
    return match[1] if match else name


def weights_digest(module: nn.Module) -> str:
    """Return a digest of the first 1024 values of every tensor of a module, as float32."""
    heads = (tensor.detach().flatten()[:HEAD].cpu().float() for tensor in module.state_dict().values())
    return digest(b"".join(head.numpy().tobytes() for head in heads))


def _update(state: Any, value: Any) -> None:
    """Add the content of a module, of a data set, or of a part of an example to a digest."""
    if isinstance(value, nn.Module):
        state.update(weights_digest(value).encode())
    elif isinstance(value, Tensor):
        state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif hasattr(value, "tobytes"):  # an image of Pillow or an array
        state.update(value.tobytes())
    elif isinstance(value, Mapping):
        _update(state, list(value.items()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            _update(state, item)
    elif not isinstance(value, (str, bytes)) and hasattr(value, "__getitem__") and hasattr(value, "__len__"):
        count = len(value)
        state.update(f"{count}".encode())
        rows = getattr(value, "iloc", value)  # of a table of pandas
        for place in range(min(count, EXAMPLES)):
            _update(state, rows[place * count // min(count, EXAMPLES)])
    else:
        state.update(repr(value).encode())
