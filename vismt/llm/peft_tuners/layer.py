"""Layers around a tuner layer of the installed peft, with its forward, its tensors and its merge.

peft builds its tuners on the stock model as a whole, since some tuners share tensors among layers. Its tuner layers are then
taken out. Each becomes part of a `HostedLayer`, which holds the base weight under its stock name and hands it to the tuner.
Targets, freezing, files and undoing are therefore the same as for every other layer. A tensor that several tuners share is
saved with the first of them. What peft computes from its settings and the base (tensors outside of state dicts) is computed
again.
"""

from __future__ import annotations

import copy
import importlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.factors import LowRank
from vismt.lowrank.files.peft_settings import PEFT_STARTS
from vismt.lowrank.layers.base import (
    AdapterLayer,
    AdapterModule,
    Finish,
    LayerSpec,
    adapter_layers,
    inner_module,
    register_module,
)
from vismt.lowrank.layers.stock_modules import dense_weight
from vismt.lowrank.model.modules import detach_all
from vismt.lowrank.tensors import check_factor
from vismt.storage.files import JsonObject

_BASE = "base_layer"  # peft's name of the stock module in a tuner layer
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class HostedSettings:
    """Settings of a tuner.

    tuner: Type of peft, "OFT". options: Arguments of its configuration beside the targets. seed: Seed of the start values.
    trained, fixed: Shapes of the tensors that peft made for this layer, by name. They are filled in when the layer is placed.
    """

    tuner: str
    options: JsonObject
    seed: int
    trained: Shapes = field(default_factory=dict)
    fixed: Shapes = field(default_factory=dict)


@register_module("hosted")
class HostedLayer(AdapterLayer):
    """A stock module with a tuner of peft, which `prepare` builds."""

    Settings = HostedSettings
    combine_refusal = "is a tuner of peft, not a pair of factors"
    has_factors = False
    takes_prequantized = True

    tuner: Any  # a layer of peft
    inner: nn.Module
    elsewhere: frozenset[str]

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.__dict__["elsewhere"] = frozenset()

    def adopt(self, base: Any) -> None:
        super().adopt(base)
        self.__dict__["inner"] = inner_module(base)
        if "tuner" in self._modules:  # an adapter that becomes active again has one
            self.tuner.__dict__[_BASE] = self.inner

    # ---- the layer as data
    @classmethod
    def build(cls, base: nn.Module, spec: LayerSpec, **how: object) -> HostedLayer:
        return cls(base)

    @classmethod
    def tensor_shapes(cls, spec: LayerSpec) -> Shapes:
        return {**spec.settings.trained, **spec.settings.fixed}

    @classmethod
    def count_parameters(cls, spec: LayerSpec) -> int:
        return sum(torch.Size(shape).numel() for shape in spec.settings.trained.values())

    @classmethod
    def describe(cls, spec: LayerSpec) -> tuple[str, str]:
        return str(spec.settings.options.get("r", "")), ""

    @classmethod
    def check_tensors(cls, what: str, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> None:
        for name, value in tensors.items():
            if name in spec.settings.trained or value.is_floating_point():
                check_factor(f"{what}.{name}", value)

    @classmethod
    def prepare(cls, model: nn.Module, specs: Sequence[LayerSpec]) -> Finish | None:
        """Let peft build the tuners of all `specs`. Afterwards the model is as it was."""
        with as_peft(model, specs) as hosted:
            tuners = {spec.path: hosted.get_submodule(f"base_model.model.{spec.path}") for spec in specs}

        def finish(layers: Mapping[str, AdapterModule]) -> None:
            seen: set[int] = set()
            for spec in specs:
                layer: Any = layers[spec.path]
                if "tuner" not in layer._modules:
                    layer.host(tuners[spec.path], seen)
                    layer.check_shapes(spec)

        return finish

    def host(self, tuner: nn.Module, seen: set[int]) -> None:
        """Take a tuner in.

        seen: Ids of the tensors that earlier layers save. The tensors of this layer are added.
        """
        tuner._modules.pop(_BASE)
        tuner.__dict__[_BASE] = self.inner
        self.tuner = tuner.train(self.training)
        named = tensors_of(tuner)
        self.__dict__["elsewhere"] = frozenset(name for name, value in named.items() if id(value) in seen)
        seen.update(id(value) for value in named.values())

    def check_shapes(self, spec: LayerSpec) -> None:
        """Fill in the shapes of a new layer. Raise UserError if a file has other shapes, because another peft wrote it."""
        shapes: tuple[Shapes, Shapes] = ({}, {})
        for name, value in self.tensors().items():
            shapes[not value.requires_grad][name] = tuple(value.shape)
        settings = spec.settings
        if not (settings.trained or settings.fixed):
            settings.trained.update(shapes[0])
            settings.fixed.update(shapes[1])
        elif (settings.trained, settings.fixed) != shapes:
            version = installed("peft").__version__
            raise UserError(
                f"'{spec.path}': peft {version} makes other tensors of {settings.tuner} than the file has; install the peft that "
                "wrote it."
            )

    # ---- the update
    def stock_weight(self) -> Tensor:
        return dense_weight(self.inner)

    def linked(self) -> Any:
        """Return the tuner with the present weight and bias. Conversions and functional calls may have replaced them."""
        self.inner._parameters.update(weight=self.weight, bias=self.bias)
        return self.tuner

    def forward(self, x: Tensor) -> Tensor:
        return self.linked()(x)

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in tensors_of(self.tuner).items() if name not in self.elsewhere}

    def low_rank(self) -> LowRank:
        raise UserError(f"adapter: a layer that {self.combine_refusal} has no factors; merge the model.")

    def check_mergeable(self, what: str, path: str) -> None:
        try:
            self.tuner.merge(adapter_names=[])
        except NotImplementedError as error:
            tuner = type(self.tuner).__module__.split(".")[-2]
            raise UserError(f"{what}: peft cannot merge its tuner '{tuner}' ('{path}'); save the adapter.") from error

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return the stock module with the weight and bias that peft merges."""
        tuner = copy.deepcopy(self.linked())
        tuner.merge()
        base = tuner.get_base_layer()
        module = self.stock(nn.Parameter(base.weight.detach(), requires_grad=self.weight.requires_grad))
        if self.bias is not None:
            module.bias = nn.Parameter(base.bias.detach(), requires_grad=self.bias.requires_grad)
        return module

    @classmethod
    def peft_files(cls, model: nn.Module, specs: Sequence[LayerSpec], saved: Sequence[str]) -> dict[str, bytes]:
        layers: dict[str, Any] = {spec.path: model.get_submodule(spec.path) for spec in specs}
        with as_peft(model, specs, saved) as hosted, tempfile.TemporaryDirectory() as folder:
            for path, layer in layers.items():
                fresh, own = tensors_of(hosted.get_submodule(f"base_model.model.{path}")), tensors_of(layer.tuner)
                for name, value in own.items():
                    fresh[name].data.copy_(value)
            hosted.save_pretrained(folder, save_embedding_layers=False)
            return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def tensors_of(tuner: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a tuner layer needs in a file: of its state dict, and of plain tables such as indices.

    Names have ":" instead of dots, because dots separate modules in an adapter file.
    """
    named = {
        name: value for name, value in tuner.state_dict(keep_vars=True).items() if not name.startswith(f"{_BASE}.")
    }
    for attribute, table in vars(tuner).items():
        if isinstance(table, dict) and not attribute.startswith("_"):
            named.update({f"{attribute}.{key}": value for key, value in table.items() if isinstance(value, Tensor)})
    return {name.replace(".", ":"): value for name, value in named.items()}


def configuration(settings: HostedSettings, paths: Iterable[str], saved: Sequence[str] = ()) -> Any:
    """Return peft's configuration of a tuner on exactly these modules.

    saved: Whole modules that are trained beside the tuner.

    Raise UserError for a tuner or options that the installed peft does not have, and for a start that moves the base weights.
    """
    peft = installed("peft")
    known = {
        kind.value: cls for kind, cls in importlib.import_module("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    if settings.tuner not in known:
        raise UserError(f"peft {peft.__version__} has no tuner '{settings.tuner}'; install the peft that has it.")
    start = settings.options.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in PEFT_STARTS:
        raise UserError(
            f"adapt.init_lora_weights: '{start}' moves the base weights, which stay frozen here; take true or one of "
            f"{', '.join(PEFT_STARTS)}."
        )
    targets = "|".join(re.escape(path) for path in paths)
    beside = {"modules_to_save": list(saved)} if saved else {}  # not every configuration has this field
    try:
        return known[settings.tuner](**settings.options, target_modules=targets, **beside)
    except (TypeError, ValueError) as error:
        raise UserError(f"adapt: peft does not take these options of {settings.tuner}: {error}") from error


@contextmanager
def as_peft(model: nn.Module, specs: Sequence[LayerSpec], saved: Sequence[str] = ()) -> Iterator[Any]:
    """Make `model` a PeftModel with fresh tuners inside the block. Restore modules and flags afterwards."""
    settings = specs[0].settings
    others = [
        spec.path
        for spec in specs
        if (spec.settings.tuner, spec.settings.options) != (settings.tuner, settings.options)
    ]
    if others:
        raise UserError(f"adapter: '{others[0]}' has another tuner than '{specs[0].path}'; a model hosts one.")
    children = [(module, dict(module._modules)) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = set(vars(model))
    try:
        hosts = {path: layer for path, layer in adapter_layers(model).items() if isinstance(layer, HostedLayer)}
        detach_all(model, {path: layer.linked().get_base_layer() for path, layer in hosts.items()})
        config = configuration(settings, [spec.path for spec in specs], saved)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(settings.seed)
                hosted = installed("peft").get_peft_model(model, config)
        except Exception as error:  # the tuner's code may raise any error
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"adapt: peft cannot build {config.peft_type.value} here: {reason}") from error
        yield hosted
    finally:
        for module, table in children:
            module._modules = table
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        for name in set(vars(model)) - attributes:
            delattr(model, name)


def installed(module: str) -> ModuleType:
    """Return a module of peft. Raise UserError if peft is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"adapt: the tuners of peft need peft ({error}): pip install peft.") from error
