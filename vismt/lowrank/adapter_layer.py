"""The base class of adapter layers: what takes the place of a stock linear or convolution and carries its update.

A kind of layer is one class in one file. It declares its settings as a frozen dataclass, plans and builds itself, names
the tensors that an adapter file holds for it, and merges, undoes and exports its update. `LAYERS` finds it by name when
an adapter file is read; nothing else in the core tests the class of a layer.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vismt.lowrank.factors import LowRank
from vismt.lowrank.layer_spec import LayerSpec
from vismt.lowrank.targets import kind_of, matrix_shape
from vismt.lowrank.values import check_factor, check_finite
from vismt.registry import Registry

HOOKS = [name for name in nn.Module().__dict__ if "hook" in name and "state_dict" not in name]


class AdapterLayer(nn.Module, ABC):
    """A layer in the place of a stock linear or convolution, with the same weight and bias Parameters under their names.

    A subclass adds `Settings`, its forward and its tensors, is registered in `LAYERS`, and overrides what differs from the
    defaults here. A layer that stores its update in the weight itself takes it out in `remove_update` and puts it back in
    `apply_update`; one that reorders its tensors goes to the stock order and back in `reorder`, between those two.
    """

    Settings: ClassVar[type]
    name: ClassVar[str]
    # Why export_peft and combine refuse this layer, after "'<method>' "; empty where they do not.
    not_exported: ClassVar[str] = ""
    not_combined: ClassVar[str] = ""
    shell: nn.Module

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.training = base.weight, base.bias, base.training
        # The stock module without its tensors: not a submodule, so it adds no keys and follows no conversion.
        self.__dict__["shell"] = copy.copy(base)
        self.empty_shell()
        for name in HOOKS:  # shared tables: hooks fire while the module is adapted and stay when it is undone
            self.__dict__[name] = base.__dict__[name]

    # ---- the layer as data
    @classmethod
    @abstractmethod
    def build(
        cls, base: nn.Module, spec: LayerSpec, *, dropout: float = 0.0, dtype: torch.dtype | None = None
    ) -> AdapterLayer:
        """Return the layer of `spec` on the stock module `base`, with its update unset.

        dtype: of the trained tensors; None for the weight's own, fp32 for half-precision weights.
        """

    @classmethod
    @abstractmethod
    def tensor_shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that an adapter file must hold for `spec`, by name."""

    @classmethod
    def optional_shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        """Return the shapes of tensors that a file may hold besides: all of them or none."""
        return {}

    @classmethod
    def check_settings(cls, spec: LayerSpec) -> None:
        """Raise ValueError for settings of an adapter file that do not fit the shape of the weight."""

    @classmethod
    def check_tensors(cls, what: str, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> None:
        """Raise UserError for values that a layer of `spec` cannot hold; here for all that is not floating and finite.

        tensors: of an adapter file, by name, their shapes checked. what: start of messages.
        """
        for name, value in tensors.items():
            check_factor(f"{what}.{name}", value)

    @classmethod
    @abstractmethod
    def count_parameters(cls, spec: LayerSpec) -> int:
        """Return the number of trainable values of the update."""

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

    @classmethod
    def low_rank_of(cls, what: str, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> LowRank:
        """Return the update that `tensors` of an adapter file describe, without a model.

        what: start of error messages. Raises UserError where the update is not determined by the tensors alone.
        """
        weight = nn.Linear(spec.shape[1], spec.shape[0], bias=False, device="meta")
        layer = cls.build(weight, LayerSpec(spec.path, "linear", spec.shape, cls, spec.settings))
        layer.check_mergeable(what, spec.path)
        layer.assign(tensors)
        return layer.low_rank()

    @classmethod
    def prepare(
        cls, model: nn.Module, specs: Sequence[LayerSpec]
    ) -> Callable[[Mapping[str, AdapterLayer]], None] | None:
        """Check `specs` of this class on the stock model as a whole, before any layer is placed.

        Returns None, or a function to call with the placed layers by path. Raises UserError.
        """
        return None

    # ---- the stock module
    def matrix(self, weight: Tensor) -> Tensor:
        """Return the stock weight as a matrix (o, i); a view where its layout allows."""
        return weight.t() if type(self.shell).__name__ == "Conv1D" else weight

    def stored(self, matrix: Tensor) -> Tensor:
        """Return a matrix (o, i) in the stock weight's shape: the inverse of `matrix`."""
        return matrix.t() if type(self.shell).__name__ == "Conv1D" else matrix

    @property
    def in_features(self) -> int:
        return self.matrix(self.weight).shape[1]

    @property
    def out_features(self) -> int:
        return self.matrix(self.weight).shape[0]

    # ---- the update
    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that an adapter file holds for this layer, by name."""

    def check_fill(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        """Raise UserError for checked tensors that this layer on its model cannot take; here for values beyond its dtype."""
        own = self.tensors()
        for name, value in tensors.items():
            check_finite(f"{what}.{name}", value, own[name].dtype if name in own else trained_dtype(self.weight))

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what `tensors` of a layer of the same settings returned."""
        for name, value in tensors.items():
            getattr(self, name).copy_(value)

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the tensors themselves, frozen: for a layer on the meta device."""
        for name, value in tensors.items():
            trained = name in self._parameters
            setattr(self, name, nn.Parameter(value, requires_grad=False) if trained else value)

    @abstractmethod
    def low_rank(self) -> LowRank:
        """Return the whole update against the stock weight."""

    @abstractmethod
    def merged(self) -> nn.Module:
        """Return the stock module with the update in its weight."""

    def restored(self) -> nn.Module:
        """Return the stock module with its own weight, bit for bit."""
        return self._stock(self.weight)

    def peft_factors(self, update: LowRank) -> tuple[Tensor, Tensor]:
        """Return A and B of `update` in the layout of a peft file, the scale in B: (r, i) and (o, r)."""
        return update.R, update.L * update.scale

    def check_mergeable(self, what: str, path: str) -> None:
        """Raise UserError for `what` (merge, export) while one weight cannot hold the update."""

    def remove_update(self) -> None:
        """Take the update out of the weight."""

    def reorder(self, stock: bool) -> None:
        """Put tensors that are kept in another order into the stock order, or back."""

    def apply_update(self) -> None:
        """Put the update into the weight: the inverse of `remove_update`."""

    def empty_shell(self) -> None:
        """Drop the tensors of the stock module, which this layer has, or which a refused merge left there."""
        self.shell._parameters = dict.fromkeys(self.shell._parameters)

    def _stock(self, weight: nn.Parameter) -> nn.Module:
        module = self.shell
        module.weight, module.bias = weight, self.bias
        module.training = self.training
        return module


LAYERS: Registry[type[AdapterLayer]] = Registry(
    "adapter layer: no layer",
    files=(
        "vismt.lowrank.linear",
        "vismt.lowrank.quantized",
        "vismt.lowrank.slice_linear",
        "vismt.multitask.expert_pairs",
    ),
)


def register_layer(name: str) -> Callable[[type[Any]], type[Any]]:
    """Return a decorator that registers an AdapterLayer class as `name`, the name that adapter files use."""

    def decorate(layer: type[Any]) -> type[Any]:
        layer.name = name
        return LAYERS.add(name, layer)

    return decorate


def spec_of(path: str, module: nn.Module, layer: type[AdapterLayer], settings: Any) -> LayerSpec:
    """Return the LayerSpec of a stock module."""
    return LayerSpec(path, str(kind_of(module)), matrix_shape(module), layer, settings)


def trained_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of trained tensors on `weight`: its own, fp32 for half precision."""
    return torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype
