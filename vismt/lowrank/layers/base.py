"""The base class of adapter layers: what takes the place of a stock linear or convolution and carries its update.

A kind of layer is one class in one file. It declares its settings as a frozen dataclass, plans and builds itself, names
the tensors that an adapter file holds for it, and merges, undoes and exports its update. `LAYERS` finds it by name when
an adapter file is read; nothing else in the core tests the class of a layer.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vismt.base.registry import PLACES, Registry
from vismt.lowrank.factors import LowRank
from vismt.lowrank.layers.kinds import kind_of, matrix_shape
from vismt.lowrank.values import check_factor, check_finite


class StandIn(nn.Module):
    """Base class: a subclass adds its forward. The stock module is kept as `shell`, without its tensors."""

    shell: nn.Module

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.adopt(base)

    def adopt(self, base: nn.Module) -> None:
        """Take the tensors, hooks and mode of the stock module `base`."""
        self.weight, self.bias, self.training = base.weight, getattr(base, "bias", None), base.training
        # The stock module without its tensors: not a submodule, so it adds no keys and follows no conversion.
        self.__dict__["shell"] = copy.copy(base)
        self.empty_shell()
        for name in HOOKS:  # shared tables: hooks fire while the module is replaced and stay when it is back
            self.__dict__[name] = base.__dict__[name]

    def release(self) -> None:
        """Let go of what `adopt` took, which is in the stock module again; the order of the parameters stays."""
        self.__dict__["shell"] = None
        self._parameters.update(dict.fromkeys({"weight", "bias"} & self._parameters.keys()))

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the stock weight as a matrix (o, i); a view where its layout allows."""
        return weight.t() if type(self.shell).__name__ == "Conv1D" else weight

    def stored(self, matrix: Tensor) -> Tensor:
        """Return a matrix (o, i) in the stock weight's shape: the inverse of `matrix`."""
        return matrix.t() if type(self.shell).__name__ == "Conv1D" else matrix

    def stock_weight(self) -> Tensor:
        """Return the stock weight as numbers; for a layer whose update is out of it."""
        return self.weight.detach()

    @property
    def in_features(self) -> int:
        return self.matrix(self.weight).shape[1]

    @property
    def out_features(self) -> int:
        return self.matrix(self.weight).shape[0]

    def restored(self) -> nn.Module:
        """Return the stock module with its own weight, bit for bit."""
        return self._stock(self.weight)

    def empty_shell(self) -> None:
        """Drop the tensors of the stock module, which this layer has, or which a refused merge left there."""
        self.shell._parameters = dict.fromkeys(self.shell._parameters)

    def _stock(self, weight: nn.Parameter) -> nn.Module:
        module: Any = self.shell
        module.weight = weight
        if "bias" in module._parameters:  # an embedding has none
            module.bias = self.bias
        module.training = self.training
        return module


class AdapterLayer(StandIn, ABC):
    """A layer in the place of a stock linear or convolution that carries its update.

    A subclass adds `Settings`, its forward and its tensors, is registered in `LAYERS`, and overrides what differs from the
    defaults here. A layer that stores its update in the weight itself takes it out in `remove_update` and puts it back in
    `apply_update`; one that reorders its tensors goes to the stock order and back in `reorder`, between those two.
    """

    Settings: ClassVar[type]
    name: ClassVar[str]
    # Why export_peft and combine refuse this layer, after "'<method>' "; empty where they do not.
    not_exported: ClassVar[str] = ""
    not_combined: ClassVar[str] = ""
    has_factors: ClassVar[bool] = True  # whether `low_rank` returns the update
    peft_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")  # of `peft_factors` in a file
    takes_packed: ClassVar[bool] = False  # whether the weight may be packed (packed_weights.py)
    forms_weight: ClassVar[bool] = (
        False  # whether `formed` returns W + DeltaW, for modules that read it themselves (held.py)
    )
    held: ClassVar[bool] = False  # whether the layer stands in the place of a parameter

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

    def peft_factors(self, update: LowRank) -> tuple[Tensor, Tensor]:
        """Return A and B of `update` in the layout of a peft file, the scale in B: (r, i) and (o, r)."""
        return update.R, update.L * update.scale

    @classmethod
    def peft_files(cls, model: nn.Module, specs: Sequence[LayerSpec], saved: Sequence[str]) -> dict[str, bytes] | None:
        """Return the files of a peft folder by name where the update has a format of peft's own; None for a plain LoRA.

        saved: modules that are trained as a whole beside the update.
        """
        return None

    def check_mergeable(self, what: str, path: str) -> None:
        """Raise UserError for `what` (merge, export) while one weight cannot hold the update."""

    def remove_update(self) -> None:
        """Take the update out of the weight."""

    def reorder(self, stock: bool) -> None:
        """Put tensors that are kept in another order into the stock order, or back."""

    def apply_update(self) -> None:
        """Put the update into the weight: the inverse of `remove_update`."""


LAYERS: Registry[type[AdapterLayer]] = Registry("adapter layer: no layer", PLACES["layers"])


def inner_module(base: nn.Module) -> nn.Module:
    """Return a stock module for calls from inside its layer: with its tensors, without the hooks, which the layer has."""
    inner = copy.copy(base)
    inner.__dict__.update({name: value for name, value in nn.Module().__dict__.items() if name in HOOKS})
    inner._parameters = dict(base._parameters)
    return inner


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
    """Return the dtype of trained tensors on `weight`: fp64 for fp64, fp32 for half precision and packed bytes too."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return every adapter layer of the model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterLayer)}


@dataclass(frozen=True)
class LayerSpec:
    """One adapted module: the layer class and its settings, enough to build the layer on a stock model.

    path, kind, shape: of the stock module; kind is that of `targets.kind_of`, shape the (o, i) of its matrix.
    settings: an instance of `layer.Settings`.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    layer: type[AdapterLayer]
    settings: Any

    @property
    def parameters(self) -> int:
        """Number of trainable values of the update."""
        return self.layer.count_parameters(self)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that an adapter file must hold for this module, by name."""
        return self.layer.tensor_shapes(self)


def factor_rank(specs: Sequence[LayerSpec]) -> int:
    """Return the largest rank of a pair of factors; 0 where there is none."""
    return max((spec.layer.factor_rank(spec) for spec in specs), default=0)


HOOKS = [name for name in nn.Module().__dict__ if "hook" in name and "state_dict" not in name]
