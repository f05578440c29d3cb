"""The arms and the evaluated models of a few-shot configuration: experts of a pool, other backbones, heads by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

from vismt.base.errors import UserError
from vismt.engine.study import ALONE, FROZEN, resolve_arms
from vismt.jobs.fewshot.config import (
    DEFAULT_MERGED,
    EXPERT,
    MERGED,
    PROTOTYPES,
    ExpertConfig,
    FewShotConfig,
)
from vismt.jobs.fewshot.pool_experts import CLEAN_EXPERT, ExpertSpec, PlannedExpert, level_text, plan_experts
from vismt.metatune.amt.selection_rules import COMBINED
from vismt.metatune.settings import HEADS, AdversaryForm
from vismt.robustness.attacks.attacks import radius_text

# What a model that is made of a pool is, by its strategy.
MERGING = {
    "paper": "the experts, merged for each task by how compact and distinct they make its support classes (AMT)",
    "min_ce": "the expert with the least cross-entropy on the support",
    "average": "the equal mean of the experts",
    "logits": "the mean of the experts' logits",
    **{rule: f"the experts' updates, merged by {rule} of `vismt.lowrank.combine`" for rule in COMBINED},
}


def resolve_experts(config: FewShotConfig) -> dict[str, FewShotConfig]:
    """Return the configuration of every arm of `arms` and of every expert of the pool. {} if nothing is trained.

    An arm with a pool section of one expert is trained as this expert, and evaluated like any other arm.
    """
    if config.adapt is None or config.train is None or (config.pool is not None and config.pool.folder):
        return {}
    planned = planned_experts(config)
    if config.pool is not None and config.pool.clean and CLEAN_EXPERT not in planned:
        planned = {CLEAN_EXPERT: PlannedExpert(tuple(config.source.data), None), **planned}
    experts: dict[str, FewShotConfig] = {label: _expert_config(config, expert) for label, expert in planned.items()}
    arms = resolve_arms(config) if config.arms or config.pool is None else {}
    for name, arm in arms.items():
        if name in experts:
            raise UserError(f"arms: '{name}' is also the label of an expert of the pool; name the arm otherwise.")
        experts[name] = arm if arm.pool is None else _expert_config(arm, _only_expert(arm, name))
    return experts


def _expert_config(config: FewShotConfig, expert: PlannedExpert) -> ExpertConfig:
    values = {item.name: getattr(config, item.name) for item in fields(FewShotConfig)}
    values |= {"arms": {}, "seeds": [], "tune": None, "source": replace(config.source, data=list(expert.sources))}
    return ExpertConfig(**values, adversary=expert.adversary, copy=expert.copy)


def _only_expert(arm: FewShotConfig, name: str) -> PlannedExpert:
    planned = list(planned_experts(arm).values())
    pool = arm.pool
    if pool is not None and (pool.folder or pool.clean or len(planned) != 1):
        raise UserError(
            f"arms.{name}: pool: an arm is trained as one expert, and this section has {len(planned)}, or folder or clean; "
            "give it one level, or pool: null for a training without attack."
        )
    return planned[0]


def planned_experts(config: FewShotConfig) -> dict[str, PlannedExpert]:
    """Return the experts that the pool section lists, by label. {} without a pool section."""
    pool = config.pool
    if pool is None:
        return {}
    values = {item.name: getattr(pool, item.name) for item in fields(AdversaryForm)}
    form = AdversaryForm(**{**values, "pyramid": tuple(map(tuple, pool.pyramid))})
    if pool.experts:
        return plan_experts(pool.experts, "pool.experts", form, config.source.data)
    listed = [level if isinstance(level, list) else [level] for level in pool.levels]
    specs = [ExpertSpec(level=values, label=level_text(values)) for values in listed]
    return plan_experts(specs, "pool.levels", form, config.source.data)


def pool_members(config: FewShotConfig, arms: Iterable[str]) -> list[str]:
    """Return the arms that are experts of the pool."""
    planned = planned_experts(config)
    return [arm for arm in arms if arm in planned]


def strategy_of(config: FewShotConfig, stem: str) -> str:
    """Return the strategy of `MergeSettings` of a model that is merged from the pool, by its name without a head."""
    if stem.startswith(EXPERT):
        return "expert"
    rule = stem.removeprefix(f"{MERGED}:")
    if stem in (MERGED, DEFAULT_MERGED) and config.pool is not None:
        rule = config.pool.select
    return rule


def trained_on(config: FewShotConfig) -> str:
    """Return the sets of an arm's training episodes, and the attack on the episodes of an expert."""
    sets = ", ".join(config.source.data) + (" by class labels" if config.source.labels == "set" else "")
    if not isinstance(config, ExpertConfig):
        return sets
    adversary = config.adversary
    if adversary is None:
        return f"{sets} without attack"
    levels = " or ".join(radius_text(adversary.norm, level) for level in adversary.epsilons)
    return f"{sets} under {adversary.norm} {levels}"


def merged_text(config: FewShotConfig, stem: str) -> str:
    """Return a description of a model that is made of several experts. "" for another model."""
    return "" if config.pool is None else MERGING.get(strategy_of(config, stem), "")


def untrained_arms(config: FewShotConfig) -> dict[str, FewShotConfig]:
    """Return the configuration of every arm of a run that trains nothing, whose arms are other backbones."""
    if config.pool is not None or not config.arms or (config.adapt is not None and config.train is not None):
        return {}
    return resolve_arms(config)


def split_head(model: str) -> tuple[str, str]:
    """Return the stem of a model's name and its head, "" for prototypes."""
    stem, _, head = model.rpartition("+")
    return (stem, head) if head in HEADS else (model, "")


def evaluated_models(config: FewShotConfig, arms: list[str]) -> list[str]:
    """Return evaluate.models, with all arms in place of "adapted". Without a training, only "frozen", or arms in its place.

    Models without a head of their own get the head of the configuration.
    """
    named = [(model, split_head(model)[0]) for model in config.evaluate.models]
    models = [
        f"{arm}{model.removeprefix(stem)}"
        for arm in untrained_arms(config)
        for model, stem in named
        if stem in (FROZEN, arm)
    ]
    for model, stem in named if not models else ():
        if stem == ALONE and config.arms:
            models += [f"{arm}{model.removeprefix(stem)}" for arm in arms]
        elif stem == FROZEN or arms or (config.pool is not None and config.pool.folder):
            models.append(model)
    ending = "" if config.head.name == PROTOTYPES else f"+{config.head.name}"
    return list(dict.fromkeys(model if split_head(model)[1] else f"{model}{ending}" for model in models))
