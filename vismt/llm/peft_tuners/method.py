"""Any tuner of the installed peft as a method, for baselines: `adapt(model, "peft:dora")`, "peft:oft", "peft:vera", ...

The update is peft's own (vismt.llm.peft_tuners.layer). Targets, freezing, `also_train` and seeds work as for every method. The
name after the colon is peft's type in lower case, or "dora", which is LoRA with use_dora. `rank` is the option r, and `alpha`
is the option alpha or *_alpha. alpha None keeps the ratio of alpha to r in peft's defaults. Other options are the fields of
peft's configuration. Names of modules in them are patterns, as in `targets`. Left out: prompt methods, which have no layers,
single tokens, and tuners that need more than a forward (AdaLoRA's budget, X-LoRA's gates, Poly's task ids, Shadow's second
model).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vismt.base.errors import require_known
from vismt.llm.peft_tuners.layer import HostedLayer, HostedSettings, installed
from vismt.llm.s2ft.structures import structures
from vismt.lowrank.layers.base import spec_of
from vismt.lowrank.model.inject import also_trained, check_options, install
from vismt.lowrank.model.record import AdaptReport, count_parameters, refuse_adapted
from vismt.lowrank.model.targets import Targets, find_targets
from vismt.methods import METHODS, Method
from vismt.storage.files import JsonObject

_PREFIX = "peft"
_VARIANTS: dict[str, tuple[str, JsonObject]] = {"dora": ("LORA", {"use_dora": True})}
_LEFT_OUT = ("ADALORA", "POLY", "SHADOW", "TRAINABLE_TOKENS", "XLORA")
# Fields that `adapt` decides, besides the fields that every configuration of peft has. They are not options of the method.
DECIDED = {"bias", "exclude_modules", "layers_pattern", "layers_to_transform"}
DECIDED |= {"modules_to_save", "target_modules", "target_parameters"}


def host(
    model: nn.Module,
    *,
    tuner: str,
    targets: Targets,
    rank: int,
    alpha: float | None,
    seed: int,
    exclude: str | Sequence[str] = (),
    also_train: str | Sequence[str] = (),
    **options: Any,
) -> AdaptReport:
    """Put a tuner of peft on the targets."""
    common = check_options(
        {"targets": targets, "rank": rank, "alpha": alpha, "exclude": exclude, "also_train": also_train}
    )
    refuse_adapted(model)
    modules, remarks = find_targets(model, common["targets"], common["exclude"], prequantized=True)
    names = also_trained(model, common["also_train"], list(modules))
    kind, given = _VARIANTS.get(tuner, (tuner.upper(), {}))
    fields = _fields(kind)
    known = importlib.import_module("peft.utils.constants").TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if "feedforward_modules" in fields and model_type not in known:
        # IA3 scales the inputs of these modules, the hidden units of an FFN, and the outputs of the other targets. peft
        # has lists of such modules for some types of models.
        last = {structure.parts["d"].path for structure in structures(model).values() if "d" in structure.parts}
        options.setdefault("feedforward_modules", [path for path in modules if path in last])
    for name, value in options.items():
        if name.endswith("_modules") and value:
            options[name] = "|".join(re.escape(path) for path in find_targets(model, value, prequantized=True)[0])
    settings = {**_sizes(fields, common["rank"], common["alpha"]), **given, **options}
    specs = [spec_of(p, m, HostedLayer, HostedSettings(kind, dict(settings), seed)) for p, m in modules.items()]
    method = f"{_PREFIX}:{tuner}"
    install(model, method, specs, {"seed": seed}, names)
    return AdaptReport(method, specs, *count_parameters(model), remarks)


def _sizes(fields: JsonObject, rank: int, alpha: float | None) -> JsonObject:
    """Return r and alpha as options. If a tuner has no default of r, another option sets its size."""
    if "rank" in _unread(fields):
        return {}
    sizes: JsonObject = {"r": rank}
    for name, value in fields.items():
        if _is_alpha(name, value):
            sizes[name] = rank * value / fields["r"] if alpha is None else alpha
    return sizes


def _unread(fields: Mapping[str, object]) -> dict[str, str]:
    """Return which arguments a tuner with these fields does not read, and why.

    If a tuner has no default of r, another option sets its size.
    """
    own = "takes its size from options of its own: set these"
    alphas = [name for name, value in fields.items() if _is_alpha(name, value)]
    return {name: own for name in ("rank", "alpha") if not fields.get("r") or (name == "alpha" and not alphas)}


def _is_alpha(name: str, value: object) -> bool:
    return (name == "alpha" or name.endswith("_alpha")) and isinstance(value, (int, float))


def _fields(kind: str) -> JsonObject:
    configuration = importlib.import_module("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    decided = DECIDED.union(item.name for item in dataclasses.fields(importlib.import_module("peft").PeftConfig))
    fields = [item for item in dataclasses.fields(configuration) if item.name not in decided]
    return {item.name: None if item.default is dataclasses.MISSING else item.default for item in fields}


def tuners() -> list[str]:
    """Return the names of the tuners of the installed peft that can be hosted. Raise UserError without peft."""
    mapping, base = installed("peft.mapping"), installed("peft.tuners.tuners_utils").BaseTuner
    kinds = {
        str(kind.value)
        for kind, tuner in mapping.PEFT_TYPE_TO_TUNER_MAPPING.items()
        if isinstance(tuner, type) and issubclass(tuner, base)
    }
    return sorted({kind.lower() for kind in kinds - set(_LEFT_OUT)} | set(_VARIANTS))


@functools.cache
def host_tuner(tuner: str) -> Method:
    """Use a tuner of the installed peft (peft:dora, peft:oft, peft:vera, ...). Options are the fields of peft's configuration."""
    require_known("adapt: peft has no tuner", [tuner], tuners())
    kind = _VARIANTS.get(tuner, (tuner.upper(), {}))[0]
    adapt = functools.partial(host, tuner=tuner)
    names = {*inspect.signature(host).parameters, *_fields(kind)} - {"tuner", "options"}
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in sorted(names)]
    adapt.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    adapt.__doc__ = f"Put peft's tuner {tuner} on the targets."
    return Method(f"{_PREFIX}:{tuner}", adapt, layers=(HostedLayer,), exports=False, unread=_unread(_fields(kind)))


METHODS.family(_PREFIX, host_tuner)
