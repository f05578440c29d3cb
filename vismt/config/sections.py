"""Run configurations: a YAML file and dotted overrides become one typed dataclass.

An unknown key and a value of another type are UserErrors with the dotted key. The sections that all jobs share are declared
here; a job adds its sections by subclassing RunConfig (vismt/jobs/__init__.py lists the jobs). vismt/config/typed.py does the
typing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml

from vismt.base.errors import UserError, near
from vismt.config import typed as typed_yaml
from vismt.config.typed import Names, within
from vismt.storage.paths import shipped

# Metadata of a field that changes how a run is computed, but not its numbers.
UNHASHED = {"hashed": False}
# Metadata of a field that was added later: its default leaves the hashes of older configurations unchanged.
HASHED_IF_SET = {"hashed": "if set"}
# Key of the metadata of a field of options: names of options, in a mapping of the list, that change how results are read alone.
UNHASHED_OPTIONS = "unhashed options"
# What happens with an image that cannot be decoded.
OnBadSample = Literal["error", "skip"]
# Every random generator takes these.
Seed = Annotated[int, within(0, 2**63 - 1)]
# Strength of colour changes; beyond it images are black and white.
Jitter = Annotated[float, within(0, 10)]
# An interval needs two, and each is kept in a record.
Episodes = Annotated[int, within(2, 1_000_000)]
# Of the weights of a model.
Dtype = Literal["float32", "bfloat16", "float16"]
T = TypeVar("T")


@dataclass
class ModelSection:
    """The key that the model sections of all jobs share.

    Args:
        name: model; each job's section says what is known.
    """

    name: str = ""


@dataclass
class ModelConfig(ModelSection):
    """The backbone.

    Args:
        name: an asset (`vismt assets list`) or a timm model.
        img_size: side of the images in pixels; null for the model's own.
        pretrained: true for the published weights, false for random ones, or a checkpoint file.
        block: number of the block whose output is used, later ones are left out; null for the last.
        position: how a pretrained position table is resampled to another image size (vismt.backbones.position).
        pool: token (class token) or avg (mean of the patches); null as the model does.
        dtype: type of the weights and of the computations in blocks; heads and what a method trains stay float32.
    """

    name: str = "vit_small_patch14_imgfocus"
    img_size: int | None = None
    pretrained: bool | str = True
    block: int | None = None
    position: Annotated[str, Names("vismt.backbones.position:POSITIONS")] = "timm"
    pool: Annotated[str | None, Names(("token", "avg"))] = None
    dtype: Dtype = field(default="float32", metadata=HASHED_IF_SET)


@dataclass
class AdaptConfig:
    """The arguments of vismt.adapt.

    Args:
        method: the adaptation method (`vismt list methods`).
        targets: the adapted modules: a regular expression, names or "all-linear"; null for the method's own choice.
        rank: rank of the update.
        alpha: numerator of the scale alpha / rank of the update; null for the method's own.
        options: further arguments of the method, which `vismt list methods` shows.
    """

    method: Annotated[str, Names("vismt.methods:METHODS")] = "lora"
    targets: str | list[str] | None = None
    rank: int = 8
    alpha: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainConfig:
    """Optimisation.

    Args:
        steps: optimiser steps.
        optimizer: adamw, or sgd with momentum.
        lr: the peak learning rate, reached after `warmup` steps, followed by a cosine down to min_lr.
        min_lr: the last learning rate.
        warmup: steps over which the rate grows linearly.
        cooldown: number of last steps at min_lr.
        rates: {regular expression: factor of lr}; a parameter takes the factor of the first expression that matches
            anywhere in its name.
        weight_decay: of matrices; vectors and scalars have none.
        momentum: of sgd.
        accumulate: batches in one optimiser step.
        clip: largest norm of the gradient; null for none. Under a balancer of gradients, of that of the balanced
            parameters alone.
        precision: mixed precision of the forward pass: no, bf16 or fp16.
        recompute: cheap computes outputs of norms and activations again in the backward pass, for less memory
            (vismt.recompute).
        checkpointing: whether every block is computed again in the backward pass, for less memory.
        compile: whether blocks run under torch.compile, with static shapes.
        workers: processes that load data; 0 for the training's own.
        log_every: steps between two lines of metrics.jsonl.
        checkpoint_every: steps between two checkpoints, from which a run resumes.
        trackers: further logs through accelerate.
    """

    steps: int = 100
    optimizer: Annotated[str, Names("vismt.engine.optimizer:OPTIMIZERS")] = "adamw"
    lr: float = 1e-3
    min_lr: float = 0.0
    warmup: int = 0
    cooldown: int = 0
    rates: dict[str, float] = field(default_factory=dict)
    weight_decay: float = 0.0
    momentum: float = 0.9
    accumulate: int = 1
    clip: float | None = 1.0
    precision: Annotated[str, Names(("no", "bf16", "fp16"))] = "no"
    recompute: Literal["none", "cheap"] = field(default="none", metadata=UNHASHED)
    checkpointing: bool = field(default=False, metadata=UNHASHED)
    compile: bool = field(default=False, metadata=HASHED_IF_SET)
    workers: int = 0
    log_every: int = 1
    checkpoint_every: int = 50
    trackers: Annotated[list[str], Names(("tensorboard", "wandb"))] = field(default_factory=list)


@dataclass
class RunConfig:
    """The sections that every job has; a job declares the type of its model section.

    Args:
        task: the job.
        title: title of the report; not part of the run's hash.
        seed: seed of start values, and of the training where `seeds` is empty.
        model: the model.
        adapt: the adaptation method; null trains no adapter.
        train: the optimisation; null trains nothing.
    """

    ELSEWHERE: ClassVar[dict[str, str]] = {
        "device": "A run takes the GPU where there is one: CUDA_VISIBLE_DEVICES=1 vismt run ... takes the second, "
        "ACCELERATE_USE_CPU=true the processor.",
        "threads": "OMP_NUM_THREADS=4 vismt run ... sets the number of threads, `vismt run --workers` that of processes.",
    }

    task: str = "fewshot"
    title: str = ""
    seed: Seed = 0
    model: ModelSection = field(default_factory=ModelConfig)
    adapt: AdaptConfig | None = field(default_factory=AdaptConfig)
    train: TrainConfig | None = field(default_factory=TrainConfig)


def list_configs() -> list[str]:
    """Return the names of the configurations that travel with the package, "dense/camvid"."""
    folder = shipped("configs")
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_config(text: str) -> Path:
    """Return the file of a path, or of a name of `list_configs`, with or without "configs/" and ".yaml".

    What is neither is returned as a path, and `read_yaml` names what is near.
    """
    name = text.removeprefix("configs/").removesuffix(".yaml")
    if Path(text).exists() or name not in list_configs():
        return Path(text)
    return shipped("configs") / f"{name}.yaml"


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in the YAML file `path`.

    Raises UserError for a file that cannot be read; for a missing file the message names similar files and configurations.
    """
    if not path.exists():
        names = [str(file) for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        names += list_configs()
        raise UserError(f"config: no file '{path}'.{near(str(path), names)} `vismt list configs` shows those of vismt.")
    return typed_yaml.read_yaml(path, f"config: '{path}'")


def override(raw: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `raw` with dotted `key=value` assignments applied; values are read as YAML.

    A key goes into a list by the name of an item: tasks.digits.limit=40.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"override '{assignment}': write key=value, for example train.steps=20.")
        try:
            value = typed_yaml.parse_yaml(text)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"override '{assignment}': the value is not YAML: {reason}.") from error
        raw = _replaced(raw, key.split("."), value, f"override '{assignment}'", "")
    return raw


def typed(raw: Mapping[str, Any], kind: type[T], source: str) -> T:
    """Return an instance of the dataclass `kind` from plain values; `source` names the file in errors."""
    return typed_yaml.build(kind, raw, source)


def with_values(config: T, changes: Mapping[str, Any], source: str) -> T:
    """Return a copy of a configuration with values replaced along dotted paths, each typed as its field.

    Raises UserError for an unknown key, a path through a value, and a value of another type; `source` names the place.
    """
    for key, value in changes.items():
        config = _replaced(config, key.split("."), value, source, "")
    return config


def _replaced(node: Any, path: Sequence[str], value: Any, source: str, prefix: str) -> Any:
    """Return a copy of a dataclass or mapping with the value at `path` replaced."""
    name, *rest = path
    if isinstance(node, list):
        return _replaced_item(node, path, value, source, prefix)
    if isinstance(node, dict):
        return {**node, name: _replaced(node.get(name, {}), rest, value, source, f"{prefix}{name}.") if rest else value}
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        raise UserError(f"{source}: '{prefix.rstrip('.')}' is a value, not a section.")
    names = [item.name for item in dataclasses.fields(node)]
    if name not in names:
        raise typed_yaml.unknown_key(type(node), name, source, f"{prefix}{name}", names)
    if rest:
        value = _replaced(getattr(node, name), rest, value, source, f"{prefix}{name}.")
    if not dataclasses.is_dataclass(value):
        value = getattr(typed({name: value}, type(node), source), name)
    return dataclasses.replace(node, **{name: value})


def _replaced_item(items: list[Any], path: Sequence[str], value: Any, source: str, prefix: str) -> list[Any]:
    """Return a copy of a list of names, or mappings with a name, with an option of the item `path[0]` replaced."""
    names = [item.get("name") if isinstance(item, dict) else item for item in items]
    name, *rest = path
    if name not in names or not rest:
        known = [item for item in names if isinstance(item, str)]
        raise UserError(
            f"{source}: '{prefix}{name}': name one of {', '.join(known) or 'no items'}, and its option.{near(name, known)}"
        )
    place = names.index(name)
    item = items[place] if isinstance(items[place], dict) else {"name": name}
    return [*items[:place], _replaced(item, rest, value, source, f"{prefix}{name}."), *items[place + 1 :]]


def resolved(config: Any) -> dict[str, Any]:
    """Return the whole configuration as plain values, defaults included."""
    return dataclasses.asdict(config)


def config_hash(config: Any) -> str:
    """Return eight hex digits that change with every value of the resolved configuration except the title and unhashed fields."""
    plain = _hashed(config)
    plain.pop("title", None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]


def _hashed(value: Any) -> Any:
    """Return `resolved` without fields marked UNHASHED, and without fields marked HASHED_IF_SET at their default."""
    if isinstance(value, list):
        return [_hashed(item) for item in value]
    if isinstance(value, dict):
        return dict(value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = [item for item in dataclasses.fields(value) if item.metadata != UNHASHED]
    if any(item.metadata == HASHED_IF_SET for item in fields):
        default = type(value)()
        fields = [item for item in fields if item.metadata != HASHED_IF_SET or _differs(value, default, item.name)]
    plain = {item.name: _hashed(getattr(value, item.name)) for item in fields}
    for item in fields:
        for options in plain[item.name] if UNHASHED_OPTIONS in item.metadata else ():
            for name in item.metadata[UNHASHED_OPTIONS] if isinstance(options, dict) else ():
                options.pop(name, None)
    return plain


def _differs(value: Any, default: Any, name: str) -> bool:
    return getattr(value, name) != getattr(default, name)


def fraction(value: float | str, name: str) -> float:
    """Return a number that may be written as a fraction, '4.5/255'; `name` is the key in errors."""
    if not isinstance(value, str):
        return float(value)
    parts = value.split("/")
    try:
        numbers = [float(Fraction(part.strip())) for part in parts]
        if len(numbers) > 2:
            raise ValueError
        return numbers[0] / (numbers[1] if len(numbers) == 2 else 1.0)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{name}: '{value}' is neither a number nor a fraction such as 4.5/255.") from error
