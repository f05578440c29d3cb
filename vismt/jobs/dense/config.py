"""The sections of a multi-task dense prediction configuration (task: dense)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

from vismt.base.errors import UserError, near, require_known
from vismt.config.sections import SCHEDULED, UNHASHED_OPTIONS, Count, Jitter, ModelConfig
from vismt.config.typed import Names, build, within
from vismt.data.set_entries import check_row_names
from vismt.engine.parts import PartsConfig, check_parts, shares
from vismt.engine.study import StudyConfig, check_arms, resolve_arms
from vismt.evaluation.sections import asked_features, check_other_sets, evaluate_section
from vismt.jobs.task_sections import (
    BalancingConfig,
    RetainConfig,
    Split,
    check_adjusted,
    check_tasks,
    make_configured_balancer,
)
from vismt.multitask.class_loss import ClassLoss
from vismt.multitask.emtal.fading import FadeConfig
from vismt.multitask.emtal.retain import QualityRetaining
from vismt.multitask.heads import check_map_head
from vismt.multitask.tasks import TASKS, MapTask, Task, loss_options, make_task
from vismt.multitask.tasks.classes import Classification, unite
from vismt.robustness.conditions import AttackConfig, CorruptionConfig, dense_conditions
from vismt.uncertainty.features import OUTSIDE, PIXELS, PROBABILITIES, VALIDATION

_MODES = ("slide", "whole")
_SHARED = ("data", "size", "canvas", "baseline")  # sections that all arms share, besides those in engine/study.py
DELTA = "delta_m"  # the name of a score
TAKEN = (DELTA, "loss", "retain", "fade", "step", "elapsed_s", "memory_mb", "lr", "grad_norm")  # in logs and results
_PARTS = tuple(field.name for field in fields(PartsConfig))  # keys of an entry of `tasks`
PANELS = "dense_panels.npz"  # a file of a run folder


@dataclass
class DenseDataConfig(PartsConfig):
    """Cards of maps; with the task classify also cards of image classification, which have a class and no maps.

    Further tasks of whole images name sets of their own, with the same keys in their entry of `tasks`.

    A share is split off the end of each training set, within each class where images have classes.
    """


@dataclass
class DenseHeadConfig:
    """The heads, one for each task; those of whole images are linear.

    Args:
        name: the head of tasks of maps (vismt.multitask.heads).
        options: further arguments of that head.
        labels: of several tasks of whole images: separate, each with a softmax over its own classes, or union, one softmax
            over the classes of all; the same in all arms.
    """

    name: Annotated[str, Names("vismt.multitask.heads:HEADS", only=True)] = "conv"
    options: dict[str, Any] = field(default_factory=dict)
    labels: Annotated[str, Names("vismt.multitask.nets:LABEL_SPACES", only=True)] = "separate"

    def __post_init__(self) -> None:
        check_map_head(self.name, self.options)


@dataclass
class DenseAugmentConfig:
    """Augmentation of training images and maps, see vismt.data.maps.dense_transforms.augment_sample.

    Args:
        scales: smallest and largest factor of the size.
        flip: whether samples are mirrored at random.
        cat_max_ratio: a crop is drawn again while one class covers more than this share of it.
        strength: strength of colour changes; 0 for none.
        hue: strength of changes of the hue.
    """

    scales: list[float] = field(default_factory=lambda: [0.5, 2.0])
    flip: bool = True
    cat_max_ratio: Annotated[float, within(0, 1)] = 0.75
    strength: Jitter = 0.4
    hue: Annotated[float, within(0, 0.5)] = 0.05

    def __post_init__(self) -> None:
        if len(self.scales) != 2 or not 0 < self.scales[0] <= self.scales[1]:
            raise UserError(f"augment.scales: {self.scales}; give two factors above 0, the smaller first.")


@evaluate_section(PROBABILITIES, PIXELS, OUTSIDE, VALIDATION)
@dataclass
class DenseEvaluateConfig:
    """Evaluation.

    Args:
        split: test, or validation while settings are chosen.
        batch: images in one forward pass.
        mode: on a canvas larger than the size, slide averages over windows of the size, whole predicts the canvas at
            once, with the position table resampled for it.
        overlap: share of their side by which windows overlap.
        flip: whether the prediction is averaged with that on the mirrored image.
        scales: factors by which each image is enlarged; the predictions are averaged (multi-scale testing).
        adjust_logits: whether tasks with classes are evaluated with the logits minus tau log prior, too
            (vismt.multitask.class_loss), with tau of each task chosen on the validation images.
        attacks: pgd on the run's losses.
        corruptions: evaluated corruptions; all has those that leave pixels where they are.
    """

    split: Split = "test"
    batch: Count = 8
    mode: Annotated[str, Names(_MODES, only=True)] = "slide"
    overlap: Annotated[float, within(0, below=1)] = 0.5
    flip: bool = False
    scales: list[float] = field(default_factory=lambda: [1.0])
    adjust_logits: bool = False
    attacks: list[AttackConfig] = field(default_factory=list)
    corruptions: list[CorruptionConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        from vismt.multitask.inference import check_scales

        check_adjusted(self.adjust_logits, self.split)
        check_scales(self.scales)


@dataclass
class DenseConfig(StudyConfig):
    """Several dense tasks on one backbone.

    Args:
        model: the backbone; its image size is `size`.
        data: the sets.
        tasks: names of dense tasks, or mappings with the name and options of the task, and for a task of your own the module
            that registers it. An entry with kind: classify has any name, and images of its own: train, validation, test,
            validation_share, test_share and limit as in `data`. Arms may differ in options of the losses:
            `tasks.semseg.class_weights: sqrt`.
        only: the trained tasks, [] for all; an arm with a single task is a single-task baseline.
        size: [height, width] of training images in pixels, of a ViT multiples of the patch.
        canvas: [height, width] into which every image is fitted, and from which training crops are taken; null for the
            size.
        head: the heads of tasks of maps.
        blocks: numbers of the blocks, or stages, that the heads read; null for four evenly spread.
        batch: images of a training batch.
        augment: augmentation of training images and maps.
        fade: the fading of routers; null leaves them at their start value.
        retain: quality retaining; null for none.
        label_smoothing: share of the label of a whole image that is spread over all classes, in [0, 1).
        class_weights: weights of the classes of whole images by their training counts; null for none.
        balancing: how the losses of the tasks are weighed; null for the sum of the weighted losses.
        baseline: the arm, or {task: arm}, that delta_m compares with; null for no delta_m.
        evaluate: the evaluation.
    """

    task: str = "dense"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DenseDataConfig = field(default_factory=DenseDataConfig)
    tasks: Annotated[list[str | dict[str, Any]], Names("vismt.multitask.tasks:TASKS", options=True)] = field(
        default_factory=list, metadata={UNHASHED_OPTIONS: ("absent", "module")}
    )
    only: list[str] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    canvas: list[int] | None = None
    head: DenseHeadConfig = field(default_factory=DenseHeadConfig)
    blocks: list[int] | None = None
    batch: Count = 8
    augment: DenseAugmentConfig = field(default_factory=DenseAugmentConfig)
    fade: FadeConfig | None = field(default=None, metadata=SCHEDULED)
    retain: RetainConfig | None = None
    label_smoothing: Annotated[float, within(0, below=1)] = 0.1
    class_weights: str | None = None
    balancing: BalancingConfig | None = None
    baseline: str | dict[str, str] | None = None
    evaluate: DenseEvaluateConfig = field(default_factory=DenseEvaluateConfig)


def all_tasks(config: DenseConfig) -> list[Task]:
    """Return the tasks of the configuration, also those that an arm leaves out, each over its own classes."""
    specs = [
        spec if isinstance(spec, str) else {key: spec[key] for key in spec if key not in _PARTS}
        for spec in config.tasks
    ]
    return [make_task(spec) for spec in specs]


def own_parts(config: DenseConfig) -> dict[str, PartsConfig]:
    """Return the sets of each task of whole images that has its own, by its name."""
    return {
        str(spec["name"]): build(
            PartsConfig, {key: spec[key] for key in _PARTS if key in spec}, f"tasks: {spec['name']}"
        )
        for spec in config.tasks
        if not isinstance(spec, str) and "name" in spec and any(key in spec for key in _PARTS)
    }


def trained_tasks(config: DenseConfig) -> list[Task]:
    """Return the tasks that this configuration (of an arm) trains."""
    tasks = [task for task in all_tasks(config) if not config.only or task.name in config.only]
    return unite(tasks) if config.head.labels == "union" else tasks


def baseline_arms(config: DenseConfig) -> dict[str, str]:
    """Return {task: the arm that delta_m compares with}, empty without a baseline."""
    baseline = config.baseline
    if baseline is None:
        return {}
    names = [task.name for task in all_tasks(config)]
    return dict.fromkeys(names, baseline) if isinstance(baseline, str) else {name: baseline[name] for name in names}


def check(config: DenseConfig) -> None:
    """Raise UserError for values that types do not exclude, also in the arms, before any work is done."""
    _check_values(config)
    losses = tuple(f"tasks.{task.name}.{option}" for task in all_tasks(config) for option in loss_options(task))
    check_arms(config, _check_values, _SHARED, losses)
    if len({arm.head.labels for arm in resolve_arms(config).values()}) > 1:
        raise UserError(
            "arms: head.labels must be the same for all arms: an answer among the classes of all tasks is right less often."
        )
    _check_baseline(config)
    dense_conditions(config.evaluate.attacks, config.evaluate.corruptions, [task.name for task in all_tasks(config)])


def class_tasks(config: DenseConfig) -> list[Task]:
    """Return the tasks whose logits `evaluate.adjust_logits` adjusts."""
    return [task for task in all_tasks(config) if isinstance(task, ClassLoss)]


def image_tasks(tasks: Iterable[Task]) -> list[Task]:
    """Return the tasks of whole images, whose answers have probabilities."""
    return [task for task in tasks if not isinstance(task, MapTask)]


def _check_values(config: DenseConfig) -> None:
    if config.evaluate.adjust_logits and not class_tasks(config):
        raise UserError("evaluate.adjust_logits: no task has classes; set it to false.")
    if config.evaluate.adjust_logits and config.head.labels == "union":
        raise UserError(
            "evaluate.adjust_logits: its prior is over the classes of one task; set head.labels to separate."
        )
    keys = [feature.key for feature in asked_features(config.evaluate)]
    if keys and not image_tasks(all_tasks(config)):
        raise UserError(f"evaluate.{keys[0]}: no task is of whole images; add the task classify, or leave the key out.")
    tasks = [task.name for task in all_tasks(config)]
    trained = [task.name for task in trained_tasks(config)]
    check_tasks(config, tasks)
    make_configured_balancer(config.balancing, trained)
    from vismt.methods import check_sections

    check_sections(config, None if config.adapt is None else config.adapt.method)
    require_known("only: no task", config.only, tasks)
    model = config.model
    if model.block is not None or model.pool is not None or model.img_size is not None:
        raise UserError("model: img_size, block and pool must be null; give size: [h, w] and blocks instead.")
    _check_sizes(config)
    _check_parts(config)
    if config.retain is not None:
        from vismt.multitask.nets import SEGMENTATION

        classes = next((task.channels for task in trained_tasks(config) if task.name == SEGMENTATION), None)
        if classes is None and not (image_tasks(trained_tasks(config)) and config.head.labels == "union"):
            raise UserError(
                f"retain: compares logits of {SEGMENTATION}, or of whole images with head.labels: union; set retain to null."
            )
        QualityRetaining(classes or 1, **asdict(config.retain))


def _check_parts(config: DenseConfig) -> None:
    own = own_parts(config)
    for spec in config.tasks:
        whole = not isinstance(spec, str) and Classification.name in (spec.get("kind"), spec.get("name"))
        for key in (key for key in ("label_smoothing", "class_weights") if whole and key in spec):
            raise UserError(f"tasks: {spec['name']}: {key} is of all tasks of whole images; give {key} beside tasks.")
    for task in all_tasks(config):
        named = isinstance(task, Classification) and task.name != Classification.name
        if named != (task.name in own):
            fix = "name sets of its own: train, test" if named else "its sets belong in data"
            raise UserError(f"tasks: {task.name}: {fix}.")
        if named and task.name in (*TASKS, *TAKEN):
            raise UserError(f"tasks: {task.name}: the name has another meaning in a run; choose another one.")
    sections = {f"tasks: {name}": parts for name, parts in own.items()}
    if len(own) < len(config.tasks) or config.data != DenseDataConfig():
        sections = {"data": config.data, **sections}
    for where, parts in sections.items():
        if not parts.train:
            raise UserError(f"{where}.train: names no set." if where == "data" else f"{where}: train names no set.")
        if shares(parts):
            check_row_names(parts.train, f"{where}: train")
    check_parts(sections)
    used = {where: (*parts.train, *parts.validation, *parts.test) for where, parts in sections.items()}
    check_other_sets(config.evaluate, used)


def _check_sizes(config: DenseConfig) -> None:
    size, canvas = config.size, config.canvas
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"size: {size}; give [height, width] in pixels, multiples of the model's patch.")
    if canvas is not None and (len(canvas) != 2 or any(side < least for side, least in zip(canvas, size))):
        raise UserError(f"canvas: {canvas}; give [height, width], neither below that of size {size}, or null.")


def canvas_of(config: DenseConfig) -> tuple[int, int]:
    """Return (h, w) of the canvas that every image is fitted into."""
    height, width = config.canvas or config.size
    return height, width


def window_of(config: DenseConfig) -> tuple[int, int]:
    """Return (h, w) of the images that the evaluated net takes."""
    return canvas_of(config) if config.evaluate.mode == "whole" else (config.size[0], config.size[1])


def _check_baseline(config: DenseConfig) -> None:
    if config.baseline is None:
        return
    tasks = [task.name for task in all_tasks(config)]
    arms = list(config.arms)
    if isinstance(config.baseline, dict) and set(config.baseline) != set(tasks):
        odd = min(set(config.baseline) ^ set(tasks))
        raise UserError(
            f"baseline: '{odd}' is in only one of tasks and baseline; name an arm for each of {', '.join(tasks)}."
        )
    for task, arm in baseline_arms(config).items():
        if arm not in arms:
            raise UserError(f"baseline: no arm '{arm}'.{near(arm, arms) or ' The configuration names no arms.'}")
        if task not in [trained.name for trained in trained_tasks(resolve_arms(config)[arm])]:
            raise UserError(
                f"baseline: arm '{arm}' does not train '{task}'; name another arm for it, as {{task: arm}}."
            )


CONFIG = DenseConfig
