"""The sections of a few-shot configuration (task: fewshot)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from vismt.config import RunConfig
from vismt.errors import UserError, near
from vismt.metatune.amt import Adversary, AdversaryForm
from vismt.metatune.finetune import FineTuneSettings
from vismt.metatune.input_attack import PYRAMID
from vismt.metatune.maml import MamlSettings
from vismt.metatune.merging import MergeSettings
from vismt.robustness.conditions import AttackConfig, CorruptionConfig, check_conditions

SINGLE = ("frozen", "adapted")
POOLED = ("frozen", "clean", "merged", "merged:default", "average", "logits", "min_ce")
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


@dataclass(frozen=True)
class PoolConfig(AdversaryForm):
    """A pool of AMT experts, one for each level, each trained apart by the settings of `metatune.amt.AdversaryForm`.

    levels: budget of the input attack in 1/255, 0 for none; a list in place of a number is one expert whose budget is
    drawn for each episode. A level that is named again is another expert with a seed of its own. clean: also train a
    reference by the same episodes without either attack (the model "clean"). rates: {label: peak learning rate} where it
    is not train.lr; labels are the levels' texts and "clean". folder: an assembled pool to evaluate; nothing is trained.
    """

    levels: list[float | list[float]] = field(default_factory=lambda: [0.01, 0.1, 6.0, 8.0])
    pyramid: list[tuple[int | None, float]] = field(default_factory=lambda: list(PYRAMID))
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
        form = {one.name: getattr(self, one.name) for one in fields(AdversaryForm)}
        form["pyramid"] = tuple(map(tuple, self.pyramid))
        return Adversary(**form, epsilons=tuple(value / 255 for value in budgets))


@dataclass
class EvaluateConfig:
    """Test episodes. rule: 'uniform' (ways, shots) or 'variable' (Meta-Dataset); seed: of the episodes, apart from training's.

    min_ways, max_ways, max_contribution: of the variable rule; 5, 5 and 1 are the AMT paper's "5-way 1-shot".
    models: frozen, adapted; with a pool frozen, clean, merged, average, logits, min_ce, expert:LABEL. Each but logits also
    with "+finetune". masking: also try PGD at growing radii on the first masking_episodes episodes of each set.
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
    min_ways: int = 5
    max_ways: int = 50
    max_contribution: int = 100
    attacks: list[AttackConfig] = field(default_factory=list)
    corruptions: list[CorruptionConfig] = field(default_factory=list)
    masking: bool = False
    masking_episodes: int = 10


@dataclass
class SelectConfig:
    """How the settings of "merged" (and "merged+finetune") are chosen; "merged:default" keeps those of the configuration.

    data: sets for the choice, none of them evaluated; or class_share: the share of every evaluated set's own classes. Then
    the grid: beta, balance, trim (mappings as in merging), lr (of fine-tuning). attack: count its accuracy with the clean.
    """

    data: list[str] = field(default_factory=list)
    class_share: float = 0.0
    episodes: int = 20
    shots: int = 5
    queries: int = 5
    seed: int = 2
    beta: list[float] = field(default_factory=lambda: [1.0, 4.0, 12.0])
    balance: list[float] = field(default_factory=lambda: [0.0, 0.3, 0.6, 0.9])
    trim: list[dict[str, float]] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    attack: AttackConfig | None = None


@dataclass
class FewShotConfig(RunConfig):
    """One few-shot experiment. on_bad_sample: 'error' or 'skip' for images that cannot be decoded."""

    source: SourceConfig = field(default_factory=SourceConfig)
    meta: MamlSettings | None = None
    pool: PoolConfig | None = None
    select: SelectConfig | None = None
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
    _check_selection(config)
    if config.meta is not None and (
        config.pool is not None or (settings.rule, settings.ways) != ("uniform", source.ways)
    ):
        raise UserError(
            f"meta: a head of source.ways = {source.ways} outputs; it needs evaluate.rule uniform, evaluate.ways "
            f"{source.ways} and no pool section."
        )
    if settings.rule not in ("uniform", "variable"):
        raise UserError(f"evaluate.rule: '{settings.rule}'.{near(settings.rule, ('uniform', 'variable'))}")
    if config.on_bad_sample not in ("error", "skip"):
        raise UserError(f"on_bad_sample: '{config.on_bad_sample}'.{near(config.on_bad_sample, ('error', 'skip'))}")
    if settings.episodes < 2:
        raise UserError(f"evaluate.episodes: {settings.episodes}; an interval needs 2 or more.")
    if not 0 < source.crop <= 1 or source.jitter < 0:
        raise UserError(
            f"source: crop {source.crop}, jitter {source.jitter}; crop lies in (0, 1], jitter is not negative."
        )
    own = {"targets", "rank", "alpha", "seed"} & set(config.adapt.options if config.adapt else {})
    if own:
        raise UserError(f"adapt.options: '{min(own)}' has a key of its own: adapt.{min(own)} (seed: at the top).")
    ways = settings.ways if settings.rule == "uniform" else settings.min_ways
    check_conditions(settings.attacks, settings.corruptions, ways)
    if config.select is not None and config.select.attack is not None and config.select.attack.source is not None:
        raise UserError("select.attack: the choice attacks the model it is made for; leave source out.")
    if settings.masking_episodes < 2:
        raise UserError(f"evaluate.masking_episodes: {settings.masking_episodes}; an interval needs 2 or more.")


def _check_models(config: FewShotConfig, trains: bool) -> None:
    """Every model of evaluate.models can be had from this configuration."""
    pool, known = config.pool, list(SINGLE)
    if pool is not None:
        trained = pool.experts()
        known = [*POOLED, *(f"expert:{label}" for label in ([] if pool.folder else trained))]
        for label in pool.rates:
            if label not in (*trained, "clean"):
                raise UserError(f"pool.rates: no expert '{label}'.{near(label, (*trained, 'clean'))}")
    sources = [
        ("evaluate.attacks: source", attack.source) for attack in config.evaluate.attacks if attack.source is not None
    ]
    for where, model in [*(("evaluate.models", model) for model in config.evaluate.models), *sources]:
        stem = model.removesuffix(TUNED)
        if stem == "merged:default" and config.select is None:
            raise UserError(f"{where}: 'merged:default' without a select section is 'merged'; write that.")
        if stem == "logits" and model != stem:
            raise UserError(f"{where}: '{model}': an average of logits has no weights to tune; take 'merged{TUNED}'.")
        if stem not in known and not (pool is not None and pool.folder and stem.startswith("expert:")):
            raise UserError(f"{where}: '{model}'.{near(stem, known)}")
        if stem == "clean" and not (pool is not None and pool.clean and trains):
            raise UserError(f"{where}: 'clean' needs pool.clean: true and a training; add them, or leave it out.")
    for where, model in sources:
        if model.removesuffix(TUNED) != "frozen" and not trains and not (pool is not None and pool.folder):
            raise UserError(f"{where}: '{model}' needs a training, and there is none; take 'frozen'.")
    if "frozen" not in config.evaluate.models and not trains and not (pool is not None and pool.folder):
        raise UserError(
            f"evaluate.models: {config.evaluate.models} without an adapt and a train section; add them, name a pool.folder, or "
            "evaluate 'frozen'."
        )


def _check_selection(config: FewShotConfig) -> None:
    """The choice has tasks, and none of them can be a test task."""
    select = config.select
    if select is None:
        return
    if config.pool is None:
        raise UserError("select: chooses the settings of a pool's merging; add a pool section, or leave it out.")
    if bool(select.data) == bool(select.class_share) or not 0 <= select.class_share < 1:
        raise UserError(
            f"select: data {select.data}, class_share {select.class_share:g}; give one of them, the share below 1."
        )
    if select.episodes < 2:
        raise UserError(f"select.episodes: {select.episodes}; an interval needs 2 or more.")
    if select.class_share and config.evaluate.rule != "uniform":
        raise UserError("select.class_share: needs evaluate.rule uniform; for variable episodes give select.data.")
    for name in select.data:
        card, _, split = name.partition(":")
        for other in config.evaluate.data:
            same, _, tested = other.partition(":")
            if card == same and (split in ("", "all", tested) or tested in ("", "all")):
                raise UserError(
                    f"select.data: '{name}' shares images with evaluate.data '{other}'; choose on other sets."
                )


def models(config: FewShotConfig) -> list[str]:
    """evaluate.models without those that only a training makes, where there is none."""
    made = (config.adapt is not None and config.train is not None) or (config.pool is not None and config.pool.folder)
    return [name for name in config.evaluate.models if made or name.removesuffix(TUNED) == "frozen"]
