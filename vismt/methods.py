"""Adaptation methods: one declaration a method, in the method's own file, and `adapt`, which finds it by name.

A `Method` declares everything that the rest of the package needs to know about a method: the function that adapts a model,
the layer classes it places, the optimiser and the schedule that training needs, what a job has to provide, and whether the
trained model merges and exports. No other file tests the name of a method.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from vismt.base.errors import UserError, require_known, shown_value
from vismt.base.registry import PLACES, Registry, with_entry_points
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.layers.stock_modules import matrix_shape
from vismt.lowrank.model.inject import COMMON, check_options
from vismt.lowrank.model.named import new_adapter
from vismt.lowrank.model.record import AdaptReport, record_of
from vismt.lowrank.model.targets import find_targets, pattern_values

_GIVEN = {"model", "targets", "rank", "alpha", "seed"}  # what every method takes
RANK = 8
DEFAULTS: dict[str, Any] = {"targets": None, "rank": RANK, "alpha": None}  # of `adapt`


class Schedule(Protocol):
    """What a method changes as training goes on. It may have `metrics() -> {name: scalar}`, which the loop logs."""

    def on_step(self, step: int) -> None:
        """Get ready for the next step; `step` is the number of finished ones."""


class MakeSchedule(Protocol):
    """Return the schedule of an adapted model, or None where there is nothing to schedule.

    steps: optimiser steps of the whole training. settings: the section `Method.section` of the run's configuration.
    """

    def __call__(self, model: nn.Module, optimizer: Optimizer, *, steps: int, settings: Any) -> Schedule | None: ...


@dataclass
class Calibration:
    """Data that a job offers to a method before it adapts the model.

    batches() returns batches of model inputs on the CPU. folder: Folder for what was computed. results: computed values by key,
    shared by all arms of a run.
    """

    batches: Callable[..., list[dict[str, Tensor]]]
    folder: Path
    results: dict[str, Any] = field(default_factory=dict)


class Calibrate(Protocol):
    """Return options of the method that are computed from data. targets, options: as `adapt` gets them."""

    def __call__(
        self, model: nn.Module, calibration: Calibration, *, targets: Any, options: Mapping[str, Any]
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Method:
    """The declaration of a method.

    Args:
        name: what `vismt.adapt` takes.
        adapt: `adapt(model, *, targets, rank, alpha, seed, **options) -> AdaptReport`; its first docstring line is shown
            by `vismt list`.
        layers: classes of the adapter layers and wrappers that it places; () for a method that trains the weights.
        optimizer: `optimizer(optimizer, model) -> optimizer` returns the optimiser that an adapted model is trained with.
            It may have `metrics() -> {name: scalar}`, which the loop logs.
        schedule: returns the schedule of an adapted model, see `MakeSchedule`.
        section: name of the section of a run's configuration with the schedule's settings.
        freezes: whether the schedule freezes parameters in turn.
        head_only: whether it trains the model's own classifier and nothing below. Jobs have heads of their own, so a
            configuration with such a method is one with adapt: null.
        calibrate: computes options from data, see `Calibrate`.
        needs: what a job has to provide under given options, with the reason: "calibration" (data for `calibrate`), "users" (a
            vector for each sample, its width the option `user_width`), or "tasks" (heads that read features of their own,
            streams.py).
        merges: whether the trained model can be merged into stock weights.
        exports: whether the update can be exported as a plain LoRA.
        unread: those of targets, rank and alpha that it does not read, each with what it does instead and what to set.
    """

    name: str
    adapt: Callable[..., AdaptReport]
    layers: tuple[type[nn.Module], ...]
    optimizer: Callable[[Optimizer, nn.Module], Optimizer] | None = None
    schedule: MakeSchedule | None = None
    section: str | None = None
    freezes: bool = False
    head_only: bool = False
    calibrate: Calibrate | None = None
    needs: Callable[[Mapping[str, Any]], Mapping[str, str]] = lambda options: {}
    merges: bool = True
    exports: bool = True
    unread: Mapping[str, str] = field(default_factory=dict)

    def check_read(self, where: str = "", **arguments: Any) -> None:
        """Raise UserError for one of targets, rank and alpha that is given, with another value than its default, and not read."""
        for name, value in arguments.items():
            if name in self.unread and value != DEFAULTS[name]:
                raise UserError(
                    f"{where}adapt.{name}: {shown_value(value)} with '{self.name}', which {self.unread[name]}, leave {name} out."
                )

    def unread_of(self, settings: Any) -> dict[str, Any]:
        """Return the defaults of those of targets, rank and alpha that it does not read and `settings` changes."""
        return {name: DEFAULTS[name] for name in self.unread if getattr(settings, name) != DEFAULTS[name]}

    @property
    def options(self) -> list[str]:
        """Names of the options beyond targets, rank, alpha and seed; `**options` of `adapt` stands for the common ones."""
        parameters = [p for p in inspect.signature(self.adapt).parameters.values() if p.name not in _GIVEN]
        names = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
        if len(names) < len(parameters):
            names += [name for name in COMMON if name not in names]
        return names


METHODS: Registry[Method] = Registry("adapt: no method", with_entry_points("vismt.methods", PLACES["methods"]))


def register_method(method: Method) -> Method:
    """Make a method known to `vismt.adapt`, and return it."""
    return METHODS.add(method.name, method)


def list_methods() -> list[str]:
    """Return the names that `vismt.adapt` takes."""
    return list(METHODS)


def adapt(
    model: nn.Module,
    method: str,
    targets: Any = None,
    rank: int = RANK,
    alpha: float | None = None,
    seed: int = 0,
    name: str = "default",
    **options: Any,
) -> AdaptReport:
    """Adapt `model` in place with a published method and freeze the rest.

    A model may carry several adapters, each with a name; the new one becomes the active one (`activate`).

    Args:
        model: any module with linears or convolutions; changed in place.
        method: one of `list_methods()`. "full" trains every weight, "head" the classifier alone.
        targets: 'all-linear' (None), 'all-conv', 'all-linear+conv', a full-path regex, or a list of paths and suffixes.
        rank: of each pair of factors.
        alpha: numerator of the scale alpha / rank; None means alpha = rank.
        seed: the start values depend on it and on each module's path alone.
        name: of the adapter on this model.
        options: of the method; `vismt list methods` shows each with its default and meaning.

    Returns:
        What was adapted; printing it gives a table.

    Raises:
        UserError: for an unknown method or option, a pattern without a match, a rank that does not fit, an argument that the
            method does not read (rank with 's2ft'), and a name that the model carries already; the model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"adapt: the model is a {type(model).__name__}; it must be a torch.nn.Module.")
    known = known_method(method, options)
    if not isinstance(seed, int) or seed.bit_length() > 64:
        raise UserError(f"adapt.seed: {shown_value(seed)}; it must be a whole number of at most 64 bits.")
    known.check_read(targets=targets, rank=rank, alpha=alpha)
    with new_adapter(model, name, "adapt"):
        return known.adapt(model, targets=targets, rank=rank, alpha=alpha, seed=seed, **options)


def known_method(name: Any, options: Collection[str]) -> Method:
    """Return a method by name. Raises UserError for an unknown one, and for options that it does not have."""
    method = METHODS[name]
    unknown = [option for option in options if option not in method.options]
    if unknown:
        from vismt.config.sections import AdaptConfig

        for option in unknown:
            if option in AdaptConfig.ELSEWHERE:
                raise UserError(f"adapt: '{name}' has no option '{option}'. {AdaptConfig.ELSEWHERE[option]}")
        require_known(f"adapt: '{name}' has no option", unknown, method.options)
    return method


def check_adaptation(
    model: nn.Module, name: str, targets: Any, rank: int, alpha: float | None, options: Mapping[str, Any]
) -> None:
    """Raise UserError for a method, option, target or rank that `adapt` refuses; the model's values are not read.

    What a method checks beyond that is left to `adapt`.
    """
    method = known_method(name, options)
    method.check_read(targets=targets, rank=rank, alpha=alpha)
    common = {option: options[option] for option in COMMON if option in options}
    settings = check_options({"targets": targets, "rank": rank, "alpha": alpha, **common})
    if not any(issubclass(layer, LowRankLayer) for layer in method.layers):
        return
    modules, _ = find_targets(model, settings["targets"], settings["exclude"], prequantized=True, readable=True)
    ranks = {} if targets is None else pattern_values("adapt.rank_pattern", settings["rank_pattern"], modules)
    if targets is None:  # the method's own choice, which may leave out small modules
        modules = dict([max(modules.items(), key=lambda item: min(matrix_shape(item[1])))])
    flags = {name: settings[name] for name in ("rslora", "clamp_rank", "split_qkv")}
    for path, module in modules.items():
        LowRankLayer.plan(path, module, ranks.get(path, settings["rank"]), None, **flags)


def adapted_models(module: nn.Module) -> list[tuple[nn.Module, Method]]:
    """Return every adapted model in `module` with its method; a method that is not registered is left out."""
    records = [(model, record_of(model)) for model in module.modules()]
    return [(model, METHODS[record.method]) for model, record in records if record and record.method in METHODS]


def method_optimizer(optimizer: Optimizer, model: nn.Module) -> Optimizer:
    """Return `optimizer` inside what the methods need that adapted `model` or a part of it; itself where none does."""
    for adapted, method in adapted_models(model):
        if method.optimizer is not None and any(parameter.requires_grad for parameter in adapted.parameters()):
            optimizer = method.optimizer(optimizer, adapted)
    return optimizer


def schedules(module: nn.Module, optimizer: Optimizer, steps: int, sections: Any = None) -> list[Schedule]:
    """Return the schedules of the adapted models in `module`.

    steps: of the whole training. sections: an object whose attributes are the sections of the run's configuration.
    """
    result = []
    for model, method in adapted_models(module):
        if method.schedule is None:
            continue
        settings = getattr(sections, method.section, None) if method.section else None
        schedule = method.schedule(model, optimizer, steps=steps, settings=settings)
        if schedule is not None:
            result.append(schedule)
    return result


def freezes(module: nn.Module) -> bool:
    """Return whether the method of an adapted model in `module` freezes parameters in turn."""
    return any(method.freezes for _, method in adapted_models(module))


def check_sections(config: Any, method: str | None) -> None:
    """Raise UserError for a section of a configuration that the schedule of the method does not read, but others do."""
    read = None if method is None else METHODS[method].section
    from vismt.config.sections import SCHEDULED  # `adapt` needs no configuration

    for item in fields(config):
        if item.metadata != SCHEDULED or item.name == read or getattr(config, item.name) is None:
            continue
        names = [name for name, declaration in METHODS.items() if declaration.section == item.name]
        subject = f"'{method}'" if method else "a run without a method"
        raise UserError(
            f"{item.name}: {subject} has no schedule with this section; set adapt.method to {' or '.join(names)}, or "
            f"{item.name} to null."
        )


def needs(method: str, options: Mapping[str, Any]) -> Mapping[str, str]:
    """Return what a job has to provide for a method, with reasons; nothing for an unknown one."""
    return METHODS[method].needs(options) if method in METHODS else {}
