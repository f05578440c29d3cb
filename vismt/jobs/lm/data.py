"""The rows of a language-model configuration: sets opened once, rows turned into tokens, batches by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vismt import console
from vismt.data.batching import Passes
from vismt.data.interactions import Catalogue, InteractionSet
from vismt.data.splits import divide, limited
from vismt.data.texts import TextSet, open_texts
from vismt.engine.splits import shares
from vismt.errors import UserError
from vismt.jobs.lm.config import KIND, LmCalibrationConfig, LmConfig, LmTaskConfig, task_of, trained_task
from vismt.llm.net import LmNet
from vismt.llm.tasks.base import Item, Task, context_tokens, fill, gather
from vismt.llm.tasks.pieces import IGNORE, collate, piece
from vismt.seeds import digest


class LmData:
    """tasks: by name. Sets are opened here, rows become tokens when they are asked for, the same for every arm.

    Raises UserError for a card that is not here or holds no texts, and for rows that do not fit the task.
    """

    def __init__(self, config: LmConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.tasks: dict[str, Task] = {task.name: task_of(task) for task in config.tasks}
        self.trained = trained_task(config).name
        self._sections = {task.name: task for task in config.tasks}
        self._opened: dict[str, TextSet] = {}
        self._sets = {task.name: self._open_task(task) for task in config.tasks}
        self._items: dict[tuple[str, str, str], list[Item]] = {}
        self._held = 0
        for name, parts in self._sets.items():
            numbers = {
                part: [f"{sum(map(len, own)):,}" for own in found.values()] for part, found in parts.items() if found
            }
            counts = "   ".join(f"{part} {' + '.join(own)}" for part, own in numbers.items())
            console.stage("data", f"{name}   {counts}")

    def names(self, task: str, part: str) -> list[str]:
        """What is reported on its own in a part of a task."""
        return list(self._sets[task][part])

    def rows(self, task: str, part: str, name: str) -> list[Item]:
        """The rows of a named set of a part ("train", "validation", "test") as tokens, no more than the limit says."""
        key = (task, part, name)
        if key not in self._items:
            limit, made = self._limit(task, part), self.tasks[task]
            rows = [
                (f"{texts.name}:{i}", r)
                for texts in self._sets[task][part][name]
                for i, r in zip(texts.ids, texts.rows)
            ]
            if limit is not None and not made.labelled:
                rows = [
                    rows[i] for i in limited(torch.zeros(len(rows)), [row_id for row_id, _ in rows], limit).tolist()
                ]
            items = [made.encode(row_id, row, self.tokenizer) for row_id, row in rows]
            if limit is not None and made.labelled:
                kept = limited(torch.tensor([item.label for item in items]), [item.id for item in items], limit)
                items = [items[i] for i in kept.tolist()]
            if len(items) < 2:
                raise UserError(f"tasks: {task}: {part} '{name}' has {len(items)} rows; an interval needs two or more.")
            self._items[key] = items
        return self._items[key]

    def _limit(self, task: str, part: str) -> int | None:
        section, general = self._sections[task], self.config.evaluate.limit
        if part == "train":
            return section.limit
        return general if section.train or section.limit is None else min(section.limit, general or section.limit)

    def training(self) -> list[Item]:
        """What is trained on, packed where the task packs."""
        key = (self.trained, "train", "")
        if key not in self._items:
            rows = [
                item for name in self.names(self.trained, "train") for item in self.rows(self.trained, "train", name)
            ]
            self._items[key] = self.tasks[self.trained].training(rows)
        return self._items[key]

    def forms(self) -> list[Item]:
        """Every form in which the training may show what `training` gives."""
        return [form for item in self.training() for form in (item, item.hybrid) if form is not None]

    @property
    def catalogue(self) -> Catalogue:
        """The items of a recommendation; UserError where its sets are not of one card."""
        found = {
            name.partition(":")[0]: texts.catalogue
            for name, texts in self._opened.items()
            if isinstance(texts, InteractionSet)
        }
        if len(found) != 1:
            raise UserError(
                f"tasks: a recommendation knows the items of one card, here are {sorted(found)}; name sets of one."
            )
        return next(iter(found.values()))

    def interactions(self) -> list[tuple[list[int], int]]:
        """(history, next item) of all training rows, whatever the limit."""
        own = self._sets[self.trained]["train"].values()
        return [(row["history"], row["next"]) for sets in own for texts in sets for row in texts.rows]

    @property
    def num_train(self) -> int:
        """Training rows."""
        return sum(len(self.rows(self.trained, "train", name)) for name in self.names(self.trained, "train"))

    def fingerprint(self, task: str, part: str, name: str) -> str:
        """What tells the rows of a set, and how they are asked, from any others."""
        held = [texts.content() for texts in self._sets[task][part][name]]
        section = self._sections[task]
        asked = (section.kind, section.prompt, sorted(section.options.items(), key=str), self._limit(task, "test"))
        return digest(repr((held, asked, self.tokenizer.name_or_path)).encode())

    def calibration(self, asked: LmCalibrationConfig, labels: bool = False) -> list[dict[str, Tensor]]:
        """Arguments of the LM's forward pass on the texts that a section names; labels: every token but a text's first."""
        held = [
            (f"{texts.name}:{i}", row) for texts in map(self._open, asked.data) for i, row in zip(texts.ids, texts.rows)
        ]
        chosen = limited(torch.zeros(len(held)), [name for name, _ in held], asked.rows)
        texts = [fill(asked.text, held[i][1], "calibration: text") for i in chosen.tolist()]
        pieces = [piece(context_tokens(self.tokenizer, text), [], asked.length) for text in texts]
        batches = [collate(pieces[start : start + asked.batch]) for start in range(0, len(pieces), asked.batch)]
        found = [
            {"input_ids": b["ids"], "attention_mask": b["mask"].long(), "position_ids": b["positions"]} for b in batches
        ]
        if not labels:
            return found
        for batch in found:
            batch["labels"] = batch["input_ids"].masked_fill(batch["position_ids"] == 0, IGNORE)
            if not bool((batch["labels"] != IGNORE).any()):
                raise UserError(
                    f"calibration: text '{asked.text}' gives rows of one token, which predict nothing; lengthen it."
                )
        return found

    def training_fingerprint(self) -> str:
        """What tells the training rows from any others."""
        limit = self._sections[self.trained].limit
        held = [self.fingerprint(self.trained, "train", name) for name in self.names(self.trained, "train")]
        return digest(repr((held, limit)).encode())

    def cache(self, items: Sequence[Item], net: LmNet, told: str) -> None:
        """Give items the output of the net's frozen lower blocks, unless they have it or memory does not hold it."""
        missing = [item for item in items if item.lower is None]
        tokens = sum(len(piece.ids) for item in missing for piece in item.pieces)
        size = tokens * net.lm.config.hidden_size * net.lm.dtype.itemsize
        if not net.first or not missing or (self._held + size) > self.config.model.cache_mb * 2**20:
            return
        self._held += size
        console.stage(
            "cache", f"{told}   {tokens:,} tokens through blocks 0 to {net.first - 1}   {size / 2**20:.0f} MB"
        )
        states = iter(net.lower_states([piece for item in missing for piece in item.pieces]))
        for item in missing:
            item.lower = [next(states) for _ in item.pieces]

    def _open_task(self, task: LmTaskConfig) -> dict[str, dict[str, list[TextSet]]]:
        """{part: {reported name: sets}}."""
        kept, joined = shares(task), "+".join(task.train)
        if kept and any(isinstance(self._open(name), InteractionSet) for name in task.train):
            raise UserError(f"tasks: {task.name}: a share would cut through users; name splits in validation and test.")
        parts: dict[str, dict[str, list[TextSet]]] = {"train": {}, "validation": {}, "test": {}}
        for name in task.train:
            texts = self._open(name)
            for part, index in divide(torch.zeros(len(texts), dtype=torch.int64), kept, name).items():
                parts[part].setdefault(joined, []).append(texts.take(index.tolist()) if kept else texts)
        for part in ("validation", "test"):
            for name in getattr(task, part):
                parts[part][name] = [self._open(name)]
        for name in (*task.train, *task.validation, *task.test):
            if task.kind == KIND and not isinstance(self._open(name), InteractionSet):
                raise UserError(
                    f"tasks: {task.name}: '{name}' holds no items; '{KIND}' needs sets of kind interactions."
                )
        return parts

    def _open(self, name: str) -> TextSet:
        if name not in self._opened:
            card, _, split = name.partition(":")
            self._opened[name] = open_texts(card, split or "all")
        return self._opened[name]


class ItemBatches:
    """batches(k) -> a batch of `gather`: passes over all items, each in an order of its own, in the form of batch k of `of`."""

    def __init__(self, items: Sequence[Item], batch: int, task: Task, of: int, *, seed: int) -> None:
        self.items, self.task, self.of, self.seed = items, task, of, seed
        self._passes = Passes(len(items), batch, seed=seed, unit="rows")

    def __call__(self, number: int) -> dict[str, Tensor]:
        chosen = [self.items[i] for i in self._passes(number).tolist()]
        return gather(self.task.form(chosen, number, self.of, self.seed))
