"""Checks of a few-shot configuration: what the types of its sections do not exclude."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from vismt.base.errors import UserError, near
from vismt.data.set_entries import check_apart, check_row_names
from vismt.engine.study import ALONE, FROZEN, check_arms, validates
from vismt.evaluation.sections import asked_features, check_other_sets, perturbations
from vismt.jobs.calibration import check_calibration
from vismt.jobs.fewshot.arms import evaluated_models, planned_experts, resolve_experts, split_head, untrained_arms
from vismt.jobs.fewshot.config import (
    DEFAULT_MERGED,
    EXPERT,
    PROTOTYPES,
    SINGLE,
    ExpertConfig,
    FewShotConfig,
    pooled_models,
)
from vismt.jobs.fewshot.pool_experts import CLEAN_EXPERT
from vismt.robustness.conditions import TransferSource
from vismt.uncertainty.features import Inputs


def check(config: FewShotConfig) -> None:
    """Raise UserError for values that types do not exclude, also in the arms, before any work is done."""
    if config.arms and config.pool is not None and config.pool.folder:
        raise UserError("arms: pool.folder is evaluated as it is, and nothing is trained beside it; leave out arms.")
    trains = config.train is not None and config.adapt is not None
    _check_arm(config, config.arms)
    if not trains and not evaluated_models(config, []):
        raise UserError(
            f"evaluate.models: {config.evaluate.models} without an adapt and a train section; add them, name a pool.folder, "
            "or evaluate 'frozen'."
        )
    _check_selection(config)
    # The pool section of an arm is for its training. The models that are evaluated know only the pool of the run.
    check_arms(
        config,
        lambda arm: _check_arm(replace(arm, pool=config.pool), config.arms),
        ("select", "finetune", "head", "on_bad_sample", "download"),
        ("select.attack",) if trains else ("model",),
    )
    _check_arm_keys(config)
    for name, arm in resolve_experts(config).items():  # raises for an arm that is not one expert
        _check_labels(arm, "" if name == ALONE else f" of '{name}'")
    if validates(config) and not (config.select is not None and config.select.data):
        key = "train.validate" if config.tune is None else "tune"
        raise UserError(
            f"{key}: trainings are judged on validation tasks; name the sets of these tasks in select.data."
        )


def check_sets(config: FewShotConfig) -> None:
    """Raise UserError if a set that chooses or tests is also trained on. A finished run is opened anyway."""
    trained = {}
    arms = resolve_experts(config)
    for name, arm in arms.items():
        of = f" of '{name}'" if len(arms) > 1 else ""
        trained[f"source.data{of}"] = arm.source.data
        trained[f"calibration.data{of}"] = arm.calibration.data if arm.calibration is not None else []
    chosen = config.select.data if config.select is not None else []
    check_apart(trained, {"select.data": chosen, "evaluate.data": config.evaluate.data})
    check_other_sets(config.evaluate, trained)


def _check_arm(config: FewShotConfig, arms: Collection[str]) -> None:
    trains = config.train is not None and config.adapt is not None
    _check_values(config, trains)
    _check_evaluation(config)
    _check_models(config, trains, arms)
    if trains and not config.arms:
        check_calibration(config.calibration, config.adapt)


def _check_arm_keys(config: FewShotConfig) -> None:
    for name, values in config.arms.items():
        if split_head(name)[1]:
            raise UserError(f"arms: '{name}' reads as a head on '{split_head(name)[0]}'; name it otherwise.")
        key = next((key for key in values if key.partition(".")[0] != "model"), None)
        if key is not None and untrained_arms(config):
            raise UserError(
                f"arms.{name}: {key}: this run trains nothing, so its arms differ in `model` alone; leave the key out, or add "
                "adapt and train."
            )


def _check_values(config: FewShotConfig, trains: bool) -> None:
    if trains and not config.source.data:
        raise UserError("source.data: names no set to train on; add a card, or set train to null to evaluate only.")
    if config.meta is not None and config.train is not None and config.train.compile:
        raise UserError(
            "train.compile: the outer loop of meta differentiates a gradient, and torch.compile has no second derivative; leave "
            "it out."
        )
    repeated = {"targets", "rank", "alpha", "seed"} & set(config.adapt.options if config.adapt else {})
    if repeated:
        name = min(repeated)
        raise UserError(f"adapt.options: '{name}' is not an option but the key adapt.{name} (seed: at the top).")


def _check_labels(arm: FewShotConfig, of: str) -> None:
    if arm.source.labels == "episode":
        return
    wrong = "a meta section" if arm.meta is not None else ""
    if len(arm.source.data) > 1:
        wrong = f"the sets {', '.join(arm.source.data)}"
    elif isinstance(arm, ExpertConfig) and arm.adversary is not None and arm.adversary.weight_attack == "paper":
        wrong = "pool.weight_attack paper"
    if wrong:
        raise UserError(f"source.labels{of}: set with {wrong}; take labels episode, or one set of data, without that.")


def _check_evaluation(config: FewShotConfig) -> None:
    settings = config.evaluate
    source = config.source
    if not settings.data:
        raise UserError("evaluate.data: names no set to evaluate on.")
    for name in ("data", "models", "shots"):
        values = getattr(settings, name)
        if not values or len(set(values)) < len(values):
            raise UserError(f"evaluate.{name}: {values}; name at least one, each once.")
    check_row_names(settings.data, "evaluate.data")
    check_other_sets(settings, {"evaluate.data": settings.data})
    if config.meta is not None and (
        config.pool is not None or (settings.rule, settings.ways) != ("uniform", source.ways)
    ):
        raise UserError(
            f"meta: a head of source.ways = {source.ways} outputs; it needs evaluate.rule uniform, evaluate.ways "
            f"{source.ways} and no pool section."
        )
    _check_ways(config)
    least = min(map(settings.ways_in, settings.data)) if settings.rule == "uniform" else settings.min_ways
    unbuilt: Any = None  # a check needs only the names of models
    perturbations(asked_features(settings), Inputs(least, source=lambda model: TransferSource(model, unbuilt, "")))
    if config.select is not None and config.select.attack is not None:
        if config.select.attack.source is not None:
            raise UserError("select.attack: the choice attacks the evaluated model; leave source out.")
        config.select.attack.spec().check_classes(min(map(settings.ways_in, config.select.data)))


def _check_ways(config: FewShotConfig) -> None:
    settings = config.evaluate
    names = [*settings.data, *(config.select.data if config.select is not None else ())]
    for name in settings.ways_of:
        if name not in names:
            raise UserError(f"evaluate.ways_of: '{name}' is not evaluated.{near(name, names)}")
    if settings.ways_of and (settings.rule != "uniform" or config.meta is not None):
        raise UserError("evaluate.ways_of: needs evaluate.rule uniform and no meta section; leave it out.")


def _check_models(config: FewShotConfig, trains: bool, arms: Collection[str]) -> None:
    pool = config.pool
    assembled = pool is not None and bool(pool.folder)
    planned = planned_experts(config)
    experts = [] if assembled else [f"{EXPERT}{label}" for label in planned]
    known = [*(SINGLE if pool is None else pooled_models()), *experts, *arms]
    if pool is not None and not (trains and (pool.clean or CLEAN_EXPERT in (*planned, *arms))):
        known.remove(CLEAN_EXPERT)
    sources = [(model, f"evaluate.{of.key}: source") for of in asked_features(config.evaluate) for model in of.models]
    ending = "" if config.head.name == PROTOTYPES else f"+{config.head.name}"
    for model in config.evaluate.models:
        where = "evaluate.models" if split_head(model)[1] or not ending else "evaluate.models with head"
        _check_model(config, where, model if split_head(model)[1] else f"{model}{ending}", known)
    for model, where in sources:
        _check_model(config, where, model, known)
        if trains and arms and split_head(model)[0] == ALONE:
            raise UserError(f"{where}: '{model}' stands for all arms of this run; name one of {', '.join(arms)}.")
        if split_head(model)[0] != FROZEN and not trains and not assembled:
            raise UserError(
                f"{where}: '{model}' needs a training, and this configuration trains nothing; take 'frozen'."
            )


def _check_model(config: FewShotConfig, where: str, model: str, known: list[str]) -> None:
    pool = config.pool
    stem, head = split_head(model)
    if stem == DEFAULT_MERGED and config.select is None:
        raise UserError(f"{where}: 'merged:default' equals 'merged' without a select section; write 'merged'.")
    if stem == "logits" and head:
        raise UserError(f"{where}: '{model}': an average of logits has no weights to tune; take 'merged+{head}'.")
    if stem != FROZEN and head and config.meta is not None:
        raise UserError(f"{where}: '{model}': the classifier of an inner loop has no prototypes; take '{stem}'.")
    if stem not in known and not (pool is not None and pool.folder and stem.startswith(EXPERT)):
        if stem == CLEAN_EXPERT and pool is not None:
            raise UserError(f"{where}: 'clean' needs pool.clean: true and a training; add them, or leave it out.")
        raise UserError(f"{where}: '{model}'.{near(stem, known)}")


def _check_selection(config: FewShotConfig) -> None:
    select = config.select
    if select is None:
        return
    if config.pool is None and config.tune is None and not config.evaluate.probabilities:
        raise UserError(
            "select: the episodes of a pool's settings, of rates or of temperatures; add pool or tune, set "
            "evaluate.probabilities, or leave it out."
        )
    if not select.data:
        raise UserError("select.data: names no set; add one that is neither trained on nor evaluated.")
    check_apart({"select.data": select.data}, {"evaluate.data": config.evaluate.data})
