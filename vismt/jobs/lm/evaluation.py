"""Evaluation of a language-model run: it writes a record for every row of every set, and computes the scores from the records.

A score has a value for each row, and the mean of the values is the score (vismt.llm.tasks.base). Models are therefore compared
row by row (ECE has a separate interval instead). The model before training and the recommender are evaluated beside the arms.
Nets are evaluated unmerged. The merge check compares the logits of the last token of each row, on the first batch of each set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress

import torch
from torch import Tensor, nn

from vismt.base import ranks
from vismt.base.seeds import mix_seed
from vismt.data.division import validation_parts
from vismt.data.set_entries import row_name
from vismt.engine import runtime
from vismt.engine.log import record_stem
from vismt.engine.study import FROZEN, Study, Training
from vismt.evaluation.quality import ACCURACY
from vismt.evaluation.sections import asked_features, asked_scores, divides
from vismt.jobs.lm.config import ENSEMBLE, RECOMMENDERS, REFERENCES, LmConfig, trained_task
from vismt.jobs.lm.data import LmData, lm_of
from vismt.jobs.lm.models import LmModels, fingerprint, load_trained
from vismt.jobs.lm.recommender import Recommender
from vismt.llm.net import LmNet
from vismt.llm.tasks.base import (
    Item,
    Record,
    averaged_records,
    by_row,
    choices,
    gather_items,
    in_form,
    users_of,
)
from vismt.llm.tasks.recommendation import Recommendation
from vismt.lowrank.layers.base import AdapterModule
from vismt.storage.records import Field, Header, Records
from vismt.uncertainty.features import VALIDATION, Answers, Feature, Fitted, MakeHead, Rows, Validation, View, rows_of
from vismt.uncertainty.intervals import CLEAN, Condition, Measure, Score

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
        self._other: tuple[Training | None, int, MakeHead | None, nn.Module | None] = (None, 0, None, None)

    def scores(self, training: Training, split: str) -> list[Score]:
        """Return every measure of a training or reference on every set of a split."""
        views = []
        for task, name in self._sets(training, split):
            records, examples = self.records(training, task, split, name)
            if records:  # and no ensemble on a task without choices
                views.append(SetView(self, training, task, split, name, records, examples))
        scores = [score for view in views for at, records in self._conditions(view) for score in view.of(records, at)]
        return scores + self._asked(training, [view for view in views if "log_p" in view.records[0]])

    def constant_scores(self, training: Training, split: str) -> list[Score]:
        """Return the accuracy of the class that is most frequent in the training rows, on each set of the trained task."""
        most = Counter(item.label for item in self.data.all_rows("train")).most_common(1)[0][0]
        task, scores = self.data.trained, []
        for name in self.data.names(task, split):
            records = [{"id": item.id, "label": item.label} for item in self.data.rows(task, split, name)]
            measure = Measure(ACCURACY, by_row(records, [float(row["label"] == most) for row in records]))
            content = self.data.content(task, split, name)
            view = SetView(self, training, task, split, name, records, content)
            scores.append(view.score(measure, CLEAN, content))
        return scores

    def _asked(self, training: Training, views: Sequence[SetView]) -> list[Score]:
        """Return the scores of features on sets with choices. Fitted features score only the trained task."""
        features, scores = asked_features(self.config.evaluate), []
        for view in views:
            own = view.task == self.data.trained and view.split != "validation"
            asked = [of for of in features if own or not (VALIDATION in of.needs or of.sets)]
            fitted = [of.fitted(view) for of in asked if view.name not in map(row_name, of.sets)]
            scores += asked_scores(fitted, view, view.rows(fitted), partial(view.other, fitted))
            forms = [(at, form) for of in fitted for at, form in of.forms.items()]
            scores += [score for at, form in forms for score in view.of(in_form(view.records, form), at)]
        trained = [view for view in views if view.task == self.data.trained and view.split != "validation"]
        if trained and training.arm in self.study.arms:
            scores += [score for feature in features for score in feature.net_scores(trained)]
        return scores

    def members(self, arm: str) -> list[Training]:
        """Return the trainings whose probabilities an ensemble averages. [] for another model."""
        return self.study.trainings(arm.removesuffix(ENSEMBLE)) if arm.endswith(ENSEMBLE) else []

    def quality(self, training: Training) -> float:
        """Return the trained task's quality on the validation rows that choose rates."""
        records, chooses, _ = self.validation(training)
        return self.data.tasks[self.data.trained].quality([*compress(records, chooses.tolist())])

    def view(self, training: Training) -> SetView:
        """Return the trained task for what is fitted on its validation rows."""
        return SetView(self, training, self.data.trained, self.config.evaluate.split, "", [], "")

    def validation(self, training: Training) -> tuple[list[Record], Tensor, Tensor]:
        """Return the validation records of the trained task, and masks: which choose rates, on which features are fitted."""
        names = self.data.names(self.data.trained, "validation")
        records = [row for name in names for row in self.records(training, self.data.trained, "validation", name)[0]]
        labels = torch.tensor([record.get("label", 0) for record in records])
        apart, users = divides(self.config.evaluate, self.config.tune), list(users_of(records).values())
        return records, *validation_parts(labels, apart, users)

    def _sets(self, training: Training, split: str) -> list[tuple[str, str]]:
        """Return all pairs (task, set) on which a model can be evaluated. Recommenders can only choose from candidates."""
        tasks = list(self.data.tasks)
        if training.arm in RECOMMENDERS:
            tasks = [name for name, task in self.data.tasks.items() if isinstance(task, Recommendation) and task.reads]
        return [(task, name) for task in tasks for name in self.data.names(task, split)]

    def _conditions(self, view: SetView) -> Iterator[tuple[Condition, list[Record]]]:
        training, records = view.training, view.records
        yield CLEAN, records
        if view.task != self.data.trained or "log_p" not in records[0]:
            return
        if "mean_log_p" in records[0]:
            yield MEANS, [{**record, "log_p": record["mean_log_p"]} for record in records]
        arm, passes = self.study.arms.get(training.arm), self.config.evaluate.passes
        if passes and arm is not None and arm.adapt is not None and arm.adapt.options.get("dropout"):
            condition = Condition(f"{passes} passes with dropout", "variant", DROPOUT)
            yield condition, self.records(training, view.task, view.split, view.name, DROPOUT)[0]

    def records(
        self, training: Training, task: str, split: str, name: str, variant: str = "", make: MakeHead | None = None
    ) -> tuple[list[Record], str]:
        """Return a record for each row, from the training's folder if it has one, and the text that tells the rows from others.

        variant: DROPOUT, the name of the head of `make`, or "" for the unchanged net. An ensemble has no records on a task
        without choices.
        """
        members = self.members(training.arm)
        if members:
            parts, contents = zip(*(self.records(member, task, split, name, variant) for member in members))
            return averaged_records(parts) if "log_p" in parts[0][0] else [], contents[0]
        stem = record_stem(split, task, name) + (f"-{variant}" if variant else "")
        path = training.folder / "records" / f"{stem}.jsonl"
        log = Records(path, self._header(training, task, split, name, variant), FIELDS, further=True)
        items = self.data.rows(task, split, name)
        if any(item.id not in log for item in items):
            self._complete(log, training, task, items, variant, make, f"{name} {training.arm} seed {training.seed}")
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
        self,
        log: Records,
        training: Training,
        name: str,
        items: Sequence[Item],
        variant: str,
        make: MakeHead | None,
        label: str,
    ) -> None:
        """Add the records of all rows, in batches of rows of similar length, which need little padding."""
        if training.arm in RECOMMENDERS:
            names, recommender = [item.id for item in items], self._recommender()
            log.complete([names], lambda _: recommender.records(training.arm, items), label)
            return
        task = self.data.tasks[name]
        net = self.net(training) if make is None else self._with_head(training, make)
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

    def _with_head(self, training: Training, make: MakeHead) -> LmNet:
        """Return the net of a training with another head. The latest net is kept."""
        net = self.net(training)
        if self._other[:3] != (training, self.models.generation, make):
            validation = self._features(net, self.data.all_rows("validation"))
            features = list(self._features(net, self.data.training())[0].split(256))
            head = make(net.head, features, validation).to(validation[0].device)
            self._other = (training, self.models.generation, make, head)
        return LmNet(net.lm, self._other[3], net.first).eval()

    @torch.no_grad()
    def _features(self, net: LmNet, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Return features (n, d) and labels (n,) of all rows."""
        self.data.cache(items, net, "rows for another head")

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
        return {name: value.to(device) for name, value in gather_items(items).items()}

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
        """Return the net of a training, or the net before training. It is kept until another net is made."""
        open_training, generation, net = self._open
        if open_training != training or generation != self.models.generation or net is None:
            if training.arm == FROZEN:
                net = self.models.untrained(self.data)
            else:
                net = load_trained(self.models.fresh(self.study.config_of(training), self.data), training)
            net = net.to(runtime.processes().device)
            self._open = (training, self.models.generation, net)
        return net


@dataclass(frozen=True)
class SetView(View):
    """The rows of a set with their records. content: Text that tells the rows from others of the same names."""

    evaluation: Evaluation
    training: Training
    task: str
    split: str
    name: str
    records: list[Record]
    content: str

    def of(self, records: list[Record], condition: Condition) -> list[Score]:
        """Return the measures of the task of these rows, answered under a condition."""
        measures = self.evaluation.data.tasks[self.task].measures(records)
        return [self.score(measure, condition, self.content) for measure in measures.values()]

    def score(self, measure: Measure, condition: Condition, examples: str, about: str = "") -> Score:
        tokens = sum(record.get("tokens", 0) for record in self.records)
        users = len(measure.values) < len(self.records)  # and not rows, which are several of a user
        rows = f"{len(self.records):,} {self.split} rows" if users else f"{self.split} rows"
        if not users and tokens:
            rows += f", {tokens:,} tokens"
        folds = trained_task(self.evaluation.config).folds
        if folds > 1:  # which have other numbers of rows, and one score
            rows = f"{self.split} rows of {folds} folds"
        protocol = f"{self.evaluation.data.tasks[self.task].about}, {about or rows}"
        unit = "users" if users else "rows"
        return Score(self.task, self.name, protocol, measure, condition, unit, examples)

    def rows(self, features: Sequence[Feature]) -> Rows:
        """Return the columns of features."""
        found = rows_of(features, Answers(*choices(self.records)), [str(record["id"]) for record in self.records])
        return replace(found, groups=users_of(self.records), unit="users", content=self.content)

    def other(self, features: Sequence[Feature], entry: str) -> Rows:
        """Return the columns of features of another evaluated set."""
        name = row_name(entry)
        records, content = self.evaluation.records(self.training, self.task, self.split, name)
        return replace(self, name=name, records=records, content=content).rows(features)

    def fitted(self, name: str, kind: type[Fitted], fit: Callable[[], Fitted], *, of_net: bool = False) -> Fitted:
        return fit()  # from validation rows that are on record

    def validation(self) -> list[Validation]:
        records, _, fits = self.evaluation.validation(self.training)
        return [Validation(*choices(records), fits)]

    @property
    def head_shape(self) -> tuple[str, int, int]:
        of = self.evaluation
        name = of.study.config_of(self.training).head.name
        return name, len(of.data.classes.tokens(of.models.tokenizer)), of.models.width

    def with_head(self, name: str, make: MakeHead) -> list[Score]:
        records, _ = self.evaluation.records(self.training, self.task, self.split, self.name, name, make)
        return self.of(records, CLEAN)


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
