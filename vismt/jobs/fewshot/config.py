"""The sections of a few-shot configuration (task: fewshot)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from vismt.base.errors import UserError
from vismt.config.sections import HASH_DEFAULT, Episodes, ModelConfig, OnBadSample, Seed
from vismt.config.typed import Names, within
from vismt.engine.study import ALONE, FROZEN, StudyConfig
from vismt.evaluation.sections import evaluate_section
from vismt.jobs.calibration import ImageCalibrationConfig
from vismt.jobs.fewshot.pool_experts import CLEAN_EXPERT, ExpertSpec
from vismt.metatune.amt.input_attack import PYRAMID
from vismt.metatune.amt.selection_rules import merging_rules
from vismt.metatune.settings import HEADS, Adversary, AdversaryForm, FineTuneSettings, MamlSettings
from vismt.robustness.conditions import AttackConfig
from vismt.storage.files import JsonObject
from vismt.uncertainty.features import OUTSIDE, PIXELS, PROBABILITIES
from vismt.uncertainty.last_layers import check_head, is_variational

EXPERT = "expert:"
MERGED = "merged"
DEFAULT_MERGED = "merged:default"
SINGLE = (FROZEN, ALONE)
_LEVELS: list[float | list[float]] = [0.01, 0.1, 6.0, 8.0]
PROTOTYPES = (
    "prototypes"  # the head of a model without an ending. The model "STEM+HEAD" has a head of HEADS in their place
)
COPY_SEED = 1_000_003  # difference of the training seeds of experts with one level


def pooled_models() -> tuple[str, ...]:
    """Return the models of a run with a pool, besides its experts."""
    merged = (f"{MERGED}:{rule}" for rule in merging_rules())
    return (FROZEN, CLEAN_EXPERT, MERGED, DEFAULT_MERGED, *merged, "average", "logits", "min_ce")


def known_models() -> tuple[str, ...]:
    """Return the evaluated models whose names do not follow from the run."""
    return (*SINGLE, *pooled_models())


def head_names() -> tuple[str, ...]:
    """Return the names of heads."""
    return (PROTOTYPES, *HEADS)


@dataclass
class SourceConfig:
    """Training episodes.

    Args:
        data: cards as 'name' or 'name:split'.
        ways: classes of an episode.
        shots: support images of a class.
        queries: query images of a class.
        augment: whether training images are cropped, changed in colour and mirrored at random.
        hierarchy: whether the ways are drawn within one superclass.
        scale: scale of the cosine classifier's logits at the start. It is trained.
        labels: classes of the training loss. episode classifies queries by the prototypes of their episode. set classifies all
            images of an episode by a learned vector for each class of the one set in data, which no evaluation uses.
    """

    data: list[str] = field(default_factory=list)
    ways: int = 5
    shots: int = 5
    queries: int = 15
    augment: bool = True
    hierarchy: bool = False
    scale: Annotated[float, within(above=0)] = 10.0
    labels: Annotated[str, Names(("episode", "set"), only=True)] = "episode"


@dataclass(frozen=True)
class PoolConfig(AdversaryForm):
    """A pool of AMT experts, trained independently.

    Args:
        levels: budgets of the input attack in 1/255, 0 for no attack, each for an expert of source.data under linf. A list in
            place of a number is one expert with a budget drawn for each episode.
        clean: whether a reference without either attack is also trained on the same episodes (the model clean).
        folder: an assembled pool to evaluate. Nothing is trained.
        experts: source, threat and level of each expert, in place of levels. A repeated expert is another expert with another
            seed.
        select: rule of the model merged (metatune/amt/selection_rules.py).
    """

    levels: list[float | list[float]] = field(default_factory=lambda: list(_LEVELS))
    pyramid: list[tuple[int | None, float]] = field(default_factory=lambda: list(PYRAMID))
    clean: bool = False
    folder: str | None = None
    experts: list[ExpertSpec] = field(default_factory=list)
    select: Annotated[str, Names("vismt.metatune.amt.selection_rules:merging_rules", only=True)] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts and self.levels not in ([], _LEVELS):
            raise UserError(f"pool: levels {self.levels} and experts; give one of them.")
        if self.experts:
            object.__setattr__(self, "levels", [])


@dataclass
class FewShotHeadConfig:
    """The head of evaluated models whose name has no ending.

    Args:
        name: name of the head, prototypes, finetune, ridge, logistic, vbll, laplace or one of your own, as in evaluate.models.
        options: further arguments of vbll (vismt.uncertainty.vbll).
    """

    name: Annotated[str, Names("vismt.jobs.fewshot.config:head_names", only=True)] = PROTOTYPES
    options: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        if is_variational(self.name):
            check_head(self.name, self.options)
        elif self.options:
            raise UserError(f"head: '{self.name}' has no options; finetune has its own section, the others have none.")


@evaluate_section(PROBABILITIES, PIXELS, OUTSIDE)
@dataclass
class EvaluateConfig:
    """Test episodes.

    Args:
        data: cards as 'name' or 'name:split'.
        models: evaluated models, frozen and adapted. With a pool frozen, clean, merged, merged:RULE, average, logits, min_ce
            and expert:LABEL. All except logits also with +finetune, +ridge, +logistic, +vbll or +laplace.
        rule: rule of the episodes, uniform (ways, shots) or variable (Meta-Dataset).
        ways: number of classes of an episode of the uniform rule.
        shots: number of support images of a class. Each number is a protocol of its own.
        queries: number of query images of a class.
        episodes: number of episodes of each set.
        seed: seed of the episodes, not of the training.
        hierarchy: whether the ways are drawn within one superclass.
        min_ways: smallest number of classes of the variable rule.
        max_ways: largest number of classes of the variable rule.
        max_contribution: largest number of support images of a class of the variable rule. With min_ways = max_ways = 5, a
            value of 1 is the AMT paper's 5-way 1-shot.
        probabilities: whether the ECE, NLL and Brier score of the probabilities after each model's temperature are reported.
            The temperature is fitted on the validation episodes of the select section.
        ways_of: ways of sets that have other ways than `ways`, by their entry in data or select.data.
        sampling: images from which uniform episodes draw. parts draws episode i from part i % 5 of the images of every class,
            so that intervals cover new images. If a class has fewer than four times as many images as an episode takes, the
            classes are divided, so that intervals also cover new classes. A set with fewer than four times as many classes as
            an episode has is sampled with_replacement. with_replacement draws from all images in each episode, and intervals
            cover only new episodes. without_replacement draws no image twice and every class equally often, and the smallest
            class limits the number of episodes. The variable rule takes shots from class sizes, and is always with_replacement.
    """

    data: list[str] = field(default_factory=list)
    models: Annotated[list[str], Names("vismt.jobs.fewshot.config:known_models")] = field(
        default_factory=lambda: list(SINGLE)
    )
    rule: Annotated[str, Names(("uniform", "variable"), only=True)] = "uniform"
    ways: int = 5
    shots: list[int] = field(default_factory=lambda: [1, 5])
    queries: int = 15
    episodes: Episodes = 600
    seed: Seed = 1
    hierarchy: bool = False
    min_ways: int = 5
    max_ways: int = 50
    max_contribution: int = 100
    probabilities: bool = False
    ways_of: dict[str, Annotated[int, within(2)]] = field(default_factory=dict)
    sampling: Annotated[str, Names(("parts", "with_replacement", "without_replacement"), only=True)] = field(
        default="parts", metadata={HASH_DEFAULT: "with_replacement"}
    )

    def __post_init__(self) -> None:
        if self.rule == "variable":
            self.sampling = "with_replacement"

    def ways_in(self, data: str, classes: int | None = None) -> int:
        """Return the ways of the uniform episodes of a set. Raises UserError if it has fewer classes."""
        ways = self.ways_of.get(data, self.ways)
        if classes is not None and classes < ways:
            raise UserError(
                f"evaluate.ways: '{data}' has {classes} classes, too few for {ways}-way episodes; give it ways of its own, "
                f"evaluate.ways_of: {{{data}: {classes}}}, or lower evaluate.ways."
            )
        return ways


@dataclass
class SelectConfig:
    """The validation episodes of the choice of rates and of temperatures.

    Args:
        data: sets for the choice, none of them evaluated.
        episodes: number of episodes of each set.
        shots: support images of a class.
        queries: query images of a class.
        attack: attack of the criterion, which is the mean of clean accuracy and accuracy under the attack. null takes only clean
            accuracy. An arm may have its own (select.attack).
    """

    data: list[str] = field(default_factory=list)
    episodes: Episodes = 20
    shots: int = 5
    queries: int = 5
    attack: AttackConfig | None = None


@dataclass
class FewShotConfig(StudyConfig):
    """One few-shot experiment.

    Args:
        model: the backbone.
        arms: variants of the configuration, as {name: {dotted key: value}}. {} means one arm, or the experts of the pool alone.
            An arm is trained as the one expert of its pool section, or without attack if the section is null. In a run that
            trains nothing, an arm replaces values of `model` and is evaluated in place of frozen.
        seeds: seeds of the trainings. [] takes only `seed`.
        tune: learning rates that every arm tries, judged on select.data. null takes train.lr.
        source: training episodes.
        meta: MAML in place of prototypes. null means prototypes.
        pool: pool of AMT experts. null means no pool.
        select: validation episodes. null means none.
        finetune: fine-tuning on a task, of models with +finetune.
        head: head of evaluated models, fitted to the support of each task. A model may also name its head, frozen+vbll.
        calibration: images from which a method computes options before the training. null means none.
        evaluate: test episodes.
        on_bad_sample: error or skip, for images that cannot be decoded.
        download: whether sets that are missing are downloaded.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    meta: MamlSettings | None = None
    pool: PoolConfig | None = None
    select: SelectConfig | None = None
    finetune: FineTuneSettings = field(default_factory=FineTuneSettings)
    head: FewShotHeadConfig = field(default_factory=FewShotHeadConfig)
    calibration: ImageCalibrationConfig | None = None
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    on_bad_sample: OnBadSample = "error"
    download: bool = False

    @property
    def selection(self) -> SelectConfig:
        """The select section. Raises UserError if it is null."""
        if self.select is None:
            raise UserError("select: is null; choosing settings and rates needs this section.")
        return self.select


@dataclass
class ExpertConfig(FewShotConfig):
    """One expert of a pool.

    adversary: Attacks of the training. None for a clean expert. copy: Index among experts that differ only in the seed.
    """

    adversary: Adversary | None = None
    copy: int = 0

    @property
    def training_seed(self) -> int:
        return self.seed + COPY_SEED * self.copy


CONFIG = FewShotConfig
