"""The evaluation that all jobs share. It turns scores into rows, values by example and a report."""

from __future__ import annotations

import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Generic, TypeVar

from torch import nn

from vismt.base import console, ranks
from vismt.base.errors import UserError
from vismt.base.seeds import digest
from vismt.config.sections import flat
from vismt.engine.study import FROZEN, Study, StudyConfig, Training
from vismt.jobs.graphs import Graph
from vismt.jobs.predictions import Options, Predictions
from vismt.report.comparison import Comparison, arm_title, compare_results
from vismt.report.conclusion import Conclusion, conclude
from vismt.report.confusion import class_section
from vismt.report.plotting import figure_formats
from vismt.report.results import (
    RESULTS,
    Result,
    Score,
    ValuesByExample,
    read_results,
    result_of,
    write_results,
    write_values,
)
from vismt.report.score_sections import score_sections, summary_sections
from vismt.report.tables import (
    Section,
    measure_tables,
    number_text,
    result_tables,
    row_text,
    split_wide_table,
    without_further,
)
from vismt.report.trainings import cost_section, progress_section, read_costs, training_sections
from vismt.report.writer import DEFAULT_FORMATS, result_sections, run_heading, write_report
from vismt.robustness.conditions import AttackConfig
from vismt.storage.files import JsonObject
from vismt.storage.paths import file_name
from vismt.uncertainty.intervals import averaged, interval_kind_text, over_seeds

Config = TypeVar("Config", bound=StudyConfig)


class EvaluationJob(ABC, Generic[Config]):
    """Evaluate the models of one run folder and report on them. The constructor of the job checks the configuration."""

    # Columns of metrics.jsonl that the report draws, with their titles.
    logged: Mapping[str, str] = {"loss": "Training loss"}
    # Whether lines about scores name the task, because a set has scores of several tasks.
    names_tasks = False
    # Names of models that no arm trains, evaluated beside the arms.
    references: Sequence[str] = ()
    # References that are made of trained arms.
    composed: Collection[str] = ()
    # The options of `vismt predict` that the job takes.
    predict_options: Collection[str] = ()
    # Commands of `vismt` to paste after a report, with the places {run} and {arm}.
    next_steps: Sequence[str] = ()
    # The attack of `vismt attack RUN` if none is named.
    default_attack = "strong"

    def __init__(self, config: Config, folder: Path, config_hash: str) -> None:
        self.config = config
        self.folder = folder
        self.hash = config_hash
        self.study: Study[Config] = self.make_study()
        self._printed: set[str] = set()  # lines that this process has printed: scores, remarks on adapters
        self.part_done: Callable[[], object] = lambda: None  # called with each checkpoint and evaluated training

    def make_study(self) -> Study[Config]:
        """Return the study of the configuration."""
        return Study(self.config, self.folder)

    # ---- what a job declares ------------------------------------------------------------------------------------------

    @abstractmethod
    def score(self, training: Training, split: str, attacks: Sequence[AttackConfig] | None) -> list[Score]:
        """Return every measure of a training or reference on a split, clean and under each condition.

        attacks: Conditions in place of the configuration's conditions. None for the configuration's.
        """

    @abstractmethod
    def trainings(self, arm: str) -> list[Training]:
        """Return the evaluated trainings of an arm or reference, one for each seed."""

    @property
    def split(self) -> str:
        """The split that is evaluated: `evaluate.split`, in jobs that have the key."""
        return getattr(getattr(self.config, "evaluate", None), "split", "test")

    def derived(self, scores: Mapping[str, Sequence[Score]], seeds: Sequence[int]) -> dict[str, list[Score]]:
        """Return further scores by arm, computed from the scores of several arms or conditions, means over `seeds`."""
        return {}

    def check_evaluation(self, attacks: Sequence[AttackConfig] | None) -> None:
        """Raise UserError, before any evaluation, for what cannot be evaluated. By default do nothing."""

    def is_untrained(self, arm: str, data: str) -> bool:
        """Return whether an arm is trained on other tasks than the task with the name `data`."""
        return False

    def finished(self, training: Training) -> None:
        """Run after the evaluation of a training. By default do nothing."""

    def write_panels(self) -> None:
        """Write the files from which the report draws pictures of examples."""

    def sections(self, results: Sequence[Result]) -> list[Section]:
        """Return the report's sections besides the shared ones."""
        return []

    def baselines(self) -> dict[str, str]:
        """Return the arm to which differences are computed, by task. "" for none. Tasks left out use the first arm."""
        return {}

    def described(self, arm: str) -> str:
        """Return what an evaluated model is, in one line for the reader of a report. By default the settings of its arm."""
        return settings_text(self.config.arms.get(arm, {}))

    def facts(self) -> JsonObject:
        """Return the job's entries of run.json, such as seeds."""
        return {}

    def classifier(self, arm: str | None = None) -> tuple[nn.Module, list[str], int]:
        """Return one arm as a classifier of images in [0, 1]: the net, the names of its outputs, and the image size in pixels."""
        raise UserError(
            f"run '{self.folder}': the job '{self.config.task}' has no classifier of images; name another run."
        )

    def cards_of_tasks(self) -> dict[str, set[str]]:
        """Return the cards of a classifier whose outputs are named "task/class", by task, as rows of results name them."""
        return {}

    def test_ids(self, entry: str) -> set[str] | None:
        """Return the ids of a set's images that the run tests on. None for a set that it neither trained nor chose on.

        entry: Name 'card' or 'card:split'.
        """
        return None

    def check(self) -> None:
        """Raise UserError for what a configuration names, before data is decoded and a run folder is made."""

    def check_model_names(self) -> None:
        """Raise UserError if two models would have the same files of records."""
        seen: dict[str, str] = {}
        for arm in self.evaluated():
            other = seen.setdefault(file_name(arm), arm)
            if other != arm:
                raise UserError(
                    f"arms: '{other}' and '{arm}' are both '{file_name(arm)}' in names of files; rename one."
                )

    # ---- a job that trains nothing ----------------------------------------------------------------------------------------

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return False

    def train(self) -> JsonObject:
        """Train what is not trained yet, and return the entry "adapt" of run.json."""
        return {}

    def check_sets(self) -> None:
        """Raise UserError if training examples changed after the trainings of this run began."""

    def check_kept(self) -> None:
        """Raise UserError if predictions and exports need data that cannot be opened."""

    def adapted(self, arm: str | None = None) -> nn.Module:
        """Return the stock model of one arm ("arm" or "arm:seed") with its adapter.

        Raises UserError for an arm without an adapter.
        """
        raise UserError(f"run '{self.folder}': the job '{self.config.task}' trains no adapter.")

    def merged(self, arm: str | None = None) -> nn.Module:
        """Return the stock model of one arm with merged weights."""
        raise UserError(f"run '{self.folder}': the job '{self.config.task}' trains no adapter.")

    def graph(self, arm: str | None, form: str) -> Graph:
        """Return the merged model of one arm for the export as a graph. form: "torch" or "onnx"."""
        raise UserError(f"run '{self.folder}': the job '{self.config.task}' trains no model to export.")

    def about(self, arm: str | None = None) -> JsonObject:
        """Return the further entries of config.json beside the merged weights of an arm."""
        return {}

    def predict(self, inputs: Sequence[Path], target: Path, options: Options) -> Predictions:
        """Write one arm's predictions on images or rows of text into `target`, and return them."""
        raise UserError(
            f"predict: run '{self.folder}' has the job '{self.config.task}', which trains no model to predict with; name a "
            "run of another job, or a checkpoint."
        )

    def chosen_arm(self, name: str | None) -> str | None:
        """Return the arm that `--arm` names. None and "best" stand for the arm that is best on validation, if the job trains."""
        return name

    def name_of(self, arm: str | None = None) -> str:
        """Return the arm and seed that a name stands for, as they stand in the name of a folder."""
        training = self.study.find(arm)
        return f"{training.arm}-seed-{training.seed}"

    def files_beside(self, arm: str | None = None) -> dict[str, bytes]:
        """Return the files to write beside the merged or exported weights of one arm, by name."""
        return {}

    # ---- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, attacks: Sequence[AttackConfig] | None = None) -> None:
        """Score every reference and arm and write results.jsonl. Rows of other conditions (an earlier attack) stay.

        Processes that share the evaluation (ranks.py) call it together, and the first process writes the files. attacks:
        Conditions in place of the configuration's conditions. Raises UserError for arms that cannot be evaluated, after the
        others are.
        """
        self.check_evaluation(attacks)
        scores: dict[str, dict[int, list[Score]]] = {}
        failed: dict[str, UserError] = {}
        for arm in self.evaluated():
            try:
                trainings = self.trainings(arm)
                scores[arm] = {training.seed: self.evaluate_one(training, attacks) for training in trainings}
            except UserError as error:
                if ranks.count() > 1:  # other processes may wait for a part of this arm
                    raise
                failed[arm] = error
                console.stage("eval", f"{arm}   left out: {error}")
                continue
            if not self.names_tasks:
                self._print(arm, mean_scores(scores[arm].values()), len(trainings))
        if failed and not scores:
            raise next(iter(failed.values()))
        self._write(scores)
        if failed:
            arm, reason = next(iter(failed.items()))
            more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
            raise UserError(
                f"evaluate: '{arm}'{more} left out: {reason} The other arms are in {RESULTS}: vismt report '{self.folder}'."
            ) from reason
        if attacks is None:
            ranks.on_first(self.write_panels)

    def evaluate_references(self) -> None:
        """Score models that no arm trains before the trainings, so that there are numbers soon. `evaluate` reads the records."""
        self.check_evaluation(None)
        for arm in (arm for arm in self.references if arm not in self.composed):
            trainings = self.trainings(arm)
            self._print(arm, mean_scores([self.evaluate_one(training) for training in trainings]), len(trainings))

    def evaluate_one(self, training: Training, attacks: Sequence[AttackConfig] | None = None) -> list[Score]:
        """Return the scores of a training or reference, from its records if they are complete."""
        scores = self.score(training, self.split, attacks)
        if attacks is None and training.arm in self.study.arms:
            self.finished(training)
        self.part_done()
        return scores

    def evaluated(self) -> list[str]:
        """Return the names of all evaluated models, references first."""
        return [*self.references, *self.study.arms]

    def _write(self, scores: Mapping[str, Mapping[int, Sequence[Score]]]) -> None:
        """Write the rows of every arm, averaged over its trainings, and the rows of each of several trainings."""
        groups: dict[int | None, dict[str, Sequence[Score]]]
        groups = {None: {arm: mean_scores(by_seed.values()) for arm, by_seed in scores.items()}}
        trained = {arm: by_seed for arm, by_seed in scores.items() if arm not in self.references}
        sizes = {(arm, of.key): len(of.measure.values) for arm, means in groups[None].items() for of in means}
        for seed in self.study.seeds if len(self.study.seeds) > 1 else ():
            groups[seed] = {
                # The scores of two folds are on different examples, and do not repeat each other.
                arm: [of for of in by_seed[seed] if sizes.get((arm, of.key), 0) <= len(of.measure.values)]
                for arm, by_seed in trained.items()
                if seed in by_seed
            }
        derived = {
            seed: self.derived(by_arm, self.study.seeds if seed is None else [seed]) for seed, by_arm in groups.items()
        }
        if not all(derived.values()):
            derived = {}  # a score that lacks one of its seeds cannot be compared by seed
        averages = derived.get(None, {})
        for arm, arm_scores in averages.items():
            trainings = [
                {score.key: score.measure.score for score in by_arm.get(arm, ())}
                for number, by_arm in derived.items()
                if number is not None
            ]
            averages[arm] = [
                replace(
                    score,
                    measure=over_seeds(score.measure, [of[score.key] for of in trainings if score.key in of]),
                )
                for score in arm_scores
            ]
            if not self.names_tasks:
                self._print(arm, averages[arm], len(scores[arm]))
        rows = [
            (result_of(score, arm, seed, self.split, self.hash, self.is_untrained(arm, score.data)), score.measure)
            for seed, by_arm in groups.items()
            for arm, arm_scores in by_arm.items()
            for score in (*arm_scores, *derived.get(seed, {}).get(arm, ()))
        ]
        if ranks.rank() > 0:
            return
        write_values(self.folder, [(row, measure) for row, measure in rows if row.seed is None])
        write_results(self.folder, [row for row, _ in rows])
        if self.names_tasks:
            self._print_tables()

    def _print_tables(self) -> None:
        """Print the tables of results, and of all measures of the tasks."""
        _, comparisons, _ = self._compared()
        for table, note in [*result_tables(without_further(comparisons)), *measure_tables(comparisons)]:
            console.block(f"\n{table.title}")
            for part in split_wide_table(table):
                console.table(part.heads, part.rows)
            console.block(note)

    def _print(self, arm: str, scores: Sequence[Score], trainings: int) -> None:
        """Print a line for every set, with the mean of more than three corruptions. No line is printed twice."""
        scores = [score for score in scores if not score.measure.further]
        for task, data, protocol in dict.fromkeys((score.task, score.data, score.protocol) for score in scores):
            chosen = [score for score in scores if (score.task, score.data, score.protocol) == (task, data, protocol)]
            first = chosen[0]
            corrupted = [score for score in chosen if score.condition.kind == "corruption"]
            many = len(corrupted) > 3
            shown = [score for score in chosen if not many or score.condition.kind != "corruption"]
            texts = [score_text(score) for score in shown]
            if many:
                values = [of.measure.score for of in corrupted if of.measure.metric == first.measure.metric]
                mean = number_text(fmean(values), first.measure.scale)
                texts.append(f"mean of {len(values)} corruptions {mean}")
            count = f"n = {len(first.measure.values):,} {first.unit}"
            if trainings > 1:
                count += f", {trainings} seeds"
            kinds = dict.fromkeys(interval_kind_text(of.measure.covers, of.measure.units_text) for of in shown)
            count += f"; {' / '.join(kinds)}"
            arm = arm_title(arm, [score.condition.label for score in chosen])
            name = f"{data}  {task}" if self.names_tasks else data
            line = f"{name}  {protocol}  {arm}   {'   '.join(texts)}   ({count})"
            if line not in self._printed:
                console.stage("eval", line)
            self._printed.add(line)

    def _compared(self) -> tuple[list[Result], list[Comparison], ValuesByExample]:
        """Return the rows of the run, their comparisons, and their values by example."""
        results, values = read_results(self.folder / RESULTS, self.hash), ValuesByExample(self.folder)
        return results, compare_results(results, values, self.baselines(), self.references), values

    def report(self, formats: Sequence[str] = DEFAULT_FORMATS) -> list[Path]:
        """Write the report from the files of the run folder, in some of writer.FORMATS and plotting.FIGURES. Return its files.

        The report of a run without results shows the progress of its trainings.
        """
        results, comparisons, values = self._compared()
        with figure_formats(formats):
            training = training_sections(self.folder, list(self.study.arms), self.study.seeds[0], self.logged)
            if results:
                conclusion, sections = self._sections(results, values, comparisons, training)
                console.stage("answer", conclusion.text)
            else:
                steps = {arm: config.train.steps for arm, config in self.study.arms.items() if config.train}
                conclusion, sections = None, [progress_section(self.folder, steps), training[0]]
                if not sections[0].filled:
                    raise UserError(
                        f"report: no results in '{self.folder}'; make them with `vismt evaluate {self.folder}`."
                    )
        return write_report(self.folder, run_heading(self.folder), results, comparisons, conclusion, sections, formats)

    def _sections(
        self,
        results: Sequence[Result],
        values: ValuesByExample,
        comparisons: Sequence[Comparison],
        training: Sequence[Section],
    ) -> tuple[Conclusion, list[Section]]:
        """Return the answer and the sections of a run with results. training: sections about its trainings, the curves first."""
        conditions = {c.condition for c in comparisons}
        arms = {arm_title(row.arm, conditions): row.arm for row in results}
        known = read_costs(self.folder, [*self.study.arms])
        costs = {name: known[self.arm_of(arm)] for name, arm in arms.items() if self.arm_of(arm) in known}
        conclusion = conclude(comparisons, {FROZEN: 0, **{name: cost.trained for name, cost in costs.items()}})
        taken = arms[conclusion.model]
        return conclusion, [
            cost_section(self.folder, comparisons, costs),
            class_section(self.folder, taken),
            training[0],
            Section("What to do next", commands=self.commands(taken) if conclusion.take else []),
            Section("Models", pairs=[(name, text) for name, arm in arms.items() if (text := self.described(arm))]),
            *result_sections(comparisons),
            *score_sections(
                self.folder,
                results,
                comparisons,
                values,
                [arm for arm in self.evaluated() if arm not in self.references],
            ),
            *training[1:],
            *summary_sections(results),
            *self.sections(results),
        ]

    def commands(self, model: str) -> list[str]:
        """Return commands to paste after a report that takes a model."""
        run = shlex.quote(str(self.folder))
        steps = self.next_steps if self.arm_of(model) else ()
        steps = [step.format(run=run, arm=shlex.quote(model)) for step in steps]
        return [f"vismt {step}" for step in (*steps, f"compare {run} ANOTHER_RUN")]

    def arm_of(self, model: str) -> str:
        """Return the arm whose training made an evaluated model, "" for a model that no single training made."""
        return model if model in self.study.arms else ""


def settings_text(settings: JsonObject, without: Collection[str] = ()) -> str:
    """Return the settings in which an arm differs as one text, by dotted keys. Keys in `without` are left out."""
    shown = {key: value for key, value in flat(settings).items() if key not in without and value != {}}
    return ", ".join(f"{key} {'null' if value is None else value}" for key, value in shown.items())


def records_folder(folder: Path, attacks: Sequence[AttackConfig] | None) -> Path:
    """Return the folder of records: `folder`, or a folder below it for attacks in place of the configuration's."""
    if not attacks:
        return folder
    return folder / digest(json.dumps([asdict(attack) for attack in attacks], sort_keys=True).encode())[:8]


def mean_scores(trainings: Iterable[Sequence[Score]]) -> list[Score]:
    """Return the scores of several trainings, averaged example by example. Scores that one training lacks are left out."""
    by_key: dict[tuple[str, ...], list[Score]] = {}
    count = 0
    for scores in trainings:
        count += 1
        for score in scores:
            by_key.setdefault(score.key, []).append(score)
    shared = [group for group in by_key.values() if len(group) == count]
    return [replace(group[0], measure=averaged([score.measure for score in group])) for group in shared]


def score_text(score: Score) -> str:
    """Return condition, metric and interval of a score as one text."""
    row = result_of(score, "", None, "", "")
    condition = "" if score.condition.label == "clean" and row.metric != "accuracy" else f"{score.condition.label} "
    metric = "" if row.metric == "accuracy" else f"{row.metric} "
    return f"{condition}{metric}{row_text(row)}"
