"""The sections of a classification configuration of one or more tasks (task: classification, or multitask)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from vismt.base.errors import UserError, require_known
from vismt.config.sections import SCHEDULED, UNHASHED, Count, Jitter, ModelConfig, OnBadSample
from vismt.config.typed import Names, within
from vismt.data.set_entries import check_row_names
from vismt.engine.parts import PartsConfig, check_parts, shares
from vismt.engine.study import StudyConfig, check_arms, resolve_arms
from vismt.evaluation.sections import asked_features, check_other_sets, divides, evaluate_section, fitted_keys
from vismt.jobs.calibration import ImageCalibrationConfig, check_calibration
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
from vismt.robustness.conditions import AttackConfig, CorruptionConfig, check_conditions
from vismt.uncertainty.features import EMBEDDING, HEAD, OUTSIDE, PIXELS, PROBABILITIES, VALIDATION
from vismt.uncertainty.last_layers import check_head, is_variational


@dataclass
class TaskConfig(PartsConfig):
    """One task. Shares are taken of each class.

    Args:
        name: name of the task.
    """

    name: str = ""


@dataclass
class AugmentConfig:
    """Augmentation of training images.

    Args:
        crop: smallest area of a random crop; 1 for none.
        jitter: strength of colour changes.
        flip: whether images are mirrored at random.
    """

    crop: Annotated[float, within(above=0, most=1)] = 0.35
    jitter: Jitter = 0.0
    flip: bool = True


@evaluate_section(PROBABILITIES, PIXELS, OUTSIDE, VALIDATION, EMBEDDING, HEAD)
@dataclass
class MultitaskEvaluateConfig:
    """Evaluation.

    Args:
        split: test, or validation while settings are chosen.
        batch: images in one forward pass.
        temperature: writes the temperature that fits the validation images beside exported weights, not those of vbll;
            reports have it wherever there are validation images.
        adjust_logits: whether logits minus tau log prior are evaluated, too, with tau chosen on validation.
        attacks: evaluated attacks.
        corruptions: evaluated corruptions.
    """

    split: Split = "test"
    batch: Count = 64
    temperature: bool = field(default=False, metadata=UNHASHED)
    adjust_logits: bool = False
    attacks: list[AttackConfig] = field(default_factory=list)
    corruptions: list[CorruptionConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_adjusted(self.adjust_logits, self.split)


@dataclass
class HeadConfig:
    """The head as a section.

    Args:
        name: linear, or vbll, a Bayesian last layer (vismt.uncertainty.vbll).
        options: further arguments of the head.
        labels: union, over the classes of all tasks, or separate, those of the image's task; vbll needs union.
    """

    name: Annotated[str, Names("vismt.uncertainty.last_layers:HEADS", only=True)] = "linear"
    options: dict[str, Any] = field(default_factory=dict)
    labels: Annotated[str, Names("vismt.multitask.nets:LABEL_SPACES", only=True)] = "union"

    def __post_init__(self) -> None:
        check_head(self.name, self.options)


@dataclass
class MergeConfig:
    """An arm that merges the adapters of others, each trained on tasks of its own; nothing is trained.

    Of the heads it takes those rows that were trained.

    Args:
        arms: the merged arms, which stand before this one; together they are trained on each task once.
        method: of `vismt.lowrank.combine`; svd for their mean or sum.
        weights: tried values of the weight of each adapter, of which that with the best mean accuracy over the validation
            images of the tasks is taken, by each seed; [] for the method's own, 1 / T with svd, else 1.
    """

    arms: list[str] = field(default_factory=list)
    method: Annotated[str, Names("vismt.lowrank.files.combining:METHODS", only=True)] = "svd"
    weights: list[float] = field(default_factory=list)


@dataclass
class MultitaskConfig(StudyConfig):
    """Classification of images, of one or several tasks on one backbone.

    Args:
        model: the backbone.
        tasks: the tasks.
        head: union, one linear head over the classes of all tasks, or separate, one for each task; or a section, such as
            {name: vbll}.
        label_smoothing: share of the label that is spread over all classes, in [0, 1).
        class_weights: weights of the classes by their training counts (vismt.multitask.class_loss); null for none.
        batch: images of a training batch.
        augment: augmentation of training images.
        fade: the fading of routers; null leaves them at their start value.
        retain: quality retaining; null for none.
        balancing: how the losses of the tasks are weighed; null for one mean over the batch.
        calibration: images that a method computes options from before the training; null for none.
        trained_tasks: the tasks whose images an arm is trained on, by name; [] for all.
        merge: of an arm that merges the adapters of others; null for an arm that is trained.
        evaluate: the evaluation.
        on_bad_sample: error or skip, for images that cannot be decoded.
        download: whether sets that are missing are downloaded.
    """

    task: str = "multitask"
    model: ModelConfig = field(default_factory=ModelConfig)
    tasks: list[TaskConfig] = field(default_factory=list)
    head: Annotated[str, Names("vismt.multitask.nets:LABEL_SPACES", only=True)] | HeadConfig = "union"
    label_smoothing: Annotated[float, within(0, below=1)] = 0.1
    class_weights: str | None = None
    batch: Count = 32
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    fade: FadeConfig | None = field(default=None, metadata=SCHEDULED)
    retain: RetainConfig | None = None
    balancing: BalancingConfig | None = None
    calibration: ImageCalibrationConfig | None = None
    trained_tasks: list[str] = field(default_factory=list)
    merge: MergeConfig | None = None
    evaluate: MultitaskEvaluateConfig = field(default_factory=MultitaskEvaluateConfig)
    on_bad_sample: OnBadSample = "error"
    download: bool = False

    @property
    def derived(self) -> bool:
        return self.merge is not None

    @property
    def head_section(self) -> HeadConfig:
        """The head, whether it is written as a section or as its labels."""
        return self.head if isinstance(self.head, HeadConfig) else HeadConfig(labels=self.head)


def class_loss(config: MultitaskConfig, counts: Sequence[int] | None = None) -> ClassLoss:
    """Return the loss over the classes; counts: training images of each class of the union."""
    return ClassLoss(class_weights=config.class_weights, class_counts=counts)


def check(config: MultitaskConfig) -> None:
    """Raise UserError for values that types do not exclude, also in the arms, before any work is done."""
    _check_arm(config)
    check_arms(config, _check_arm)
    _check_merges(config)


def _check_arm(config: MultitaskConfig) -> None:
    _check_sets(config)
    names = [task.name for task in config.tasks]
    check_tasks(config, names)
    make_configured_balancer(config.balancing, names)
    from vismt.methods import check_sections

    check_sections(config, None if config.adapt is None else config.adapt.method)
    model = config.model
    if model.block is not None or model.pool is not None:
        raise UserError(
            "model: block and pool must be null: the head takes the place of timm's, so that timm can load the model."
        )
    _check_head(config)
    class_loss(config).check_options("multitask", 0)
    if config.retain is not None:
        if config.head_section.labels != "union":
            raise UserError(
                "retain: quality retaining compares logits over the classes of all tasks; it needs head: union."
            )
        QualityRetaining(1, [0], **asdict(config.retain))
    unchecked = next((task.name for task in config.tasks if not (task.validation or task.validation_share)), None)
    for key in fitted_keys(config.evaluate) if unchecked is not None else ():
        raise UserError(f"evaluate.{key}: task '{unchecked}' has no validation images; give it validation_share.")
    inside = {f"tasks: {task.name}": (*task.train, *task.validation, *task.test) for task in config.tasks}
    check_other_sets(config.evaluate, inside)
    if not config.arms:
        check_calibration(config.calibration, config.adapt)
    of_head = [feature.key for feature in asked_features(config.evaluate) if HEAD in feature.needs]
    if of_head and config.head_section.labels != "union":
        raise UserError(
            f"evaluate.{of_head[0]}: it is around one softmax over all classes; set the head's labels to union, or leave it out."
        )
    check_conditions(config.evaluate.attacks, config.evaluate.corruptions, 4)
    require_known("trained_tasks:", config.trained_tasks, names)


def _check_sets(config: MultitaskConfig) -> None:
    for task in config.tasks:
        if not task.train:
            raise UserError(f"tasks: {task.name}: train names no set.")
        if shares(task):
            check_row_names(task.train, f"tasks: {task.name}: train")
    calibration = config.calibration.data if config.calibration is not None else ()
    check_parts({f"tasks: {task.name}": task for task in config.tasks}, calibration)


def _check_merges(config: MultitaskConfig) -> None:
    if config.merge is not None:
        raise UserError("merge: it makes an arm from other arms; give it as arms.NAME: {merge: {...}}.")
    earlier: dict[str, MultitaskConfig] = {}
    for name, arm in resolve_arms(config).items():
        if arm.merge is None:
            earlier[name] = arm
            continue
        where = f"arms.{name}: merge.arms:"
        require_known(f"{where} no trained arm before it is", arm.merge.arms, earlier)
        tasks = sorted(task for other in arm.merge.arms for task in earlier[other].trained_tasks)
        if tasks != sorted(task.name for task in config.tasks):
            raise UserError(
                f"{where} {', '.join(arm.merge.arms) or 'none'} are trained on {', '.join(tasks) or 'no own task'}; name "
                "arms before this one whose trained_tasks hold each task once."
            )
        if len(arm.merge.arms) < 2:
            raise UserError(f"{where} {arm.merge.arms[0]} alone; name two or more.")
        if arm.adapt is None or any(earlier[other].adapt is None for other in arm.merge.arms):
            raise UserError(f"{where} an arm without adapt has no adapter; give it the section.")
        if is_variational(arm.head_section.name):
            raise UserError(
                f"arms.{name}: merge: rows of a '{arm.head_section.name}' head do not stand alone; take linear."
            )
        if len(arm.merge.weights) > 1 and any(not (task.validation or task.validation_share) for task in config.tasks):
            raise UserError(
                f"arms.{name}: merge.weights: are chosen on validation images; give each task validation_share."
            )
        apart = fitted_keys(config.evaluate, apart=True)
        if len(arm.merge.weights) > 1 and apart and not divides(config.evaluate, config.tune):
            raise UserError(
                f"arms.{name}: merge.weights: are chosen on the validation images, of which none are left for "
                f"evaluate.{apart[0]}; name one weight, or give tune, with which half of them choose."
            )


def _check_head(config: MultitaskConfig) -> None:
    head = config.head_section
    if not is_variational(head.name):
        return
    if head.labels != "union":
        raise UserError(f"head: vbll with labels '{head.labels}'; its bound is over all classes: set labels to union.")
    if config.class_weights is not None:
        raise UserError("head: vbll is trained on a bound of the cross-entropy; leave class_weights out.")


CONFIG = MultitaskConfig
