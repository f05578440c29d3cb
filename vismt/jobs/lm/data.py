"""The rows of a language-model configuration: open each set once, turn rows into tokens, make batches by number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vismt.base import console
from vismt.base.errors import UserError
from vismt.base.seeds import digest, mix_seed
from vismt.data.batching import Passes
from vismt.data.division import divide, limited, unseen
from vismt.data.set_entries import card_and_split, row_name
from vismt.data.texts.interactions import Catalogue, InteractionSet, numbered
from vismt.data.texts.text_set import TextRow, TextSet, open_texts
from vismt.engine.parts import shares
from vismt.jobs.lm.config import KIND, RECOMMENDER, LmCalibrationConfig, LmConfig, LmTaskConfig, task_of, trained_task
from vismt.llm.net import LmNet, stored_lower_states
from vismt.llm.tasks.base import Item, LmTask, context_tokens, fill_template, gather_items, naming
from vismt.llm.tasks.classes import Classes
from vismt.llm.tasks.pieces import collate_pieces, piece
from vismt.llm.tasks.recommendation import Recommendation, listed_of
from vismt.storage.files import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHE_MB = 1024  # size of the stored output of frozen blocks
OTHERS = 1024  # number of users that "shuffled-user" draws from


class LmData:
    """The rows of all tasks as tokens, the same for every arm. Sets are opened, and rows are encoded, on first use.

    fold: Fold that is tested, if the shares of a task rotate. kept: What a run folder has of `needed`, so that nets are built
    without the rows.

    Raises UserError for a card that does not exist or has no texts, and for rows that do not fit the task.
    """

    def __init__(self, config: LmConfig, tokenizer: Any, fold: int = 0, kept: JsonObject | None = None) -> None:
        self.config = config
        self.fold = fold
        self.tokenizer = tokenizer
        self.tasks: dict[str, LmTask] = {task.name: task_of(task) for task in config.tasks}
        self.trained = trained_task(config).name
        self.folds = trained_task(config).folds
        cross_fits = config.recommender is not None and config.recommender.cross_fit
        self.fitted = RECOMMENDER if cross_fits else "train"  # the part that the recommender is fitted to
        self._sections = {task.name: task for task in config.tasks}
        self._opened: dict[str, TextSet] = {}
        self._items: dict[tuple[str, str, str], list[Item]] = {}
        self._cached_bytes = 0
        self._kept = kept

    @cached_property
    def _sets(self) -> dict[str, dict[str, dict[str, list[TextSet]]]]:
        """The sets by task, part and the name under which they are reported."""
        opened = {task.name: self._open_task(task) for task in self.config.tasks}
        for name, parts in opened.items():
            counts = []
            for part, named_sets in parts.items():
                if named_sets:
                    sizes = [f"{sum(map(len, sets)):,}" for sets in named_sets.values()]
                    counts.append(f"{part} {' + '.join(sizes)}")
                for title, sets in named_sets.items():
                    classes = {of for texts in sets for of in _classes(texts, self.tasks[name])}
                    if len(classes) == 1 and "" not in classes:
                        text = f"every row of {part} '{title}' has the label '{classes.pop()}'"
                        console.stage("data", f"{name}   {text}; scores say nothing of the others")
            console.stage("data", f"{name}   {'   '.join(counts)}")
        return opened

    @cached_property
    def needed(self) -> JsonObject:
        """What nets need of the rows: the number of training rows, or titles of items and histories of other users."""
        if self._kept is not None:
            return self._kept
        task = self.tasks[self.trained]
        if isinstance(task, Classes):
            return {"rows": len(self.all_rows("train"))}
        if not isinstance(task, Recommendation):
            return {}
        histories = [history[-task.history :] for history, _ in self.interactions()]
        order = sorted(range(len(histories)), key=lambda i: mix_seed(self.config.seed, "other user", i))[:OTHERS]
        return {"titles": list(self._catalogue.titles), "others": [histories[i] for i in order]}

    def names(self, task: str, part: str) -> list[str]:
        """Return the names of the sets under which a part of a task is reported."""
        return list(self._sets[task][part])

    def rows(self, task: str, part: str, name: str) -> list[Item]:
        """Return the rows, up to the limit, of a named set of a part ("train", "validation", "test") as tokens."""
        key = (task, part, name)
        if key not in self._items:
            limit = self._limit(task, part)
            encoder = self.tasks[task]
            rows = _named_rows(self._sets[task][part][name])
            if limit is not None and not encoder.labelled:
                users = numbered([row["user"] for _, row in rows]) if encoder.by_user else [0] * len(rows)
                kept = limited(torch.tensor(users), [row_id for row_id, _ in rows], limit)
                rows = [rows[i] for i in kept.tolist()]
            items = []
            for row_id, row in rows:
                with naming(row_id):
                    items.append(encoder.encode(row_id, row, self.tokenizer))
            if limit is not None and encoder.labelled:
                kept = limited(torch.tensor([item.label for item in items]), [item.id for item in items], limit)
                items = [items[i] for i in kept.tolist()]
            if len(items) < 2:
                raise UserError(f"tasks: {task}: {part} '{name}' has {len(items)} rows; an interval needs two or more.")
            prompts, answers = (sum(any(piece.cut[of] for piece in item.pieces) for item in items) for of in (0, 1))
            if prompts or answers:
                text = f"{prompts:,} of {len(items):,} rows of {part} '{name}' lose the beginning of the prompt"
                text += f", {answers:,} the end of the answer" if answers else ""
                console.stage("data", f"{task}   {text}; length {encoder.length} cuts them")
            self._items[key] = items
        return self._items[key]

    def all_rows(self, part: str) -> list[Item]:
        """Return the rows of all sets of a part of the trained task."""
        return [item for name in self.names(self.trained, part) for item in self.rows(self.trained, part, name)]

    def _limit(self, task: str, part: str) -> int | None:
        section = self._sections[task]
        if part == "train":
            return section.limit
        general = self.config.evaluate.limit
        if section.train or section.limit is None:
            return general
        return min(section.limit, general or section.limit)

    def training(self) -> list[Item]:
        """Return the items to train on, packed if the task packs."""
        key = (self.trained, "train", "")
        if key not in self._items:
            self._items[key] = self.tasks[self.trained].training(self.all_rows("train"))
        return self._items[key]

    def forms(self) -> list[Item]:
        """Return the items of `training` in every form that a training batch may use."""
        return [form for item in self.training() for form in (item, item.hybrid) if form is not None]

    @property
    def _catalogue(self) -> Catalogue:
        """The items of a recommendation. Raises UserError if its sets are of several cards."""
        catalogues = {
            card_and_split(name)[0]: texts.catalogue
            for name, texts in self._opened.items()
            if isinstance(texts, InteractionSet)
        }
        if len(catalogues) != 1:
            raise UserError(
                f"tasks: a recommendation knows the items of one card, and its sets are of {sorted(catalogues)}; name sets of "
                "one card."
            )
        return next(iter(catalogues.values()))

    @property
    def classes(self) -> Classes:
        """The trained task, which has to be of kind 'classes'. Raises UserError for another kind."""
        task = self.tasks[self.trained]
        if not isinstance(task, Classes):
            raise UserError(f"tasks: {self.trained}: has no head on the last token; train a task of kind 'classes'.")
        return task

    def interactions(self, part: str = "train") -> list[tuple[list[int], int]]:
        """Return (history, next item) of all rows of a part of the trained task, regardless of the limit."""
        named_sets = self._sets[self.trained][part].values()
        return [(row["history"], row["next"]) for sets in named_sets for texts in sets for row in texts.rows]

    def fingerprint(self, task: str, part: str, name: str) -> str:
        """Return a digest of the rows of a set and of their task."""
        return digest(repr((self.content(task, part, name), self.protocol(task))).encode())

    def protocol(self, task: str) -> JsonObject:
        """Return how the rows of a task are asked."""
        section = self._sections[task]
        return {
            "kind": section.kind,
            "prompt": section.prompt,
            "options": section.options,
            "chat": section.chat,
            "limit": self._limit(task, "test"),
            "tokenizer": self.tokenizer.name_or_path,
        }

    def content(self, task: str, part: str, name: str) -> str:
        """Return a digest of the rows of a set, for any task."""
        return digest(" ".join(texts.content() for texts in self._sets[task][part][name]).encode())

    def calibration(self, settings: LmCalibrationConfig) -> list[dict[str, Tensor]]:
        """Return arguments of the LM's forward pass, one dict for each batch of the texts that a section names."""
        rows = _named_rows([self._open(name) for name in settings.data])
        chosen = limited(torch.zeros(len(rows)), [row_id for row_id, _ in rows], settings.rows)
        texts = [fill_template(settings.text, rows[i][1], "calibration: text") for i in chosen.tolist()]
        pieces = [piece(context_tokens(self.tokenizer, text), [], settings.length) for text in texts]
        if not all(part.ids for part in pieces):
            raise UserError(
                f"calibration: text '{settings.text}' gives rows without a token; leave them out, or add to the text."
            )
        batches = [
            collate_pieces(pieces[start : start + settings.batch]) for start in range(0, len(pieces), settings.batch)
        ]
        return [
            {"input_ids": b["ids"], "attention_mask": b["mask"].long(), "position_ids": b["positions"]} for b in batches
        ]

    def training_fingerprint(self) -> str:
        """Return a digest of the training rows."""
        limit = self._sections[self.trained].limit
        fingerprints = [self.fingerprint(self.trained, "train", name) for name in self.names(self.trained, "train")]
        return digest(repr((fingerprints, limit)).encode())

    def cache(self, items: Sequence[Item], net: LmNet, label: str) -> None:
        """Store the output of the net's frozen lower blocks in the items that lack it, if it fits into CACHE_MB.

        label: Name of the items in the console.
        """
        missing = [item for item in items if item.lower is None]
        texts = {(piece.ids, piece.documents) for item in missing for piece in item.pieces}
        tokens = sum(len(ids) for ids, _ in texts)
        lm = lm_of(net)
        size = tokens * int(lm.config.hidden_size) * lm.dtype.itemsize
        if not net.first or not missing or self._cached_bytes + size > CACHE_MB * 2**20 / self.folds:
            return
        self._cached_bytes += size
        console.stage(
            "cache", f"{label}   {tokens:,} tokens through blocks 0 to {net.first - 1}   {size / 2**20:.0f} MB"
        )
        states = iter(stored_lower_states(net, [piece for item in missing for piece in item.pieces]))
        for item in missing:
            item.lower = [next(states) for _ in item.pieces]

    def _open_task(self, task: LmTaskConfig) -> dict[str, dict[str, list[TextSet]]]:
        """Open the sets of a task and return {part: {reported name: sets}}."""
        own = self.tasks[task.name].own_rows()
        if own is not None:
            return {"train": {}, "validation": {}, "test": {own.name: [own]}}
        parts = self._open_sets(task)
        if task.train and task.kind != KIND:
            _note_repeats(task.name, parts, bool(shares(task)))
        return parts

    def _open_sets(self, task: LmTaskConfig) -> dict[str, dict[str, list[TextSet]]]:
        split_shares = shares(task)
        joined = "+".join(map(row_name, task.train))
        parts: dict[str, dict[str, list[TextSet]]] = {"train": {}, "validation": {}, "test": {}}
        for name in task.train:
            texts = self._open(name)
            divided = {"train": texts}
            if task.rotate:
                divided = _rotated(texts, split_shares, name, task.folds, self.fold)
            elif split_shares:
                divided = _divided(texts, split_shares, name, self.tasks[task.name])
            for part, rows in divided.items():
                parts[part].setdefault(joined, []).append(rows)
        for part in ("validation", "test"):
            for name in getattr(task, part):
                parts[part][row_name(name)] = [self._open(name)]
        _check_names(task.name, parts)
        for name in (*task.train, *task.validation, *task.test):
            if task.kind == KIND and not isinstance(self._open(name), InteractionSet):
                raise UserError(f"tasks: {task.name}: '{name}' has no items; '{KIND}' needs sets of kind interactions.")
        if task.train and self.fitted == RECOMMENDER:
            _cross_fit(parts)
        return parts

    def _open(self, name: str) -> TextSet:
        if name not in self._opened:
            self._opened[name] = open_texts(*card_and_split(name))
        return self._opened[name]


def lm_of(net: LmNet) -> PreTrainedModel:
    """Return the LM of a net with the type that `create_lm` gives it. LmNet takes any module that passes `check_logits`."""
    return cast("PreTrainedModel", net.lm)


def _named_rows(sets: Sequence[TextSet]) -> list[tuple[str, TextRow]]:
    return [(f"{texts.name}:{i}", row) for texts in sets for i, row in zip(texts.ids, texts.rows)]


def _classes(texts: TextSet, task: LmTask) -> list[str]:
    """Return the class of each row."""
    classes = []
    for row_id, row in zip(texts.ids, texts.rows):
        with naming(f"{texts.name}:{row_id}"):
            classes.append(task.class_of(row))
    return classes


def _check_names(task: str, parts: Mapping[str, Mapping[str, Sequence[TextSet]]]) -> None:
    """Raise UserError if two rows of joined sets have the same name, because records are kept by names."""
    for part, named_sets in parts.items():
        for title, sets in named_sets.items():
            names = Counter(f"{texts.name}:{i}" for texts in sets for i in texts.ids)
            twice = next((name for name, count in names.items() if count > 1), None)
            if twice is not None:
                raise UserError(
                    f"tasks: {task}: two rows of {part} '{title}' are called '{twice}', as two of its sets have one name, or "
                    "rows in common; rename a file, or name each row once."
                )


def _divided(texts: TextSet, split_shares: Mapping[str, float], name: str, task: LmTask) -> dict[str, TextSet]:
    if isinstance(texts, InteractionSet):
        users = torch.tensor(texts.users)
        parts = divide(torch.zeros(int(users.max()) + 1, dtype=torch.int64), split_shares, name)
        parts = {part: torch.isin(users, chosen).nonzero().flatten() for part, chosen in parts.items()}
    else:
        classes = _classes(texts, task)
        labels = torch.tensor(numbered(classes), dtype=torch.int64)
        parts = divide(labels, split_shares, name, classes=list(dict.fromkeys(classes)))
    return {part: texts.take(index.tolist()) for part, index in parts.items()}


def _note_repeats(task: str, parts: Mapping[str, Mapping[str, Sequence[TextSet]]], divided: bool) -> None:
    """Print how many training rows are also in another part. Raise UserError if all are."""
    contents = {
        part: [repr(row) for sets in of.values() for texts in sets for row in texts.rows] for part, of in parts.items()
    }
    count = unseen(
        contents["train"], contents["validation"] + contents["test"], f"tasks: {task}", divided=divided
    ).count(False)
    if count:
        text = f"{count:,} of {len(contents['train']):,} training rows are also in validation or test, with every field"
        console.stage("data", f"{task}   {text}")


def _rotated(texts: TextSet, split_shares: Mapping[str, float], name: str, folds: int, fold: int) -> dict[str, TextSet]:
    """Return the parts of a set of interactions with one share of the users as the test, and the others divided as usual."""
    users = torch.tensor(cast("InteractionSet", texts).users)
    count = int(users.max()) + 1
    tested = torch.arange(count) * folds // count == fold
    test, others = tested.nonzero().flatten(), (~tested).nonzero().flatten()
    rest = {part: share * count / len(others) for part, share in split_shares.items() if part != "test"}
    divided = divide(torch.zeros_like(others), rest, name) if rest else {"train": torch.arange(len(others))}
    parts = {"test": test, **{part: others[places] for part, places in divided.items()}}
    return {part: texts.take(torch.isin(users, chosen).nonzero().flatten().tolist()) for part, chosen in parts.items()}


def _cross_fit(parts: dict[str, dict[str, list[TextSet]]]) -> None:
    """Move the rows of about half of the training users to the part of the recommender, by a hash of the user's name."""
    train, parts["train"], parts[RECOMMENDER] = parts["train"], {}, {}
    for name, sets in train.items():
        for texts in sets:
            half = [mix_seed(0, "cross-fit", row["user"]) % 2 for row in texts.rows]
            for part, wanted in (("train", 0), (RECOMMENDER, 1)):
                kept = [number for number, side in enumerate(half) if side == wanted]
                parts[part].setdefault(name, []).append(texts.take(kept))


class ItemBatches:
    """Return batch k of `of` from `gather_items`, in the form that the task uses there. Each pass over the items has a new order.

    If a task samples users, the passes are over users, with one item of each user.
    """

    def __init__(self, items: Sequence[Item], batch: int, task: LmTask, of: int, *, seed: int) -> None:
        self.task = task
        self.of = of
        self.seed = seed
        users = numbered([listed_of(item).user for item in items]) if task.by_user else range(len(items))
        self._groups: dict[int, list[Item]] = {}
        for user, item in zip(users, items):
            self._groups.setdefault(user, []).append(item)
        self._passes = Passes(len(self._groups), batch, seed=seed, unit="users" if task.by_user else "rows")

    def __call__(self, number: int) -> dict[str, Tensor]:
        groups = [self._groups[i] for i in self._passes(number).tolist()]
        places = [mix_seed(self.seed, "row", number, place) % len(group) for place, group in enumerate(groups)]
        chosen = [group[place] for group, place in zip(groups, places)]
        return gather_items(self.task.form(chosen, number, self.of, self.seed))
