"""The sections of a language-model configuration (task: lm)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vismt.config import UNHASHED
from vismt.engine.arms import ArmsConfig, arm_config, arm_names, check_arms
from vismt.engine.splits import PartsConfig, check_parts
from vismt.engine.study import check_study
from vismt.errors import UserError, require_known
from vismt.llm.heads import check_head
from vismt.llm.hybrid import check_gates
from vismt.llm.tasks import make_task
from vismt.llm.tasks.base import Task
from vismt.llm.unit_scores import SCORES

FROZEN = "frozen"  # how the model before training is called
RECOMMENDER = "sasrec"  # and the recommender
REFERENCES = (FROZEN, RECOMMENDER)  # models that no arm trains
KIND = "recommendation"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class LmModelConfig:
    """name: an asset, a folder or a name on the hub, see vismt.backbones.lm.create_lm; dtype: null for the saved one.

    first_block: blocks below are frozen and their output on every text is computed once, as far as cache_mb holds it.
    """

    name: str = "smollm2-135m-instruct"
    revision: str | None = None
    gguf_file: str | None = None
    dtype: str | None = None
    first_block: int = 0
    cache_mb: int = 1024


@dataclass
class LmTaskConfig(PartsConfig):
    """One task: its kind (vismt.llm.tasks), prompt, options and sets. Each set in `test` is reported on its own.

    One task has sets to train on; the others are only evaluated, on `limit` rows of each set. Shares are the last rows of
    each training set.
    """

    name: str = ""
    kind: str = "causal"
    prompt: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class LmAlternateConfig:
    """lr: of the posterior's means and noise, spread_lr: of its covariances; steps: of the posterior for each batch."""

    lr: float = 3e-3
    spread_lr: float = 3e-2
    steps: int = 1


@dataclass
class LmHeadConfig:
    """name: of vismt.llm.heads, options: its own; for kinds with a head on the last token.

    alternate: null trains head and LM jointly (train.rates sets the head's rate apart); else see tasks/alternating.py.
    """

    name: str = "linear"
    options: dict[str, Any] = field(default_factory=dict)
    alternate: LmAlternateConfig | None = None


@dataclass
class LmCalibrationConfig:
    """Texts that a method sees before the training: for the covariances of corda, and for s2ft with adapt.options.strategy
    activation, product or gradient, the last of which is the loss of predicting them.

    data: sets; text: template of a row; rows: how many, batch: at a time; length: tokens of a row at most. memory_mb: of
    covariances under way, null for all at once; less takes several passes over the texts. Finished ones stay in the run
    folder, under calibration/, where an interrupted calibration goes on.
    """

    data: list[str] = field(default_factory=list)
    text: str = "{text}"
    rows: int = 256
    batch: int = 8
    length: int = 512
    memory_mb: int | None = field(default=None, metadata=UNHASHED)


@dataclass
class LmRecommenderConfig:
    """SASRec, trained on all training rows of a recommendation and frozen. width: of its vectors; batch: rows at a time."""

    width: int = 64
    blocks: int = 1
    heads: int = 1
    dropout: float = 0.1
    steps: int = 2000
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.0


@dataclass
class LmEvaluateConfig:
    """split: 'test', or 'validation' while choosing; batch: rows at a time; limit: rows of each set, null for all.

    frozen: also the model before training. temperature: also with the temperature of least NLL on validation rows; laplace:
    also with a Laplace approximation around the trained head (Kronecker-factored, which the condition's name then says, where a
    linear head has more than 4,096 weights); samples: draws of a Bayesian head.
    """

    split: str = "test"
    batch: int = 8
    limit: int | None = None
    frozen: bool = True
    temperature: bool = False
    laplace: bool = False
    samples: int = 20


@dataclass
class LmConfig(ArmsConfig):
    """A causal LM, trained on one task and evaluated on several. batch: rows (or packed pieces) of a training batch.

    gates: what the gates of ilora see in a recommendation: "user", or as controls "random" and "shuffled-user".
    """

    task: str = "lm"
    model: LmModelConfig = field(default_factory=LmModelConfig)
    tasks: list[LmTaskConfig] = field(default_factory=list)
    head: LmHeadConfig = field(default_factory=LmHeadConfig)
    batch: int = 8
    calibration: LmCalibrationConfig | None = None
    recommender: LmRecommenderConfig | None = None
    gates: str = "user"
    evaluate: LmEvaluateConfig = field(default_factory=LmEvaluateConfig)


def task_of(config: LmTaskConfig) -> Task:
    """The task that a section describes."""
    return make_task(config.kind, config.prompt, config.options, f"tasks: {config.name}")


def trained_task(config: LmConfig) -> LmTaskConfig:
    """The section of the task that is trained."""
    return next(task for task in config.tasks if task.train)


def recommends(config: LmConfig) -> bool:
    """Whether the trained task is a recommendation."""
    return trained_task(config).kind == KIND


def check(config: LmConfig) -> None:
    """Values that no type can exclude, before any work is done; those of every arm, too."""
    _check_values(config)
    check_arms(config, _check_values)
    for arm in arm_names(config):
        _check_texts(arm_config(config, arm), f"arms.{arm}: " if config.arms else "")
    if config.evaluate.frozen and FROZEN in config.arms:
        raise UserError(f"arms: '{FROZEN}' is the model before training (evaluate.frozen); call the arm otherwise.")
    if RECOMMENDER in config.arms:
        raise UserError(f"arms: '{RECOMMENDER}' is the recommender itself; call the arm otherwise.")
    for arm, values in config.arms.items():
        changed = next((key for key in values if key.partition(".")[0] == "recommender"), None)
        if changed is not None:
            raise UserError(
                f"arms.{arm}: {changed} must be the same for all arms: they share the recommender; leave it out."
            )
    for task in config.tasks:
        if config.evaluate.split == "validation" and not (task.validation or task.validation_share):
            raise UserError(
                f"tasks: {task.name}: nothing to validate on; name a set in validation, or give validation_share."
            )


def _check_values(config: LmConfig) -> None:
    check_study(config, [task.name for task in config.tasks])
    trained = [task.name for task in config.tasks if task.train]
    if len(trained) != 1:
        raise UserError(f"tasks: {trained} name sets to train on; one task must.")
    for task in config.tasks:
        made = task_of(task)
        check_parts(task, f"tasks: {task.name}")
        if not task.train and (task.test_share or task.validation_share):
            raise UserError(f"tasks: {task.name}: a share of no training set; name the sets in test and validation.")
        if task.limit is not None and task.limit < 1:
            raise UserError(f"tasks: {task.name}: limit {task.limit}; it must be at least 1.")
        if made.head and not task.train:
            raise UserError(
                f"tasks: {task.name}: '{task.kind}' needs a trained head; name sets to train on, or take 'answers'."
            )
    own = trained_task(config)
    validates = config.tune is not None or config.evaluate.temperature or config.evaluate.laplace
    if validates and not (own.validation or own.validation_share):
        raise UserError(
            f"tasks: {own.name}: nothing to validate on; name a set in validation, or give validation_share."
        )
    if config.adapt is None and not task_of(own).head:
        raise UserError(f"adapt: is null, and '{own.kind}' has no head: nothing would be trained; name a method.")
    _check_recommendation(config)
    check_head(config.head.name, config.head.options)
    if config.head.alternate is not None and config.head.name != "vbll":
        raise UserError(
            f"head.alternate: '{config.head.name}' has no posterior to alternate with; set head.name to vbll."
        )
    seen = config.calibration
    if seen is not None:
        numbers = [value for value in (seen.rows, seen.batch, seen.length, seen.memory_mb) if value is not None]
        if not seen.data or min(numbers) < 1:
            raise UserError("calibration: name sets in data; rows, batch, length and memory_mb must be at least 1.")
    if config.model.dtype is not None:
        require_known("model.dtype: no precision", [config.model.dtype], DTYPES)
    least = {
        "model.cache_mb": (config.model.cache_mb, 0),
        "evaluate.limit": (config.evaluate.limit, 2),
        "evaluate.samples": (config.evaluate.samples, 1),
    }
    for name, (value, low) in least.items():
        if value is not None and value < low:
            raise UserError(f"{name}: {value}; it must be at least {low}.")


def _check_texts(config: LmConfig, where: str) -> None:
    """A method that starts from texts has some. Only what is trained is asked: an arm may give what the base has not."""
    if config.adapt is None or config.calibration is not None:
        return
    method, options = config.adapt.method, config.adapt.options
    if method == "corda" and options.get("covariances") is None:
        told = "'corda' needs covariances"
        raise UserError(
            f"{where}calibration: {told}; name texts here, or a folder of them in adapt.options.covariances."
        )
    if method == "s2ft" and options.get("strategy") in [score for score in SCORES if score != "weight"]:
        told = f"'s2ft' chooses by texts with strategy '{options['strategy']}'"
        raise UserError(f"{where}calibration: {told}; name some here, or take 'weight' or 'random'.")


def _check_recommendation(config: LmConfig) -> None:
    """The recommender's section, and gates that have a user to come from."""
    check_gates(config.gates)
    method = config.adapt.method if config.adapt is not None else None
    gated = method == "ilora"
    if not recommends(config):
        given = "recommender" if config.recommender is not None else "gates" if config.gates != "user" else None
        if given is not None:
            raise UserError(
                f"{given}: is for a recommendation, and '{trained_task(config).kind}' is trained; leave it out."
            )
    own = task_of(trained_task(config))
    for task in config.tasks if recommends(config) else ():
        made = task_of(task) if task.kind == KIND else own
        if made.items and not own.items:
            raise UserError(f"tasks: '{task.name}' shows item vectors that nothing trains; set items to false there.")
        if made.history > own.history:
            raise UserError(
                f"tasks: '{task.name}' has a history of {made.history}, and the recommender reads {own.history}, that of the "
                "trained task; give it no more."
            )
    other = next((task.name for task in config.tasks if task.kind != KIND), None)
    if gated and other is not None:
        raise UserError(
            f"adapt: '{method}' is gated by a user's history and '{other}' has none; take tasks of kind {KIND} only."
        )
    if config.gates != "user" and not gated:
        raise UserError(
            f"gates: '{config.gates}', and '{method}' has no gates; set adapt.method to ilora, or gates to user."
        )
    if gated and (config.adapt.options.get("gate", "linear") is None) != (config.gates == "random"):
        raise UserError(
            "gates: adapt.options.gate is null where gates are random, and else a gate network; change one of them."
        )
    if config.recommender is not None:
        for name in ("steps", "batch"):
            if getattr(config.recommender, name) < 1:
                raise UserError(f"recommender.{name}: {getattr(config.recommender, name)}; it must be at least 1.")
