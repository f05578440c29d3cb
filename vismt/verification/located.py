"""Where the weights of adapted modules are in a checkpoint: under which names, and in which orientation."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.verification.facts import Facts, ModuleFacts, read_facts
from vismt.verification.fit import BITS

INNER = "language_model."  # the part that text-only and multimodal classes name differently
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # model types whose linears are transposed


@dataclass
class Located:
    """The weights of adapted modules in a checkpoint.

    names: of their tensors, by path. change: what the paths had to be changed by. transposed: whether square ones are (i, o).
    """

    facts: Facts
    names: dict[str, str] = field(default_factory=dict)
    change: str = ""
    transposed: bool = False

    def misfits(self, module: ModuleFacts) -> bool:
        """Return whether the factors of a module do not fit its weight here."""
        shape, stored = shape_of(module), self.shape(module.path)
        return shape is not None and len(stored) == 2 and stored not in (shape, shape[::-1])

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the stored shape of a module's weight; () where the checkpoint has none."""
        return self.facts.tensors[self.names[path]].shape if path in self.names else ()

    def matrix(self, path: str, shape: tuple[int, int]) -> Tensor | None:
        """Return the weight (o, i) of a module; None where it is missing, has another shape, or is not of a float type."""
        stored = self.facts.tensors[self.names[path]]
        turned = stored.shape == shape[::-1] and (shape[0] != shape[1] or self.transposed)
        flat = (stored.shape[0], int(torch.Size(stored.shape[1:]).numel())) if stored.shape else ()
        if not turned and flat != shape:
            return None
        value = self.facts.stored.read(stored.name)
        if value is None or value.dtype not in BITS:
            return None
        return value.T if turned else value.flatten(1)


def open_checkpoint(place: str | Path, what: str) -> Facts:
    """Return the facts of a checkpoint: a folder or file, the name of an asset, or a model on the hub."""
    path = Path(place).expanduser()
    if not path.exists():
        from vismt.backbones.assets import get_asset, list_assets

        path = get_asset(str(place)) if str(place) in list_assets() else _from_hub(str(place), what)
    facts = read_facts(path)
    if facts.is_adapter and facts.model_config:  # a merged model with the adapter's files beside it
        facts = read_facts(path, as_checkpoint=True)
    if facts.kind != "checkpoint":
        raise UserError(f"verify: {what} '{place}' is not a checkpoint ({facts.kind}); give a folder with its weights.")
    return facts


def _from_hub(name: str, what: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"verify: {what} '{name}' is not a folder, a file or an asset, and the hub does not give it ({reason})."
        ) from error


def locate(facts: Facts, checkpoint: Facts) -> Located:
    """Find the weights of the adapted modules, under the change of names that finds the most of them."""
    names = checkpoint.tensors
    paths = list(facts.modules)

    def hits(change: Callable[[str], str]) -> dict[str, str]:
        found = {}
        for path in paths:
            name = change(path)
            weight = next((known for known in (f"{name}.weight", name) if known in names), None)
            if weight is not None:
                found[path] = weight
        return found

    changes: dict[str, Callable[[str], str]] = {"": lambda path: path}
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
    shapes = [(shape_of(facts.modules[path]), located.shape(path)) for path in located.names]
    known = [(shape, stored) for shape, stored in shapes if shape and len(stored) == 2 and shape[0] != shape[1]]
    turned = sum(stored == shape[::-1] for shape, stored in known)
    located.transposed = turned > 0.5 * len(known) if known else checkpoint.config.get("model_type") in CONV1D
    return located


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
        return B.shape[0], int(torch.Size(A.shape[1:]).numel())
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
