"""The sections of a multi-task dense prediction configuration (task: dense)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from vismt.engine.arms import ArmsConfig, arm_config, check_arms
from vismt.engine.splits import PartsConfig, check_parts
from vismt.engine.study import BalancingConfig, FadeConfig, RetainConfig, check_study, check_weighing
from vismt.errors import UserError, near
from vismt.multitask.dense import SEGMENTATION
from vismt.multitask.heads import check_head
from vismt.multitask.inference import check_overlap
from vismt.multitask.retain_dense import DenseRetaining
from vismt.multitask.tasks import DenseTask, make_task

MODES = ("slide", "whole")
SAME_FOR_ALL = ("data", "size", "canvas", "baseline")  # of all arms, besides what arms.py names
DELTA, SEEDS, PANELS = "delta_m", "dense_seeds.jsonl", "dense_panels.npz"  # a score, and files of a run folder


@dataclass
class DenseDataConfig(PartsConfig):
    """Cards of maps, and of image classification where classify is a task: their images have a class and no map.

    Shares are the last of each training set, in its own order, and within each class where images have one; a limit is spread
    evenly over all.
    """


@dataclass
class DenseHeadConfig:
    """name: of vismt.multitask.heads, options: its own; every task of maps has a head of its own of this kind."""

    name: str = "conv"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DenseAugmentConfig:
    """See vismt.data.dense_transforms.augment. scales: smallest and largest; strength: of colour changes, 0 for none."""

    scales: list[float] = field(default_factory=lambda: [0.5, 2.0])
    flip: bool = True
    cat_max_ratio: float = 0.75
    strength: float = 0.4
    hue: float = 0.05


@dataclass
class DenseEvaluateConfig:
    """split: 'test', or 'validation' while choosing; batch: images at a time.

    On a canvas larger than the size, mode 'slide' averages windows of the size, of which neighbours share `overlap` of a side;
    'whole' takes the canvas at once, the position table resampled for it. flip: the mean with the mirrored image's prediction.
    """

    split: str = "test"
    batch: int = 8
    mode: str = "slide"
    overlap: float = 0.5
    flip: bool = False


@dataclass
class DenseConfig(ArmsConfig):
    """Several dense tasks on one backbone.

    size: (h, w) of what the net is trained on, multiples of the patch. canvas: (h, w), null for the size; every image is fitted
    into it, and in training scaled and cropped to the size. tasks: names or mappings for make_task. only: the tasks that are
    trained, [] for all; an arm with one task is a single-task baseline. blocks: taps of the heads, null for four spread evenly.
    adapt null and full false: the heads alone; full: the whole backbone is trained, adapt must then be null. baseline: what
    delta_m is taken over: an arm, or {task: arm}; null for no delta_m. balancing: null for the sum of the weighted losses.
    """

    task: str = "dense"
    data: DenseDataConfig = field(default_factory=DenseDataConfig)
    tasks: list[str | dict[str, Any]] = field(default_factory=list)
    only: list[str] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    canvas: list[int] | None = None
    head: DenseHeadConfig = field(default_factory=DenseHeadConfig)
    blocks: list[int] | None = None
    full: bool = False
    batch: int = 8
    augment: DenseAugmentConfig = field(default_factory=DenseAugmentConfig)
    fade: FadeConfig | None = None
    retain: RetainConfig | None = None
    balancing: BalancingConfig | None = None
    baseline: str | dict[str, str] | None = None
    evaluate: DenseEvaluateConfig = field(default_factory=DenseEvaluateConfig)


def all_tasks(config: DenseConfig) -> list[DenseTask]:
    """The tasks of the configuration, whatever an arm leaves out."""
    return [make_task(spec) for spec in config.tasks]


def trained_tasks(config: DenseConfig) -> list[DenseTask]:
    """The tasks that this configuration (of an arm) trains."""
    return [task for task in all_tasks(config) if not config.only or task.name in config.only]


def baseline_arms(config: DenseConfig) -> dict[str, str]:
    """{task: the arm that delta_m compares with}, empty without a baseline."""
    given = config.baseline
    if given is None:
        return {}
    return {task.name: given if isinstance(given, str) else given[task.name] for task in all_tasks(config)}


def check(config: DenseConfig) -> None:
    """Values that no type can exclude, before any work is done; those of every arm, too."""
    _check_values(config)
    for name, values in config.arms.items():
        for key in values:
            if key.partition(".")[0] in SAME_FOR_ALL:
                raise UserError(
                    f"arms.{name}: {key} must be the same for all arms, or they cannot be compared; leave it out."
                )
    check_arms(config, _check_values)
    _check_baseline(config)


def _check_values(config: DenseConfig) -> None:
    tasks = [task.name for task in all_tasks(config)]
    trained = [task.name for task in trained_tasks(config)]
    check_study(config, tasks)
    check_weighing(config, trained)
    for name in config.only:
        if name not in tasks:
            raise UserError(f"only: no task '{name}'.{near(name, tasks)}")
    model = config.model
    if model.block is not None or model.pool is not None or model.img_size is not None:
        raise UserError("model: img_size, block and pool must be null; give size: [h, w] and blocks instead.")
    if len(config.size) != 2 or min(config.size) < 1:
        raise UserError(f"size: {config.size}; give [height, width] in pixels, multiples of the model's patch.")
    _check_canvas(config)
    if config.full and config.adapt is not None:
        raise UserError(
            "full: trains the whole backbone, which leaves nothing to adapt; set adapt to null, or full to false."
        )
    _check_data(config.data)
    check_head(config.head.name, config.head.options)
    _check_augment(config.augment)
    if config.retain is not None:
        classes = next((task.channels for task in trained_tasks(config) if task.name == SEGMENTATION), None)
        if classes is None:
            raise UserError(f"retain: compares class logits and needs the task {SEGMENTATION}; set retain to null.")
        DenseRetaining(classes, **asdict(config.retain))


def canvas_of(config: DenseConfig) -> tuple[int, int]:
    """(h, w) that every image is fitted into."""
    height, width = config.canvas or config.size
    return height, width


def window_of(config: DenseConfig) -> tuple[int, int]:
    """(h, w) of the images that the evaluated net takes."""
    return canvas_of(config) if config.evaluate.mode == "whole" else (config.size[0], config.size[1])


def _check_canvas(config: DenseConfig) -> None:
    canvas, how = config.canvas, config.evaluate
    if canvas is not None and (len(canvas) != 2 or any(side < least for side, least in zip(canvas, config.size))):
        raise UserError(f"canvas: {canvas}; give [height, width], neither below that of size {config.size}, or null.")
    if how.mode not in MODES:
        raise UserError(f"evaluate.mode: '{how.mode}'.{near(how.mode, MODES)}")
    check_overlap(how.overlap)


def _check_data(data: DenseDataConfig) -> None:
    if not data.train:
        raise UserError("data.train: names no set.")
    if data.limit is not None and data.limit < 1:
        raise UserError(f"data.limit: {data.limit}; it must be at least 1.")
    check_parts(data, "data")


def _check_augment(augment: DenseAugmentConfig) -> None:
    scales = augment.scales
    if len(scales) != 2 or not 0 < scales[0] <= scales[1] < math.inf:
        raise UserError(f"augment.scales: {scales}; give two factors above 0, the smaller first.")
    for name, low, high in (("strength", 0, math.inf), ("hue", 0, 0.5), ("cat_max_ratio", 0, 1)):
        value = getattr(augment, name)
        if not low <= value <= high:
            raise UserError(f"augment.{name}: {value}; it lies from {low} to {high:g}.")


def _check_baseline(config: DenseConfig) -> None:
    """Every task has a baseline, an arm that trains it."""
    if config.baseline is None:
        return
    tasks, arms = [task.name for task in all_tasks(config)], list(config.arms)
    if isinstance(config.baseline, dict) and set(config.baseline) != set(tasks):
        odd = min(set(config.baseline) ^ set(tasks))
        raise UserError(
            f"baseline: '{odd}' is in only one of tasks and baseline; name an arm for each of {', '.join(tasks)}."
        )
    for task, arm in baseline_arms(config).items():
        if arm not in arms:
            raise UserError(f"baseline: no arm '{arm}'.{near(arm, arms) or ' There are no arms.'}")
        if task not in [one.name for one in trained_tasks(arm_config(config, arm))]:
            raise UserError(
                f"baseline: arm '{arm}' does not train '{task}'; name another arm for it, as {{task: arm}}."
            )
