"""Run configurations: a YAML file and dotted overrides become one typed dataclass.

An unknown key, or a value of another type, is a UserError with the dotted key. This file declares the sections that all jobs
share. A job adds its sections by subclassing RunConfig (vismt/jobs/__init__.py lists the jobs). vismt/config/typed.py does the
typing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml

from vismt.base.errors import UserError, near
from vismt.base.registry import import_own
from vismt.config import yaml_text
from vismt.config.typed import Names, build, within
from vismt.storage.files import JsonObject
from vismt.storage.paths import shipped

# Metadata of a field that changes how a run is computed, but not its numbers.
UNHASHED = {"hashed": False}
# Key of the metadata of a field. Its value leaves hashes as they are, instead of the default.
HASH_DEFAULT = "hash default"
# Metadata of a section that the schedule of a method reads (vismt.methods.Method.section).
SCHEDULED = {"scheduled": True}
# Key of the metadata of a field of options. It names options, in a mapping of the list, that only change how results are read.
UNHASHED_OPTIONS = "unhashed options"
HASH_DIGITS = 10
RESOLVED = "config.resolved.yaml"  # file of a run folder with its whole configuration
# How to handle an image that cannot be decoded.
OnBadSample = Literal["error", "skip"]
# Seed of any random generator.
Seed = Annotated[int, within(0, 2**63 - 1)]
# Strength of colour changes. A larger strength makes images black and white.
Jitter = Annotated[float, within(0, 10)]
# Number of examples. An interval needs two, and each is kept in a record.
Episodes = Annotated[int, within(2, 1_000_000)]
# Number of things, one or more.
Count = Annotated[int, within(1)]
# Strength of weight decay.
Dtype = Literal["float32", "bfloat16", "float16"]
T = TypeVar("T")


@dataclass
class MapAugmentation:
    """Augmentation of an image and its maps.

    Args:
        flip: Whether samples are mirrored with probability 1/2.
        scales: Smallest and largest factor of the size.
        cat_max_ratio: Largest share of a crop that one class may cover, see `random_crop`.
        strength: Strength of colour changes, see `photometric`. 0 for no changes.
        hue: Largest shift of the hue, see `photometric`.
    """

    flip: bool = True
    scales: list[float] = field(default_factory=lambda: [0.5, 2.0])
    cat_max_ratio: Annotated[float, within(0, 1)] = 0.75
    strength: Jitter = 0.4
    hue: Annotated[float, within(0, 0.5)] = 0.05

    def __post_init__(self) -> None:
        if len(self.scales) != 2 or not 0 < self.scales[0] <= self.scales[1]:
            raise UserError(f"augment.scales: {self.scales}; give two factors above 0, the smaller first.")


@dataclass
class ModelSection:
    """The key that the model sections of all jobs share.

    Args:
        name: Name of the model. The section of each job says which names are known.
    """

    name: str = ""


@dataclass
class ModelConfig(ModelSection):
    """The backbone.

    Args:
        name: Name of an asset (`vismt assets list`) or of a timm model.
        img_size: Side of the images in pixels. null for the model's own size.
        pretrained: true for the published weights, false for random weights, or a checkpoint file.
        block: Number of the block whose output is used. Later blocks are left out. null for the last block.
        position: How a pretrained position table is resampled to another image size (vismt.backbones.position).
        pool: "token" (class token) or "avg" (mean of the patches). null for the model's own pooling.
        dtype: Type of the weights and of the computations in blocks. Heads, and what a method trains, stay float32.
    """

    name: str = "vit_small_patch14_imgfocus"
    img_size: int | None = None
    pretrained: bool | str = True
    block: int | None = None
    position: Annotated[str, Names("vismt.backbones.position:POSITIONS", only=True)] = "timm"
    pool: Annotated[str | None, Names(("token", "avg"), only=True)] = None
    dtype: Dtype = "float32"


@dataclass
class AdaptConfig:
    """The arguments of vismt.adapt.

    Args:
        method: Name of the adaptation method (`vismt list methods`).
        targets: Modules to adapt: a regular expression, names, "all-linear", "all-conv" or "all-linear+conv". null for the
            method's own choice.
        rank: Rank of the update.
        alpha: Numerator of the scale alpha / rank of the update. null for the method's own value.
        options: Further arguments of the method, which `vismt list methods` shows.
    """

    # Words of peft, in Python and in configurations.
    ELSEWHERE: ClassVar[dict[str, str]] = {
        "module": "Name the module at the top of the file: module: mine.",
        "r": "It is rank here.",
        "target_modules": "It is targets here.",
        "lora_alpha": "It is alpha here.",
        "exclude_modules": "It is exclude here (in a configuration adapt.options.exclude).",
        "modules_to_save": "It is also_train here (in a configuration adapt.options.also_train).",
        "lora_dropout": "It is dropout here (in a configuration adapt.options.dropout).",
        "use_rslora": "It is rslora here (in a configuration adapt.options.rslora).",
        "use_dora": "Take the method 'peft:dora'.",
        "dora": "Take the method 'peft:dora'.",
        "layers_to_transform": "Name the layers in targets, by a regular expression of the full path.",
        "init_lora_weights": "A start is a method here: lora, pissa, corda, polar or another one of `vismt list methods`.",
        "bias": "Name biases in also_train (in a configuration adapt.options.also_train).",
        "task_type": "It is not needed; leave it out.",
    }

    method: Annotated[str, Names("vismt.methods:METHODS", only=True)] = "lora"
    targets: str | list[str] | None = None
    rank: int = 8
    alpha: float | None = None
    options: JsonObject = field(default_factory=dict)


@dataclass
class TrainConfig:
    """Optimisation.

    Args:
        steps: Number of optimiser steps. 0 leaves a net as its method starts it.
        optimizer: "adamw", or "sgd" with momentum.
        lr: Peak learning rate. It is reached after `warmup` steps, and a cosine down to min_lr follows.
        min_lr: Last learning rate.
        warmup: Number of steps over which the rate grows linearly.
        cooldown: Number of last steps at min_lr.
        rates: Factors of lr, {regular expression: factor}. A parameter takes the factor of the first expression that matches
            anywhere in its name.
        weight_decay: Weight decay of matrices. Vectors and scalars have none.
        momentum: Momentum of sgd.
        accumulate: Number of batches in one optimiser step.
        clip: Largest norm of the gradient, null for no limit. Under a balancer of gradients it limits only the gradient of the
            balanced parameters.
        precision: Mixed precision of the forward pass: "no", "bf16" or "fp16".
        recompute: "cheap" computes outputs of norms and activations again in the backward pass, which needs less memory
            (vismt.recompute).
        checkpointing: Whether every block is computed again in the backward pass, which needs less memory.
        compile: Whether blocks run under torch.compile, with static shapes.
        workers: Number of processes that load data. 0 loads them in the training's own process.
        log_every: Number of steps between two lines of metrics.jsonl.
        checkpoint_every: Number of steps between two checkpoints, from which a run resumes.
        validate: Whether the report has the curve of the validation score over the checkpoints, for the first seed of every arm.
            The weights of these steps are kept until the arm is trained.
        trackers: Trackers of accelerate that also get the content of metrics.jsonl.
    """

    steps: Annotated[int, within(0)] = 100
    optimizer: Annotated[str, Names("vismt.engine.optimizer:OPTIMIZERS", only=True)] = "adamw"
    lr: Annotated[float, within(above=0)] = 1e-3
    min_lr: Annotated[float, within(0)] = 0.0
    warmup: Annotated[int, within(0)] = 0
    cooldown: Annotated[int, within(0)] = 0
    rates: dict[str, Annotated[float, within(0)]] = field(default_factory=dict)
    weight_decay: Annotated[float, within(0)] = 0.0
    momentum: Annotated[float, within(0)] = 0.9
    accumulate: Count = 1
    clip: Annotated[float, within(above=0)] | None = 1.0
    precision: Annotated[str, Names(("no", "bf16", "fp16"), only=True)] = "no"
    recompute: Literal["none", "cheap"] = field(default="none", metadata=UNHASHED)
    checkpointing: bool = field(default=False, metadata=UNHASHED)
    compile: bool = False
    workers: Annotated[int, within(0)] = 0
    log_every: Count = 1
    checkpoint_every: Count = 50
    validate: bool = field(default=False, metadata=UNHASHED)
    trackers: Annotated[list[str], Names(("mlflow", "tensorboard", "wandb"), only=True)] = field(
        default_factory=list, metadata=UNHASHED
    )

    def __post_init__(self) -> None:
        if self.warmup + self.cooldown > self.steps:
            raise UserError(
                f"train: warmup {self.warmup} and cooldown {self.cooldown} do not fit into {self.steps} steps; lower them too "
                "(train.warmup=0 train.cooldown=0)."
            )
        if self.compile and (self.checkpointing or self.recompute != "none"):
            other = "checkpointing" if self.checkpointing else "recompute"
            raise UserError(
                f"train.compile: torch.compile decides by itself what it recomputes; leave out train.{other} or train.compile."
            )


@dataclass
class RunConfig:
    """The sections that every job has. A job declares the type of its model section.

    Args:
        task: Name of the job.
        module: Python module of yours, which is imported before the other keys are read and registers what they name.
        title: Title of the report. It is not part of the run's hash.
        seed: Seed of start values, and of the training if `seeds` is empty.
        model: Model.
        adapt: Adaptation method. null trains no adapter.
        train: Optimisation. null trains nothing.
    """

    ELSEWHERE: ClassVar[dict[str, str]] = {
        "device": "A run takes the GPU if there is one: CUDA_VISIBLE_DEVICES=1 vismt run ... takes the second, "
        "ACCELERATE_USE_CPU=true the processor.",
        "threads": "OMP_NUM_THREADS=4 vismt run ... sets the number of threads, `vismt run --workers` the number of processes.",
    }

    task: str = "fewshot"
    module: Annotated[str, import_own] | None = field(default=None, metadata=UNHASHED)
    title: str = field(default="", metadata=UNHASHED)
    seed: Seed = 0
    model: ModelSection = field(default_factory=ModelConfig)
    adapt: AdaptConfig | None = field(default_factory=AdaptConfig)
    train: TrainConfig | None = field(default_factory=TrainConfig)


def list_configs() -> list[str]:
    """Return the names of the configurations that come with the package, for example "dense/camvid"."""
    folder = shipped("configs")
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_config(text: str) -> Path:
    """Return the file of a path, or of a name of `list_configs`, with or without "configs/" and ".yaml".

    Any other text is returned as a path, and `read_config_file` then names similar files.
    """
    name = text.removeprefix("configs/").removesuffix(".yaml")
    if Path(text).exists() or name not in list_configs():
        return Path(text)
    return shipped("configs") / f"{name}.yaml"


def read_config_file(path: Path) -> JsonObject:
    """Return the mapping in the YAML file `path`.

    Raise UserError for a file that cannot be read. For a missing file, the message names similar files and configurations.
    """
    if not path.exists():
        names = [str(file) for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        names += list_configs()
        raise UserError(
            f"config: no file '{path}'.{near(str(path), names)} `vismt list configs` shows the files of vismt."
        )
    return yaml_text.read_yaml(path, f"config: '{path}'")


def from_working_folder(value: object, folder: Path) -> Any:
    """Return a configuration whose relative paths below `folder` are paths from the working folder.

    They are the texts that have a "/" or a suffix and exist in `folder`, also with ":split" behind them. The name of a folder
    without a "/" gets "./", because it may also be the name of a card.
    """
    if isinstance(value, dict):
        return {key: from_working_folder(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [from_working_folder(item, folder) for item in value]
    if isinstance(value, str) and set(value) & set("./") and not os.path.isabs(value):
        path = os.path.normpath(value)
        if path not in (".", "..") and any(
            os.path.exists(folder / of) for of in (path, path.rpartition(":")[0] or path)
        ):
            found = os.path.relpath(folder / path)
            return found if set(found) & set("./") else f"./{found}"
    return value


def override(raw: dict[str, object], assignments: Sequence[str]) -> JsonObject:
    """Return a copy of `raw` with dotted `key=value` assignments applied. Values are read as YAML.

    A key leads into a list by the name of an item: tasks.digits.limit=40.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        source = f"override '{assignment}'"
        if not equals or not key:
            raise UserError(f"{source}: write key=value, for example train.steps=20.")
        try:
            value = yaml_text.parse_yaml(text)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{source}: the value is not YAML: {reason}.") from error
        raw = _replaced(raw, key.split("."), value, source, "")
    return raw


def with_values(config: T, changes: Mapping[str, object], source: str) -> T:
    """Return a copy of a configuration with values replaced along dotted paths, typed and checked as a whole.

    Raise UserError for an unknown key, a path through a value, and a value of another type. `source` names the place.
    """
    raw: JsonObject = dataclasses.asdict(config)  # type: ignore[call-overload]  # a dataclass
    for key, value in changes.items():
        raw = _replaced(raw, key.split("."), value, source, "")
    return build(type(config), raw, source)


def _replaced(node: object, path: Sequence[str], value: object, source: str, prefix: str) -> Any:
    """Return a copy of a mapping, or of a list of items with names, with the value at `path` replaced."""
    name, *rest = path
    if isinstance(node, list):
        return _replaced_item(node, path, value, source, prefix)
    if not isinstance(node, dict):
        raise UserError(f"{source}: '{prefix.rstrip('.')}' is a value, not a section.")
    return {**node, name: _replaced(node.get(name, {}), rest, value, source, f"{prefix}{name}.") if rest else value}


def _replaced_item(items: list[object], path: Sequence[str], value: object, source: str, prefix: str) -> list[object]:
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


def flat(values: Mapping[str, object], prefix: str = "") -> JsonObject:
    """Return {dotted key: value} of nested mappings. An empty mapping counts as a value."""
    found: JsonObject = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found


def config_hash(config: RunConfig) -> str:
    """Return HASH_DIGITS hex digits of the task and of everything that differs from the defaults and can change a number.

    A new key with a default leaves all hashes as they are.
    """
    plain = {"task": config.task, **differences(config)}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:HASH_DIGITS]


def differences(section: Any, base: Any = None) -> JsonObject:
    """Return the hashed values of a section that differ from the values of `base`, or from the defaults, as plain values."""
    found: JsonObject = {}
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        default = default_of(item) if base is None else getattr(base, item.name)
        default = item.metadata.get(HASH_DEFAULT, default)
        if item.metadata == UNHASHED or value == default:
            continue
        if dataclasses.is_dataclass(value) and type(value) is type(default):
            changed = differences(value, default)
            if changed:
                found[item.name] = changed
        else:
            found[item.name] = _hashed(value, item.metadata.get(UNHASHED_OPTIONS, ()))
    return found


def default_of(item: dataclasses.Field[object]) -> object:
    """Return the default of a field. A required field has MISSING."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _hashed(value: object, left_out: Sequence[str]) -> object:
    """Return a value, or the items of a list, as plain values.

    left_out: Keys that mappings in the list lose.
    """
    if isinstance(value, list | tuple):
        return [_hashed(item, left_out) for item in value]
    if dataclasses.is_dataclass(value):
        return differences(value)
    if isinstance(value, dict):
        return {name: item for name, item in value.items() if name not in left_out}
    return value.removeprefix("./") if isinstance(value, str) else value


def fraction(value: float | str, name: str) -> float:
    """Return a number that may be written as a fraction, "4.5/255". `name` is the key in errors."""
    if not isinstance(value, str):
        return float(value)
    try:
        numbers = [float(part) for part in value.split("/")]
        if len(numbers) > 2 or not all(map(math.isfinite, numbers)):
            raise ValueError
        return numbers[0] / (numbers[1] if len(numbers) == 2 else 1.0)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{name}: '{value}' is neither a number nor a fraction such as 4.5/255.") from error
