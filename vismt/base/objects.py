"""Data sets and models given as Python objects. A configuration holds a name for each, such as "<CIFAR10 1a2b3c4d>".

`named` replaces the objects in a configuration by names. Inside `registered`, the functions that open a name find its object.
The digits come from the object's identity (vismt/base/identity.py). For a model they cover all weights, settings and code, for
a data set all examples. A run folder is therefore not continued with another object. A run whose configuration has such names
can be reported anywhere. It is trained and evaluated only if the objects are given.
"""

from __future__ import annotations

import os
import random
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import nn

from vismt.base import console
from vismt.base.errors import UserError
from vismt.base.identity import Identity

_NAME = re.compile(r"<([^<>]+) [0-9a-f]{8}>")
_PLAIN = (str, int, float, bool, type(None))
# Attributes of a data set that are read beside its examples.
READ = ("classes", "column_names", "features", "targets", "labels", "_labels", "indices", "ids", "nodes", "superclass")

_registered: ContextVar[Mapping[str, object] | None] = ContextVar("registered", default=None)


def named(value: Any, objects: dict[str, object]) -> Any:
    """Return a configuration with a name for each object that YAML could not hold. The object goes into `objects`."""
    if isinstance(value, _PLAIN):
        return value
    if type(value) is dict:
        return {key: named(item, objects) for key, item in value.items()}
    if type(value) in (list, tuple):
        return [named(item, objects) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return name_of(value, objects)


def name_of(given: object, objects: dict[str, object], title: str | None = None) -> str:
    """Put an object into `objects` under a name, and return the name.

    title: Title in reports. The default is the name of the type.
    """
    title = re.sub(r"[^\w.+-]+", "-", title or type(given).__name__)
    name = f"<{title} {_digits(given, title)}>"
    objects[name] = given
    return name


def _digits(given: object, title: str) -> str:
    """Return eight digits of the identity of an object."""
    identity = _identity(given, title)
    if not identity.unknown:
        return str(identity)[:8]
    console.stage("study", f"{title} has no readable content ({identity.unknown}): its folder cannot be continued")
    return secrets.token_hex(4)


@contextmanager
def registered(objects: Mapping[str, object]) -> Iterator[None]:
    """Let `object_named` find these objects."""
    token = _registered.set({**(_registered.get() or {}), **objects})
    try:
        yield
    finally:
        _registered.reset(token)


def object_named(name: str) -> Any:
    """Return the object of a name. Return None for a name that does not belong to an object.

    Raise UserError for the name of an object that was not given.
    """
    if not is_object(name):
        return None
    objects = _registered.get() or {}
    if name not in objects:
        raise UserError(
            f"'{name}' is a Python object, which is not given here; call the function that made the run again with the same "
            "object and folder."
        )
    return objects[name]


def is_object(name: str) -> bool:
    """Return whether a name belongs to an object."""
    return _NAME.fullmatch(name) is not None


def title_of(name: str) -> str:
    """Return the title in the name of an object. Return any other name unchanged."""
    match = _NAME.fullmatch(name)
    return match[1] if match else name


def _identity(given: Any, title: str) -> Identity:
    """Return the identity of a model, of a data set with all its examples, or of any other object."""
    if isinstance(given, Mapping):
        parts = [_identity(part, f"{title} {name}") for name, part in given.items()]
        return Identity(*given, *parts)
    table = hasattr(given, "to_dict") and hasattr(given, "iloc")
    rows = given.to_dict("records") if table else given
    read = getattr(rows, "read", None) or getattr(rows, "__getitem__", None)
    if isinstance(given, nn.Module | str | bytes) or read is None or not hasattr(rows, "__len__"):
        return Identity(given)
    with _fixed_draws():
        places = console.track(range(len(rows)), "data", f"{title}: reading {len(rows):,} examples")
        examples = [Identity(read(place)) for place in places]
    about = []
    inner: Any = given
    while inner is not None:  # down to the data set that the subsets belong to
        about += [getattr(inner, name, None) for name in READ if not table]
        inner = getattr(inner, "dataset", None)
    return Identity(about, *examples)


@contextmanager
def _fixed_draws() -> Iterator[None]:
    """Make augmentations draw the same inside the block. Afterwards, give the generators their states back."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
