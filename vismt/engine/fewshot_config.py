"""The sections of a few-shot configuration (task: fewshot)."""

from __future__ import annotations

from dataclasses import dataclass, field

from vismt.config import RunConfig, fraction
from vismt.errors import UserError, near
from vismt.robustness.attacks import AttackSpec

MODELS = ("frozen", "adapted")


@dataclass
class SourceConfig:
    """Training episodes. data: cards as 'name' or 'name:split'; hierarchy: draw the ways within one superclass."""

    data: list[str] = field(default_factory=list)
    ways: int = 5
    shots: int = 5
    queries: int = 15
    augment: bool = True
    crop: float = 0.35
    jitter: float = 0.4
    flip: bool = True
    hierarchy: bool = False


@dataclass
class AttackConfig:
    """See robustness.attacks.AttackSpec; epsilon and step_size in pixels of [0, 1], also as '4.5/255'."""

    name: str = "pgd"
    epsilon: float | str = "4.5/255"
    step_size: float | str | None = None
    steps: int | None = None
    norm: str = "linf"
    random_start: bool = True

    def spec(self, seed: int = 0) -> AttackSpec:
        """The attack with its numbers."""
        step = None if self.step_size is None else fraction(self.step_size, "attack.step_size")
        epsilon = fraction(self.epsilon, "attack.epsilon")
        return AttackSpec(self.name, epsilon, step, self.steps, self.norm, self.random_start, seed)


@dataclass
class EvaluateConfig:
    """Test episodes. rule: 'uniform' (ways, shots) or 'variable' (Meta-Dataset); seed: of the episodes, apart from training's."""

    data: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=lambda: list(MODELS))
    rule: str = "uniform"
    ways: int = 5
    shots: list[int] = field(default_factory=lambda: [1, 5])
    queries: int = 15
    episodes: int = 600
    seed: int = 1
    hierarchy: bool = False
    attacks: list[AttackConfig] = field(default_factory=list)


@dataclass
class FewShotConfig(RunConfig):
    """One few-shot experiment. on_bad_sample: 'error' or 'skip' for images that cannot be decoded."""

    source: SourceConfig = field(default_factory=SourceConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    on_bad_sample: str = "error"
    download: bool = False


def check(config: FewShotConfig) -> None:
    """Values that no type can exclude, before any work is done."""
    settings, source = config.evaluate, config.source
    trains = config.train is not None and config.adapt is not None
    if trains and not source.data:
        raise UserError("source.data: names no set to train on; add a card, or set train to null to evaluate only.")
    if not settings.data:
        raise UserError("evaluate.data: names no set to evaluate on.")
    for name in ("data", "models", "shots"):
        values = getattr(settings, name)
        if not values or len(set(values)) < len(values):
            raise UserError(f"evaluate.{name}: {values}; name at least one, each once.")
    for model in settings.models:
        if model not in MODELS:
            raise UserError(f"evaluate.models: '{model}'.{near(model, MODELS)}")
    if not trains and "frozen" not in settings.models:
        raise UserError("evaluate.models: ['adapted'] without an adapt and a train section; add them, or evaluate 'frozen'.")
    if settings.rule not in ("uniform", "variable"):
        raise UserError(f"evaluate.rule: '{settings.rule}'.{near(settings.rule, ('uniform', 'variable'))}")
    if config.on_bad_sample not in ("error", "skip"):
        raise UserError(f"on_bad_sample: '{config.on_bad_sample}'.{near(config.on_bad_sample, ('error', 'skip'))}")
    if settings.episodes < 2:
        raise UserError(f"evaluate.episodes: {settings.episodes}; an interval needs 2 or more.")
    if not 0 < source.crop <= 1 or source.jitter < 0:
        raise UserError(f"source: crop {source.crop}, jitter {source.jitter}; crop lies in (0, 1], jitter is not negative.")
    own = {"targets", "rank", "alpha", "seed"} & set(config.adapt.options if config.adapt else {})
    if own:
        raise UserError(f"adapt.options: '{min(own)}' has a key of its own: adapt.{min(own)} (seed: at the top).")
    for attack in settings.attacks:
        attack.spec()
