"""The sections of a language-model configuration (task: lm)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from vismt.config import HASHED_IF_SET, UNHASHED, Dtype, ModelSection
from vismt.engine.splits import PartsConfig, check_parts
from vismt.engine.study import StudyConfig, check_arms, resolve_arms
from vismt.errors import UserError, require_known
from vismt.jobs.multitask import check_tasks
from vismt.llm.heads import check_head
from vismt.llm.hybrid import PROJECTORS, check_gates
from vismt.llm.item_baselines import ITEM_BASELINES
from vismt.llm.tasks import make_task
from vismt.llm.tasks.base import LmTask
from vismt.llm.tasks.recommendation import Recommendation
from vismt.methods import needs
from vismt.typed_yaml import Names

FROZEN = "frozen"  # name of the model before training
RECOMMENDER = "sasrec"  # name of the recommender
GRU = "gru4rec"
BASELINES = (*ITEM_BASELINES, GRU)  # of the recommender
RECOMMENDERS = (RECOMMENDER, *BASELINES)
REFERENCES = (FROZEN, *RECOMMENDERS)  # models that no arm trains
KIND = "recommendation"


@dataclass
class LmModelConfig(ModelSection):
    """The language model.

    Args:
        name: an asset, a folder or a name on the hub, see vismt.backbones.lm.create_lm.
        revision: revision of a model of the hub; null for the newest.
        gguf_file: name of the .gguf file in the folder; null for other files.
        dtype: type of the weights; null for that of the checkpoint.
        first_block: the blocks below it are frozen, and their output on each text is computed once and cached in
            memory.
        cache_mb: largest size of that cache in MB.
    """

    name: str = "smollm2-135m-instruct"
    revision: str | None = None
    gguf_file: str | None = None
    dtype: Dtype | None = None
    first_block: int = 0
    cache_mb: int = 1024


@dataclass
class LmTaskConfig(PartsConfig):
    """A task. Exactly one has sets to train on; the others are only evaluated, on `limit` rows of each set.

    Each set in `test` is reported separately. Shares are the last rows of each training set; of sets of interactions, all rows
    of the last users.

    Args:
        name: name of the task.
        kind: kind of the task (vismt.llm.tasks).
        prompt: template of the prompt.
        chat: whether the prompt is the user's turn in the chat template of the model, and the answer the assistant's.
        options: further arguments of the kind.
    """

    name: str = ""
    kind: Annotated[str, Names("vismt.llm.tasks:TASKS")] = "causal"
    prompt: str = ""
    chat: bool = field(default=False, metadata=HASHED_IF_SET)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class LmAlternateConfig:
    """Alternating training of a head's posterior and the LM.

    Args:
        lr: learning rate of the posterior's means and noise.
        spread_lr: learning rate of its covariances.
        steps: steps on the posterior for each batch.
    """

    lr: float = 3e-3
    spread_lr: float = 3e-2
    steps: int = 1


@dataclass
class LmHeadConfig:
    """The head on the last token, for kinds that have one.

    Args:
        name: the head (vismt.llm.heads).
        options: further arguments of the head.
        alternate: alternating training (vismt.llm.tasks.alternating); null trains head and LM jointly (train.rates can
            give the head another rate).
    """

    name: Annotated[str, Names("vismt.llm.heads:HEADS")] = "linear"
    options: dict[str, Any] = field(default_factory=dict)
    alternate: LmAlternateConfig | None = None


@dataclass
class LmCalibrationConfig:
    """Texts that a method computes options from before the training.

    They serve for covariances of inputs, or for the choice of units by activations or gradients; see the method's
    options. Finished covariances are kept in calibration/ of the run folder, so that an interrupted calibration
    resumes.

    Args:
        data: sets of texts.
        text: template of a row.
        rows: number of rows.
        batch: rows at a time.
        length: largest number of tokens of a row.
        memory_mb: memory for covariances in progress in MB, null for all at once; with less, several passes over the
            texts are made.
    """

    data: list[str] = field(default_factory=list)
    text: str = "{text}"
    rows: int = 256
    batch: int = 8
    length: int = 512
    memory_mb: int | None = field(default=None, metadata=UNHASHED)


@dataclass
class LmRecommenderConfig:
    """SASRec, trained on the training rows of a recommendation, regardless of their limit, then frozen.

    Args:
        width: of item and user vectors.
        blocks: number of blocks.
        heads: attention heads of a block.
        dropout: share of dropped values in training.
        steps: optimiser steps.
        batch: rows of a training batch.
        lr: learning rate.
        weight_decay: weight decay.
        cross_fit: whether the recommender is fitted to half of the training users, and the LM to the others.
        baselines: further recommenders that are evaluated on the same candidates.
    """

    width: int = 64
    blocks: int = 1
    heads: int = 1
    dropout: float = 0.1
    steps: int = 2000
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.0
    cross_fit: bool = field(default=False, metadata=HASHED_IF_SET)
    baselines: Annotated[list[str], Names(BASELINES)] = field(default_factory=list, metadata=HASHED_IF_SET)


@dataclass
class LmEvaluateConfig:
    """Evaluation.

    Args:
        split: test, or validation while settings are chosen.
        batch: rows at a time.
        limit: rows of each set; null for all.
        frozen: also evaluate the model before training.
        temperature: also evaluate with the temperature that minimises the NLL on validation rows.
        laplace: also evaluate with a Laplace approximation around the trained head; it is Kronecker-factored, and the
            condition is named accordingly, where a linear head has more than 4,096 weights.
        samples: draws of a Bayesian head.
    """

    split: Annotated[str, Names("vismt.jobs.multitask:SPLITS")] = "test"
    batch: int = 8
    limit: int | None = None
    frozen: bool = True
    temperature: bool = False
    laplace: bool = False
    samples: int = 20


@dataclass
class LmConfig(StudyConfig):
    """A causal LM, trained on one task and evaluated on several.

    Args:
        model: the language model.
        tasks: the tasks.
        head: the head on the last token, for kinds of tasks that have one.
        batch: rows (or packed pieces) of a training batch.
        calibration: texts that a method computes options from before the training; null for none.
        recommender: the recommender that gives item and user vectors; null for the default settings.
        gates: input of the gates of ilora in a recommendation: user, the recommender's representation of the history; text,
            the titles of the history; or as controls random and shuffled-user.
        projector: from item vectors to the LM, mlp or linear.
        evaluate: the evaluation.
    """

    task: str = "lm"
    model: LmModelConfig = field(default_factory=LmModelConfig)
    tasks: list[LmTaskConfig] = field(default_factory=list)
    head: LmHeadConfig = field(default_factory=LmHeadConfig)
    batch: int = 8
    calibration: LmCalibrationConfig | None = None
    recommender: LmRecommenderConfig | None = None
    gates: Annotated[str, Names("vismt.llm.hybrid:GATES")] = "user"
    projector: Annotated[str, Names("vismt.llm.hybrid:PROJECTORS")] = field(default="mlp", metadata=HASHED_IF_SET)
    evaluate: LmEvaluateConfig = field(default_factory=LmEvaluateConfig)


def task_of(config: LmTaskConfig) -> LmTask:
    """Return the task that a section describes."""
    task: LmTask = make_task(config.kind, config.prompt, config.options, f"tasks: {config.name}")
    task.chat = config.chat
    return task


def recommendation_of(config: LmTaskConfig) -> Recommendation:
    """Return the recommendation that a section describes; raise UserError for a section of another kind."""
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


def check(config: LmConfig) -> None:
    """Raise UserError for values that types do not exclude, also in the arms, before any work is done."""
    _check_values(config)
    check_arms(config, _check_values)
    for name, arm in resolve_arms(config).items():
        _check_texts(arm, f"arms.{name}: " if config.arms else "")
    if config.evaluate.frozen and FROZEN in config.arms:
        raise UserError(f"arms: '{FROZEN}' is the model before training (evaluate.frozen); rename the arm.")
    taken = next((arm for arm in config.arms if arm in RECOMMENDERS), None)
    if taken is not None:
        raise UserError(f"arms: '{taken}' is the name of a recommender; rename the arm.")
    for arm_name, values in config.arms.items():
        changed = next((key for key in values if key.partition(".")[0] == "recommender"), None)
        if changed is not None:
            raise UserError(
                f"arms.{arm_name}: {changed} must be the same for all arms: they share the recommender; leave it out."
            )
    for task in config.tasks:
        if config.evaluate.split == "validation" and not (task.validation or task.validation_share):
            raise UserError(
                f"tasks: {task.name}: nothing to validate on; name a set in validation, or give validation_share."
            )


def _check_values(config: LmConfig) -> None:
    batches = {"batch": config.batch, "evaluate.batch": config.evaluate.batch}
    check_tasks(config, [task.name for task in config.tasks], config.evaluate.split, batches)
    trained = [task.name for task in config.tasks if task.train]
    if len(trained) != 1:
        raise UserError(f"tasks: {trained} name sets to train on; exactly one task must.")
    for section in config.tasks:
        _check_task(section)
    _check_trained_task(config)
    _check_recommendation(config)
    check_head(config.head.name, config.head.options)
    if config.head.alternate is not None and config.head.name != "vbll":
        raise UserError(
            f"head.alternate: '{config.head.name}' has no posterior to alternate with; set head.name to vbll."
        )
    _check_numbers(config)


def _check_task(section: LmTaskConfig) -> None:
    task = task_of(section)
    if section.chat and (section.kind == KIND or not section.prompt):
        raise UserError(f"tasks: {section.name}: chat is for a prompt of texts; leave it out.")
    check_parts(section, f"tasks: {section.name}")
    if not section.train and (section.test_share or section.validation_share):
        raise UserError(
            f"tasks: {section.name}: it has no training set to take a share of; name the sets in test and validation."
        )
    if section.limit is not None and section.limit < 1:
        raise UserError(f"tasks: {section.name}: limit {section.limit}; it must be at least 1.")
    if task.head and not section.train:
        raise UserError(
            f"tasks: {section.name}: '{section.kind}' needs a trained head; name sets to train on, or take 'answers'."
        )


def _check_trained_task(config: LmConfig) -> None:
    trained = trained_task(config)
    validates = config.tune is not None or config.evaluate.temperature or config.evaluate.laplace
    if validates and not (trained.validation or trained.validation_share):
        raise UserError(
            f"tasks: {trained.name}: nothing to validate on; name a set in validation, or give validation_share."
        )
    if config.adapt is None and not task_of(trained).head:
        raise UserError(f"adapt: is null, and '{trained.kind}' has no head: nothing would be trained; name a method.")


def _check_numbers(config: LmConfig) -> None:
    calibration = config.calibration
    if calibration is not None:
        numbers = (calibration.rows, calibration.batch, calibration.length, calibration.memory_mb)
        if not calibration.data or min(number for number in numbers if number is not None) < 1:
            raise UserError("calibration: name sets in data; rows, batch, length and memory_mb must be at least 1.")
    least = {
        "model.cache_mb": (config.model.cache_mb, 0),
        "evaluate.limit": (config.evaluate.limit, 2),
        "evaluate.samples": (config.evaluate.samples, 1),
    }
    for name, (value, low) in least.items():
        if value is not None and value < low:
            raise UserError(f"{name}: {value}; it must be at least {low}.")


def _check_texts(config: LmConfig, where: str) -> None:
    """Raise UserError for a method that needs calibration texts and has none.

    Only trained configurations are checked: an arm may give the section where the base configuration does not.
    """
    if config.adapt is None or config.calibration is not None:
        return
    reason = needs(config.adapt.method, config.adapt.options).get("calibration")
    if reason is not None:
        raise UserError(f"{where}calibration: {reason}.")


def _check_recommendation(config: LmConfig) -> None:
    """Raise UserError for sections that need a recommendation where none is trained, and for values out of range."""
    check_gates(config.gates)
    require_known("projector:", [config.projector], PROJECTORS)
    if recommends(config):
        _check_histories(config)
    else:
        sections = {"recommender": config.recommender is not None, "gates": config.gates != "user"}
        given = next((name for name, is_set in sections.items() if is_set), None)
        if given is not None:
            raise UserError(
                f"{given}: is for a recommendation, and '{trained_task(config).kind}' is trained; leave it out."
            )
    _check_gated_method(config)
    if config.recommender is not None:
        for name in ("steps", "batch"):
            if getattr(config.recommender, name) < 1:
                raise UserError(f"recommender.{name}: {getattr(config.recommender, name)}; it must be at least 1.")
        require_known("recommender.baselines:", config.recommender.baselines, BASELINES)


def _check_histories(config: LmConfig) -> None:
    """Raise UserError for tasks whose item vectors or histories the trained recommendation does not cover."""
    trained = recommendation_of(trained_task(config))
    for section in config.tasks:
        if section.kind != KIND:
            continue
        task = recommendation_of(section)
        if task.items and not trained.items:
            raise UserError(
                f"tasks: '{section.name}' shows item vectors that nothing trains; set items to false for this task."
            )
        if task.history > trained.history:
            raise UserError(
                f"tasks: '{section.name}' has a history of {task.history}, and the recommender reads {trained.history}, the "
                "history of the trained task; give it no more."
            )


def _check_gated_method(config: LmConfig) -> None:
    """Raise UserError where the method has gates and the tasks or the source of the gates do not fit, and vice versa."""
    method = None
    gated = False
    random_gates = False
    if config.adapt is not None:
        method = config.adapt.method
        gated = "users" in needs(method, config.adapt.options)
        random_gates = config.adapt.options.get("gate", "linear") is None
    other = next((task.name for task in config.tasks if task.kind != KIND), None)
    if gated and other is not None:
        raise UserError(
            f"adapt: '{method}' is gated by a user's history and '{other}' has none; take tasks of kind {KIND} only."
        )
    if config.gates != "user" and not gated:
        raise UserError(
            f"gates: '{config.gates}', and '{method}' has no gates; set adapt.method to one with gates, or gates to user."
        )
    if gated and random_gates != (config.gates == "random"):
        raise UserError(
            "gates: adapt.options.gate is null where gates are random, and else a gate network; change one of them."
        )
