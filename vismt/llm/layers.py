"""Which parameters lie in a model's stack of like layers, and which outside: what a schedule over layers needs to know."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from vismt.errors import UserError, near
from vismt.lowrank.memory import count_parameters
from vismt.lowrank.targets import check_patterns, head_paths, matches

# Parameters on the way into the first layer, beside those of an nn.Embedding.
EMBEDDING = re.compile(r"(?:.*\.)?(?:[^.]*embed[^.]*|cls_token|reg_token|dist_token|norm_pre)(?:\..*)?")

Layers = str | Sequence[str] | Sequence[nn.Module] | None


@dataclass(frozen=True)
class Shares:
    """Names of the parameters that LISA may train: of each layer by its path, and those that it always trains."""

    layers: dict[str, list[str]]
    always: list[str]

    @property
    def drawn(self) -> dict[int, list[str]]:
        """Layers that have something to train, by number: one that is left out whole must not take another's turn."""
        return {number: names for number, names in enumerate(self.layers.values()) if names}

    def all(self) -> list[str]:
        """Every name once; layers may share parameters."""
        return list(dict.fromkeys([*self.always, *(name for names in self.layers.values() for name in names)]))


def find_shares(model: nn.Module, layers: Layers, train_embeddings: bool, exclude: str | Sequence[str]) -> Shares:
    """Which parameters LISA may train; one that is shared between a layer and the outside is always trained."""
    paths, exclude = find_layers(model, layers), [exclude] if isinstance(exclude, str) else exclude
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    aliases: dict[str, list[str]] = {name: [] for name in first.values()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases[first[id(parameter)]].append(name)
    check_patterns(
        "LISA.exclude", exclude, sorted({end for names in aliases.values() for one in names for end in _ends(one)})
    )
    heads = head_paths(model)
    shares = Shares({path: [] for path in paths}, [])
    for name, names in aliases.items():
        if any(matches(pattern, end) for pattern in exclude for one in names for end in _ends(one)):
            continue
        kind = model.get_parameter(name).dtype
        if not kind.is_floating_point:
            raise UserError(f"LISA: '{name}' is quantised ({kind}); load the model in a floating dtype.")
        owners = {next((path for path in paths if one.startswith(f"{path}.")), None) for one in names}
        if None not in owners:
            for path in owners:
                shares.layers[path].append(name)
        elif train_embeddings or not any(_embeds(model, one, heads) for one in names):
            shares.always.append(name)
    return shares


def find_layers(model: nn.Module, layers: Layers) -> list[str]:
    """Paths of the layers in order; UserError where the model does not say which they are."""
    paths = {id(module): path for path, module in model.named_modules()}
    if layers is None:
        layers = _stack(model)
    if isinstance(layers, str):
        try:
            layers = list(model.get_submodule(layers).children())
        except AttributeError as error:
            raise UserError(f"LISA.layers: no module '{layers}'.{near(layers, paths.values())}") from error
    found = [layer if isinstance(layer, str) else paths.get(id(layer)) for layer in layers]
    known = set(paths.values())
    for layer, path in zip(layers, found):
        if path not in known:
            name = f"'{layer}'" if isinstance(layer, str) else f"a {type(layer).__name__}"
            raise UserError(f"LISA.layers: {name} is no module of this {type(model).__name__}.{near(str(path), known)}")
    if not found or len(set(found)) != len(found):
        raise UserError(f"LISA.layers: {len(found)} layers, {len(set(found))} of them different; name each once.")
    return found


def _stack(model: nn.Module) -> nn.Module:
    """The outermost ModuleList or Sequential of like children with the most parameters."""
    sizes: dict[str, int] = {}
    for path, module in model.named_modules():
        alike = (
            isinstance(module, nn.ModuleList | nn.Sequential) and len({type(child) for child in module.children()}) == 1
        )
        if alike and not any(path.startswith(f"{outer}.") for outer in sizes):
            sizes[path] = count_parameters(module)[1]
    ranked = sorted(sizes, key=lambda path: -sizes[path])
    if not ranked:
        raise UserError(f"LISA.layers: {type(model).__name__} has no list of like layers; name them with layers=.")
    if len(ranked) > 1 and 2 * sizes[ranked[1]] >= sizes[ranked[0]]:
        raise UserError(
            f"LISA.layers: '{ranked[0]}' or '{ranked[1]}'? Name one with layers=, or give all layers as a list."
        )
    return model.get_submodule(ranked[0])


def _ends(name: str) -> list[str]:
    """A parameter's name and the paths of the modules that it lies in."""
    return [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)]


def _embeds(model: nn.Module, name: str, heads: set[str]) -> bool:
    """Whether this name of a parameter is one of the input embeddings."""
    owner = name.rpartition(".")[0]
    return owner not in heads and (
        isinstance(model.get_submodule(owner), nn.Embedding) or EMBEDDING.fullmatch(name) is not None
    )
