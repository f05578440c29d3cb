"""The tree of adapter modules: modules that a method puts into a model, in the place of a stock module or at a new path.

A kind of module is one class in one file. It declares its settings as a frozen dataclass, builds itself from them, and names the
tensors that an adapter file holds for it. `MODULES` finds it by name when an adapter file is read; nothing else in the core tests
the class of a module. An `AdapterLayer` stands in the place of a stock linear, convolution, embedding or parameter and carries
the update of its weight; other modules stand around a container (a router in an FFN) or at a path of their own (a network of
gates).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.base.registry import PLACES, Registry
from vismt.lowrank.factors import LowRank
from vismt.lowrank.layers.stock_modules import kind_of, matrix_shape
from vismt.lowrank.tensors import check_factor

_HOOKS = [name for name in nn.Module().__dict__ if "hook" in name and "state_dict" not in name]


class Placed(nn.Module):
    """A module in the place of a stock module, or at a path of its own, and how it comes and goes.

    In the place of a stock module it has the children, hooks and mode of that module, whose rest it keeps as `shell`, so every
    path and key below stays what it was. At a new path it has no shell. It never writes into a stock weight.
    """

    shell: nn.Module | None
    lent: tuple[str, ...]  # names of the children that it has of the stock module

    def __init__(self, base: nn.Module | None = None) -> None:
        super().__init__()
        self.adopt(base)

    def adopt(self, base: nn.Module | None) -> None:
        """Take the children, hooks and mode of the stock module `base`; None for a module at a new path."""
        self.__dict__["shell"], self.lent = None, ()
        if base is None:
            return
        # The stock module without what it lends: not a submodule, so it adds no keys and follows no conversion.
        shell = self.__dict__["shell"] = copy.copy(base)
        self.lent, shell._modules = tuple(base._modules), {}
        for name in _HOOKS:  # shared tables: hooks fire while the module is replaced and stay when it is back
            self.__dict__[name] = base.__dict__[name]
        self._modules.update(base._modules)
        self.training = base.training

    def attach(self, model: nn.Module, names: Sequence[str]) -> None:
        """Stand at each of these paths of the model, which are all names of one place."""
        for name in names:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, self)

    def detach(self, model: nn.Module) -> nn.Module | None:
        """Return the stock module as it was, with its present children, and let go of them; None at a new path."""
        stock = None if self.shell is None else self.stock()
        self.__dict__["shell"] = None
        for name in self.lent:  # their order stays
            self._modules[name] = None
        return stock

    def stock(self) -> nn.Module:
        """Return the stock module with the children that it lent as they are now."""
        module: Any = copy.copy(self.shell)
        module._modules = {name: self._modules[name] for name in self.lent}
        module.training = self.training
        return module


class PlacedWeight(Placed):
    """A module in the place of a stock module with a weight."""

    shell: nn.Module

    def adopt(self, base: nn.Module | None) -> None:
        """Take the weight, the bias, and what every adapter module takes."""
        super().adopt(base)
        stock: Any = base
        self.weight, self.bias = stock.weight, getattr(stock, "bias", None)
        self.shell._parameters = dict.fromkeys(self.shell._parameters)

    def detach(self, model: nn.Module) -> nn.Module | None:
        """Return the stock module with its own weight, bit for bit."""
        stock = super().detach(model)
        self._parameters.update(dict.fromkeys({"weight", "bias"} & self._parameters.keys()))
        return stock

    def stock(self, weight: nn.Parameter | None = None) -> nn.Module:
        """Return the stock module with its own weight, or with `weight` in its place."""
        module: Any = super().stock()
        module._parameters = dict(module._parameters)
        module.weight = self.weight if weight is None else weight
        if "bias" in module._parameters:  # an embedding has none
            module.bias = self.bias
        return module

    # ---- its weight
    def matrix(self, weight: Tensor) -> Tensor:
        """Return the stock weight as a matrix (o, i); a view where its layout allows."""
        return weight.t() if type(self.shell).__name__ == "Conv1D" else weight

    def stored(self, matrix: Tensor) -> Tensor:
        """Return a matrix (o, i) in the stock weight's shape: the inverse of `matrix`."""
        return matrix.t() if type(self.shell).__name__ == "Conv1D" else matrix

    def stock_weight(self) -> Tensor:
        """Return the stock weight as numbers."""
        return self.weight.detach()

    @property
    def in_features(self) -> int:
        return self.matrix(self.weight).shape[1]

    @property
    def out_features(self) -> int:
        return self.matrix(self.weight).shape[0]


class AdapterModule(Placed, ABC):
    """A part of an adapter in a model. A subclass adds its forward and tensors, and overrides what differs from the defaults."""

    Settings: ClassVar[type]
    name: ClassVar[str]  # in adapter files

    # ---- the module as data
    @classmethod
    @abstractmethod
    def build(cls, base: Any, spec: LayerSpec, **how: Any) -> AdapterModule:
        """Return the module of `spec` around `base`, the module at its path (None for a new path), with its update unset.

        how: dropout, and dtype of the trained tensors, None for the weight's own, fp32 for half-precision weights.
        """

    @classmethod
    def prepare(cls, model: nn.Module, specs: Sequence[LayerSpec]) -> Finish | None:
        """Check `specs` of this class on the stock model as a whole, before any module is placed.

        Returns None, or a function to call with the placed modules by path. Raises UserError.
        """
        return None

    @classmethod
    def tensor_shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that an adapter file must hold for `spec`, by name, where it fixes them."""
        return {}

    @classmethod
    def optional_shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Return the shapes of tensors that a file may hold besides: all of them or none."""
        return {}

    @classmethod
    def shapes_on(cls, base: nn.Module | None, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Return `tensor_shapes` for a module around `base`, which may carry such a module already.

        Raises UserError where it cannot carry one.
        """
        return cls.tensor_shapes(spec)

    @classmethod
    def check_settings(cls, spec: LayerSpec) -> None:
        """Raise ValueError for settings of an adapter file that do not fit the shape of the weight."""

    @classmethod
    def check_tensors(cls, what: str, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> None:
        """Raise UserError for values that a module of `spec` cannot hold; here for all that is not floating and finite.

        tensors: of an adapter file, by name, their shapes checked. what: start of messages.
        """
        for name, value in tensors.items():
            check_factor(f"{what}.{name}", value)

    @classmethod
    def count_parameters(cls, spec: LayerSpec) -> int:
        """Return the number of trainable values of the update."""
        return 0

    # ---- its tensors
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that an adapter file holds for this module, by name below its path."""
        return {}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what `tensors` of a module of the same settings returned."""
        own = self.tensors()
        for name, value in tensors.items():
            own[name].copy_(value)

    def check_mergeable(self, what: str, path: str) -> None:
        """Raise UserError for `what` (merge, export) while the stock weights cannot hold what this module does."""

    @classmethod
    def check_mergeable_saved(cls, what: str, path: str, tensors: Mapping[str, Tensor]) -> None:
        """Raise the same UserError for a module in an adapter file that no weight determines, from its saved `tensors()`."""


Finish = Callable[[Mapping[str, AdapterModule]], None]  # of placed modules, by path


class AdapterLayer(PlacedWeight, AdapterModule):
    """An adapter module in the place of a stock module with a weight, which carries the update of that weight."""

    # Why export_peft and combine refuse this layer, after "'<method>' "; empty where they do not.
    export_refusal: ClassVar[str] = ""
    combine_refusal: ClassVar[str] = ""
    has_factors: ClassVar[bool] = True  # whether `low_rank` returns the update
    peft_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")  # of `peft_factors` in a file
    takes_prequantized: ClassVar[bool] = False  # whether the weight may be of bitsandbytes or torchao
    # Whether `adapted_weight` returns W + DeltaW, for modules that read a weight instead of calling its layer.
    weight_readable: ClassVar[bool] = False
    of_parameter: ClassVar[bool] = False  # whether the layer stands in the place of a parameter

    # ---- its update
    @abstractmethod
    def low_rank(self) -> LowRank:
        """Return the whole update against the stock weight."""

    @abstractmethod
    def merged(self) -> nn.Module:
        """Return the stock module with the update in its weight."""

    @classmethod
    def low_rank_of(cls, what: str, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> LowRank:
        """Return the update that `tensors` of an adapter file describe, without a model.

        what: start of error messages. Raises UserError where the update is not determined by the tensors alone.
        """
        for name in cls.tensor_shapes(spec).keys() - tensors.keys():
            raise UserError(f"{what}: '{spec.path}.{name}' is missing.")
        weight = nn.Linear(spec.shape[1], spec.shape[0], bias=False, device="meta")
        layer: Any = cls.build(weight, replace(spec, kind="linear"))
        layer.check_mergeable(what, spec.path)
        for name, value in tensors.items():
            trained = name in layer._parameters
            setattr(layer, name, nn.Parameter(value, requires_grad=False) if trained else value)
        return layer.low_rank()

    @classmethod
    def factor_rank(cls, spec: LayerSpec) -> int:
        """Return the rank of the pair of factors; 0 for an update without one."""
        return 0

    @classmethod
    def describe(cls, spec: LayerSpec) -> tuple[str, str]:
        """Return the cells "rank" and "scale" of the report's table."""
        return "", ""

    @classmethod
    def shape_mismatch(cls, spec: LayerSpec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> str:
        """Return the text of the error for a model with another weight than (o, i) of `spec`. tensors: of the file."""
        return f"{spec.path}: its weight was {spec.shape}, here it is {shape}"

    def peft_factors(self, update: LowRank) -> tuple[Tensor, Tensor]:
        """Return A and B of `update` in the layout of a peft file, the scale in B: (r, i) and (o, r)."""
        return update.A, update.B * update.scale

    @classmethod
    def peft_files(cls, model: nn.Module, specs: Sequence[LayerSpec], saved: Sequence[str]) -> dict[str, bytes] | None:
        """Return the files of a peft folder by name where the update has a format of peft's own; None for a plain LoRA.

        saved: modules that are trained as a whole beside the update.
        """
        return None


@dataclass(frozen=True)
class LayerSpec:
    """One adapter module as data: its class and settings, enough to build it on a stock model.

    path: of the module. kind, shape: of the stock module with a weight that a layer stands for (stock_modules.kind_of), the
    shape being the (o, i) of its matrix; empty for other modules. settings: an instance of `layer.Settings`.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    layer: type[Any]
    settings: Any

    @property
    def parameters(self) -> int:
        """Number of trainable values of the update."""
        return self.layer.count_parameters(self)

    @property
    def has_weight(self) -> bool:
        """Whether it is an AdapterLayer, for one weight."""
        return issubclass(self.layer, AdapterLayer)


def spec_of(path: str, module: nn.Module, layer: type[AdapterLayer], settings: Any) -> LayerSpec:
    """Return the LayerSpec of a layer in the place of a stock module."""
    return LayerSpec(path, str(kind_of(module)), matrix_shape(module), layer, settings)


def factor_rank(specs: Sequence[LayerSpec]) -> int:
    """Return the largest rank of a pair of factors; 0 where there is none."""
    return max((spec.layer.factor_rank(spec) for spec in specs if spec.has_weight), default=0)


MODULES: Registry[type[AdapterModule]] = Registry(
    "this version of vismt has no adapter module",
    PLACES["adapter_modules"],
)


def register_module(name: str) -> Callable[[type[Any]], type[Any]]:
    """Return a decorator that registers an AdapterModule class as `name`, the name that adapter files use."""

    def decorate(module: type[Any]) -> type[Any]:
        module.name = name
        return MODULES.add(name, module)

    return decorate


def in_autocast(x: Tensor) -> Tensor:
    """Return an input in the dtype of autocast where that is on, as torch's own linears take it."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def inner_module(base: nn.Module) -> nn.Module:
    """Return a stock module for calls from inside its layer: with its tensors, without the hooks, which the layer has."""
    inner = copy.copy(base)
    inner.__dict__.update({name: value for name, value in nn.Module().__dict__.items() if name in _HOOKS})
    inner._parameters = dict(base._parameters)
    return inner


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return every adapter layer of the model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterLayer)}


def adapter_modules(model: nn.Module) -> dict[str, AdapterModule]:
    """Return every adapter module of the model by path: layers, and what stands around them or beside."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterModule)}
