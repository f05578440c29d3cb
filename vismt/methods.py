"""The registry of adaptation methods, and `adapt`, which finds a method by its name.

Each method declares itself once, as a `Method` in its own file. The declaration holds everything that the rest of the package
needs to know: the function that adapts a model, the layer classes it places, the optimiser and schedule that training needs,
what a job has to provide, and whether the trained model merges and exports. No other file tests the name of a method.
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
from vismt.lowrank.model.inject import COMMON, check_options, freeze_tensors
from vismt.lowrank.model.named import new_adapter
from vismt.lowrank.model.record import AdaptReport, count_parameters, record_of
from vismt.lowrank.model.targets import Targets, find_targets, pattern_values

_GIVEN = {"model", "targets", "rank", "alpha", "seed"}  # arguments that every method takes
RANK = 8
DEFAULTS: dict[str, Any] = {"targets": None, "rank": RANK, "alpha": None}  # defaults of `adapt`


class Schedule(Protocol):
    """What a method changes while training goes on.

    A schedule may have a method `metrics() -> {name: scalar}`. The training loop logs these values.
    """

    def on_step(self, step: int) -> None:
        """Prepare the next step. `step` is the number of finished steps."""


class MakeSchedule(Protocol):
    """Return the schedule of an adapted model. Return None if there is nothing to schedule.

    steps: Number of optimiser steps of the whole training. settings: Section `Method.section` of the run's configuration.
    """

    def __call__(self, model: nn.Module, optimizer: Optimizer, *, steps: int, settings: object) -> Schedule | None: ...


@dataclass
class Calibration:
    """Data that a job offers to a method before the method adapts the model.

    batches: Function that returns batches of model inputs on the CPU. folder: Folder for computed files. results: Computed
    values by key, shared by all arms of a run.
    """

    batches: Callable[..., list[dict[str, Tensor]]]
    folder: Path
    results: dict[str, object] = field(default_factory=dict)


class Calibrate(Protocol):
    """Return options of the method that are computed from data.

    targets, options: Arguments that `adapt` gets.
    """

    def __call__(
        self, model: nn.Module, calibration: Calibration, *, targets: Targets, options: Mapping[str, object]
    ) -> dict[str, object]: ...


@dataclass(frozen=True)
class Method:
    """Declaration of a method.

    Args:
        name: Name that `vismt.adapt` takes.
        adapt: Function `adapt(model, *, targets, rank, alpha, seed, **options) -> AdaptReport`. `vismt list` shows the first
            line of its docstring.
        layers: Classes of the adapter layers and wrappers that the method places. Empty for a method that trains the weights
            themselves.
        frozen: Names of tensors of the layers that are not trained, such as "lora_A". `adapt` and `load_adapter` freeze them.
        optimizer: Function `optimizer(optimizer, model) -> optimizer` that returns the optimiser for training an adapted model.
            The returned optimiser may have a method `metrics() -> {name: scalar}`. The training loop logs these values.
        schedule: Function that returns the schedule of an adapted model, see `MakeSchedule`.
        section: Name of the configuration section with the settings of the schedule.
        freezes: Whether the schedule freezes parameters in turn.
        head_only: Whether the method trains only the model's own classifier. Jobs have heads of their own, so a configuration
            with such a method is treated as adapt: null.
        calibrate: Function that computes options from data, see `Calibrate`.
        needs: Function from options to what a job has to provide, with the reason. The keys are "calibration" (data for
            `calibrate`), "users" (a vector for each sample, its width is the option `user_width`) and "tasks" (heads that read
            features of their own, streams.py).
        merges: Whether the trained model can be merged into stock weights.
        exports: Whether the update can be exported as a plain LoRA.
        unread: Arguments among targets, rank and alpha that the method does not read. Each maps to a text that says what the
            method does instead and what to set.
    """

    name: str
    adapt: Callable[..., AdaptReport]
    layers: tuple[type[nn.Module], ...]
    frozen: tuple[str, ...] = ()
    optimizer: Callable[[Optimizer, nn.Module], Optimizer] | None = None
    schedule: MakeSchedule | None = None
    section: str | None = None
    freezes: bool = False
    head_only: bool = False
    calibrate: Calibrate | None = None
    needs: Callable[[Mapping[str, object]], Mapping[str, str]] = lambda options: {}
    merges: bool = True
    exports: bool = True
    unread: Mapping[str, str] = field(default_factory=dict)

    def check_read(self, where: str = "", **arguments: object) -> None:
        """Raise UserError if targets, rank or alpha is given, differs from its default, and is not read by the method."""
        for name, value in arguments.items():
            if name in self.unread and value != DEFAULTS[name]:
                raise UserError(
                    f"{where}adapt.{name}: {shown_value(value)} with '{self.name}', which {self.unread[name]}, leave {name} out."
                )

    def unread_of(self, settings: object) -> dict[str, Any]:
        """Return the defaults of the arguments that the method does not read and that `settings` changes."""
        return {name: DEFAULTS[name] for name in self.unread if getattr(settings, name) != DEFAULTS[name]}

    @property
    def options(self) -> list[str]:
        """Names of the options beyond targets, rank, alpha and seed. A `**options` in `adapt` stands for the common options."""
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
    """Return the names of all methods that `vismt.adapt` takes.

    Example:
        print(vismt.list_methods())
    """
    return list(METHODS)


def adapt(
    model: nn.Module,
    method: str,
    targets: Targets = None,
    rank: int = RANK,
    alpha: float | None = None,
    seed: int = 0,
    name: str = "default",
    **options: object,
) -> AdaptReport:
    """Adapt `model` in place with a published method, and freeze the rest of the model.

    A model may carry several adapters, each with a name. The new adapter becomes the active one (see `activate`).

    Args:
        model: Any module with linears or convolutions. It is changed in place.
        method: Name of a method, one of `list_methods()`. "full" trains every weight, "head" only the classifier.
        targets: Modules to adapt: "all-linear", "all-conv", "all-linear+conv", a regular expression of full paths, or a list of
            paths and suffixes. None means "all-linear", and "all-conv" for a model without linear layers.
        rank: Rank of each pair of factors.
        alpha: Numerator of the scale alpha / rank. None means alpha = rank.
        seed: Seed of the start values. The start of a module depends on the seed and on the module's path alone.
        name: Name of the adapter on this model.
        options: Options of the method. `vismt list methods` shows each option with its default and meaning.

    Returns:
        A report on what was adapted. Printing it gives a table.

    Raises:
        UserError: If the method or an option is unknown, a pattern matches nothing, a rank does not fit, the method does not
            read an argument (rank with "s2ft"), or the model already carries an adapter of this name. The model is then
            unchanged.

    Example:
        model = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=10)
        report = vismt.adapt(model, "pissa", targets=["qkv", "fc1"], rank=8, also_train=["head"])
        print(report)
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"adapt: the model is a {type(model).__name__}; it must be a torch.nn.Module.")
    known = known_method(method, options)
    if not isinstance(seed, int) or seed.bit_length() > 64:
        raise UserError(f"adapt.seed: {shown_value(seed)}; it must be a whole number of at most 64 bits.")
    known.check_read(targets=targets, rank=rank, alpha=alpha)
    with new_adapter(model, name, "adapt"):
        report = known.adapt(model, targets=targets, rank=rank, alpha=alpha, seed=seed, **options)
        if known.frozen:
            freeze_tensors(model, known.frozen)
            report.trainable, report.total = count_parameters(model)
        return report


def known_method(name: str, options: Collection[str]) -> Method:
    """Return a method by name. Raise UserError if the method is unknown or lacks one of the options."""
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
    model: nn.Module, name: str, targets: Targets, rank: int, alpha: float | None, options: Mapping[str, object]
) -> None:
    """Raise UserError if `adapt` would refuse the method, an option, a target or the rank.

    The values of the model are not read. `adapt` makes the further checks of a method.
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
    """Return every adapted model in `module` with its method. Models of unregistered methods are left out."""
    records = [(model, record_of(model)) for model in module.modules()]
    return [(model, METHODS[record.method]) for model, record in records if record and record.method in METHODS]


def method_optimizer(optimizer: Optimizer, model: nn.Module) -> Optimizer:
    """Return `optimizer` wrapped in what the methods of the adapted models in `model` need.

    If no method needs anything, `optimizer` itself is returned.
    """
    for adapted, method in adapted_models(model):
        if method.optimizer is not None and any(parameter.requires_grad for parameter in adapted.parameters()):
            optimizer = method.optimizer(optimizer, adapted)
    return optimizer


def schedules(module: nn.Module, optimizer: Optimizer, steps: int, sections: object = None) -> list[Schedule]:
    """Return the schedules of the adapted models in `module`.

    steps: Number of steps of the whole training. sections: Object whose attributes are the sections of the run's configuration.
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
    """Raise UserError if the configuration has a schedule section that belongs to another method."""
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


def needs(method: str, options: Mapping[str, object]) -> Mapping[str, str]:
    """Return what a job has to provide for a method, with reasons. Return nothing for an unknown method."""
    return METHODS[method].needs(options) if method in METHODS else {}
