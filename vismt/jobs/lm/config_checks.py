"""Checks of a language-model configuration: what the types of its sections do not exclude."""

from __future__ import annotations

from vismt.base.errors import UserError, require_known
from vismt.engine.parts import check_parts
from vismt.engine.study import FROZEN, check_arms, resolve_arms, validates
from vismt.evaluation.sections import asked_features, fitted_keys
from vismt.jobs.lm.config import (
    KIND,
    RECOMMENDERS,
    LmConfig,
    LmTaskConfig,
    recommendation_of,
    recommends,
    task_of,
    trained_task,
)
from vismt.jobs.task_sections import check_tasks
from vismt.llm.ilora.hybrid import DRAWN
from vismt.llm.tasks.causal import Causal
from vismt.methods import needs
from vismt.uncertainty.features import HEAD


def check(config: LmConfig) -> None:
    """Raise UserError for values that types do not exclude, also in the arms, before any work is done."""
    _check_values(config)
    check_arms(config, _check_values)
    for name, arm in resolve_arms(config).items():  # one may give the section where the base configuration does not
        if arm.adapt is not None and arm.calibration is None:
            reason = needs(arm.adapt.method, arm.adapt.options).get("calibration")
            if reason is not None:
                raise UserError(f"{f'arms.{name}: ' if config.arms else ''}calibration: {reason}.")
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
    _check_probabilities(config)
    for task in config.tasks:
        validated = task.validation or task.validation_share or task_of(task).own
        if config.evaluate.split == "validation" and not validated:
            raise UserError(
                f"tasks: {task.name}: nothing to validate on; name a set in validation, or give validation_share."
            )


def _check_values(config: LmConfig) -> None:
    check_tasks(config, [task.name for task in config.tasks])
    trained = [task.name for task in config.tasks if task.train]
    if len(trained) != 1:
        raise UserError(f"tasks: {trained} name sets to train on; exactly one task must.")
    for section in config.tasks:
        _check_task(section)
    calibration = config.calibration.data if config.calibration is not None else ()
    check_parts({f"tasks: {task.name}": task for task in config.tasks if not task_of(task).own}, calibration)
    _check_trained_task(config)
    _check_recommendation(config)


def _check_task(section: LmTaskConfig) -> None:
    task = task_of(section)
    if section.chat and (section.kind == KIND or not section.prompt):
        raise UserError(f"tasks: {section.name}: chat is for a prompt of texts; leave it out.")
    if task.own and (section.train or section.validation or section.test or section.chat):
        raise UserError(
            f"tasks: {section.name}: '{section.kind}' has rows and prompts of its own; leave sets and chat out."
        )
    if not section.train and (section.test_share or section.validation_share):
        raise UserError(
            f"tasks: {section.name}: it has no training set to take a share of; name the sets in test and validation."
        )
    if section.rotate and (
        section.kind != KIND or not section.test_share or abs(section.folds * section.test_share - 1) > 1e-6
    ):
        raise UserError(
            f"tasks: {section.name}: rotate needs interactions of users and a test_share of 1/2, 1/3 and so on, here "
            f"'{section.kind}' and {section.test_share:g}."
        )
    if task.head and not section.train:
        raise UserError(
            f"tasks: {section.name}: '{section.kind}' needs a trained head; name sets to train on, or take 'answers'."
        )


def _check_trained_task(config: LmConfig) -> None:
    trained = trained_task(config)
    evaluate = config.evaluate
    validated = validates(config) or bool(fitted_keys(evaluate))
    if trained.rotate and validates(config):
        key = "train.validate" if config.tune is None else "tune"
        raise UserError(
            f"{key}: validation users of one fold of '{trained.name}' are test users of another; leave {key} or rotate out."
        )
    if validated and not (trained.validation or trained.validation_share):
        raise UserError(
            f"tasks: {trained.name}: nothing to validate on; name a set in validation, or give validation_share."
        )
    if config.loss != "choice" and (trained.kind != "answers" or config.model.first_block):
        raise UserError(
            f"loss: '{config.loss}' is for 'answers' and all blocks, here '{trained.kind}' and model.first_block "
            f"{config.model.first_block}; leave loss out, or set first_block to 0."
        )
    if config.adapt is None and not task_of(trained).head:
        raise UserError(
            f"adapt: null, as the method 'head', trains only a new head, and '{trained.kind}' has no head: name a method."
        )


def _check_probabilities(config: LmConfig) -> None:
    evaluate, trained = config.evaluate, trained_task(config)
    task = task_of(trained)
    asked = asked_features(evaluate)
    own = [key for key in ("passes", "ensembles") if getattr(evaluate, key)]
    for key in (*own, *(of.key for of in asked if HEAD in of.needs)):
        if not task.head:
            raise UserError(
                f"evaluate.{key}: needs the class probabilities of a head, and '{trained.kind}' has none; leave it out."
            )
    for feature in asked if isinstance(task, Causal) or not task.reads else ():
        raise UserError(f"evaluate.{feature.key}: '{trained.kind}' has no probabilities of choices; leave it out.")
    arms = resolve_arms(config)
    if evaluate.passes and not any(arm.adapt and arm.adapt.options.get("dropout") for arm in arms.values()):
        raise UserError("evaluate.passes: no arm has dropout; set adapt.options.dropout in one.")
    require_known("evaluate.ensembles:", evaluate.ensembles, list(arms))
    if evaluate.ensembles and len(config.seeds) < 2:
        raise UserError("evaluate.ensembles: an ensemble is of several trainings; name two seeds or more.")
    for feature in (of for of in asked if of.sets):
        where = f"evaluate.{feature.key}:"
        if evaluate.split == "validation":
            raise UserError(f"{where} its sets are test sets; leave it out, or evaluate.split: validation.")
        require_known(where, feature.sets, trained.test)
        if not trained.test_share and not set(trained.test) - set(feature.sets):
            raise UserError(f"{where} names every test set of '{trained.name}'; leave out the one from here.")


def _check_recommendation(config: LmConfig) -> None:
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


def _check_histories(config: LmConfig) -> None:
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
    method, gated, random_gates = None, False, False
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
    if gated and random_gates != (config.gates in DRAWN):
        raise UserError(
            f"gates: adapt.options.gate is null where gates are {' or '.join(DRAWN)}, and else a gate network; change one of "
            "them."
        )
