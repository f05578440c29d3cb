"""The sections of a language-model configuration (task: lm)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from vismt.base.errors import UserError
from vismt.config.sections import Count, Dtype, ModelSection
from vismt.config.typed import Names, within
from vismt.engine.parts import PartsConfig
from vismt.engine.study import FROZEN, StudyConfig
from vismt.evaluation.sections import evaluate_section
from vismt.jobs.task_sections import Split
from vismt.llm.ilora.recommenders import ITEM_BASELINES
from vismt.llm.tasks import make_text_task
from vismt.storage.files import JsonObject
from vismt.uncertainty.features import HEAD, OUTSIDE, PROBABILITIES, VALIDATION
from vismt.uncertainty.last_layers import check_head

if TYPE_CHECKING:  # tasks are loaded when one is made
    from vismt.llm.tasks.base import LmTask
    from vismt.llm.tasks.recommendation import Recommendation

RECOMMENDER = "sasrec"  # name of the recommender
GRU = "gru4rec"
BASELINES = (*ITEM_BASELINES, GRU)  # names of the recommender
ENSEMBLE = ":ensemble"  # ends the name of a model that averages the trainings of an arm
RECOMMENDERS = (RECOMMENDER, *BASELINES)
REFERENCES = (FROZEN, *RECOMMENDERS)  # models that no arm trains
KIND = "recommendation"
LOSSES = ("choice", "answer", "text")  # of a task of kind answers


@dataclass
class LmModelConfig(ModelSection):
    """The language model.

    Args:
        name: an asset, a folder or a name on the hub, see vismt.backbones.lm.create_lm.
        revision: revision of a model of the hub. null means the newest.
        gguf_file: name of the .gguf file in the folder. null means other files.
        dtype: type of the weights. null means the type of the checkpoint.
        first_block: first block that is trained. The blocks below it are frozen, and their output on each text is computed once
            and kept in memory, and in the cache folder for later runs.
    """

    name: str = "smollm2-135m-instruct"
    revision: str | None = None
    gguf_file: str | None = None
    dtype: Dtype | None = None
    first_block: int = 0


@dataclass
class LmTaskConfig(PartsConfig):
    """A task. Exactly one task has sets to train on. The others are only evaluated.

    Each set in `test` is reported separately. Shares are the last rows of each training set. If rows have a class (kind
    classes, and answers that are the same for all rows), they are the last rows of each class. Shares of sets of interactions
    are all rows of the last users.

    Args:
        name: name of the task.
        kind: kind of the task (vismt.llm.tasks).
        prompt: template of the prompt. A space at its end becomes the beginning of the answer.
        limit: largest number of training rows that the shares leave, and in a task that is only evaluated, of rows of each set.
            Each class has the same number of rows, as far as it has so many, and in a recommendation each user. null takes
            all.
        chat: whether the prompt is the user's turn in the chat template of the model, and the answer the assistant's.
        options: further arguments of the kind.
        rotate: whether the training of seed s is tested on the s-th share of the users in place of the last, in sets of
            interactions. Seeds 0 to 1 / test_share - 1 are then folds that test every user once. Their score is one over all
            users, with an interval only over users.
    """

    name: str = ""
    kind: Annotated[str, Names("vismt.llm.tasks:TEXT_TASKS", only=True)] = "causal"
    prompt: str = ""
    chat: bool = False
    options: JsonObject = field(default_factory=dict)
    rotate: bool = False

    @property
    def folds(self) -> int:
        """The number of folds. 1 if every training is tested on the same rows."""
        return round(1 / self.test_share) if self.rotate else 1


@dataclass
class LmAlternateConfig:
    """Alternating training of a head's posterior and the LM.

    Args:
        lr: learning rate of the posterior's means and noise.
        spread_lr: learning rate of the posterior's covariances.
        steps: number of steps on the posterior for each batch.
    """

    lr: Annotated[float, within(above=0)] = 3e-3
    spread_lr: Annotated[float, within(above=0)] = 3e-2
    steps: Count = 1


@dataclass
class LmHeadConfig:
    """The head on the last token, for kinds that have one.

    Args:
        name: name of the head (vismt.uncertainty.last_layers).
        options: further arguments of the head.
        alternate: alternating training (vismt.uncertainty.vbll). null trains head and LM jointly, and train.rates can give the
            head another rate.
    """

    name: Annotated[str, Names("vismt.uncertainty.last_layers:HEADS", only=True)] = "linear"
    options: JsonObject = field(default_factory=dict)
    alternate: LmAlternateConfig | None = None

    def __post_init__(self) -> None:
        check_head(self.name, self.options)
        if self.alternate is not None and self.name != "vbll":
            raise UserError(f"head.alternate: '{self.name}' has no posterior to alternate with; set head.name to vbll.")


@dataclass
class LmCalibrationConfig:
    """Texts from which a method computes options before the training.

    They serve for covariances of inputs, or for the choice of units by activations or gradients, see the options of the method.
    Finished covariances are kept in calibration/ of the run folder.

    Args:
        data: sets of texts.
        text: template of a row.
        rows: number of rows.
        batch: rows at a time.
        length: largest number of tokens of a row.
    """

    data: list[str] = field(default_factory=list)
    text: str = "{text}"
    rows: Count = 256
    batch: Count = 8
    length: Count = 512

    def __post_init__(self) -> None:
        if not self.data:
            raise UserError("calibration.data: names no set of texts.")


@dataclass
class LmRecommenderConfig:
    """SASRec, trained on the training rows of a recommendation, regardless of their limit, then frozen.

    Args:
        width: length of item and user vectors.
        steps: number of optimiser steps.
        batch: number of rows of a training batch.
        lr: learning rate.
        cross_fit: whether the recommender is fitted to half of the training users, and the LM to the others.
        baselines: further recommenders that are evaluated on the same candidates.
    """

    width: Count = 64
    steps: Count = 2000
    batch: Count = 256
    lr: Annotated[float, within(above=0)] = 1e-3
    cross_fit: bool = False
    baselines: Annotated[list[str], Names(BASELINES, only=True)] = field(default_factory=list)


@evaluate_section(PROBABILITIES, OUTSIDE, VALIDATION, HEAD)
@dataclass
class LmEvaluateConfig:
    """Evaluation.

    Args:
        split: test, or validation while settings are chosen, without what is fitted to it.
        batch: number of rows in one forward pass.
        limit: largest number of rows of each set. null takes all.
        frozen: whether the model before training is also evaluated.
        passes: number of passes with the adapter's dropout whose mean probability is also evaluated, in arms with dropout.
        ensembles: arms whose trainings' mean probability is evaluated as a model of its own, "ARM:ensemble".
    """

    split: Split = "test"
    batch: Count = 8
    limit: Annotated[int, within(2)] | None = None
    frozen: bool = True
    passes: Annotated[int, within(0)] = 0
    ensembles: list[str] = field(default_factory=list)


@dataclass
class LmConfig(StudyConfig):
    """A causal LM, trained on one task and evaluated on several.

    Args:
        model: the language model.
        tasks: the tasks.
        head: the head on the last token, for kinds of tasks that have one.
        batch: number of rows (or packed pieces) of a training batch.
        loss: what a task of kind answers trains: choice (the right answer against the other answers), answer (the
            likelihood of the right answer), or text (the likelihood of the prompt and the right answer).
        calibration: texts from which a method computes options before the training. null means none.
        recommender: the recommender that gives item and user vectors. null means the default settings.
        gates: input of the gates of ilora in a recommendation, user (the recommender's representation of the history) or text
            (the titles of the history). The controls are random, group (drawn for each of a few groups of users) and
            shuffled-user.
        projector: form of the map from item vectors to the LM, mlp or linear.
        evaluate: the evaluation.
    """

    task: str = "lm"
    model: LmModelConfig = field(default_factory=LmModelConfig)
    tasks: list[LmTaskConfig] = field(default_factory=list)
    head: LmHeadConfig = field(default_factory=LmHeadConfig)
    batch: Count = 8
    loss: Annotated[str, Names(LOSSES, only=True)] = "choice"
    calibration: LmCalibrationConfig | None = None
    recommender: LmRecommenderConfig | None = None
    gates: Annotated[str, Names("vismt.llm.ilora.hybrid:GATES", only=True)] = "user"
    projector: Annotated[str, Names("vismt.llm.ilora.hybrid:PROJECTORS", only=True)] = "mlp"
    evaluate: LmEvaluateConfig = field(default_factory=LmEvaluateConfig)


def task_of(config: LmTaskConfig) -> LmTask:
    """Return the task that a section describes."""
    task: LmTask = make_text_task(config.kind, config.prompt, config.options, f"tasks: {config.name}")
    task.chat = config.chat
    return task


def recommendation_of(config: LmTaskConfig) -> Recommendation:
    """Return the recommendation that a section describes. Raise UserError for a section of another kind."""
    from vismt.llm.tasks.recommendation import Recommendation

    task = task_of(config)
    if not isinstance(task, Recommendation):
        raise UserError(f"tasks: {config.name}: is of kind '{config.kind}', needed '{KIND}'.")
    return task


def trained_task(config: LmConfig) -> LmTaskConfig:
    """Return the section of the task that is trained."""
    return next(task for task in config.tasks if task.train)


def recommends(config: LmConfig) -> bool:
    """Return whether the trained task is a recommendation."""
    return trained_task(config).kind == KIND


CONFIG = LmConfig
