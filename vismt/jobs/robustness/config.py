"""The sections of a robustness configuration (task: robustness): trained models as arms, images, attacks and corruptions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from vismt.base.errors import UserError, near
from vismt.config.sections import AdaptConfig, Count, ModelConfig, OnBadSample, TrainConfig
from vismt.config.typed import within
from vismt.data.set_entries import check_row_names
from vismt.engine.study import StudyConfig, check_arms
from vismt.evaluation.sections import asked_features, check_other_sets, evaluate_section, fitted_keys, perturbations
from vismt.uncertainty.features import OUTSIDE, PIXELS, PROBABILITIES, VALIDATION, Inputs

if TYPE_CHECKING:
    from vismt.robustness.attacks.attacks import AttackSpec


@dataclass
class ClassifierConfig:
    """The source of a classifier: one of name, run and function.

    Args:
        name: a timm name, a checkpoint file, a folder of `vismt merge` or `export`, or
            robustbench:MODEL[:DATASET[:THREAT]].
        architecture: timm architecture of a checkpoint without a config.json, or the module:function that builds the nn.Module
            whose state_dict the checkpoint has.
        pretrained: whether a timm model has its weights.
        run: a run folder of vismt.
        arm: arm or arm:seed of that run.
        function: module:function, which returns an nn.Module from images in [0, 1] to logits, alone or with its number of
            classes.
        size: size in pixels to which images are decoded. null means the classifier's own. A function needs it.
        img_size: size of the images of a model in pixels. null means the size in its config.json or of timm.
        mean: mean of each channel of images in [0, 1], by which a checkpoint normalises. null means the value in its
            config.json or of timm.
        std: standard deviation of each channel, as mean.
        task: task of a multi-task classifier whose classes the cards have. null lets the cards decide.
    """

    name: str | None = None
    architecture: str | None = None
    pretrained: bool = True
    run: str | None = None
    arm: str | None = None
    function: str | None = None
    size: int | None = None
    img_size: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    task: str | None = None


@evaluate_section(PROBABILITIES, PIXELS, OUTSIDE, VALIDATION)
@dataclass
class RobustnessEvaluateConfig:
    """Evaluation.

    Args:
        images: number of images of each card, drawn with the run's seed. null takes all.
        threshold_images: number of further images of each card, from which features take their thresholds.
        batch: number of images in one forward pass.
        keep_images: whether the attacked images of cards are written to the folder `adversarial` of the run folder.
        baseline: arm relative to which the error under corruptions is also given. null means none.
    """

    images: Annotated[int, within(2)] | None = None
    threshold_images: Annotated[int, within(0)] = 0
    batch: Count = 32
    keep_images: bool = False
    baseline: str | None = None


@dataclass
class RobustnessConfig(StudyConfig):
    """Trained models, clean, under attacks and under corruptions.

    Args:
        model: not used, because `classifier` names the models.
        adapt: null.
        train: null.
        classifier: the source of the classifier, of which arms replace values.
        data: cards as 'name' or 'name:split'. [] evaluates run folders on the images and by the scores of their own
            configurations, also of maps.
        evaluate: the evaluation.
        on_bad_sample: error or skip, for images that cannot be decoded.
        download: whether sets that are missing are downloaded.
    """

    task: str = "robustness"
    model: ModelConfig = field(default_factory=ModelConfig)
    adapt: AdaptConfig | None = None
    train: TrainConfig | None = None
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: list[str] = field(default_factory=list)
    evaluate: RobustnessEvaluateConfig = field(default_factory=RobustnessEvaluateConfig)
    on_bad_sample: OnBadSample = "error"
    download: bool = False


def check(config: RobustnessConfig) -> None:
    """Raise UserError for values that types do not exclude, also in the arms, before any work is done."""
    settings = config.evaluate
    if config.adapt is not None or config.train is not None or config.seeds or config.tune is not None:
        raise UserError("robustness: nothing is trained; leave adapt, train, seeds and tune out.")
    if settings.baseline is not None and settings.baseline not in config.arms:
        raise UserError(f"evaluate.baseline: no arm '{settings.baseline}'.{near(settings.baseline, config.arms)}")
    _check_data(config)
    wanted, fitted = settings.threshold_images, fitted_keys(settings)
    if bool(wanted) != bool(fitted and config.data) or (wanted and not settings.images):
        raise UserError(
            f"evaluate.threshold_images: {wanted} with images {settings.images} and {', '.join(fitted) or 'nothing'} to fit: on "
            "cards what is fitted needs a number of images and of threshold_images; else leave it out."
        )
    check_arms(config, _check_classifier, ("data", "adapt", "train", "on_bad_sample", "download"))
    if not config.arms:
        _check_classifier(config)


def _check_data(config: RobustnessConfig) -> None:
    settings = config.evaluate
    if len(set(config.data)) < len(config.data):
        raise UserError(f"data: {config.data}; name each card once.")
    check_row_names(config.data, "data")
    check_other_sets(settings, {"data": config.data})
    if config.data:
        first_attack(config)
        return
    of_cards = {"images": settings.images is not None, "keep_images": settings.keep_images}
    asked = [key for key, used in of_cards.items() if used]
    asked += [feature.key for feature in asked_features(settings) if not (feature.everywhere or feature.of_inputs)]
    if asked:
        keys = ", ".join(f"evaluate.{key}" for key in asked)
        raise UserError(f"data: [] takes all images of the runs' own; leave out what is for cards: {keys}.")


def first_attack(config: RobustnessConfig) -> AttackSpec | None:
    """Return the first attack on the images of cards. Raises UserError for attacks and corruptions that do not fit."""
    specs = perturbations(asked_features(config.evaluate), Inputs(seed=config.seed))
    return next((spec for spec in specs if spec.kind == "attack"), None)


def _check_classifier(config: RobustnessConfig) -> None:
    classifier = config.classifier
    given = [name for name in ("name", "run", "function") if getattr(classifier, name) is not None]
    if len(given) != 1:
        raise UserError(f"classifier: {', '.join(given) or 'nothing'} given; give one of name, run and function.")
    if not config.data and (classifier.run is None or classifier.size is not None):
        raise UserError(
            "data: []; name at least one card. Only run folders (classifier.run) have images of their own, of their own size."
        )
    if classifier.task is not None and not config.data:
        raise UserError("classifier.task: it chooses among outputs for cards; leave it out with data: [].")
    if classifier.img_size is not None and classifier.name is None:
        raise UserError("classifier.img_size: it is for a timm model; give classifier.name, or leave it out.")
    if classifier.function is not None and classifier.size is None:
        raise UserError("classifier.size: a function has no image size; give it in pixels.")
    if classifier.arm is not None and classifier.run is None:
        raise UserError("classifier.arm: it names an arm of a run folder; give classifier.run, or leave it out.")


CONFIG = RobustnessConfig
