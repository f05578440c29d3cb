"""The configuration of a job that is as small as a job can be: which of two numbers is larger."""

from dataclasses import dataclass, field
from typing import Annotated

from vismt.base.errors import UserError
from vismt.config.sections import Count, ModelSection
from vismt.config.typed import Names, within
from vismt.engine.study import StudyConfig, check_arms


@dataclass
class ToyEvaluateConfig:
    """Evaluation.

    Args:
        examples: number of evaluated pairs.
    """

    examples: Annotated[int, within(2)] = 40


@dataclass
class ToyConfig(StudyConfig):
    """Pairs of numbers, of which one is larger.

    Args:
        model: not used.
        batch: pairs of a training batch.
        activation: between the two layers.
        evaluate: the evaluation.
    """

    task: str = "toy"
    model: ModelSection = field(default_factory=ModelSection)
    batch: Count = 16
    activation: Annotated[str, Names(("gelu", "relu"), only=True)] = "relu"
    evaluate: ToyEvaluateConfig = field(default_factory=ToyEvaluateConfig)


def check(config: ToyConfig) -> None:
    """Raise UserError for what crosses sections, also in the arms."""
    if config.train is None or config.adapt is None:
        raise UserError("toy: every arm trains an adapter; give train and adapt.")
    check_arms(config, lambda arm: None)


CONFIG = ToyConfig
