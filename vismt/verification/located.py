"""Where the weights of adapted modules are in a checkpoint: under which names, and in which orientation."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from vismt.lowrank.files.peft_layouts import stack_keys
from vismt.lowrank.files.peft_settings import selects
from vismt.lowrank.layers.parameter_modules import module_at
from vismt.verification.facts import Facts, ModuleFacts
from vismt.verification.fit import BITS
from vismt.verification.library import Library, Translated

INNER = "language_model."  # the part that text-only and multimodal classes name differently
EARLIER = "under the names of an earlier transformers"  # a change of names
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # model types whose linears are transposed


@dataclass
class Located:
    """The weights of adapted modules in a checkpoint.

    checkpoint: under the names of its library. names: of their tensors, by path. change: what the paths had to be changed by.
    transposed: whether square ones are (i, o). stacks: whether the matrices of a stack of experts are, by path.
    """

    checkpoint: Translated
    names: dict[str, str] = field(default_factory=dict)
    change: str = ""
    transposed: bool = False
    stacks: dict[str, bool] = field(default_factory=dict)

    @property
    def facts(self) -> Facts:
        return self.checkpoint.facts

    @property
    def library(self) -> Library | None:
        return self.checkpoint.library

    @cached_property
    def stems(self) -> set[str]:
        """Return the paths of the weights, with a star for each number."""
        return {re.sub(r"\d+", "*", name.removesuffix(".weight")) for name in self.facts.tensors}

    def lacks(self, path: str) -> bool:
        """Return whether there is no such module. Without a library, the names of other layers have to show it."""
        known = self.library is not None or re.sub(r"\d+", "*", path) in self.stems
        return path not in self.names and known

    def knows(self, facts: Facts) -> bool:
        """Return whether each module is found or known to be absent."""
        return all(path in self.names or self.lacks(path) for path in facts.modules)

    def misfits(self, module: ModuleFacts) -> bool:
        """Return whether the factors of a module do not fit its weight here."""
        shape, stored, A = shape_of(module), self.shape(module.path), module.tensors.get("A")
        if shape is None or not stored or module.path in self.stacks:
            return False
        flat = (stored[0], int(torch.Size(stored[1:]).numel()))
        turned = len(stored) == 2 and stored[::-1] == shape
        return (flat != shape and not turned) or (A is not None and len(A.shape) != len(stored) > 1)

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the stored shape of a module's weight; () where the checkpoint has none."""
        return self.facts.tensors[self.names[path]].shape if path in self.names else ()

    def matrix(self, path: str, shape: tuple[int, int]) -> Tensor | None:
        """Return the weight (o, i) of a module; None where it is missing, has another shape, or is not of a float type."""
        stored = self.shape(path)
        value = self.facts.stored.read(self.names[path]) if stored else None
        if value is None or value.dtype not in BITS:
            return None
        if path in self.stacks:
            value = (value.mT if self.stacks[path] else value).flatten(0, 1)
        elif stored == shape[::-1] and (shape[0] != shape[1] or self.transposed):
            value = value.T
        return value.flatten(1) if value.flatten(1).shape == shape else None


def locate(facts: Facts, checkpoint: Translated) -> Located:
    """Find the weights of the adapted modules, under the change of names that finds the most of them."""
    names = checkpoint.facts.tensors
    paths = list(facts.modules)
    stacks = _stacks(facts, checkpoint.library)

    def hits(change: Callable[[str], str]) -> dict[str, str]:
        found = {path: name for path, (name, _) in stacks.items() if name in names}
        for path in paths:
            name = change(path)
            weight = next((known for known in (f"{name}.weight", name) if known in names), None)
            if weight is not None and path not in stacks:
                found[path] = weight
        return found

    changes: dict[str, Callable[[str], str]] = {"": lambda path: path}
    if checkpoint.library is not None:
        changes[EARLIER] = lambda path: path if f"{path}.weight" in names else checkpoint.renamed(path)
    changes[f"without '{INNER}'"] = lambda path: path.replace(INNER, "", 1)
    inner = {
        name.replace(INNER, "", 1).removesuffix(".weight"): name.removesuffix(".weight")
        for name in names
        if INNER in name
    }
    changes[f"with '{INNER}'"] = lambda path: inner.get(path, path)
    first = next(iter(paths), "").partition(".")[0]
    changes[f"without '{first}.'"] = lambda path: path.removeprefix(f"{first}.")
    for ending in paths[:1]:
        for name in names:
            if name.endswith(f".{ending}.weight"):
                before = name.removesuffix(f"{ending}.weight")
                changes[f"with '{before}'"] = lambda path, before=before: f"{before}{path}"  # type: ignore[misc]
    found = {label: hits(change) for label, change in changes.items()}
    best = max(found, key=lambda label: (len(found[label]), not label))
    located = Located(checkpoint, found[best], best if found[best] else "")
    located.stacks = {path: turned for path, (_, turned) in stacks.items() if path in located.names}
    shapes = [(shape_of(facts.modules[path]), located.shape(path)) for path in located.names]
    known = [(shape, stored) for shape, stored in shapes if shape and len(stored) == 2 and shape[0] != shape[1]]
    turned = sum(stored == shape[::-1] for shape, stored in known)
    kind = checkpoint.facts.config.get("model_type")
    located.transposed = turned > 0.5 * len(known) if known else kind in CONV1D
    return located


def _stacks(facts: Facts, library: Library | None) -> dict[str, tuple[str, bool]]:
    """Return the name of each stack of experts that is adapted, and whether its matrices are (i, o), by path."""
    wanted = (facts.settings and facts.settings.target_parameters) or []
    if library is None:
        return {}
    own = [path for path in facts.specs if len(library.shapes.get(path, ())) == 3]
    if own or not wanted:
        return {path: (path, bool(getattr(module_at(library.model, path), "transposed", False))) for path in own}
    chosen = [name for name, value in library.model.named_parameters() if value.ndim == 3 and selects(wanted, name)]
    keys = stack_keys(library.model, [name for name in chosen if "." in name])
    turned = {name: bool(getattr(module_at(library.model, name), "transposed", False)) for name in keys}
    return {key: (name, turned[name]) for name, key in keys.items() if key in facts.modules}


def unheld(facts: Facts, base: Located) -> list[str]:
    """Return the linears of the base that the settings name, like adapted ones of other layers, and the file does not hold."""
    if facts.settings is None or base.change or len(base.names) < len(facts.modules):
        return []
    matrices = [name for name, stored in base.facts.tensors.items() if len(stored.shape) > 1]
    paths = {name.removesuffix(".weight") for name in matrices if name.endswith(".weight")}
    stems = {re.sub(r"\d+", "*", path) for path in facts.modules}
    alike = (path for path in paths - facts.modules.keys() if re.sub(r"\d+", "*", path) in stems)
    return sorted(path for path in alike if facts.settings.names(path))


def shape_of(module: ModuleFacts) -> tuple[int, int] | None:
    """Return (o, i) of the update by the shapes of its factors; None where it has none."""
    A, B = (module.tensors.get(role) for role in ("A", "B"))
    if A is not None and B is not None and len(A.shape) >= 2 and len(B.shape) >= 2 and A.shape[0] == B.shape[1]:
        return B.shape[0] * module.experts, int(torch.Size(A.shape[1:]).numel())
    A, B = (module.tensors.get(role) for role in ("embedding_A", "embedding_B"))
    if A is not None and B is not None and len(A.shape) == len(B.shape) == 2:
        return A.shape[1], B.shape[0]
    return None


def equal(W: Tensor, M: Tensor) -> bool:
    """Return whether one is the other, or a cast of it."""
    return torch.equal(W.to(M.dtype), M) or torch.equal(M.to(W.dtype), W)


def same_parameter(path: str, name: str) -> bool:
    """Return whether two names are of one parameter: equal, or one begins deeper in the model than the other."""
    return name == path or name.endswith(f".{path}") or path.endswith(f".{name}")


def find_parameter(path: str, checkpoint: Facts) -> str | None:
    """Return the name that a checkpoint has for a parameter."""
    names = checkpoint.tensors
    return path if path in names else next((name for name in names if same_parameter(path, name)), None)
