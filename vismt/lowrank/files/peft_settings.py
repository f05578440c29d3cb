"""The settings of a peft folder, adapter_config.json: what they name, as peft 0.21 matches it, and which settings are refused.

target_modules       a text: full match; 'all-linear'; a list: the path, or a suffix of it after a dot layers_to_transform  with
a list, the first number after a dot (or after layers_pattern) is one of these exclude_modules      as target_modules; wins, and
so does modules_to_save, which takes every path that ends so rank_pattern, ...    the first key that, as a regular expression,
matches the end of the path after a dot fan_in_fan_out       does not concern A and B; the class of the module decides
target_parameters    experts in one parameter; peft_layouts.py says where their factors are stored
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import islice
from typing import Any

from vismt.base.errors import UserError, shown_value
from vismt.config.typed import JsonFile, build
from vismt.lowrank.model.targets import Expression, suffixes

PEFT_CONFIG = "adapter_config.json"
# Starts that leave the base as it is. Every other start moved a part of the base into the factors.
PEFT_STARTS = ("gaussian", "eva", "orthogonal", "mica")
# Settings of variants, besides settings that begin with use_ or end with _config.
_VARIANTS = ("lora_bias", "alora_invocation_tokens", "layer_replication", "trainable_token_indices")
OF_A_START = ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config")
ONE_PATH = re.compile(r"\^?\w+(?:\\?[.-]\w+)*")  # the whole path after a ^, otherwise its end
BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class PeftSettings:
    """Settings in adapter_config.json that decide what the file means. A value out of range raises ValueError."""

    r: int
    lora_alpha: float
    target_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: str | list[str] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = False
    bias: str = "none"
    lora_dropout: float | None = 0.0
    init_lora_weights: bool | str | None = True
    peft_version: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= (self.lora_dropout or 0.0) < 1:
            raise ValueError(f"lora_dropout: {self.lora_dropout}; it must be a number in [0, 1)")
        for name, rank in {
            "r": self.r,
            **{f"rank_pattern['{key}']": n for key, n in (self.rank_pattern or {}).items()},
        }.items():
            if rank < 1:
                raise ValueError(f"{name}: {rank}; it must be a whole number, at least 1")
        for patterns in (self.targets, self.excluded, self.saved, self.layer_numbers, self.ranks, self.alphas):
            del patterns  # patterns are compiled here, so that a malformed pattern is found while the folder is read

    # A text is an expression of the whole path. A list holds paths and suffixes.
    @cached_property
    def targets(self) -> Expression | frozenset[str]:
        return _paths("target_modules", self.target_modules)

    @cached_property
    def excluded(self) -> Expression | frozenset[str]:
        return _paths("exclude_modules", self.exclude_modules)

    @cached_property
    def saved(self) -> list[Expression]:
        names = texts(self.modules_to_save)
        return [Expression("modules_to_save", rf"(^|.*\.){name}($|\..*)") for name in names]

    @cached_property
    def layer_numbers(self) -> list[Expression]:
        """Expressions of a path whose group is the number of the layer."""
        forms = [rf"(?:^|.*?\.){name}" for name in texts(self.layers_pattern)] or [r".*?\.[^.]*"]
        return [Expression("layers_pattern", rf"{form}\.(?P<number>\d+)\..*") for form in forms]

    @cached_property
    def ranks(self) -> PatternTable:
        return PatternTable("rank_pattern", self.rank_pattern or {})

    @cached_property
    def alphas(self) -> PatternTable:
        return PatternTable("alpha_pattern", self.alpha_pattern or {})

    @cached_property
    def stack_owners(self) -> frozenset[str]:
        """Paths of the modules whose parameters target_parameters names. `names_stack` takes them."""
        return frozenset(parameter.rpartition(".")[0] for parameter in self.target_parameters or ())

    @property
    def everywhere(self) -> bool:
        """Whether all linears are named."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def names(self, path: str) -> bool:
        """Return whether peft adapts the module at `path`, if the module is of a kind that peft can adapt."""
        if selects(self.excluded, path) or any(saved.match(path) for saved in self.saved):
            return False
        if self.everywhere:
            return True
        layers = self.layers_to_transform
        wanted = [layers] if isinstance(layers, int) else layers
        if not wanted or isinstance(self.targets, Expression):
            return selects(self.targets, path)
        # A full path counts whatever the layers are.
        return path in self.targets or (selects(self.targets, path) and self._layer(path) in wanted)

    def _layer(self, path: str) -> int | None:
        match = next((match for expression in self.layer_numbers if (match := expression.match(path))), None)
        return int(match["number"]) if match else None

    def scale(self, path: str) -> tuple[int, float]:
        """Return the rank and the factor of the update at `path`."""
        rank: int = self.ranks.value(path, self.r)
        alpha: float = self.alphas.value(path, self.lora_alpha)
        return rank, alpha / (rank**0.5 if self.use_rslora else rank)


def check_plain(what: str, config: Mapping[str, object]) -> None:
    """Raise UserError for settings of another tuner or variant, and for a start that cannot be replayed."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"{what}: peft_type {shown_value(config.get('peft_type'))}; only LORA can be read.")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in (*PEFT_STARTS, "pissa"):
        raise UserError(
            f"{what}: init_lora_weights '{start}' changed the base it was trained on and cannot be replayed; convert it to a "
            "plain LoRA with peft first: save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    for key, value in config.items():
        named = key.startswith("use_") or key.endswith("_config")
        if value and (key in _VARIANTS or (named and key not in (*OF_A_START, "use_rslora"))):
            raise UserError(f"{what}: '{key}' is set; that variant is not a plain LoRA and cannot be read.")


def check_targets(what: str, settings: PeftSettings) -> None:
    """Raise UserError if the settings name no module, or the value of bias is unknown."""
    if settings.bias not in BIASES:
        raise UserError(f"{what}: bias {shown_value(settings.bias)}; it must be one of {', '.join(BIASES)}.")
    if not texts(settings.target_modules) and not settings.target_parameters:
        raise UserError(f"{what}: {PEFT_CONFIG}: target_modules {shown_value(settings.target_modules)} name no module.")


def typed_settings(config: Mapping[str, object]) -> PeftSettings:
    """Return the settings of a LoRA of any variant. Raise UserError for values that cannot be read."""
    names = {field.name for field in fields(PeftSettings)}
    known = {key: value for key, value in config.items() if key in names}
    return build(PeftSettings, known, JsonFile(f"{PEFT_CONFIG} cannot be read"))


class PatternTable:
    """Values by expression. An expression that is a path is looked up, because a table may name every module of a deep model."""

    def __init__(self, key: str, table: Mapping[str, float]) -> None:
        self.paths: dict[str, tuple[int, float]] = {}  # position in the table, and value
        self.expressions: list[tuple[int, float, Expression]] = []
        for place, (text, value) in enumerate(table.items()):
            if ONE_PATH.fullmatch(text):
                self.paths.setdefault(text.replace("\\", ""), (place, value))
            else:
                self.expressions.append((place, value, Expression(key, rf"(.*\.)?({text})$")))

    def value(self, path: str, default: object) -> Any:
        """Return the value of the first expression that matches the end of the path after a dot, as in peft."""
        found = [self.paths[end] for end in (f"^{path}", *suffixes(path)) if end in self.paths]
        matches = ((place, value) for place, value, expression in self.expressions if expression.match(path))
        found += islice(matches, 1)
        return min(found)[1] if found else default


def _paths(key: str, value: str | list[str] | None) -> Expression | frozenset[str]:
    return Expression(key, value) if isinstance(value, str) else frozenset(value or ())


def selects(modules: Expression | Collection[str], path: str) -> bool:
    """Return whether an expression matches the path. A set matches if it holds the path or a suffix of it after a dot."""
    if isinstance(modules, Expression):
        return bool(modules.match(path))
    return any(suffix in modules for suffix in suffixes(path))


def texts(value: str | list[str] | None) -> list[str]:
    """Return one text or several as a list."""
    return [value] if isinstance(value, str) else value or []
