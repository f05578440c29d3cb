"""What a task on a language model gives: rows of text as tokens, a loss, a record for each row, measures over the records.

A measure is a number for each row whose mean is the reported value, so that its interval, and the paired difference of two
models, come from the rows. For a quotient of sums (nats a token) and for the calibration error they are first-order effects:

    R = sum nats / sum tokens          psi_i = R + (nats_i - R tokens_i) n / sum tokens
    perplexity e^R                     psi_i = e^R (1 + (nats_i - R tokens_i) n / sum tokens)
    ECE = sum_bins |S_b| / n           psi_i = sign(S_b(i)) (right_i - confidence_i),   S_b = sum_b (right - confidence)
"""

from __future__ import annotations

import math
import string
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vismt.errors import UserError, near
from vismt.llm.net import Batch, LmNet
from vismt.llm.sasrec import padded
from vismt.llm.tasks.pieces import Piece, collate
from vismt.llm.temperature import fit_temperature
from vismt.seeds import mix_seed

Record = dict[str, Any]
BINS, ABSENT = 15, -1e6


@dataclass(frozen=True)
class Listed:
    """A history of items, the candidates for the next one, and the candidates' titles."""

    history: list[int]
    candidates: list[int]
    titles: list[str]


@dataclass
class Item:
    """One row as tokens. label: its class, or which of its answers is right; gold: answers that count as right.

    sizes: characters of each answer. lower: what block `first` receives of each piece, where that is cached. listed: of a
    recommendation; hybrid: the same row with the places of item vectors in its prompt.
    """

    id: str
    pieces: list[Piece]
    label: int = 0
    gold: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    lower: list[Tensor] | None = None
    listed: Listed | None = None
    hybrid: Item | None = None


def gather(items: Sequence[Item]) -> dict[str, Tensor]:
    """`collate` of all pieces of some items, with "row" (pieces,), "label" (items,) and "size" (items, most answers), int64.

    Of recommendations also "history" int64 (items, longest), -1 after the last, and "key" int64 (items,), a number of the name.
    """
    cached = all(item.lower is not None for item in items)
    lower = [states for item in items for states in item.lower or []] if cached else None
    batch = collate([one for item in items for one in item.pieces], lower)
    batch["row"] = torch.tensor([number for number, item in enumerate(items) for _ in item.pieces])
    batch["label"] = torch.tensor([item.label for item in items])
    if all(item.sizes for item in items):
        batch["size"] = pad_sequence([torch.tensor(item.sizes) for item in items], True, 1)
    if all(item.listed is not None for item in items):
        batch["history"] = padded([item.listed.history for item in items])
        batch["key"] = torch.tensor([mix_seed(0, "row", item.id) >> 31 for item in items])
    return batch


@dataclass(frozen=True)
class Measure:
    """values by row, their mean is the value.

    counts: each value is 0 or 1, so that one model's interval is Wilson's. interval: (low, high) of 95 % where that of a mean
    is wrong, and with it paired differences of rows.
    """

    values: list[float]
    lower_is_better: bool = False
    counts: bool = False
    interval: tuple[float, float] | None = None


class Task(ABC):
    """prompt: a template with the row's fields in braces. length: the largest number of tokens of a piece."""

    head = False  # whether it needs a head on the last token
    reads = True  # whether rows are scored by reading them, for which the output of frozen blocks can be kept
    labelled = True  # whether a limit spreads the rows over the labels

    def __init__(self, prompt: str, length: int = 512) -> None:
        if length < 2:
            raise UserError(f"tasks: length {length}; it must be at least 2 tokens.")
        self.prompt, self.length = prompt, length

    @property
    @abstractmethod
    def about(self) -> str:
        """What is asked, for the report."""

    @abstractmethod
    def encode(self, name: str, row: Mapping[str, Any], tokenizer: Any) -> Item:
        """A row of text as tokens. Raises UserError for fields that the row lacks and labels that are not known."""

    def training(self, items: Sequence[Item]) -> list[Item]:
        """What is trained on, of all rows."""
        return list(items)

    def form(self, items: Sequence[Item], number: int, of: int, seed: int) -> list[Item]:
        """The rows of training batch `number` of `of` in the form in which they are shown then."""
        return list(items)

    def shown(self, net: LmNet, items: Sequence[Item]) -> list[Item]:
        """The rows in the form in which this net is asked."""
        return list(items)

    @abstractmethod
    def loss(self, net: LmNet, batch: Batch) -> dict[str, Tensor]:
        """{"loss", ...} scalars of a batch of `gather`."""

    @abstractmethod
    def score(self, net: LmNet, batch: Batch, items: Sequence[Item]) -> list[Record]:
        """A record, fit for JSON, of each item of a batch."""

    @abstractmethod
    def measures(self, records: Sequence[Record]) -> dict[str, Measure]:
        """Measures by name."""

    @abstractmethod
    def quality(self, records: Sequence[Record]) -> float:
        """One number in [0, 1] by which rates are chosen, the higher the better: e^-NLL where there is an NLL."""


def fill(template: str, row: Mapping[str, Any], what: str) -> str:
    """The template with the row's fields; UserError for one that it lacks."""
    try:
        return template.format_map(row)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        names = [name for _, name, _, _ in _parts(template, what) if name]
        lacking = next((name for name in names if name.split("[")[0].split(".")[0] not in row), None)
        told = f"no field '{lacking}'.{near(str(lacking), row)}" if lacking else f"it cannot be filled ({error!r})."
        raise UserError(f"{what} '{template}': {told}") from error


def has_fields(template: str, row: Mapping[str, Any], what: str) -> bool:
    """Whether the row has all fields of the template."""
    return all(name is None or name.split("[")[0].split(".")[0] in row for _, name, _, _ in _parts(template, what))


def _parts(template: str, what: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{what} '{template}': is no template ({error}); double a brace that is meant.") from error


def context_tokens(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a prompt as the tokenizer begins one, without an end-of-text token after it."""
    ids = list(tokenizer(text)["input_ids"])
    return (
        ids[:-1]
        if ids and ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id != tokenizer.bos_token_id
        else ids
    )


def answer_tokens(tokenizer: Any, text: str) -> list[int]:
    """Tokens of what follows a prompt."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def probability_measures(records: Sequence[Record]) -> dict[str, Measure]:
    """Of records with "label" and "log_p", log-probabilities of the choices, of which rows may have different numbers.

    Every row weighs the same, whatever batch it was in; see vismt.llm.metrics.
    """
    from vismt.llm.metrics import binned_gaps, ece_interval, scores  # which loads torchmetrics

    logs, labels = choices(records)
    found = scores(logs.exp(), labels)
    gaps = binned_gaps(logs.exp(), labels, BINS)
    effect = (gaps * gaps.sum(0).sign()).sum(1)
    _, low, high = ece_interval(logs.exp(), labels, resamples=500)
    return {
        "accuracy": Measure(found.correct.tolist()),
        "ECE-15": Measure(effect.tolist(), True, interval=(low, high)),
        "NLL in nats": Measure(found.nlls.tolist(), True),
        "Brier": Measure(found.briers.tolist(), True),
        **({} if math.isnan(found.auroc) else {"AUROC": Measure(found.orders.tolist())}),
    }


def choices(records: Sequence[Record]) -> tuple[Tensor, Tensor]:
    """Log-probabilities fp64 (n, k) of records, -inf where a row has fewer choices, and labels int64 (n,)."""
    width = max(len(record["log_p"]) for record in records)
    logs = [[*record["log_p"], *[-math.inf] * (width - len(record["log_p"]))] for record in records]
    return torch.tensor(logs, dtype=torch.float64), torch.tensor([record["label"] for record in records])


def tempered(records: Sequence[Record], validation: Sequence[Record]) -> list[Record]:
    """The records at the temperature of least NLL on validation records: log-probabilities of softmax(log_p / T)."""
    temperature = fit_temperature(*_finite(*choices(validation)))
    return [
        {**record, "log_p": (torch.tensor(record["log_p"], dtype=torch.float64) / temperature).log_softmax(0).tolist()}
        for record in records
    ]


def _finite(logs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """For the fit: what is no choice is as improbable at any temperature."""
    return logs.clamp_min(ABSENT), labels


def ratio_measures(records: Sequence[Record]) -> dict[str, Measure]:
    """Of records with "nats" and "tokens": nats a token over all tokens of all rows, and the perplexity."""
    tokens = sum(record["tokens"] for record in records)
    mean = math.fsum(record["nats"] for record in records) / tokens
    shift = [(record["nats"] - mean * record["tokens"]) * len(records) / tokens for record in records]
    perplexity = math.exp(mean)
    return {
        "NLL in nats a token": Measure([mean + value for value in shift], True),
        "perplexity": Measure([perplexity * (1 + value) for value in shift], True),
    }


def mean_of(measure: Measure) -> float:
    """The value of a measure."""
    return math.fsum(measure.values) / len(measure.values)


class LmObjective(nn.Module):
    """objective(batch) -> the task's losses; `step()` follows each optimiser step."""

    def __init__(self, net: LmNet, task: Task) -> None:
        super().__init__()
        self.net, self.task = net, task

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.task.loss(self.net, batch)

    def step(self) -> None:
        """Nothing follows a step."""
