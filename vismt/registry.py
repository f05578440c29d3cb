"""Methods by name: a plain dict that a decorator fills, each method in its own file, loaded when first asked for."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from vismt.errors import UserError, require_known
from vismt.lowrank.inject import inject, record_of
from vismt.lowrank.layer_spec import AdaptReport

Method = Callable[..., AdaptReport]
Wrap = Callable[[Optimizer, nn.Module], Optimizer]


class Schedule(Protocol):
    """What a method changes as training goes on."""

    def on_step(self, step: int) -> None: ...  # called with the number of finished steps, before the next one


MakeSchedule = Callable[[nn.Module, Optimizer], Schedule]

METHOD_FILES = (
    "vismt.llm.corda",
    "vismt.llm.ilora",
    "vismt.llm.lisa",
    "vismt.llm.lora",
    "vismt.llm.pissa",
    "vismt.llm.polar",
    "vismt.llm.s2ft",
    "vismt.metatune.amt",
    "vismt.multitask.moe_lora",
)

_methods: dict[str, Method] = {}
_optimizers: dict[str, Wrap] = {}
_schedules: dict[str, MakeSchedule] = {}


def register_method(name: str) -> Callable[[Method], Method]:
    """Decorator: `method(model, *, targets, rank, alpha, seed, **options) -> AdaptReport` is known as `name`."""

    def keep(method: Method) -> Method:
        _methods[name] = method
        return method

    return keep


def register_optimizer(name: str) -> Callable[[Wrap], Wrap]:
    """Decorator: `wrap(optimizer, model) -> optimizer` is how a model adapted with method `name` has to be trained."""

    def keep(wrap: Wrap) -> Wrap:
        _optimizers[name] = wrap
        return wrap

    return keep


def method_optimizer(optimizer: Optimizer, model: nn.Module) -> Optimizer:
    """`optimizer` with what the methods need around it that adapted `model` or a part of it; as it is where none does.

    A wrapped one may have `metrics() -> {name: scalar}`, which the training loop logs.
    """
    for part in [part for part in model.modules() if record_of(part) is not None]:
        methods()  # the file of a loaded adapter's method may not be
        wrap = _optimizers.get(record_of(part).method)
        if wrap is not None and any(parameter.requires_grad for parameter in part.parameters()):
            optimizer = wrap(optimizer, part)
    return optimizer


def methods() -> dict[str, Method]:
    """Every registered method by name."""
    for path in METHOD_FILES:
        importlib.import_module(path)
    return dict(sorted(_methods.items()))


def list_methods() -> list[str]:
    """Names that `vismt.adapt` takes."""
    return list(methods())


def adapt(
    model: nn.Module,
    name: str | None = None,
    /,
    targets: Any = None,
    rank: int = 8,
    alpha: float | None = None,
    seed: int = 0,
    **options: Any,
) -> AdaptReport:
    """Adapt `model` in place with a published method and freeze the rest: `adapt(model, method, targets, rank, ...)`.

    The method's name is the second argument, by position or as `method=`; a method may have an option `method` of its own
    (adapt(model, 'pissa', method='randomized')), which is why the name is positional here.
    targets: 'all-linear' (None), a full-path regex, or a list of paths and suffixes. alpha: None means alpha = rank.
    seed: the start values depend on it and on each module's path alone. options: see the method's own signature.
    Raises UserError for an unknown method or option, a pattern without a match, a rank that does not fit.
    """
    if name is None:
        name = options.pop("method", None)
    known = methods()
    require_known("adapt: no method", [name], known)
    require_known(f"adapt: '{name}' has no option", options, method_options(known[name]))
    if not isinstance(seed, int):
        raise UserError(f"adapt.seed: {seed!r}; it must be a whole number.")
    return known[name](model, targets=targets, rank=rank, alpha=alpha, seed=seed, **options)


def register_schedule(name: str) -> Callable[[MakeSchedule], MakeSchedule]:
    """Decorator: `make(model, optimizer)` is the schedule of method `name`: which of its parameters train, step by step."""

    def keep(make: MakeSchedule) -> MakeSchedule:
        _schedules[name] = make
        return make

    return keep


def schedules(module: nn.Module) -> list[Callable[[Optimizer], Schedule]]:
    """For each adapted model in `module` whose method has a schedule: what makes it of the optimiser."""
    methods()  # the file of a loaded adapter's method may not be imported
    found = [(model, record_of(model)) for model in module.modules()]
    return [
        partial(_schedules[record.method], model) for model, record in found if record and record.method in _schedules
    ]


def method_options(method: Method) -> list[str]:
    """Names of the keyword options of a method beyond targets, rank, alpha and seed; `**options` stands for `inject`'s."""
    common = {"model", "targets", "rank", "alpha", "seed"}
    own = inspect.signature(method).parameters.values()
    names = [parameter.name for parameter in own if parameter.name not in common]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own):
        names.remove("options")
        # Beside its own, what the method itself hands to inject.
        filled = {*common, "method", "init", "offset", "core", "experts", "grid", *names}
        names += [name for name in inspect.signature(inject).parameters if name not in filled]
    return names
