"""The interface of a task on a language model: rows of text as tokens, a loss, a record for each row, and measures.

A measure is a number for each row whose mean is the reported value. Its interval, and the paired difference of two models,
therefore come from the rows. For a quotient of sums (nats a token) and for the calibration error, the numbers are first-order
effects:

    R = sum nats / sum tokens          psi_i = R + (nats_i - R tokens_i) n / sum tokens
    perplexity e^R                     psi_i = e^R (1 + (nats_i - R tokens_i) n / sum tokens)
    ECE = sum_bins |S_b| / n           psi_i = sign(S_b(i)) (right_i - confidence_i),   S_b = sum_b (right - confidence)
"""

from __future__ import annotations

import math
import string
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vismt.base.errors import UserError, near, shown_value
from vismt.base.seeds import mix_seed
from vismt.data.texts.text_set import TextRow, TextSet
from vismt.llm.ilora.recommenders import pad_histories
from vismt.llm.net import LmNet, TextBatch
from vismt.llm.tasks.pieces import Piece, collate_pieces, piece
from vismt.storage.files import JsonObject
from vismt.uncertainty.features import Form
from vismt.uncertainty.intervals import NUMBER, Measure
from vismt.uncertainty.probability_metrics import example_measures, example_values, scores

Record = JsonObject
REPLY = "reply"  # stands for an answer if the text after it is wanted
BEFORE = 64  # number of letters before a text that decide how it is tokenised
CARD_ALONE = "predict: the trained task ranks the items of its card, and takes no rows of text."


class Tokenizer(Protocol):
    """What the tasks read of a tokenizer of transformers."""

    bos_token_id: int | None
    eos_token_id: int | None
    all_special_ids: list[int]

    def __call__(self, text: str | list[str], *, add_special_tokens: bool = True) -> Mapping[str, Any]: ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...

    def get_added_vocab(self) -> dict[str, int]: ...

    def apply_chat_template(
        self, conversation: list[Mapping[str, str]], *, add_generation_prompt: bool, tokenize: bool
    ) -> object: ...

    def batch_decode(self, sequences: Tensor, *, skip_special_tokens: bool) -> list[str]: ...


@dataclass(frozen=True)
class Listed:
    """A user's history of items, the candidates for the next item, and the titles of the candidates."""

    user: str
    history: list[int]
    candidates: list[int]
    titles: list[str]


@dataclass
class Item:
    """One row as tokens.

    label: Class, or number of the right answer. gold: Answers that count as right. sizes: Numbers of characters of each answer.
    lower: Input of block `first` for each piece, if it is cached. listed: History and candidates of a recommendation. hybrid:
    The same row with positions for item vectors in its prompt.
    """

    id: str
    pieces: list[Piece]
    label: int = 0
    gold: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    lower: list[Tensor] | None = None
    listed: Listed | None = None
    hybrid: Item | None = None


def gather_items(items: Sequence[Item]) -> dict[str, Tensor]:
    """Collate all pieces of some items into a batch.

    Return the tensors of `collate_pieces` with "row" (pieces,), "label" (items,) and "size" (items, most answers), int64.
    Recommendations also have "history" int64 (items, longest), with -1 after the last item, and "key" int64 (items,), a hash of
    the name.
    """
    cached = all(item.lower is not None for item in items)
    lower = [states for item in items for states in item.lower or []] if cached else None
    batch = collate_pieces([piece for item in items for piece in item.pieces], lower)
    batch["row"] = torch.tensor([number for number, item in enumerate(items) for _ in item.pieces])
    batch["label"] = torch.tensor([item.label for item in items])
    if all(item.sizes for item in items):
        batch["size"] = pad_sequence([torch.tensor(item.sizes) for item in items], True, 1)
    listed = [item.listed for item in items if item.listed is not None]
    if len(listed) == len(items):
        batch["history"] = pad_histories([entry.history for entry in listed])
        batch["key"] = torch.tensor([mix_seed(0, "row", item.id) >> 31 for item in items])
    return batch


@dataclass(frozen=True)
class Writing:
    """How a language model writes.

    temperature: 0 takes the likeliest token. seed: Seed of the draws.
    """

    new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """The answer to a row: the text that was written, or the choices with their log-probabilities fp64 (k,)."""

    text: str | None = None
    choices: Sequence[str] = ()
    log_p: Tensor | None = None


class LmTask(ABC):
    """A task.

    prompt: Template with fields of the row in braces. length: Largest number of tokens in a piece.
    """

    head = False  # whether the task needs a head on the last token
    reads = True  # whether rows are scored without generation, so that the output of frozen blocks can be cached
    labelled = True  # whether a limit on the rows is spread over the labels
    chat = False  # whether the prompt is the user's turn in the chat template of the tokenizer
    documents = False  # whether rows hold several documents, trees or packs (documents.py)
    own = False  # whether the task has rows of its own and takes no sets (`own_rows`)
    by_user = False  # whether a limit on the rows is spread over users, and batches draw users

    def __init__(self, prompt: str, length: int = 512) -> None:
        if length < 2:
            raise UserError(f"tasks: length {length}; it must be at least 2 tokens.")
        self.prompt = prompt
        self.length = length

    @property
    @abstractmethod
    def about(self) -> str:
        """Return a short description of the task for the report."""

    @abstractmethod
    def encode(self, name: str, row: TextRow, tokenizer: Tokenizer) -> Item:
        """Return a row of text as tokens. Raise UserError for missing fields and unknown labels."""

    def class_of(self, row: Mapping[str, object]) -> str:
        """Return the class of a row. Every part of a divided set needs examples of every class. "" stands for no class."""
        return ""

    def own_rows(self) -> TextSet | None:
        """Return the rows of a task that has rows of its own. Return None for a task that takes sets."""
        return None

    def context(self, row: TextRow, tokenizer: Tokenizer) -> tuple[list[int], str, str]:
        """Return the tokens of the prompt of a row, the text that an answer follows, and the spaces that begin the answer.

        The spaces at the end of a prompt begin the answer, as in lm-eval-harness, because an LM knows " word" as one token. In
        a chat, the template writes what stands between the turns, and blanks at the end of the prompt are left out.
        """
        text = fill_template(self.prompt, row, "tasks: prompt")
        if self.chat:
            text = chat_text(tokenizer, [{"role": "user", "content": text.rstrip()}])
            return list(tokenizer(text, add_special_tokens=False)["input_ids"]), text, ""
        text, spaces = split_spaces(text)
        return context_tokens(tokenizer, text), text, spaces

    def asked(self, name: str, ids: Sequence[int]) -> Item:
        """Return the last tokens of a prompt as a row without counted tokens. Raise UserError if there are none."""
        if not ids:
            raise UserError(
                f"tasks: row '{name}' has a prompt without a token; leave the row out, or add to the prompt."
            )
        return Item(name, [piece(ids, [], self.length)])

    def prompt_end(self, tokenizer: Tokenizer) -> str:
        """Return the end of every prompt. If the end is a field, return any letter."""
        if self.chat:
            return chat_text(tokenizer, [{"role": "user", "content": self.prompt}])
        return self.prompt.rpartition("}")[2] or "a"

    def training(self, items: Sequence[Item]) -> list[Item]:
        """Return the items to train on, made from the items of all training rows."""
        return list(items)

    def form(self, items: Sequence[Item], number: int, of: int, seed: int) -> list[Item]:
        """Return the items of training batch `number` of `of` in the form that the batch uses."""
        return list(items)

    def shown(self, net: LmNet, items: Sequence[Item]) -> list[Item]:
        """Return the items in the form in which this net is evaluated."""
        return list(items)

    @abstractmethod
    def loss(self, net: LmNet, batch: TextBatch) -> dict[str, Tensor]:
        """Return scalars {"loss", ...} for a batch from `gather_items`."""

    def examples(self, batch: TextBatch) -> Tensor:
        """Return the number of rows or tokens over which the loss of a batch is a mean, as a scalar."""
        return torch.tensor(len(batch["label"]), device=batch["label"].device)

    @abstractmethod
    def score(self, net: LmNet, batch: TextBatch, items: Sequence[Item]) -> list[Record]:
        """Return a record for each item of a batch, as a dictionary that JSON can store."""

    @abstractmethod
    def measures(self, records: Sequence[Record]) -> dict[str, Measure]:
        """Return the measures by name."""

    def ask(self, name: str, row: TextRow, tokenizer: Tokenizer) -> Item:
        """Return a row as tokens for `reply`.

        The row needs no answer. Raise UserError for tasks that take no rows of the user.
        """
        raise UserError(CARD_ALONE)

    def reply(
        self, net: LmNet, batch: TextBatch, rows: Sequence[Mapping[str, object]], tokenizer: Tokenizer, how: Writing
    ) -> list[Reply]:
        """Return the answers to the rows of a batch of `ask`: texts, or log-probabilities of named choices."""
        raise UserError(CARD_ALONE)

    def quality(self, records: Sequence[Record]) -> float:
        """Return a number in [0, 1] for the choice of the learning rate, higher is better.

        The default is e^-NLL, the geometric mean of the probability of the right answer.
        """
        return math.exp(-self.measures(records)["NLL in nats"].score)


@contextmanager
def naming(row: str) -> Iterator[None]:
    """Name the row in a UserError that does not name it."""
    try:
        yield
    except UserError as error:
        if row in str(error):
            raise
        raise UserError(f"row '{row}': {error}") from error


class _Filler(string.Formatter):
    """Fills a template with texts and numbers. A list or an object has no text of its own."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, (list, dict)):
            raise TypeError(
                f"{shown_value(value)} is a {type(value).__name__}; name a place in it, such as {{field[0]}}"
            )
        return str(super().format_field(value, format_spec))


def fill_template(template: str, row: Mapping[str, object], what: str) -> str:
    """Return the template filled with the fields of a row. Raise UserError for a field that is missing, null or a list."""
    fields = fields_of(template, what)
    null = next((field for field in fields if row.get(field, "") is None), None)
    if null is not None:
        raise UserError(f"{what} '{template}': field '{null}' of a row is null; give it a text, or leave the row out.")
    try:
        return _Filler().vformat(template, (), row)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        missing = [field for field in fields if field and field not in row]
        reason = (
            f"no field '{missing[0]}'.{near(missing[0], row)}"
            if missing
            else f"it cannot be filled ({shown_value(error)})."
        )
        raise UserError(f"{what} '{template}': {reason}") from error


def split_spaces(text: str) -> tuple[str, str]:
    """Return a text without the spaces at its end, and these spaces."""
    kept = text.rstrip(" ")
    return kept, text[len(kept) :]


def has_fields(template: str, row: Mapping[str, object], what: str) -> bool:
    """Return whether a row has all fields of a template, and all places in lists that the template names, none of them null."""
    if any(row.get(field) is None for field in fields_of(template, what)):
        return False
    try:
        template.format_map(row)
    except IndexError:
        return False
    except (KeyError, ValueError, AttributeError, TypeError):
        return True  # `fill` says what is wrong
    return True


def fields_of(template: str, what: str) -> list[str]:
    """Return the names of the fields of a template, without their indices and attributes."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"{what} '{template}': is not a template ({error}); double a literal brace.") from error
    return [name.split("[")[0].split(".")[0] for name in names]


def context_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a prompt with the special tokens before it, without an end-of-text token after it."""
    ids = list(tokenizer(text)["input_ids"])
    ends = bool(ids) and ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id != tokenizer.bos_token_id
    return ids[:-1] if ends else ids


def chat_text(tokenizer: Tokenizer, turns: Sequence[Mapping[str, str]], *, prompt: bool = True) -> str:
    """Return turns as the chat template writes them.

    prompt: Whether to add the beginning of the assistant's next turn.

    Raise UserError for a tokenizer without a template, and for turns that the template refuses.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "tasks: chat: the tokenizer has no chat template; write the turns in the prompt, and leave chat out."
        )
    try:
        return str(tokenizer.apply_chat_template(list(turns), add_generation_prompt=prompt, tokenize=False))
    except Exception as error:  # templates raise errors of their own
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(f"tasks: the chat template refuses the turns {roles} ({error}).") from error


def turn_end(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens by which the chat template ends the assistant's turn, up to a special token. [] means no such token."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": REPLY}]
    end = chat_text(tokenizer, turns, prompt=False).rpartition(REPLY)[2]
    ids = answer_tokens(tokenizer, end, REPLY)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    place = next((place for place, token in enumerate(ids) if token in special), -1)
    return ids[: place + 1]


def answer_tokens(tokenizer: Tokenizer, text: str, after: str = "a") -> list[int]:
    """Return the tokens of `text` after the text `after`, without special tokens.

    Both texts are tokenised together and split, since SentencePiece tokenizers begin a text of its own with another "▁". If a
    token would reach over the border (" " before "word"), the text is split from a new line or a letter.
    """
    for before in (after[-BEFORE:], "\n", "a"):
        start, both = tokenizer([before, before + text], add_special_tokens=False)["input_ids"]
        if both[: len(start)] == start:
            return list(both[len(start) :])
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def probability_measures(records: Sequence[Record]) -> dict[str, Measure]:
    """Return the probability measures of records with "label" and "log_p", the log-probabilities of the choices.

    Rows may have different numbers of choices. Every row has the same weight, in whatever batch it was. See
    vismt.uncertainty.probability_metrics.
    """
    logs, labels = choices(records)
    result = scores(logs.exp(), labels)
    # A choice that a row does not have has the smallest probability.
    values = example_values(logs.clamp_min(math.log(torch.finfo(logs.dtype).tiny)), labels)
    ids = [str(record["id"]) for record in records]
    measures = [
        Measure("accuracy", by_row(records, result.correct.tolist())),
        *example_measures(ids, values, result.correct),
    ]
    if not math.isnan(result.auroc):
        measures.append(Measure("AUROC", by_row(records, result.orders.tolist()), NUMBER, ranks=True))
    return {measure.metric: measure for measure in measures}


def item_names(item: Item) -> Record:
    """Return the id of a row and, for a recommendation, its user."""
    return {"id": item.id} if item.listed is None else {"id": item.id, "user": item.listed.user}


def users_of(records: Sequence[Record]) -> dict[str, str]:
    """Return the user of each row by its id. Return {} if no user has two rows."""
    users = {str(record["id"]): str(record.get("user", record["id"])) for record in records}
    return users if len(set(users.values())) < len(users) else {}


def by_row(records: Sequence[Record], values: Sequence[float]) -> dict[str, float]:
    """Return the value of each record by its id."""
    return {str(record["id"]): value for record, value in zip(records, values, strict=True)}


def choices(records: Sequence[Record]) -> tuple[Tensor, Tensor]:
    """Return log-probabilities fp64 (n, k) of records, with -inf for absent choices, and labels int64 (n,)."""
    width = max(len(record["log_p"]) for record in records)
    logs = [[*record["log_p"], *[-math.inf] * (width - len(record["log_p"]))] for record in records]
    return torch.tensor(logs, dtype=torch.float64), torch.tensor([record["label"] for record in records])


def averaged_records(parts: Sequence[Sequence[Record]]) -> list[Record]:
    """Return records with the mean probability of several passes or models over the same rows."""
    logs = torch.tensor([[row["log_p"] for row in part] for part in parts], dtype=torch.float64)
    means = (logs.logsumexp(0) - math.log(len(parts))).clamp_max(0).tolist()
    return [{"id": row["id"], "label": row["label"], "log_p": mean} for row, mean in zip(parts[0], means)]


def in_form(records: Sequence[Record], form: Form) -> list[Record]:
    """Return the records with the log-probabilities of another form of the logits."""
    return [
        {**record, "log_p": form(torch.tensor(record["log_p"], dtype=torch.float64)[None]).log_softmax(1)[0].tolist()}
        for record in records
    ]


class LmObjective(nn.Module):
    """The training objective of a task: objective(batch) returns its losses."""

    def __init__(self, net: LmNet, task: LmTask) -> None:
        super().__init__()
        self.net = net
        self.task = task

    def forward(self, batch: TextBatch) -> dict[str, Tensor]:
        return self.task.loss(self.net, batch)

    def examples(self, batch: TextBatch) -> Tensor:
        """Return the weight of a batch in a step of several (vismt/engine/loop.py)."""
        return self.task.examples(batch)
