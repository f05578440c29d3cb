"""The sections of a few-shot configuration (task: fewshot)."""

from __future__ import annotations

from dataclasses import dataclass, field

from vismt.config import RunConfig, fraction
from vismt.errors import UserError, near
from vismt.metatune.amt import Adversary
from vismt.metatune.finetune import FineTuneSettings
from vismt.metatune.merging import MergeSettings
from vismt.robustness.attacks import AttackSpec

SINGLE = ("frozen", "adapted")
POOLED = ("frozen", "clean", "merged", "average", "logits", "min_ce")
TUNED = "+finetune"


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
class PoolConfig:
    """A pool of AMT experts, one for each level, each trained apart (see metatune.amt.Adversary for the shared settings).

    levels: budget of the input attack in 1/255, 0 for none; a list in place of a number is one expert whose budget is
    drawn for each episode. A level that is named again is another expert with a seed of its own. clean: also train a
    reference by the same episodes without either attack (the model "clean"). rates: {label: peak learning rate} where it
    is not train.lr; labels are the levels' texts and "clean". folder: an assembled pool to evaluate; nothing is trained.
    """

    levels: list[float | list[float]] = field(default_factory=lambda: [0.01, 0.1, 6.0, 8.0])
    steps: int = 2
    step_ratio: float = 0.5
    pyramid: list[tuple[int | None, float]] = field(default_factory=lambda: [(4, 20.0), (8, 10.0), (None, 1.0)])
    init: str = "uniform"
    weight: float = 6.0
    kl: str = "clean_adv"
    weight_attack: str = "joint"
    gamma: float = 1e-4
    support: str = "perturbed"
    warmup: int = 0
    clean: bool = False
    rates: dict[str, float] = field(default_factory=dict)
    folder: str | None = None

    def experts(self) -> dict[str, tuple[int, Adversary]]:
        """Label -> (copy number, 0 for the first of its level; the adversary)."""
        found: dict[str, tuple[int, Adversary]] = {}
        seen: list[list[float]] = []
        for level in self.levels:
            budgets = [float(value) for value in (level if isinstance(level, list) else [level])]
            text, copy = "-".join(f"{value:g}" for value in budgets), seen.count(budgets)
            seen.append(budgets)
            found[text if not copy else f"{text}-copy{copy + 1}"] = (copy, self._adversary(budgets))
        return found

    def _adversary(self, budgets: list[float]) -> Adversary:
        if any(not 0 <= value <= 255 for value in budgets):
            raise UserError(f"pool.levels: {budgets}; a level is a budget in 1/255, from 0 to 255.")
        return Adversary(
            tuple(value / 255 for value in budgets), self.steps, self.step_ratio, tuple(map(tuple, self.pyramid)), self.init,
            self.weight, self.kl, self.weight_attack, self.gamma, self.support, self.warmup,
        )


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
    """Test episodes. rule: 'uniform' (ways, shots) or 'variable' (Meta-Dataset); seed: of the episodes, apart from training's.

    models: frozen, adapted; with a pool frozen, clean, merged, average, logits, min_ce, expert:LABEL. Each but logits also
    with "+finetune".
    """

    data: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=lambda: list(SINGLE))
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
    pool: PoolConfig | None = None
    merging: MergeSettings = field(default_factory=MergeSettings)
    finetune: FineTuneSettings = field(default_factory=FineTuneSettings)
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
    _check_models(config, trains)
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


def _check_models(config: FewShotConfig, trains: bool) -> None:
    """Every model of evaluate.models can be had from this configuration."""
    pool, known = config.pool, list(SINGLE)
    if pool is not None:
        trained = pool.experts()
        known = [*POOLED, *(f"expert:{label}" for label in ([] if pool.folder else trained))]
        for label in pool.rates:
            if label not in (*trained, "clean"):
                raise UserError(f"pool.rates: no expert '{label}'.{near(label, (*trained, 'clean'))}")
    for model in config.evaluate.models:
        stem = model.removesuffix(TUNED)
        if stem == "logits" and model != stem:
            raise UserError(f"evaluate.models: '{model}': an average of logits has no weights to tune; take 'merged{TUNED}'.")
        if stem not in known and not (pool is not None and pool.folder and stem.startswith("expert:")):
            raise UserError(f"evaluate.models: '{model}'.{near(stem, known)}")
        if stem == "clean" and not (pool is not None and pool.clean and trains):
            raise UserError("evaluate.models: 'clean' needs pool.clean: true and a training; add them, or leave it out.")
    if "frozen" not in config.evaluate.models and not trains and not (pool is not None and pool.folder):
        raise UserError(
            f"evaluate.models: {config.evaluate.models} without an adapt and a train section; add them, name a pool.folder, or "
            "evaluate 'frozen'."
        )


def models(config: FewShotConfig) -> list[str]:
    """evaluate.models without those that only a training makes, where there is none."""
    made = (config.adapt is not None and config.train is not None) or (config.pool is not None and config.pool.folder)
    return [name for name in config.evaluate.models if made or name.removesuffix(TUNED) == "frozen"]
