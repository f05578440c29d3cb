"""Evaluation of a language-model run: a record for every row of every set; the scores are computed from the records.

A score has a value for each row, and their mean is the score (vismt.llm.tasks.base), so that models are compared row by row
(ECE has a separate interval instead). The model before training and the recommender are evaluated beside the arms. Nets are
evaluated unmerged; the merge check compares the logits of each row's last token, on the first batch of each set.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import compress

import torch
from torch import Tensor, nn

from vismt.base import ranks
from vismt.base.seeds import mix_seed
from vismt.data.set_entries import row_name
from vismt.engine import runtime
from vismt.engine.log import record_stem
from vismt.engine.study import Study, Training
from vismt.evaluation.sections import asked_features
from vismt.jobs.image_scores import detection_score, in_groups
from vismt.jobs.lm.config import ENSEMBLE, FROZEN, RECOMMENDERS, REFERENCES, LmConfig, trained_task
from vismt.jobs.lm.data import LmData, lm_of
from vismt.jobs.lm.models import LmModels, fingerprint, load_trained
from vismt.jobs.lm.recommender import Recommender
from vismt.jobs.output_conditions import LAPLACE, TEMPERED
from vismt.jobs.risk import Thresholds, choice_measures, fit_thresholds, validation_parts
from vismt.llm.net import LmNet
from vismt.llm.tasks.base import (
    Item,
    Record,
    averaged_records,
    choices,
    gather,
    temperature_of,
    tempered,
    users_of,
)
from vismt.llm.tasks.recommendation import Recommendation
from vismt.lowrank.layers.base import AdapterModule
from vismt.report.results import Score
from vismt.storage.records import Field, Header, Records
from vismt.uncertainty.features import Answers
from vismt.uncertainty.intervals import CLEAN, Condition, Measure
from vismt.uncertainty.last_layers import laplace_head, laplace_structure

MEANS = Condition("means of the head", "variant", "means")
DROPOUT = "dropout"  # the variant of records that are the mean of passes with dropout
LOG_P = Field(most=1e-6, several=True, optional=True)
FIELDS = {
    "label": Field(0, whole=True, optional=True),
    "log_p": LOG_P,
    "mean_log_p": LOG_P,
    "nats": Field(0, optional=True),
    "tokens": Field(0, whole=True, optional=True),
}
CHECKED_ROWS = 4
"""Rows of each set on which the merged LM is compared with the unmerged one, both without the cached states of frozen blocks."""


class Evaluation:
    """Scores of a run folder's trainings on the rows in `data`."""

    def __init__(self, study: Study[LmConfig], data: LmData, models: LmModels, recommender: Recommender | None) -> None:
        self.config = study.config
        self.study = study
        self.data = data
        self.models = models
        self.recommender = recommender
        self._open: tuple[Training | None, int, LmNet | None] = (None, 0, None)
        self._posterior: tuple[Training | None, int, nn.Module | None] = (None, 0, None)

    def scores(self, training: Training, split: str) -> list[Score]:
        """Return every measure of a training or reference on every set of a split."""
        scores = []
        folds = trained_task(self.config).folds
        for task_name, name in self._sets(training, split):
            task = self.data.tasks[task_name]
            clean, examples = self._records(training, task_name, split, name)
            risk = self.config.evaluate.risk and task_name == self.data.trained and split != "validation"
            for condition, records in self._conditions(training, task_name, split, name, clean):
                tokens = sum(record.get("tokens", 0) for record in records)
                counted = f", {tokens:,} tokens" if tokens else ""
                measures = list(task.measures(records).values())
                if risk and condition == CLEAN:
                    names, groups = [str(row["id"]) for row in records], users_of(records)
                    found = choice_measures(*choices(records), names, self.thresholds(training), groups)
                    measures += [in_groups(measure, groups, "users") for measure in found]
                asked = [(condition, measure) for measure in measures]
                if condition == CLEAN and "log_p" in records[0]:
                    asked += self._asked(records)
                for at, measure in asked:
                    users = len(measure.values) < len(records)  # and not rows, which are several of a user
                    rows = f"{len(records):,} {split} rows" if users else f"{split} rows{counted}"
                    if folds > 1:  # which have other numbers of rows, and one score
                        rows = f"{split} rows of {folds} folds"
                    unit = "users" if users else "rows"
                    scores.append(Score(task_name, name, f"{task.about}, {rows}", measure, at, unit, examples))
        return scores + self._detection(training, split)

    def _asked(self, records: Sequence[Record]) -> list[tuple[Condition, Measure]]:
        """Return what the features of the evaluation ask of records with log-probabilities of choices."""
        users, answers = users_of(records), Answers(*choices(records))
        ids = [str(record["id"]) for record in records]
        features = asked_features(self.config.evaluate)
        found = [pair for feature in features for pair in feature.measures(feature.rows(ids, answers))]
        return [(condition, in_groups(measure, users, "users")) for condition, measure in found]

    def _detection(self, training: Training, split: str) -> list[Score]:
        if split == "validation" or not self.config.evaluate.ood:
            return []
        task, outside = self.data.trained, [row_name(name) for name in self.config.evaluate.ood]
        records = {name: self._records(training, task, split, name)[0] for name in self.data.names(task, split)}
        sure = {name: {str(row["id"]): math.exp(max(row["log_p"])) for row in rows} for name, rows in records.items()}
        protocol = f"{self.data.tasks[task].about}, detection"
        contents = {name: self.data.content(task, split, name) for name in sure}
        return [
            detection_score(
                sure[name],
                sure[other],
                other,
                (task, name, protocol),
                "rows",
                [contents[name], contents[other]],
                [(users_of(records[of]), "users") for of in (name, other)],
            )
            for other in outside
            for name in sure
            if name not in outside
        ]

    def members(self, arm: str) -> list[Training]:
        """Return the trainings whose probabilities an ensemble averages; [] for another model."""
        return self.study.trainings(arm.removesuffix(ENSEMBLE)) if arm.endswith(ENSEMBLE) else []

    def quality(self, training: Training) -> float:
        """Return the trained task's quality on the validation rows that choose rates."""
        return self.data.tasks[self.data.trained].quality(self._parts(self._validation(training))[0])

    def thresholds(self, training: Training) -> Thresholds:
        """Return the thresholds of `evaluate.risk` from validation rows."""
        return fit_thresholds(*choices(self._parts(self._validation(training))[1]))

    def _parts(self, records: list[Record]) -> tuple[list[Record], list[Record]]:
        """Return the validation records that choose rates, and those that give the thresholds of `evaluate.risk`."""
        labels = torch.tensor([record.get("label", 0) for record in records])
        users = list(users_of(records).values())
        chooses, thresholds = validation_parts(labels, self.config.evaluate.risk, self.config.tune, users)
        return list(compress(records, chooses.tolist())), list(compress(records, thresholds.tolist()))

    def _sets(self, training: Training, split: str) -> list[tuple[str, str]]:
        """Return (task, set) of all that a model can be evaluated on; recommenders can only choose from candidates."""
        tasks = list(self.data.tasks)
        if training.arm in RECOMMENDERS:
            tasks = [name for name, task in self.data.tasks.items() if isinstance(task, Recommendation) and task.reads]
        return [(task, name) for task in tasks for name in self.data.names(task, split)]

    def _conditions(
        self, training: Training, task: str, split: str, name: str, records: list[Record]
    ) -> Iterator[tuple[Condition, list[Record]]]:
        if not records:  # an ensemble on a task without choices
            return
        yield CLEAN, records
        if task != self.data.trained or "log_p" not in records[0]:
            return
        if "mean_log_p" in records[0]:
            yield MEANS, [{**record, "log_p": record["mean_log_p"]} for record in records]
        arm, passes = self.study.arms.get(training.arm), self.config.evaluate.passes
        if passes and arm is not None and arm.adapt is not None and arm.adapt.options.get("dropout"):
            condition = Condition(f"{passes} passes with dropout", "variant", DROPOUT)
            yield condition, self._records(training, task, split, name, DROPOUT)[0]
        if split == "validation":  # the rows that the others are fitted on
            return
        if self.config.evaluate.temperature:
            yield TEMPERED, tempered(records, self.temperature(training))
        if self.config.evaluate.laplace and arm is not None and self.data.tasks[task].head:
            classes = len(self.data.classes.tokens(self.models.tokenizer))
            structure = laplace_structure(arm.head.name, classes, self.models.width)
            yield LAPLACE[structure], self._records(training, task, split, name, structure)[0]

    def temperature(self, training: Training) -> float:
        """Return the temperature with the smallest NLL on the validation rows of the trained task."""
        return temperature_of(self._validation(training))

    def _validation(self, training: Training) -> list[Record]:
        task = self.data.trained
        names = self.data.names(task, "validation")
        return [record for name in names for record in self._records(training, task, "validation", name)[0]]

    def _records(
        self, training: Training, task: str, split: str, name: str, variant: str = ""
    ) -> tuple[list[Record], str]:
        """Return a record for each row, from the training's folder where it is there, and what tells the rows from others.

        variant: structure of a Laplace approximation around the head, DROPOUT, or "" for the net as it is. An ensemble has no
        records on a task without choices.
        """
        members = self.members(training.arm)
        if members:
            parts, contents = zip(*(self._records(member, task, split, name, variant) for member in members))
            return averaged_records(parts) if "log_p" in parts[0][0] else [], contents[0]
        stem = record_stem(split, task, name) + ({"": "", DROPOUT: "-dropout"}.get(variant, "-laplace"))
        path = training.folder / "records" / f"{stem}.jsonl"
        log = Records(path, self._header(training, task, split, name, variant), FIELDS, further=True)
        items = self.data.rows(task, split, name)
        if any(item.id not in log for item in items):
            self._complete(log, training, task, items, variant, f"{name} {training.arm} seed {training.seed}")
        return [log[item.id] for item in items], log.examples

    def _header(self, training: Training, task: str, split: str, name: str, variant: str) -> Header:
        weights = "" if training.arm in REFERENCES else fingerprint(training)
        if training.arm in RECOMMENDERS:
            weights = self._recommender().fingerprint(training.arm)
        settings: dict[str, object] = {"variant": variant}
        if variant == DROPOUT:
            settings["passes"] = self.config.evaluate.passes
        elif variant:
            validation = [self.data.fingerprint(task, "validation", of) for of in self.data.names(task, "validation")]
            settings["fitted on"] = [self.data.training_fingerprint(), *validation]
        return Header(weights, self.data.content(task, split, name), self.data.protocol(task), settings)

    @torch.no_grad()
    def _complete(
        self, log: Records, training: Training, name: str, items: Sequence[Item], variant: str, label: str
    ) -> None:
        """Add the records of all rows, in batches of rows of similar length, which need little padding."""
        if training.arm in RECOMMENDERS:
            names, recommender = [item.id for item in items], self._recommender()
            log.complete([names], lambda _: recommender.records(training.arm, items), label)
            return
        task = self.data.tasks[name]
        net = self._laplace(training) if variant not in ("", DROPOUT) else self.net(training)
        shown = task.shown(net, items)
        if task.reads:
            self.data.cache(shown, net, label)
        chunks = self._chunks(shown)

        def records(number: int) -> list[Record]:
            chunk = chunks[number]
            if variant != DROPOUT:
                return task.score(net, self.batch(chunk, net), chunk)
            parts = []
            for seed in range(self.config.evaluate.passes):  # the numbers of a pass are a function of it and the batch
                torch.manual_seed(mix_seed(seed, "dropout", chunk[0].id))
                parts.append(task.score(net, self.batch(chunk, net), chunk))
            return averaged_records(parts)

        with _dropping(net) if variant == DROPOUT else nullcontext():
            log.complete([[item.id for item in chunk] for chunk in chunks], records, label)

    def _recommender(self) -> Recommender:
        assert self.recommender is not None, "the trained task is not a recommendation"
        return self.recommender

    def _laplace(self, training: Training) -> LmNet:
        net = self.net(training)
        if self._posterior[:2] != (training, self.models.generation):
            validation = self._features(net, self.data.all_rows("validation"))
            features = list(self._features(net, self.data.training())[0].split(256))
            head = laplace_head(net.head, features, validation)
            self._posterior = (training, self.models.generation, head.to(validation[0].device))
        return LmNet(net.lm, self._posterior[2], net.first).eval()

    @torch.no_grad()
    def _features(self, net: LmNet, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Return features (n, d) and labels (n,) of all rows."""
        self.data.cache(items, net, "rows for Laplace")

        def features(chunk: list[Item]) -> tuple[Tensor, Tensor]:
            batch = self.batch(chunk, net)
            return net.features(batch).cpu(), batch["label"].cpu()

        parts = list(ranks.share(self._chunks(items), features))
        device = next(net.lm.parameters()).device
        found, labels = (torch.cat([part[place] for part in parts]).to(device) for place in (0, 1))
        return found, labels

    def _chunks(self, items: Sequence[Item]) -> list[list[Item]]:
        """Return batches of rows of similar length, which need little padding."""
        step = self.config.evaluate.batch
        by_length = sorted(items, key=lambda item: (max(len(piece.ids) for piece in item.pieces), item.id))
        return [by_length[start : start + step] for start in range(0, len(by_length), step)]

    def batch(self, items: Sequence[Item], net: LmNet) -> dict[str, Tensor]:
        device = next(net.lm.parameters()).device
        return {name: value.to(device) for name, value in gather(items).items()}

    @torch.no_grad()
    def outputs(self, net: LmNet, merged: nn.Module) -> Iterable[tuple[str, Tensor, Tensor, bool]]:
        """Yield the logits of each row's last token from the merged and the unmerged LM, for the first rows of each set."""
        merged_net = LmNet(merged, first=net.first)
        split = self.config.evaluate.split
        sets = [(task, name) for task in self.data.tasks for name in self.data.names(task, split)]
        for task, name in ranks.my_share(sets):
            batch = self.batch(self.data.rows(task, split, name)[:CHECKED_ROWS], net)
            batch.pop("lower", None)  # the merged LM runs without cached states, as its users run it
            yield "logits", _last_logits(merged_net, batch), _last_logits(net, batch), True

    def net(self, training: Training) -> LmNet:
        """Return the net of a training, or the net before training; it is kept until another one is made."""
        open_training, generation, net = self._open
        if open_training != training or generation != self.models.generation or net is None:
            if training.arm == FROZEN:
                net = self.models.untrained(self.data)
            else:
                net = load_trained(self.models.fresh(self.study.config_of(training), self.data), training)
            net = net.to(runtime.processes().device)
            self._open = (training, self.models.generation, net)
        return net


@contextmanager
def _dropping(net: LmNet) -> Iterator[None]:
    """Let the adapters drop within the block, and nothing else."""
    for module in net.lm.modules():
        module.train(isinstance(module, AdapterModule))
    with torch.random.fork_rng():
        yield
    net.eval()


@torch.no_grad()
def _last_logits(net: LmNet, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits (pieces, vocabulary) of each piece's last token."""
    return lm_of(net).get_output_embeddings()(net.hidden(batch)[:, -1]).float()
