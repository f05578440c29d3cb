"""Evaluation of a language-model run: a record for every row of every set, then a row for each model, set and measure.

A measure is a number for each row whose mean is the value (vismt.llm.tasks.base), averaged over the training seeds, so that
models are compared row by row (not in ECE, whose intervals are its own); lm_seeds.jsonl has the values by seed. The model
before training stands beside the arms. Nets are evaluated as they were trained; merge.json of a training says what merging
does to the logits of each row's last token, on the first batch of each set.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vismt import console
from vismt.engine import runtime
from vismt.engine.arms import Unit, arm_config, arm_names, final_units
from vismt.engine.log import read_lines, record_stem, write_lines
from vismt.engine.study_files import MERGE, mergeable
from vismt.files import atomic_write
from vismt.jobs.lm.config import FROZEN, RECOMMENDER, REFERENCES, LmConfig
from vismt.jobs.lm.data import LmData
from vismt.jobs.lm.models import LmModels, fingerprint
from vismt.jobs.lm.recommender import Recommender
from vismt.llm.heads import laplace_head, laplace_structure
from vismt.llm.net import LmNet
from vismt.llm.tasks.base import Item, Measure, Record, Task, gather, mean_of, tempered
from vismt.llm.tasks.recommendation import Recommendation
from vismt.lowrank.inject import merge
from vismt.robustness.evaluate import wilson
from vismt.stats import mean_interval

SEEDS = "lm_seeds.jsonl"
TEMPERED, MEANS = "temperature of validation", "means of the head"  # conditions
LAPLACE = {
    "full": "Laplace",
    "kronecker": "Laplace (Kronecker)",
    "rows": "Laplace",
}  # and by what is kept of the Hessian


class Evaluation:
    """What a run folder's trainings say of the rows in `data`."""

    def __init__(
        self,
        config: LmConfig,
        folder: Path,
        config_hash: str,
        data: LmData,
        models: LmModels,
        recommender: Recommender | None,
    ) -> None:
        self.config, self.folder, self.hash, self.data, self.models = config, folder, config_hash, data, models
        self.recommender = recommender
        self._open: tuple[Unit | None, int, LmNet | None] = (None, 0, None)
        self._posterior: tuple[Unit | None, int, nn.Module | None] = (None, 0, None)

    def validate(self, unit: Unit) -> float:
        """The trained task's quality on its validation rows."""
        return self.data.tasks[self.data.trained].quality(self._validation(unit))

    def rows(self) -> list[dict[str, Any]]:
        """Rows of results.jsonl of the model before training and of every arm."""
        found: list[dict[str, Any]] = []
        lines: list[dict[str, Any]] = []
        references = [FROZEN] * self.config.evaluate.frozen + [RECOMMENDER] * (self.recommender is not None)
        for model in references + arm_names(self.config):
            alone = [Unit(model, 0.0, self.config.seed, self.folder / model)]
            units = alone if model in references else final_units(self.config, self.folder, model)
            chooses = [
                task for task, made in self.data.tasks.items() if isinstance(made, Recommendation) and made.reads
            ]
            tasks = chooses if model == RECOMMENDER else list(self.data.tasks)
            sets = [(task, name) for task in tasks for name in self.data.names(task, self.config.evaluate.split)]
            for unit in units:  # one net after the other, not one set after the other
                for task, name in sets:
                    list(self._conditions(unit, task, name))
                if model not in references:
                    self._check_merge(unit)
            for task, name in sets:
                found += self._rows(model, units, task, name, lines)
        write_lines(self.folder / SEEDS, lines)
        return found

    def _rows(
        self, model: str, units: Sequence[Unit], task: str, name: str, lines: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Rows of one model on one set, the records that reproduce them, and the lines of its seeds."""
        made = self.data.tasks[task]
        seen: dict[str, dict[str, list[Measure]]] = {}
        ids: list[str] = []
        for unit in units:
            for condition, own in self._conditions(unit, task, name):
                ids = [record["id"] for record in own]
                for metric, measure in made.measures(own).items():
                    seen.setdefault(metric, {}).setdefault(condition, []).append(measure)
                    lines.append(
                        {
                            "arm": model,
                            "seed": unit.seed,
                            "lr": unit.lr,
                            "task": task,
                            "data": name,
                            "condition": condition,
                            "metric": metric,
                            "value": mean_of(measure),
                            "n": len(own),
                            "lower_is_better": measure.lower_is_better,
                            "tokens": sum(record.get("tokens", 0) for record in own),
                            **({"wilson": wilson(round(sum(measure.values)), len(own))} if measure.counts else {}),
                        }
                    )
        rows = []
        for metric, conditions in seen.items():
            own = {condition: _averaged(measures) for condition, measures in conditions.items()}
            rows += self._written(model, task, name, metric, ids, own)
        plain = [row for row in rows if row["condition"] == "clean"]
        told = "   ".join(f"{row['metric']} {row['value']:.4g} ± {row['ci95']:.2g}" for row in plain)
        console.stage("eval", f"{model}   {task}   {name}   {told}   (n = {len(ids):,} rows, {len(units)} seed(s))")
        return rows

    def _written(
        self, model: str, task: str, name: str, metric: str, ids: Sequence[str], conditions: dict[str, Measure]
    ) -> list[dict[str, Any]]:
        split = self.config.evaluate.split
        protocol = f"{task}: {self.data.tasks[task].about}, {split} rows"
        stem = record_stem(name, protocol, f"{model}-{metric}")
        path = self.folder / "records" / f"{stem}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {condition: measure.values for condition, measure in conditions.items()}
        write_lines(path, [{"episode": i, **{c: v[row] for c, v in columns.items()}} for row, i in enumerate(ids)])
        rows = []
        for condition, measure in conditions.items():
            value, half = mean_interval(measure.values)
            if measure.interval is not None:
                half = max(value - measure.interval[0], measure.interval[1] - value)
            rows.append(
                {
                    "data": name,
                    "protocol": protocol,
                    "condition": condition,
                    "metric": metric,
                    "model": model,
                    "value": value,
                    "ci95": half,
                    "n": len(ids),
                    "unit": "rows",
                    "seed": self.config.seed,
                    "config_hash": self.hash,
                    "lower_is_better": measure.lower_is_better,
                    "records": None if measure.interval is not None else stem,
                }
            )
        return rows

    def _conditions(self, unit: Unit, task: str, name: str) -> Iterator[tuple[str, list[Record]]]:
        """The records as they are, and what is asked for besides of the trained task where it gives probabilities."""
        records = self._records(unit, task, self.config.evaluate.split, name)
        yield "clean", records
        if task != self.data.trained or "log_p" not in records[0]:
            return
        if "mean_log_p" in records[0]:
            yield MEANS, [{**record, "log_p": record["mean_log_p"]} for record in records]
        if self.config.evaluate.temperature:
            yield TEMPERED, tempered(records, self._validation(unit))
        if self.config.evaluate.laplace and self.data.tasks[task].head and unit.arm != FROZEN:
            structure = self._structure(unit)
            yield LAPLACE[structure], self._records(unit, task, self.config.evaluate.split, name, structure)

    def _structure(self, unit: Unit) -> str:
        """Of the Laplace approximation around a training's head."""
        classes = len(self.data.tasks[self.data.trained].tokens(self.models.tokenizer))
        return laplace_structure(arm_config(self.config, unit.arm).head.name, classes, self.models.width)

    def _validation(self, unit: Unit) -> list[Record]:
        task = self.data.trained
        return [
            one for name in self.data.names(task, "validation") for one in self._records(unit, task, "validation", name)
        ]

    def _records(self, unit: Unit, task: str, part: str, name: str, laplace: str = "") -> list[Record]:
        """A record for each row; rows that are on record are not evaluated again. laplace: a structure, around the head."""
        stem = record_stem(part, task, name) + "-laplace" * bool(laplace)
        path = unit.folder / "records" / f"{stem}.jsonl"
        seen = [self.data.fingerprint(task, part, name), "" if unit.arm in REFERENCES else fingerprint(unit)]
        seen[1] = self.recommender.fingerprint() if unit.arm == RECOMMENDER else seen[1]
        # What replaced VBLL's covariances once dropped its noise as well: such records name no structure.
        seen += [self.config.evaluate.samples, f"{self.data.training_fingerprint()} {laplace}" if laplace else ""]
        lines = read_lines(path)
        if lines and lines[0].get("fingerprint") == seen:
            return lines[1:]
        items, made = self.data.rows(task, part, name), self.data.tasks[task]
        if unit.arm == RECOMMENDER:
            found = self.recommender.records(items)
        else:
            net = self._laplace(unit) if laplace else self._net(unit)
            found = self._scored(net, made, items, f"{name} {unit.arm} seed {unit.seed}")
        order = {item.id: place for place, item in enumerate(items)}
        found.sort(key=lambda record: order[record["id"]])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, [{"fingerprint": seen}, *found])
        return found

    @torch.no_grad()
    def _scored(self, net: LmNet, task: Task, items: Sequence[Item], told: str) -> list[Record]:
        asked = task.shown(net, items)
        if task.reads:
            self.data.cache(asked, net, told)
        chunks = console.track(self._chunks(asked), "eval", told)
        return [record for chosen in chunks for record in task.score(net, self._batch(chosen, net), chosen)]

    def _laplace(self, unit: Unit) -> LmNet:
        """The net of a training with the Laplace approximation in the place of its head."""
        net = self._net(unit)
        if self._posterior[:2] != (unit, self.models.given):
            rows = [
                one
                for name in self.data.names(self.data.trained, "validation")
                for one in self.data.rows(self.data.trained, "validation", name)
            ]
            held, labels = self._features(net, rows)
            head = laplace_head(net.head, list(self._features(net, self.data.training())[0].split(256)), (held, labels))
            self._posterior = (unit, self.models.given, head.to(held.device))
        return LmNet(net.lm, self._posterior[2], net.first, net.samples).eval()

    @torch.no_grad()
    def _features(self, net: LmNet, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Features (n, d) and labels (n,) of all rows."""
        self.data.cache(items, net, "rows for Laplace")
        features, labels = [], []
        for chosen in self._chunks(items):
            batch = self._batch(chosen, net)
            features.append(net.features(batch))
            labels.append(batch["label"])
        return torch.cat(features), torch.cat(labels)

    def _chunks(self, items: Sequence[Item]) -> list[list[Item]]:
        """Rows of like length together, so that little is padding."""
        step = self.config.evaluate.batch
        by_length = sorted(items, key=lambda item: (max(len(piece.ids) for piece in item.pieces), item.id))
        return [by_length[start : start + step] for start in range(0, len(by_length), step)]

    def _batch(self, items: Sequence[Item], net: LmNet) -> dict[str, Tensor]:
        device = next(net.lm.parameters()).device
        return {name: value.to(device) for name, value in gather(items).items()}

    def _check_merge(self, unit: Unit) -> None:
        """Compare the merged LM with the unmerged one; writes merge.json once."""
        if (unit.folder / MERGE).exists():
            return
        net = self._net(unit)
        if not mergeable(net, unit):
            return
        batches = []
        for task in self.data.tasks:
            for name in self.data.names(task, self.config.evaluate.split):
                items = self.data.rows(task, self.config.evaluate.split, name)[: self.config.evaluate.batch]
                batches.append(self._batch(items, net))
                batches[-1].pop("lower", None)  # the merged LM runs as others will run it
        plain = [_last_logits(net, batch) for batch in batches]
        whole = LmNet(merge(copy.deepcopy(net.stock)), first=net.first)
        merged = [_last_logits(whole, batch) for batch in batches]
        atomic_write(
            unit.folder / MERGE,
            json.dumps(
                {
                    "n": sum(map(len, plain)),
                    "different_predictions": sum(
                        int((a.argmax(1) != b.argmax(1)).sum()) for a, b in zip(plain, merged)
                    ),
                    "largest_difference": max(float((a - b).abs().max()) for a, b in zip(plain, merged)),
                    "largest_logit": max(float(a.abs().max()) for a in plain),
                }
            ),
        )

    def _net(self, unit: Unit) -> LmNet:
        """The net of a training, or the one before any, kept while no other was asked for."""
        if self._open[0] != unit or self._open[1] != self.models.given or self._open[2] is None:
            net = self.models.untrained(self.data) if unit.arm == FROZEN else self.models.loaded(unit, self.data)
            self._open = (unit, self.models.given, net.to(runtime.processes().device))
        return self._open[2]


def _averaged(measures: Sequence[Measure]) -> Measure:
    """The mean over the seeds of each row's number."""
    columns = zip(*(measure.values for measure in measures))
    ends = [measure.interval for measure in measures if measure.interval is not None]
    interval = (sum(low for low, _ in ends) / len(ends), sum(high for _, high in ends) / len(ends)) if ends else None
    return Measure([sum(values) / len(measures) for values in columns], measures[0].lower_is_better, interval=interval)


@torch.no_grad()
def _last_logits(net: LmNet, batch: dict[str, Tensor]) -> Tensor:
    """(pieces, vocabulary) of each piece's last token."""
    return net.lm.get_output_embeddings()(net.hidden(batch)[:, -1]).float()
