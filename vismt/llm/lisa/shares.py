"""The parameters that LISA may train: the parameters of each of a stack of equal layers, and the parameters outside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from vismt.base.errors import UserError, near, need_names
from vismt.lowrank.layers.base import AdapterModule
from vismt.lowrank.model.record import count_parameters
from vismt.lowrank.model.targets import containers, head_paths, match_patterns

# Names of parameters before the first layer, in addition to parameters of an nn.Embedding.
_EMBEDDING = re.compile(r"(?:.*\.)?(?:[^.]*embed[^.]*|cls_token|reg_token|dist_token|norm_pre)(?:\..*)?")

Layers = str | Sequence[str] | Sequence[nn.Module] | None


@dataclass(frozen=True)
class Shares:
    """Names of the parameters that LISA may train.

    layers: Names by path of the layer. always: Names of parameters outside the layers, which are trained at every step.
    """

    layers: dict[str, list[str]]
    always: list[str]

    @property
    def drawn(self) -> dict[int, list[str]]:
        """Return {number: names} of the layers with trainable parameters. A layer that is wholly excluded is not drawn."""
        return {number: names for number, names in enumerate(self.layers.values()) if names}

    def all(self) -> list[str]:
        """Return every name once. Layers may share parameters."""
        return list(dict.fromkeys([*self.always, *(name for names in self.layers.values() for name in names)]))


def find_shares(model: nn.Module, layers: Layers, train_embeddings: bool, exclude: str | Sequence[str]) -> Shares:
    """Sort the parameters that LISA may train. A parameter that a layer shares with another module is always trained."""
    paths = find_layers(model, layers)
    patterns = need_names("LISA.exclude:", exclude)
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    aliases: dict[str, list[str]] = {name: [] for name in first.values()}  # a tied parameter has several names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases[first[id(parameter)]].append(name)
    # The names of a parameter, and the paths of the modules that contain it.
    ends = {name: [end for alias in names for end in containers(alias)] for name, names in aliases.items()}
    matched = match_patterns("LISA.exclude", patterns, dict.fromkeys(end for name in aliases for end in ends[name]))
    excluded = {path for found in matched.values() for path in found}
    heads = head_paths(model)
    shares = Shares({path: [] for path in paths}, [])
    for name, names in aliases.items():
        if not excluded.isdisjoint(ends[name]):
            continue
        dtype = model.get_parameter(name).dtype
        if not dtype.is_floating_point:
            raise UserError(f"LISA: '{name}' is quantised ({dtype}); load the model in a floating dtype.")
        owners = {next((end for end in reversed(containers(alias)) if end in shares.layers), "") for alias in names}
        if "" not in owners:
            for path in owners:
                shares.layers[path].append(name)
        elif train_embeddings or not any(_is_embedding(model, alias, heads) for alias in names):
            shares.always.append(name)
    return shares


def find_layers(model: nn.Module, layers: Layers) -> list[str]:
    """Return the paths of the layers in order. Raise UserError if they cannot be determined."""
    path_of = {id(module): path for path, module in model.named_modules()}
    if layers is None:
        layers = _blocks(model)
    elif isinstance(layers, str):
        parent = layers
        try:
            layers = list(model.get_submodule(parent).children())
        except AttributeError as error:
            raise UserError(f"LISA.layers: no module '{parent}'.{near(parent, path_of.values())}") from error
    elif isinstance(layers, nn.Module):
        layers = list(layers.children())
    module_paths = set(path_of.values())
    paths: list[str] = []
    for layer in need_names("LISA.layers:", layers, nn.Module):
        path = layer if isinstance(layer, str) else path_of.get(id(layer))
        if path is None or path not in module_paths:
            name = f"'{layer}'" if isinstance(layer, str) else f"a {type(layer).__name__}"
            raise UserError(
                f"LISA.layers: {name} is not a module of this {type(model).__name__}.{near(str(path), module_paths)}"
            )
        paths.append(path)
    if not paths or len(set(paths)) != len(paths):
        raise UserError(f"LISA.layers: {len(paths)} layers, {len(set(paths))} of them different; name each once.")
    return paths


def stacks(model: nn.Module) -> dict[str, int]:
    """Return the numbers of parameters of the outermost ModuleLists and Sequentials whose children have one class.

    The largest come first.
    """
    sizes: dict[str, int] = {}
    for path, module in model.named_modules():
        is_stack = (
            isinstance(module, nn.ModuleList | nn.Sequential)
            and len({_kind(child) for child in module.children()}) == 1
        )
        if is_stack and not any(path.startswith(f"{outer}.") for outer in sizes):
            sizes[path] = count_parameters(module)[1]
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _kind(child: nn.Module) -> type[nn.Module]:
    shell = child.shell if isinstance(child, AdapterModule) else None
    return type(shell if shell is not None else child)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the equal layers that have the most parameters.

    They belong to one stack, or to the stages `layer1`, `layer2`, ... of a ResNet.
    """
    sizes, groups = stacks(model), dict[tuple[str, type], list[str]]()
    for path, module in model.named_modules():
        if path in sizes:
            kind = type(next(module.children()))
            groups.setdefault((path.rstrip("0123456789"), kind), []).append(path)

    def size(paths: list[str]) -> int:
        return sum(sizes[path] for path in paths)

    ranked = sorted(groups.values(), key=size, reverse=True)
    if not ranked:
        raise UserError(f"LISA.layers: {type(model).__name__} has no list of equal layers; name them with layers=.")
    if len(ranked) > 1 and 2 * size(ranked[1]) >= size(ranked[0]):
        raise UserError(
            f"LISA.layers: '{ranked[0][0]}' or '{ranked[1][0]}'? Name one with layers=, or give all layers as a list."
        )
    return [block for path in ranked[0] for block in model.get_submodule(path).children()]


def _is_embedding(model: nn.Module, name: str, heads: set[str]) -> bool:
    owner = name.rpartition(".")[0]
    return owner not in heads and (
        isinstance(model.get_submodule(owner), nn.Embedding) or _EMBEDDING.fullmatch(name) is not None
    )
