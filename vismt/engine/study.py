"""A study: variants of one configuration (arms), trained at several rates and seeds, and compared on the same examples.

An arm is the configuration with a few values replaced. Arms of one seed share start, order and augmentation wherever the
replaced values allow it. With `tune`, each arm is trained at every rate of the grid with the first seed. The rate that is best
on the validation examples is kept, and then the other seeds are trained. No arm gets more tuning than another, and tuning never
uses the test examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Generic, Protocol, TypeVar

from vismt.base import console, ranks
from vismt.base.errors import Diverged, UserError, near
from vismt.config.sections import RunConfig, Seed, TrainConfig, flat, with_values
from vismt.config.typed import plain_name, within
from vismt.storage.files import JsonObject, atomic_write, read_sealed, sealed

ARMS = "arms"
CHOSEN = "chosen.json"
DIVERGED = "diverged.json"
FROZEN = "frozen"  # the model before training: an arm of this name comes first and is drawn in grey
ALONE = "adapted"  # the arm of a configuration that names none
BEST = "best"  # stands for the arm that is best on validation, unless an arm has this name
# Sections that are the same for every arm of a study, for all jobs.
_SHARED = ("arms", "seeds", "seed", "tune", "tasks", "evaluate", "report", "model", "task")


@dataclass
class TuneConfig:
    """The learning rates that every arm tries.

    Args:
        rates: Values of train.lr. Each arm tries them with the first seed and keeps the value that is best on validation
            examples. The smaller value wins a tie.
        fixed: Patterns of parameters, as in train.rates. In arms with an adapter they keep the rate that they have at train.lr.
            [head] gives the heads of all arms one rate, so that the grid tries only the rates of the adapters. timm calls the
            head of a ViT head, of an EfficientNet classifier, and of a ResNet fc.
    """

    rates: list[Annotated[float, within(above=0)]] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Folders name a rate by six digits.
        if not self.rates or len({f"{rate:g}" for rate in self.rates}) < len(self.rates):
            raise UserError(f"tune.rates: {self.rates}; name positive rates, each once.")


@dataclass
class StudyConfig(RunConfig):
    """A study: variants of one configuration, trained at several seeds.

    Args:
        arms: Variants, {name: {dotted key: value}}. {} stands for the configuration itself as the only arm.
        seeds: Seeds of the trainings. [] stands for `seed` alone.
        tune: Learning rates that every arm tries. null takes train.lr.
    """

    arms: dict[str, JsonObject] = field(default_factory=dict)
    seeds: list[Seed] = field(default_factory=list)
    tune: TuneConfig | None = None

    @property
    def training_seed(self) -> int:
        """Seed of a training's batches and random draws. Start values follow `seed`."""
        return self.seed

    @property
    def derived(self) -> bool:
        """Whether an arm of this configuration is made from the trainings of other arms, after them and without a rate."""
        return False

    @property
    def training(self) -> TrainConfig:
        """The section `train`. Raise UserError if it is null."""
        if self.train is None:
            raise UserError("train: is null; a training needs this section.")
        return self.train


Config = TypeVar("Config", bound=StudyConfig)


def validates(config: StudyConfig) -> bool:
    """Return whether trainings are scored on validation examples: to choose a rate, or for the curve of an arm."""
    return config.tune is not None or any(arm.training.validate for arm in resolve_arms(config).values() if arm.train)


@dataclass(frozen=True)
class Training:
    """One training of an arm, at a rate and a seed, and its folder."""

    arm: str
    lr: float
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.arm}   lr {self.lr:g}   seed {self.seed}"


@dataclass(frozen=True)
class Choice:
    """The learning rate of an arm, and the validation score by tried rate. A training that diverged has None."""

    lr: float
    validation: dict[str, float | None]


class Trainer(Protocol):
    """The methods of a job that a study calls."""

    def train_one(self, training: Training) -> None:
        """Train, unless the training is finished."""

    def validate(self, training: Training) -> float:
        """Return a score on the validation examples, higher is better."""


class Study(Generic[Config]):
    """The arms of a configuration, each with its resolved configuration, and their trainings, in the run folder `folder`.

    arms: Configurations by arm, if they do not follow from `config.arms`.
    """

    def __init__(self, config: Config, folder: Path, arms: Mapping[str, Config] | None = None) -> None:
        self.config = config
        self.folder = folder
        self.arms: dict[str, Config] = dict(resolve_arms(config) if arms is None else arms)
        self.seeds: list[int] = list(config.seeds) or [config.seed]

    def config_of(self, training: Training) -> Config:
        arm = self.arms[training.arm]
        rates, factor = arm.training.rates, arm.training.lr / training.lr
        if self.config.tune is not None and arm.adapt is not None:
            fixed = self.config.tune.fixed
            others = {pattern: value for pattern, value in rates.items() if pattern not in fixed}
            rates = {pattern: factor * rates.get(pattern, 1.0) for pattern in fixed} | others
        return replace(arm, seed=training.seed, train=replace(arm.training, lr=training.lr, rates=rates))

    def training(self, arm: str, lr: float, seed: int) -> Training:
        return Training(arm, lr, seed, self.folder / ARMS / arm / f"lr-{lr:g}-seed-{seed}")

    def trainings(self, arm: str) -> list[Training]:
        """Return the trainings of an arm at its chosen rate, by seed."""
        lr = read_choice(self.folder, arm).lr
        return [self.training(arm, lr, seed) for seed in self.seeds]

    def find(self, name: str | None) -> Training:
        """Return the training named "arm" (its first seed) or "arm:seed". With None return the training of the only arm.

        Raise UserError for an unknown name.
        """
        names = list(self.arms)
        if not names:
            raise UserError(f"run '{self.folder}': the configuration trains nothing, so it has no arms.")
        if name is None and len(names) > 1:
            raise UserError(
                f"run '{self.folder}': this run has several arms; name one of them, as NAME or NAME:SEED: {', '.join(names)}."
            )
        arm, _, seed = (name or names[0]).partition(":")
        if arm not in names:
            raise UserError(f"run '{self.folder}': no arm '{arm}': {', '.join(names)}.{near(arm, names)}")
        trainings = self.trainings(arm)
        if not seed:
            return trainings[0]
        match = next((training for training in trainings if str(training.seed) == seed), None)
        if match is None:
            seeds = ", ".join(str(training.seed) for training in trainings)
            raise UserError(f"run '{self.folder}': arm '{arm}' has no seed '{seed}'; take one of {seeds}.")
        return match

    def train(self, job: Trainer) -> None:
        """Train every arm, the tried rates before the seeds. Finished trainings are kept."""
        for arm in self.arms:
            attempted = [] if self.is_chosen(arm) else self.tried(arm)
            for training in attempted:
                self.attempt(job, training)
            self.choose(job, arm)
            for training in self.trainings(arm):
                if training not in attempted:
                    self.attempt(job, training)

    def rates(self, arm: str) -> list[float]:
        """Return the rates that an arm tries, ascending."""
        if self.config.tune is None or self.arms[arm].derived:
            return [self.arms[arm].training.lr]
        return sorted(self.config.tune.rates)

    def is_chosen(self, arm: str) -> bool:
        return (self.folder / ARMS / arm / CHOSEN).exists()

    def tried(self, arm: str) -> list[Training]:
        """Return the trainings that need no choice of a rate: every rate with the first seed, or every seed at the only rate."""
        rates = self.rates(arm)
        seeds = self.seeds if len(rates) == 1 else self.seeds[:1]
        return [self.training(arm, lr, seed) for lr in rates for seed in seeds]

    def attempt(self, job: Trainer, training: Training) -> None:
        """Train. If the arm tries several rates, also print the validation score, whose records make the choice quick.

        A training that diverges is marked as diverged if its arm tries other rates. Otherwise it is an error.
        """
        if has_diverged(training):
            return
        tries = len(self.rates(training.arm)) > 1 and not self.is_chosen(training.arm)
        try:
            job.train_one(training)
        except Diverged as error:
            if not tries:
                raise
            console.stage("tune", f"{training.arm}   lr {training.lr:g}   {error}")
            content = sealed({"error": str(error)})
            ranks.on_first(lambda: atomic_write(training.folder / DIVERGED, content))
            return
        if tries:
            console.stage("tune", f"{training}   validation score {job.validate(training):.4g}")

    def choose(self, job: Trainer, arm: str) -> None:
        """Choose the rate of an arm by the validation scores of the tried rates, unless it is chosen."""
        if ranks.on_first(lambda: self.is_chosen(arm)):
            return
        rates = self.rates(arm)
        validation: dict[float, float | None] = {}
        for training in self.tried(arm) if len(rates) > 1 else ():
            validation[training.lr] = None if has_diverged(training) else job.validate(training)
        ranks.on_first(lambda: write_choice(self.folder / ARMS / arm / CHOSEN, arm, rates, validation))


def has_diverged(training: Training) -> bool:
    """Return whether a tried training ended without a result."""
    return (training.folder / DIVERGED).exists()


def resolve_arms(config: Config) -> dict[str, Config]:
    """Return the configuration of every arm, each without arms. Without arms there is one arm, "adapted"."""
    plain = replace(config, arms={}, seeds=[], tune=None)
    if not config.arms:
        return {ALONE: settled(plain)}
    arms = {name: with_values(plain, changes, f"arms.{name}") for name, changes in config.arms.items()}
    return {name: settled(arm, config.arms[name], f"arms.{name}: ") for name, arm in arms.items()}


def settled(config: Config, changes: Mapping[str, object] | None = None, where: str = "") -> Config:
    """Return a configuration without the values of targets, rank and alpha that its method does not read.

    A change of the method alone is therefore enough. A method that trains a head alone counts as no method, as a job has heads
    of its own.

    changes: Changes of an arm. Raise UserError, which begins with `where`, if a change sets a value that the method does not
    read.
    """
    if config.adapt is None:
        return config
    from vismt.methods import METHODS

    given = [key.removeprefix("adapt.") for key in flat(changes or {})]
    method = METHODS[config.adapt.method]
    method.check_read(where, **{name: getattr(config.adapt, name) for name in method.unread if name in given})
    reset = method.unread_of(config.adapt)
    if method.head_only or reset:
        return replace(config, adapt=None if method.head_only else replace(config.adapt, **reset))
    return config


def ignored(config: StudyConfig) -> list[str]:
    """Return a line for each arm whose method does not read targets, rank or alpha of the section `adapt`."""
    from vismt.methods import METHODS

    lines = []
    for name, changes in (config.arms or {ALONE: {}}).items():
        arm = with_values(replace(config, arms={}), changes, f"arms.{name}").adapt
        method = None if arm is None else METHODS[arm.method]
        if method is not None and not method.head_only:
            values = [f"{key} {getattr(arm, key)}" for key in method.unread_of(arm)]
            reason = next(iter(method.unread.values()), "")
            lines += [f"{name}   without {', '.join(values)}: '{method.name}' {reason}"] if values else []
    return lines


def check_arms(
    config: Config, check: Callable[[Config], None], shared: tuple[str, ...] = (), free: tuple[str, ...] = ()
) -> None:
    """Raise UserError for an invalid name, key, seed or rate of a study, and if `check` refuses the configuration of an arm.

    shared: Further keys that must be the same for all arms of the job. free: Keys or sections of _SHARED that may differ.
    """
    for name, values in config.arms.items():
        plain_name(name, "arms")
        for key in values:
            section = key.partition(".")[0]
            if section in {*_SHARED, *shared} and not {section, key} & set(free):
                raise UserError(
                    f"arms.{name}: {key} must be the same for all arms, or they cannot be compared; leave it out."
                    f"{near(key, free)}"
                )
    for arm in resolve_arms(config).values() if config.arms else ():
        check(arm)
    if len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"seeds: {config.seeds}; name each once.")


def write_choice(path: Path, arm: str, rates: list[float], validation: Mapping[float, float | None]) -> None:
    """Write the rate with the best validation score, or the only rate if nothing was validated.

    validation: Score by rate, ascending. A training that diverged has None. Raise UserError if all of them diverged.
    """
    if not validation:
        atomic_write(path, sealed({"lr": rates[0], "validation": {}}))
        return
    finished = {lr: score for lr, score in validation.items() if score is not None}
    if not finished:
        grid = f"{rates[0]:g} to {rates[-1]:g}"
        raise UserError(f"arms: {arm}: the training diverged at every rate of tune.rates ({grid}); lower them.")
    best = max(finished, key=finished.__getitem__)
    texts = {lr: "diverged" if score is None else f"{score:.4g}" for lr, score in validation.items()}
    scores = "   ".join(f"{lr:g} {text}" for lr, text in texts.items())
    console.stage("tune", f"{arm}   validation score by rate: {scores}   chosen {best:g}")
    if best in (rates[0], rates[-1]) and len(rates) > 2:
        end, beyond = ("smallest", "smaller") if best == rates[0] else ("largest", "larger")
        console.stage("tune", f"{arm}   {best:g} is the {end} of tune.rates; a {beyond} one may be better, add some")
    atomic_write(path, sealed({"lr": best, "validation": {f"{lr:g}": score for lr, score in validation.items()}}))


def chosen_trainings(folder: Path, arm: str) -> dict[int, Path]:
    """Return the folders of an arm's trainings at its chosen rate, by seed. Return {} if no rate was chosen."""
    if not (folder / ARMS / arm / CHOSEN).exists():
        return {}
    stem = f"lr-{read_choice(folder, arm).lr:g}-seed-"
    paths = (folder / ARMS / arm).glob(f"{stem}*")
    found = {int(seed): path for path in paths if (seed := path.name.removeprefix(stem)).isdecimal()}
    return dict(sorted(found.items()))


def read_choice(folder: Path, arm: str) -> Choice:
    """Read the choice for an arm of a run folder. Raise UserError before the arm is trained."""
    path = folder / ARMS / arm / CHOSEN
    if not path.exists():
        raise UserError(f"run '{folder}': arm '{arm}' is not trained yet; `vismt train` goes on with it.")
    content = read_sealed(path, f"run '{folder}'", {"lr": float, "validation": dict[str, float | None]})
    return Choice(content["lr"], content["validation"])
