"""From a YAML file and dotted overrides to one typed dataclass; an unknown key or a wrong type is a UserError with the path.

jsonargparse does the typing. What every job has in common is declared here; a job adds its own sections by subclassing
RunConfig (vismt/jobs/__init__.py lists them).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
import typing
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from vismt.errors import UserError, near

UNHASHED = {"hashed": False}  # metadata of a field that says how a run is computed and changes no number
KEPT = 64  # configurations that are remembered
_made: dict[tuple[str, type, str], Any] = {}


@dataclass
class ModelConfig:
    """name: asset or timm model; img_size: pixels; pretrained: true, false or a checkpoint file.

    block, position, pool: see vismt.backbones.vit.create.
    """

    name: str = "vit_small_patch14_imgfocus"
    img_size: int | None = None
    pretrained: bool | str = True
    block: int | None = None
    position: str = "timm"
    pool: str | None = None


@dataclass
class AdaptConfig:
    """What vismt.adapt takes; options are the method's own."""

    method: str = "lora"
    targets: str | list[str] | None = None
    rank: int = 8
    alpha: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainConfig:
    """steps: of the optimiser; lr: the peak, after `warmup` steps, then a cosine to min_lr; accumulate: batches a step.

    cooldown: last steps at min_lr. rates: {pattern: factor of lr} for the parameters whose name a regular expression is
    found in, the first that fits. weight_decay: of matrices; vectors and scalars have none. clip: largest gradient norm,
    null for none; precision: no, bf16 or fp16; trackers: accelerate's (tensorboard, wandb).
    """

    steps: int = 100
    optimizer: str = "adamw"
    lr: float = 1e-3
    min_lr: float = 0.0
    warmup: int = 0
    cooldown: int = 0
    rates: dict[str, float] = field(default_factory=dict)
    weight_decay: float = 0.0
    momentum: float = 0.9
    accumulate: int = 1
    clip: float | None = 1.0
    precision: str = "no"
    workers: int = 0
    log_every: int = 1
    checkpoint_every: int = 50
    trackers: list[str] = field(default_factory=list)


@dataclass
class RunConfig:
    """What every job has."""

    task: str = "fewshot"
    title: str = ""
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    adapt: AdaptConfig | None = field(default_factory=AdaptConfig)
    train: TrainConfig | None = field(default_factory=TrainConfig)


class _Loader(yaml.SafeLoader):
    """YAML with the booleans of version 1.2: `precision: no` is the word."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:bool"]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        raw = yaml.load(path.read_text(encoding="utf8"), _Loader)
    except FileNotFoundError as error:
        known = [str(found) for found in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"config: no file '{path}'.{near(str(path), known)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config: '{path}' cannot be read ({error}).") from error
    except yaml.YAMLError as error:
        raise UserError(f"config: '{path}' is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"config: '{path}' holds {type(raw).__name__}, not sections and keys.")
    return raw


def override(raw: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of `raw` with dotted `key=value` assignments applied; values are read as YAML."""
    result = copy.deepcopy(raw)
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"override '{assignment}': write key=value, for example train.steps=20.")
        node = result
        *parents, leaf = key.split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise UserError(f"override '{assignment}': '{parent}' is a value, not a section.")
            node = child
        try:
            node[leaf] = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise UserError(f"override '{assignment}': the value is no YAML.") from error
    return result


def typed(raw: Mapping[str, Any], kind: type, source: str) -> Any:
    """An instance of the dataclass `kind` from plain values; `source` names the file in errors."""
    key = (repr(raw), kind, source)
    if key not in _made:  # jsonargparse takes 50 ms, and a study asks for the same arms hundreds of times
        if len(_made) == KEPT:
            _made.clear()
        _made[key] = _typed(raw, kind, source)
    return copy.deepcopy(_made[key])


def _typed(raw: Mapping[str, Any], kind: type, source: str) -> Any:
    """What `typed` copies."""
    _check_keys(raw, kind, source, "")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--run", type=kind)
    try:
        parsed = parser.parse_object({"run": copy.deepcopy(dict(raw))})  # it writes into nested values
        made = parser.instantiate(parsed) if hasattr(parser, "instantiate") else parser.instantiate_classes(parsed)
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"{source}: {_shorten(str(error))}") from error
    return made.run


def resolved(config: Any) -> dict[str, Any]:
    """The whole configuration as plain values, defaults included."""
    return dataclasses.asdict(config)


def config_hash(config: Any) -> str:
    """Eight hex digits that change with any value of the resolved configuration but the title and fields marked UNHASHED."""
    plain = _hashed(config)
    plain.pop("title", None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]


def _hashed(value: Any) -> Any:
    """`resolved` without what is marked UNHASHED."""
    if dataclasses.is_dataclass(value):
        kept = [one.name for one in dataclasses.fields(value) if one.metadata.get("hashed", True)]
        return {name: _hashed(getattr(value, name)) for name in kept}
    return [_hashed(one) for one in value] if isinstance(value, list) else value


def fraction(value: float | str, name: str) -> float:
    """A number, also written as '4.5/255'."""
    if not isinstance(value, str):
        return float(value)
    parts = value.split("/")
    try:
        numbers = [float(Fraction(part.strip())) for part in parts]
        if len(numbers) > 2:
            raise ValueError
        return numbers[0] / (numbers[1] if len(numbers) == 2 else 1.0)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{name}: '{value}' is no number and no fraction such as 4.5/255.") from error


def _check_keys(raw: Any, kind: Any, source: str, prefix: str) -> None:
    """Every key of `raw` is a field of the dataclass, at every depth."""
    if raw is None and type(None) not in typing.get_args(kind):
        raise UserError(f"{source}: {prefix.rstrip('.')} is null; it needs a value.")
    kind = _dataclass_in(kind)
    if kind is None or raw is None:
        return
    if isinstance(raw, list):
        for index, item in enumerate(raw):
            _check_keys(item, kind, source, f"{prefix.rstrip('.')}[{index}].")
        return
    if not isinstance(raw, Mapping):
        raise UserError(f"{source}: {prefix.rstrip('.')} is {raw!r}, not a section.")
    hints = typing.get_type_hints(kind)
    for key, value in raw.items():
        if key not in hints:
            raise UserError(f"{source}: unknown key '{prefix}{key}'.{near(str(key), hints)}")
        _check_keys(value, hints[key], source, f"{prefix}{key}.")


def _dataclass_in(kind: Any) -> type | None:
    """The dataclass in `X`, `X | None` or `list[X]`, else None."""
    if dataclasses.is_dataclass(kind):
        return kind
    return next((found for part in typing.get_args(kind) if (found := _dataclass_in(part))), None)


def _shorten(text: str) -> str:
    """One line from jsonargparse's tree of reasons: the deepest key, what was expected, what was seen."""
    keys = [key.removeprefix("run.") for key in re.findall(r'Parser key "([^"]+)"', text) if key != "run"]
    expected = [
        re.sub(r"<class '([^']+)'>", r"\1", found) for found in re.findall(r"Expected an? (.+?)(?:\. Got|\n|$)", text)
    ]
    seen = re.findall(r"(?:Got value|Given value): (.*)", text)
    if not keys or not expected:
        return " ".join(text.split())
    wanted = " or ".join(dict.fromkeys(expected))
    return f"{'.'.join(keys)}: expected {wanted}, got {seen[0] if seen else 'something else'}."
