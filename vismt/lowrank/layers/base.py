"""The base classes of adapter modules: modules that a method puts into a model, in the place of a stock module or at a new path.

A kind of module is one class in one file. The class declares its settings as a frozen dataclass, builds itself from them, and
names the tensors that an adapter file holds for it. `MODULES` finds the class by name when an adapter file is read. Nothing
else in the core tests the class of a module. An `AdapterLayer` stands in the place of a stock linear, convolution, embedding or
parameter, and carries the update of its weight. Other modules stand around a container (a router in an FFN) or at a path of
their own (a network of gates).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.base.registry import PLACES, Registry
from vismt.lowrank.factors import LowRank
from vismt.lowrank.layers.stock_modules import kind_of, matrix_shape
from vismt.lowrank.tensors import check_factor

M = TypeVar("M", bound="AdapterModule")
_HOOKS = [name for name in nn.Module().__dict__ if "hook" in name and "state_dict" not in name]


class AdapterModule(nn.Module, ABC):
    """A part of an adapter in a model. A subclass adds its forward and its tensors, and overrides defaults.

    In the place of a stock module it has the children, hooks and mode of that module. It keeps the rest of the stock module as
    `shell`, so that every path and key below stays the same. At a new path it has no shell. It never writes into a stock
    weight.
    """

    Settings: ClassVar[type]
    name: ClassVar[str]  # name in adapter files
    shell: nn.Module | None
    lent: tuple[str, ...]  # names of the children that it borrows from the stock module

    def __init__(self, base: nn.Module | None = None) -> None:
        super().__init__()
        self.adopt(base)

    def adopt(self, base: nn.Module | None) -> None:
        """Take the children, hooks and mode of the stock module `base`. `base` is None for a module at a new path."""
        self.__dict__["shell"], self.lent = None, ()
        if base is None:
            return
        # The stock module without its borrowed children. It is not a submodule, so it adds no keys and follows no
        # conversion.
        shell = self.__dict__["shell"] = copy.copy(base)
        self.lent, shell._modules = tuple(base._modules), {}
        # the tables are shared, so hooks fire while the module is replaced and are still there when it is back
        for name in _HOOKS:
            self.__dict__[name] = base.__dict__[name]
        self._modules.update(base._modules)
        self.training = base.training

    def attach(self, model: nn.Module, names: Sequence[str]) -> None:
        """Stand at each of these paths of the model. All of them are names of one place."""
        for name in names:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, self)

    def detach(self, model: nn.Module) -> nn.Module | None:
        """Return the stock module with its present children, and give the children up. Return None at a new path."""
        stock = None if self.shell is None else self.stock()
        self.__dict__["shell"] = None
        for name in self.lent:  # the order of the children stays
            self._modules[name] = None
        return stock

    def stock(self) -> nn.Module:
        """Return the stock module with its borrowed children as they are now."""
        module: Any = copy.copy(self.shell)
        module._modules = {name: self._modules[name] for name in self.lent}
        module.training = self.training
        return module

    # ---- the module as data
    @classmethod
    @abstractmethod
    def build(
        cls, base: Any, spec: LayerSpec, *, dropout: float = 0.0, dtype: torch.dtype | None = None
    ) -> AdapterModule:
        """Return the module of `spec` around `base`, with its update unset.

        base: Module at the path of the spec, None for a new path. dropout: Probability of dropout on the input of the update.
        dtype: Dtype of the trained tensors. None stands for the weight's own dtype, or fp32 if that is half precision.
        """

    @classmethod
    def prepare(cls, model: nn.Module, specs: Sequence[LayerSpec]) -> Finish | None:
        """Check all `specs` of this class on the stock model before any module is placed.

        Return None, or a function that takes the placed modules by path. Raise UserError for specs that do not fit the model.
        """
        return None

    @classmethod
    def tensor_shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that an adapter file must hold for `spec`, by name, as far as the spec fixes them."""
        return {}

    @classmethod
    def optional_shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Return the shapes of optional tensors. A file holds all of them or none."""
        return {}

    @classmethod
    def shapes_on(cls, base: nn.Module | None, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Return `tensor_shapes` for a module around `base`. `base` may carry such a module already.

        Raise UserError if `base` cannot carry one.
        """
        return cls.tensor_shapes(spec)

    @classmethod
    def check_settings(cls, spec: LayerSpec) -> None:
        """Raise ValueError for settings of an adapter file that do not fit the shape of the weight."""

    @classmethod
    def check_tensors(cls, what: str, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> None:
        """Raise UserError for values that a module of `spec` cannot hold.

        The default refuses values that are not floating and finite.

        tensors: Tensors of an adapter file, by name, with checked shapes. what: Start of messages.
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
        """Copy in the tensors that `tensors` of a module with the same settings returned."""
        own = self.tensors()
        for name, value in tensors.items():
            own[name].copy_(value)

    def check_mergeable(self, what: str, path: str) -> None:
        """Raise UserError for `what` (merge, export) while the stock weights cannot hold what this module does."""

    @classmethod
    def check_mergeable_saved(cls, what: str, path: str, tensors: Mapping[str, Tensor]) -> None:
        """Raise the error of `check_mergeable` for a module in an adapter file, from its saved `tensors()`.

        It is called for modules that belong to no weight.
        """


Finish = Callable[[Mapping[str, AdapterModule]], None]  # takes the placed modules by path


class AdapterLayer(AdapterModule):
    """An adapter module in the place of a stock module with a weight. It carries the update of that weight."""

    # Text that completes "'<method>' ..." in the error of export_peft and combine. Empty if the layer can be exported and
    # combined.
    export_refusal: ClassVar[str] = ""
    combine_refusal: ClassVar[str] = ""
    has_factors: ClassVar[bool] = True  # whether `low_rank` returns the update
    peft_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")  # names of `peft_factors` in a file
    takes_prequantized: ClassVar[bool] = False  # whether the weight may be of bitsandbytes or torchao
    # Whether `adapted_weight` returns W + DeltaW, for modules that read a weight instead of calling its layer.
    weight_readable: ClassVar[bool] = False
    of_parameter: ClassVar[bool] = False  # whether the layer stands in the place of a parameter
    shell: Any  # the stock module: its attributes follow its kind

    def adopt(self, base: nn.Module | None) -> None:
        """Take the weight and the bias, and everything that every adapter module takes."""
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
        """Return the stock module with its own weight, or with `weight` instead."""
        module: Any = super().stock()
        module._parameters = dict(module._parameters)
        module.weight = self.weight if weight is None else weight
        if "bias" in module._parameters:  # an embedding has none
            module.bias = self.bias
        return module

    # ---- its weight
    def matrix(self, weight: Tensor) -> Tensor:
        """Return the stock weight as a matrix (o, i). It is a view if the layout allows."""
        return weight.t() if type(self.shell).__name__ == "Conv1D" else weight

    def stored(self, matrix: Tensor) -> Tensor:
        """Return a matrix (o, i) in the shape of the stock weight, the inverse of `matrix`."""
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

    # ---- its update
    @abstractmethod
    def low_rank(self) -> LowRank:
        """Return the whole update relative to the stock weight."""

    @abstractmethod
    def merged(self) -> nn.Module:
        """Return the stock module with the update in its weight."""

    @classmethod
    def low_rank_of(cls, what: str, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> LowRank:
        """Return the update that `tensors` of an adapter file describe, without a model.

        what: Start of error messages.

        Raise UserError if the tensors alone do not determine the update.
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
        """Return the rank of the pair of factors. An update without factors has 0."""
        return 0

    @classmethod
    def describe(cls, spec: LayerSpec) -> tuple[str, str]:
        """Return the cells "rank" and "scale" of the report's table."""
        return "", ""

    @classmethod
    def shape_mismatch(cls, spec: LayerSpec, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> str:
        """Return the error text for a model whose weight has another shape than the (o, i) of `spec`.

        tensors: Tensors of the file.
        """
        return f"{spec.path}: its weight was {spec.shape}, here it is {shape}"

    def peft_factors(self, update: LowRank) -> tuple[Tensor, Tensor]:
        """Return A (r, i) and B (o, r) of `update` in the layout of a peft file, with the scale in B."""
        return update.A, update.B * update.scale

    @classmethod
    def peft_files(cls, model: nn.Module, specs: Sequence[LayerSpec], saved: Sequence[str]) -> dict[str, bytes] | None:
        """Return the files of a peft folder by name if the update has a format of peft's own. Return None for a plain LoRA.

        saved: Modules that are trained as a whole beside the update.
        """
        return None


@dataclass(frozen=True)
class LayerSpec:
    """One adapter module as data: its class and settings, from which it can be built on a stock model.

    path: Path of the module. kind: Kind of the stock module with a weight that a layer replaces (stock_modules.kind_of), empty
    for other modules. shape: Shape (o, i) of its weight as a matrix, empty for other modules. settings: Instance of
    `layer.Settings`.
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
        """Whether the module is an AdapterLayer, which belongs to one weight."""
        return issubclass(self.layer, AdapterLayer)


def spec_of(path: str, module: nn.Module, layer: type[AdapterLayer], settings: object) -> LayerSpec:
    """Return the LayerSpec of a layer that replaces a stock module."""
    return LayerSpec(path, str(kind_of(module)), matrix_shape(module), layer, settings)


def factor_rank(specs: Sequence[LayerSpec]) -> int:
    """Return the largest rank of a pair of factors, 0 for a model without pairs."""
    return max((spec.layer.factor_rank(spec) for spec in specs if spec.has_weight), default=0)


MODULES: Registry[type[AdapterModule]] = Registry(
    "this version of vismt has no adapter module",
    PLACES["adapter_modules"],
)


def register_module(name: str) -> Callable[[type[M]], type[M]]:
    """Return a decorator that registers an AdapterModule class under `name`, the name that adapter files use."""

    def decorate(module: type[M]) -> type[M]:
        module.name = name
        MODULES.add(name, module)
        return module

    return decorate


def in_autocast(x: Tensor) -> Tensor:
    """Return an input in the dtype of autocast if autocast is on, as torch's own linears take it."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def inner_module(base: nn.Module) -> nn.Module:
    """Return a stock module that its layer can call: with the stock tensors, and without the hooks, which the layer has."""
    inner = copy.copy(base)
    inner.__dict__.update({name: value for name, value in nn.Module().__dict__.items() if name in _HOOKS})
    inner._parameters = dict(base._parameters)
    return inner


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return every adapter layer of the model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterLayer)}


def adapter_modules(model: nn.Module) -> dict[str, AdapterModule]:
    """Return every adapter module of the model by path: layers, modules around them, and modules at paths of their own."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterModule)}
