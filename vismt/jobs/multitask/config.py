"""The sections of a multi-task configuration: classes of whole images, maps, or both (task: multitask, classification or dense).

With `size` every image is fitted into a canvas and padded, and heads read the maps of the backbone. Without it images are
squares, all tasks are of whole images, and one classifier takes the place of timm's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

from vismt.base.errors import UserError, near, require_known
from vismt.config.sections import (
    SCHEDULED,
    UNHASHED_OPTIONS,
    Count,
    Jitter,
    MapAugmentation,
    ModelConfig,
    OnBadSample,
    differences,
    flat,
)
from vismt.config.typed import Names, build, within
from vismt.data.set_entries import card_and_split, check_row_names
from vismt.engine.parts import PartsConfig, check_parts, shares
from vismt.engine.study import StudyConfig, check_arms, resolve_arms
from vismt.evaluation.sections import (
    asked_features,
    check_other_sets,
    divides,
    evaluate_section,
    fitted_keys,
    perturbations,
)
from vismt.jobs.calibration import ImageCalibrationConfig, check_calibration
from vismt.jobs.task_sections import (
    BalancingConfig,
    RetainConfig,
    Split,
    check_tasks,
    make_configured_balancer,
)
from vismt.multitask.class_loss import ClassLoss
from vismt.multitask.emtal.fading import FadeConfig
from vismt.multitask.emtal.retain import QualityRetaining
from vismt.multitask.heads import MAP_HEADS, check_map_head
from vismt.multitask.tasks import TASKS, MapTask, Task, loss_options, make_task
from vismt.multitask.tasks.classes import Classification, unite
from vismt.storage.files import JsonObject
from vismt.uncertainty.features import COUNTS, HEAD, OUTSIDE, PIXELS, PROBABILITIES, VALIDATION, Inputs
from vismt.uncertainty.last_layers import HEADS as CLASSIFIERS
from vismt.uncertainty.last_layers import check_head, is_variational

_MODES = ("slide", "whole")
_SHARED = ("data", "size", "canvas", "baseline")  # sections that all arms share, besides those in engine/study.py
DELTA = "delta_m"  # the name of a score
# Names of columns in logs and of scores, which no task may have.
TAKEN = (DELTA, "loss", "ce", "accuracy", "retain", "fade", "step", "elapsed_s", "memory_mb", "lr", "grad_norm")
_OF_ALL = (
    "label_smoothing",
    "class_weights",
    "class_counts",
)  # options of tasks of whole images that are keys of the run
_PARTS = tuple(field.name for field in fields(PartsConfig))  # keys of an entry of `tasks`
PANELS = "dense_panels.npz"  # a file of a run folder
# Keys of runs with `size`, and keys of runs without it.
_FITTED = (
    *("data", "canvas", "blocks", "baseline"),
    *("evaluate.mode", "evaluate.overlap", "evaluate.flip", "evaluate.scales"),
    *("augment.scales", "augment.cat_max_ratio", "augment.strength", "augment.hue"),
)
_SQUARE = {
    "augment.crop": "augment.scales crops images and maps alike",
    "augment.jitter": "augment.strength is the strength of colour changes",
    "merge": "adapters of tasks with heads of their own are merged by no rule",
}


def head_names() -> list[str]:
    """Return the names of the heads of maps and of the classifiers."""
    return list(dict.fromkeys((*CLASSIFIERS, *MAP_HEADS)))


@dataclass
class HeadConfig:
    """The heads.

    Args:
        name: head of tasks of maps, linear, conv (the default), segformer or dpt (vismt.multitask.heads). Whole images beside
            maps have linear heads. Without `size`, linear (the default) or vbll, a Bayesian last layer
            (vismt.uncertainty.vbll).
        options: further arguments of the head.
        labels: union, one softmax over the classes of all tasks of whole images, or separate, a softmax for each task. vbll needs
            union.
    """

    name: Annotated[str | None, Names("vismt.jobs.multitask.config:head_names", only=True)] = None
    options: JsonObject = field(default_factory=dict)
    labels: Annotated[str, Names("vismt.multitask.nets:LABEL_SPACES", only=True)] = "union"


@dataclass
class AugmentConfig(MapAugmentation):
    """Augmentation of training images and their maps.

    Args:
        crop: smallest area of a random crop, 1 for no crop. Without `size`.
        jitter: strength of colour changes. Without `size`.
        flip: whether images are mirrored at random.
        scales: smallest and largest factor of the size. With `size`.
        cat_max_ratio: largest share of a crop that one class may cover. Another crop is drawn up to ten times. With `size`.
        strength: strength of colour changes, 0 for no changes. With `size`.
        hue: strength of changes of the hue. With `size`.
    """

    crop: Annotated[float, within(above=0, most=1)] = 0.35
    jitter: Jitter = 0.0


@evaluate_section(PROBABILITIES, PIXELS, OUTSIDE, VALIDATION, HEAD, COUNTS)
@dataclass
class MultitaskEvaluateConfig:
    """Evaluation.

    Args:
        split: test, or validation while settings are chosen.
        batch: number of images in one forward pass.
        mode: prediction on a canvas larger than the size. slide averages over windows of the size, and whole predicts the canvas
            at once, with a resampled position table.
        overlap: share of their side by which windows overlap.
        flip: whether the prediction is averaged with the prediction on the mirrored image.
        scales: factors by which each image is enlarged. The predictions are averaged (multi-scale testing).
    """

    split: Split = "test"
    batch: Count = 64
    mode: Annotated[str, Names(_MODES, only=True)] = "slide"
    overlap: Annotated[float, within(0, below=1)] = 0.5
    flip: bool = False
    scales: list[float] = field(default_factory=lambda: [1.0])

    def __post_init__(self) -> None:
        from vismt.multitask.inference import check_scales

        check_scales(self.scales)


@dataclass
class MergeConfig:
    """An arm that merges the adapters of other arms, each trained on tasks of its own. Nothing is trained.

    For each task, the head takes the rows of the arm that was trained on the task.

    Args:
        arms: the merged arms, which stand before this arm. Together they are trained on each task once.
        method: method of `vismt.lowrank.combine`, svd for their mean or sum.
        weights: tried values of the weight of each adapter. Each seed takes the value with the best mean accuracy over the
            validation images of the tasks. [] takes the method's own, 1 / T with svd, else 1.
    """

    arms: list[str] = field(default_factory=list)
    method: Annotated[str, Names("vismt.lowrank.files.combining:COMBINATIONS", only=True)] = "svd"
    weights: list[float] = field(default_factory=list)


@dataclass
class MultitaskConfig(StudyConfig):
    """Classes of whole images and maps, of one or several tasks on one backbone.

    Args:
        model: the backbone. With `size` it takes images of that size.
        data: sets of all tasks without sets of their own, with `size`: cards of maps, and for the task classify cards of images
            with classes.
        tasks: the tasks. A task of whole images is a mapping with any name and its sets: train, validation, test,
            validation_share, test_share and limit as in `data`. A task of maps is its name, or a mapping with the name and its
            options. Arms may differ in options of losses:
            `tasks.semseg.class_weights: sqrt`.
        trained_tasks: names of the tasks on which an arm is trained. Images without a label of these tasks are left out. [] means
            all tasks.
        size: [height, width] of training images in pixels, for a ViT multiples of the patch. Tasks of maps need it. [] takes
            squares of the model's size.
        canvas: [height, width] into which every image is fitted, and from which training crops are taken. null means the size.
        head: union, one linear head over the classes of all tasks, or separate, one for each task, or a section, such as
            {name: vbll} or {name: segformer}.
        blocks: numbers of the blocks, or stages, that the heads of maps read. null takes four, evenly spread.
        label_smoothing: share of the label of a whole image that is spread over all classes, in [0, 1).
        class_weights: weights of the classes of whole images by their training counts (vismt.multitask.class_loss). null means
            no weights.
        batch: number of images of a training batch.
        augment: augmentation of training images and maps.
        fade: the fading of routers. null leaves them at their start value.
        retain: quality retaining of whole images with a union of labels, and of semseg. null means none.
        balancing: method that weighs the losses of the tasks. null takes the sum of the weighted losses of maps and one mean over
            the whole images of a batch.
        calibration: images from which a method computes options before the training. null means none.
        merge: settings of an arm that merges the adapters of others. null means an arm that is trained.
        baseline: the arm, or {task: arm}, with which delta_m compares. null means no delta_m.
        evaluate: the evaluation.
        on_bad_sample: error or skip, for images of classes that cannot be decoded.
        download: whether sets that are missing are downloaded.
    """

    ELSEWHERE = {**StudyConfig.ELSEWHERE, "only": "It is trained_tasks here."}  # noqa: RUF012  # a constant

    task: str = "multitask"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: PartsConfig = field(default_factory=PartsConfig)
    tasks: Annotated[list[str | JsonObject], Names("vismt.multitask.tasks:TASKS", options=True)] = field(
        default_factory=list, metadata={UNHASHED_OPTIONS: ("absent",)}
    )
    trained_tasks: list[str] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    canvas: list[int] | None = None
    head: Annotated[str, Names("vismt.multitask.nets:LABEL_SPACES", only=True)] | HeadConfig = "union"
    blocks: list[int] | None = None
    label_smoothing: Annotated[float, within(0, below=1)] = 0.1
    class_weights: str | None = None
    batch: Count = 32
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    fade: FadeConfig | None = field(default=None, metadata=SCHEDULED)
    retain: RetainConfig | None = None
    balancing: BalancingConfig | None = None
    calibration: ImageCalibrationConfig | None = None
    merge: MergeConfig | None = None
    baseline: str | dict[str, str] | None = None
    evaluate: MultitaskEvaluateConfig = field(default_factory=MultitaskEvaluateConfig)
    on_bad_sample: OnBadSample = "error"
    download: bool = False

    @property
    def derived(self) -> bool:
        return self.merge is not None

    @property
    def head_section(self) -> HeadConfig:
        """The head, written as a section or as its labels."""
        return self.head if isinstance(self.head, HeadConfig) else HeadConfig(labels=self.head)

    @property
    def head_name(self) -> str:
        """The head of maps, or without `size` the classifier."""
        return self.head_section.name or ("conv" if self.size else "linear")


# ---- tasks and their sets ----------------------------------------------------------------------------------------------


def entry_name(spec: str | Mapping[str, Any]) -> str:
    """Return the name of an entry of `tasks`."""
    return spec if isinstance(spec, str) else str(spec.get("name", spec.get("kind")))


def own_parts(config: MultitaskConfig) -> dict[str, PartsConfig]:
    """Return the sets of each task of whole images that has its own, by its name."""
    return {
        str(spec["name"]): build(
            PartsConfig, {key: spec[key] for key in _PARTS if key in spec}, f"tasks: {spec['name']}"
        )
        for spec in config.tasks
        if not isinstance(spec, str) and "name" in spec and any(key in spec for key in _PARTS)
    }


def all_parts(config: MultitaskConfig) -> dict[str, PartsConfig]:
    """Return the sections that name sets by their key in errors: `data`, if a task has no sets of its own, and the tasks."""
    own = {f"tasks: {name}": parts for name, parts in own_parts(config).items()}
    shared = len(own) < len(config.tasks) or config.data != PartsConfig()
    return {"data": config.data, **own} if shared else own


def all_tasks(config: MultitaskConfig) -> list[Task]:
    """Return the tasks of the configuration, also those that an arm leaves out, each over its own classes."""
    return [make_task(_options(spec)) for spec in config.tasks]


def _options(spec: str | Mapping[str, Any]) -> str | JsonObject:
    """Return the options of an entry of `tasks` without its sets. A task with sets is of whole images with counted classes."""
    if isinstance(spec, str) or not any(key in spec for key in _PARTS):
        return spec if isinstance(spec, str) else dict(spec)
    options = {"kind": Classification.name, **{key: spec[key] for key in spec if key not in _PARTS}}
    train = spec.get("train")
    if options["kind"] == Classification.name and "classes" not in options and train:
        from vismt.data.cards import load_card

        options["classes"] = load_card(card_and_split(train[0])[0]).classes
        if not options["classes"]:
            raise UserError(f"tasks: {spec['name']}: the card of '{train[0]}' has no number of classes; give classes.")
    return options


def trained_tasks(config: MultitaskConfig) -> list[Task]:
    """Return the tasks that this configuration (of an arm) trains."""
    chosen = config.trained_tasks
    tasks = [task for task in all_tasks(config) if not chosen or task.name in chosen]
    return unite(tasks) if config.head_section.labels == "union" else tasks


def class_tasks(config: MultitaskConfig) -> list[Task]:
    """Return the tasks of choices among classes, whose training labels are counted."""
    return [task for task in all_tasks(config) if isinstance(task, ClassLoss)]


def image_tasks(tasks: Iterable[Task]) -> list[Task]:
    """Return the tasks of whole images, whose answers have probabilities."""
    return [task for task in tasks if not isinstance(task, MapTask)]


def class_loss(config: MultitaskConfig, counts: Sequence[int] | None = None) -> ClassLoss:
    """Return the loss over the classes of whole images. counts: Training images of each class of the union."""
    return ClassLoss(class_weights=config.class_weights, class_counts=counts)


def inputs_of(config: MultitaskConfig, seed: int = 0) -> Inputs:
    """Return what attacks and corruptions meet. seed: Seed of attacks."""
    return Inputs(seed=seed, tasks=[task.name for task in all_tasks(config)] if config.size else None)


def canvas_of(config: MultitaskConfig) -> tuple[int, int]:
    """Return (h, w) of the canvas into which every image is fitted."""
    height, width = config.canvas or config.size
    return height, width


def window_of(config: MultitaskConfig) -> tuple[int, int]:
    """Return (h, w) of the images that the evaluated net takes."""
    return canvas_of(config) if config.evaluate.mode == "whole" else (config.size[0], config.size[1])


def baseline_arms(config: MultitaskConfig) -> dict[str, str]:
    """Return the arm with which delta_m compares, by task. Empty without a baseline."""
    baseline = config.baseline
    if baseline is None:
        return {}
    names = [task.name for task in all_tasks(config)]
    return dict.fromkeys(names, baseline) if isinstance(baseline, str) else {name: baseline[name] for name in names}


# ---- checks ------------------------------------------------------------------------------------------------------------


def check(config: MultitaskConfig) -> None:
    """Raise UserError for values that types do not exclude, also in the arms, before any work is done."""
    _check_values(config)
    losses = (
        [f"tasks.{task.name}.{option}" for task in all_tasks(config) for option in _free(task)] if config.size else []
    )
    check_arms(config, _check_values, _SHARED, tuple(losses))
    if config.size and len({arm.head_section.labels for arm in resolve_arms(config).values()}) > 1:
        raise UserError(
            "arms: head.labels must be the same for all arms: an answer among the classes of all tasks is right less often."
        )
    _check_merges(config)
    _check_baseline(config)


def _free(task: Task) -> list[str]:
    """Return the options of a task in which arms may differ."""
    return [option for option in loss_options(task) if isinstance(task, MapTask) or option not in _OF_ALL]


def _check_values(config: MultitaskConfig) -> None:
    for place, spec in enumerate(config.tasks):
        if not isinstance(spec, str) and not {"name", "kind"} & {*spec}:
            raise UserError(f"tasks[{place}]: has no name; give one.")
    names = [entry_name(spec) for spec in config.tasks]
    check_tasks(config, names)
    require_known("trained_tasks: no task", config.trained_tasks, names)
    for spec in (spec for spec in config.tasks if entry_name(spec) not in own_parts(config)):
        make_task(_options(spec))
        if not config.size:
            fix = "give size: [height, width]"
            raise UserError(f"tasks: {entry_name(spec)}: is a task of maps, or of the sets in data; {fix}.")
    _check_view(config)
    _check_parts(config)
    from vismt.methods import check_sections

    check_sections(config, None if config.adapt is None else config.adapt.method)
    make_configured_balancer(config.balancing, [name for name in names if name in (config.trained_tasks or names)])
    class_loss(config).check_options("multitask", 0)
    if config.size:
        _check_fitted(config)
    else:
        _check_square(config)
    perturbations(asked_features(config.evaluate), inputs_of(config))
    if not config.arms:
        check_calibration(config.calibration, config.adapt)


def _check_view(config: MultitaskConfig) -> None:
    """Raise UserError for keys and tasks that belong only to runs with `size`, or only to runs without it."""
    given = [*flat(differences(config))]
    other = list(_SQUARE) if config.size else _FITTED
    for key in (key for key in other if any(name == key or name.startswith(f"{key}.") for name in given)):
        if config.size:
            raise UserError(f"{key}: {_SQUARE[key]}; leave {key} or size out.")
        raise UserError(
            f"{key}: is of images that are fitted into `size`; give size: [height, width], or leave {key} out."
        )
    model = config.model
    if config.size and (model.block, model.pool, model.img_size) != (None, None, None):
        raise UserError("model: img_size, block and pool must be null; give size: [h, w] and blocks instead.")
    if (model.block, model.pool) != (None, None):
        raise UserError(
            "model: block and pool must be null: the head takes the place of timm's, so that timm can load the model."
        )


def _check_parts(config: MultitaskConfig) -> None:
    sections = all_parts(config)
    for where, parts in sections.items():
        if not parts.train:
            raise UserError(f"{where}.train: names no set." if where == "data" else f"{where}: train names no set.")
        if shares(parts):
            check_row_names(parts.train, f"{where}: train")
    check_parts(sections, config.calibration.data if config.calibration is not None else ())
    used = {where: (*parts.train, *parts.validation, *parts.test) for where, parts in sections.items()}
    check_other_sets(config.evaluate, used)
    for spec in config.tasks:
        whole = not isinstance(spec, str) and (
            any(key in spec for key in _PARTS) or Classification.name in (*spec.values(),)
        )
        for key in (key for key in _OF_ALL if whole and key in spec):
            raise UserError(
                f"tasks: {entry_name(spec)}: {key} is of all tasks of whole images; give {key} beside tasks."
            )


def _check_square(config: MultitaskConfig) -> None:
    own, head = own_parts(config), config.head_section
    for spec in config.tasks:
        known = ("name", "kind", "classes", "loss_weight", *_PARTS)
        require_known(f"tasks: {entry_name(spec)}: unknown key", spec, known)
    check_head(config.head_name, head.options)
    if is_variational(config.head_name) and head.labels != "union":
        raise UserError(f"head: vbll with labels '{head.labels}'; its bound is over all classes: set labels to union.")
    if is_variational(config.head_name) and config.class_weights is not None:
        raise UserError("head: vbll is trained on a bound of the cross-entropy; leave class_weights out.")
    if config.retain is not None:
        if head.labels != "union":
            raise UserError(
                "retain: quality retaining compares logits over the classes of all tasks; it needs head: union."
            )
        QualityRetaining(1, **asdict(config.retain))
    unchecked = next((name for name, parts in own.items() if not (parts.validation or parts.validation_share)), None)
    for key in fitted_keys(config.evaluate) if unchecked is not None else ():
        raise UserError(f"evaluate.{key}: task '{unchecked}' has no validation images; give it validation_share.")
    of_head = [feature.key for feature in asked_features(config.evaluate) if HEAD in feature.needs]
    if of_head and head.labels != "union":
        raise UserError(
            f"evaluate.{of_head[0]}: it is around one softmax over all classes; set the head's labels to union, or leave it out."
        )


def _check_fitted(config: MultitaskConfig) -> None:
    size, canvas = config.size, config.canvas
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"size: {size}; give [height, width] in pixels, multiples of the model's patch.")
    if canvas is not None and (len(canvas) != 2 or any(side < least for side, least in zip(canvas, size))):
        raise UserError(f"canvas: {canvas}; give [height, width], neither smaller than in size {size}, or null.")
    if config.head_name in CLASSIFIERS and config.head_name not in MAP_HEADS:
        raise UserError(f"head: {config.head_name} takes the place of a stock classifier; leave it or size out.")
    check_map_head(config.head_name, config.head_section.options)
    _check_fitted_tasks(config)
    if config.retain is not None:
        from vismt.multitask.nets import SEGMENTATION

        trained = trained_tasks(config)
        classes = next((task.channels for task in trained if task.name == SEGMENTATION), None)
        if classes is None and not (image_tasks(trained) and config.head_section.labels == "union"):
            raise UserError(
                f"retain: compares logits of {SEGMENTATION}, or of whole images with head.labels: union; set retain to null."
            )
        QualityRetaining(classes or 1, **asdict(config.retain))


def _check_fitted_tasks(config: MultitaskConfig) -> None:
    own, tasks = own_parts(config), all_tasks(config)
    for task in tasks:
        named = isinstance(task, Classification) and task.name != Classification.name
        if named != (task.name in own):
            fix = "name sets of its own: train, test" if named else "its sets belong in data"
            raise UserError(f"tasks: {task.name}: {fix}.")
        if named and task.name in (*TASKS, *TAKEN):
            raise UserError(f"tasks: {task.name}: the name has another meaning in a run; choose another one.")
    whole = image_tasks(tasks)
    for feature in asked_features(config.evaluate):
        where = f"evaluate.{feature.key}:"
        if COUNTS in feature.needs and not class_tasks(config):
            raise UserError(f"{where} no task has classes; leave it out.")
        if COUNTS in feature.needs and len(whole) > 1 and config.head_section.labels == "union":
            raise UserError(f"{where} its prior is over the classes of one task; set head.labels to separate.")
        if feature.needs & {PROBABILITIES, HEAD} and not whole:
            raise UserError(f"evaluate.{feature.key}: no task is of whole images; add one, or leave the key out.")
        if HEAD in feature.needs:
            raise UserError(
                f"evaluate.{feature.key}: it stands on the input of a stock classifier; leave it or size out."
            )


def _check_merges(config: MultitaskConfig) -> None:
    if config.merge is not None:
        raise UserError("merge: it makes an arm from other arms; give it as arms.NAME: {merge: {...}}.")
    own, earlier = own_parts(config), dict[str, MultitaskConfig]()
    for name, arm in resolve_arms(config).items():
        if arm.merge is None:
            earlier[name] = arm
            continue
        where = f"arms.{name}: merge.arms:"
        require_known(f"{where} no trained arm before it is", arm.merge.arms, earlier)
        tasks = sorted(task for other in arm.merge.arms for task in earlier[other].trained_tasks)
        if tasks != sorted(own):
            raise UserError(
                f"{where} {', '.join(arm.merge.arms) or 'none'} are trained on {', '.join(tasks) or 'no own task'}; name "
                "arms before this one whose trained_tasks hold each task once."
            )
        if len(arm.merge.arms) < 2:
            raise UserError(f"{where} only {arm.merge.arms[0]}; name two or more.")
        if arm.adapt is None or any(earlier[other].adapt is None for other in arm.merge.arms):
            raise UserError(f"{where} an arm without adapt has no adapter; give it the section.")
        if is_variational(arm.head_name):
            raise UserError(f"arms.{name}: merge: rows of a '{arm.head_name}' head cannot be merged; take linear.")
        if len(arm.merge.weights) > 1 and any(not (of.validation or of.validation_share) for of in own.values()):
            raise UserError(
                f"arms.{name}: merge.weights: are chosen on validation images; give each task validation_share."
            )
        apart = fitted_keys(config.evaluate, apart=True)
        if len(arm.merge.weights) > 1 and apart and not divides(config.evaluate, config.tune):
            raise UserError(
                f"arms.{name}: merge.weights: are chosen on the validation images, of which none are left for "
                f"evaluate.{apart[0]}; name one weight, or give tune, with which half of them choose."
            )


def _check_baseline(config: MultitaskConfig) -> None:
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


CONFIG = MultitaskConfig
