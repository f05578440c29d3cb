"""Arms of a study: variants of one configuration, trained at several seeds and compared on the same examples.

An arm is the configuration with a few values replaced. Arms of one seed share start, order and augmentation wherever the
replaced values allow it. With `tune`, each arm is trained at every rate of the grid with the first seed, the best on the
validation part is kept, and only then the other seeds are trained: no arm gets more tuning than another, and none of it
sees the test part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from vismt import console
from vismt.config import RunConfig, override, resolved, typed
from vismt.engine import runtime
from vismt.engine.loop import Diverged
from vismt.errors import UserError, near
from vismt.files import atomic_write, read_json

CHOSEN, ALONE = "chosen.json", "adapted"
Config = TypeVar("Config")


@dataclass
class TuneConfig:
    """rates: of train.lr, tried by every arm with the first seed. A tie goes to the smaller one."""

    rates: list[float] = field(default_factory=list)


@dataclass
class ArmsConfig(RunConfig):
    """arms: {name: {dotted key: value}}, none for the configuration as it is; seeds: [] for the run's own; tune: the rates."""

    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    tune: TuneConfig | None = None


@dataclass(frozen=True)
class Unit:
    """One training: of an arm, at a rate and a seed, in a folder of its own."""

    arm: str
    lr: float
    seed: int
    folder: Path


def arm_names(config: ArmsConfig) -> list[str]:
    """The arms in order; one, "adapted", where none is named."""
    return list(config.arms) or [ALONE]


def seeds(config: ArmsConfig) -> list[int]:
    """The training seeds."""
    return list(config.seeds) or [config.seed]


def arm_config(config: Config, arm: str) -> Config:
    """The configuration of one arm, itself without arms."""
    plain = {**resolved(config), "arms": {}, "seeds": [], "tune": None}
    changes = [f"{key}={json.dumps(value)}" for key, value in config.arms.get(arm, {}).items()]
    return typed(override(plain, changes), type(config), f"arms.{arm}")


def unit_config(config: Config, unit: Unit) -> Config:
    """The configuration of one training."""
    own = arm_config(config, unit.arm)
    return replace(own, seed=unit.seed, train=replace(own.train, lr=unit.lr))


def unit(config: ArmsConfig, folder: Path, arm: str, lr: float, seed: int) -> Unit:
    """The training of `arm` at a rate and a seed."""
    return Unit(arm, lr, seed, unit_folder(folder, arm, lr, seed))


def unit_folder(folder: Path, arm: str, lr: float, seed: int) -> Path:
    """Where the training of `arm` at a rate and a seed lies in a run folder."""
    return folder / "arms" / arm / f"lr-{lr:g}-seed-{seed}"


def check_arms(config: ArmsConfig, check: Callable[[Any], None]) -> None:
    """Names, seeds and rates, and every arm as a configuration of its own."""
    for name, values in config.arms.items():
        if not re.fullmatch(r"[\w.+-]+", name):
            raise UserError(f"arms: '{name}' is no name for an arm; take letters, digits and + - . _")
        for key in values:
            if key.partition(".")[0] in ("arms", "seeds", "seed", "tune", "tasks", "evaluate", "model", "task"):
                raise UserError(
                    f"arms.{name}: {key} must be the same for all arms, or they cannot be compared; leave it out."
                )
        check(arm_config(config, name))
    if len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"seeds: {config.seeds}; name each once.")
    if config.tune is not None:
        rates = config.tune.rates
        if not rates or len(set(rates)) < len(rates) or any(not rate > 0 for rate in rates):
            raise UserError(f"tune.rates: {rates}; name positive rates, each once.")


def train_arms(config: Any, folder: Path, train: Callable[[Unit], None], validate: Callable[[Unit], float]) -> None:
    """Train what is not done. train(unit) trains or finds it done; validate(unit) is a score, the higher the better."""
    for arm in arm_names(config):
        train_arm(config, folder, arm, train, validate)


def train_arm(
    config: Any, folder: Path, arm: str, train: Callable[[Unit], None], validate: Callable[[Unit], float]
) -> None:
    """One arm: its grid with the first seed, the choice, then the other seeds."""
    first, *others = seeds(config)
    path = folder / "arms" / arm / CHOSEN
    state, known = runtime.processes(), path.exists()
    state.wait_for_everyone()  # all have looked before one writes
    if not known:
        rates = sorted(config.tune.rates) if config.tune is not None else [arm_config(config, arm).train.lr]
        tried: dict[float, Unit | None] = {}
        for lr in rates:
            tried[lr] = unit(config, folder, arm, lr, first)
            try:
                train(tried[lr])
            except Diverged as error:  # which is what a grid is there to find out
                if len(rates) == 1:
                    raise
                console.stage("tune", f"{arm}   lr {lr:g}   {error}")
                tried[lr] = None
        if state.is_main_process:
            if len(rates) > 1:
                _choose(path, arm, {lr: None if one is None else validate(one) for lr, one in tried.items()})
            else:
                atomic_write(path, json.dumps({"lr": rates[0], "validation": {}}))
        state.wait_for_everyone()
    for seed in others:
        train(unit(config, folder, arm, chosen(config, folder, arm)["lr"], seed))


def _choose(path: Path, arm: str, scores: dict[float, float | None]) -> None:
    """Write the rate with the best score; scores by rate, ascending, None where the training diverged."""
    rates, finished = list(scores), [lr for lr, score in scores.items() if score is not None]
    if not finished:
        grid = f"{rates[0]:g} to {rates[-1]:g}"
        raise UserError(f"arms: {arm}: the training diverged at every rate of tune.rates ({grid}); lower them.")
    best = max(finished, key=lambda lr: scores[lr])
    told = "   ".join(f"{lr:g} {'diverged' if score is None else f'{100 * score:.1f}'}" for lr, score in scores.items())
    edge = "   (at an end of the grid)" if best in (rates[0], rates[-1]) and len(rates) > 2 else ""
    console.stage("tune", f"{arm}   validation score by rate: {told}   chosen {best:g}{edge}")
    atomic_write(path, json.dumps({"lr": best, "validation": {f"{lr:g}": score for lr, score in scores.items()}}))


def chosen(config: ArmsConfig, folder: Path, arm: str) -> dict[str, Any]:
    """{"lr": the arm's rate, "validation": {rate: score, None where it diverged}}; UserError before the arm was trained."""
    path = folder / "arms" / arm / CHOSEN
    if not path.exists():
        raise UserError(f"run '{folder}': arm '{arm}' is not trained yet; `vismt train` goes on with it.")
    found = read_json(path, f"run '{folder}': {path.name} of arm '{arm}'")
    if (
        not isinstance(found, dict)
        or not isinstance(found.get("lr"), float)
        or not isinstance(found.get("validation"), dict)
    ):
        raise UserError(f"run '{folder}': {path} is not what a run writes; delete it to choose again.")
    return found


def final_units(config: ArmsConfig, folder: Path, arm: str) -> list[Unit]:
    """The trainings of an arm at its chosen rate, by seed."""
    lr = chosen(config, folder, arm)["lr"]
    return [unit(config, folder, arm, lr, seed) for seed in seeds(config)]


def named_unit(config: ArmsConfig, folder: Path, name: str | None) -> Unit:
    """The training called 'arm' (its first seed) or 'arm:seed'; None where there is one arm. UserError for another name."""
    names = arm_names(config)
    arm, _, seed = (names[0] if name is None and len(names) == 1 else name or "").partition(":")
    if arm not in names:
        told = "this run has several arms; name one with --expert" if name is None else f"no arm '{arm}'"
        raise UserError(f"run '{folder}': {told}: {', '.join(names)}.{near(arm, names) if arm else ''}")
    found = final_units(config, folder, arm)
    one = next((one for one in found if not seed or str(one.seed) == seed), None)
    if one is None:
        raise UserError(
            f"run '{folder}': arm '{arm}' has no seed '{seed}'; take one of {', '.join(str(u.seed) for u in found)}."
        )
    return one
