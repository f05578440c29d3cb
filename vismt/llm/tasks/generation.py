"""Generated answers: greedy generation after the prompt, read by a pattern and compared with the gold answers.

The model trains on the answer as in causal.py. The generated text is read up to `stop`. The first group of the last match of
`pattern` (the whole text without a pattern) is compared with the gold answers. Both are normalised before, as numbers (without
thousands commas and trailing zeros) or as text (without case, articles and punctuation, as in SQuAD's evaluation).
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation

from torch import Tensor

from vismt.base.errors import UserError
from vismt.data.texts.text_set import TextRow
from vismt.llm.net import LmNet, TextBatch
from vismt.llm.tasks import TEXT_TASKS
from vismt.llm.tasks.base import Item, Record, Tokenizer, Writing, by_row, gather_items
from vismt.llm.tasks.causal import Causal, written
from vismt.llm.tasks.pieces import IGNORED, select_tokens
from vismt.uncertainty.intervals import Measure


@TEXT_TASKS.register("generation")
class Generation(Causal):
    """Generated answers.

    Args:
        prompt: Template of the prompt.
        answer: Template of the answer that is trained on.
        gold: Name of the field with the right answer or the list of right answers.
        pattern: Regular expression with one group, the answer. None for the whole text.
        stop: Text that ends the answer. None for no such text.
        new_tokens: Largest number of generated tokens.
        length: Largest number of tokens of a piece.
        end: Whether the end of the answer is counted, as in `Causal`.
        pack: Whether rows share training pieces, as in `Causal`.

    Raises:
        UserError: If the prompt is missing, the number of new tokens is 0, or the pattern does not have exactly one group.
    """

    reads = False

    def __init__(
        self,
        prompt: str,
        answer: str,
        gold: str,
        pattern: str | None = None,
        stop: str | None = None,
        new_tokens: int = 128,
        length: int = 512,
        end: bool = True,
        pack: bool = False,
    ) -> None:
        super().__init__(prompt, answer, length, end, pack)
        if not prompt or new_tokens < 1:
            raise UserError(f"tasks: 'generation' needs a prompt and new_tokens of at least 1, has {new_tokens}.")
        try:
            groups = 1 if pattern is None else re.compile(pattern).groups
        except re.error as error:
            raise UserError(f"tasks: pattern '{pattern}' is not a regular expression: {error}.") from error
        if groups != 1:
            raise UserError(f"tasks: pattern '{pattern}' has {groups} groups, needed one: the answer.")
        self.gold, self.pattern, self.stop, self.new_tokens = gold, pattern, stop, new_tokens
        self._tokenizer: Tokenizer  # the tokenizer of the latest row

    @property
    def about(self) -> str:
        return f"exact match, greedy, at most {self.new_tokens} tokens"

    def encode(self, name: str, row: TextRow, tokenizer: Tokenizer) -> Item:
        if self.gold not in row:
            raise UserError(f"tasks: gold: row '{name}' has no field '{self.gold}'.")
        self._tokenizer = tokenizer
        gold = row[self.gold] if isinstance(row[self.gold], list) else [row[self.gold]]
        trained, prompt = super().encode(name, row, tokenizer), self.ask(name, row, tokenizer)
        # the prompt alone, from which nothing was cut for the trained answer
        pieces = [*trained.pieces, *prompt.pieces]
        return replace(trained, pieces=pieces, gold=[str(answer) for answer in gold])

    def score(self, net: LmNet, batch: TextBatch, items: Sequence[Item]) -> list[Record]:
        records = []
        stops = self.stops(self._tokenizer)
        texts = written(net, prompts_of(net, items), self._tokenizer, Writing(self.new_tokens), stops)
        for item, text in zip(items, texts):
            right = normalised(self.read(text)) in {normalised(gold) for gold in item.gold}
            records.append({"id": item.id, "right": right, "text": text})
        return records

    def read(self, text: str) -> str:
        """Return the answer in a generated text. It is empty if the pattern does not match."""
        text = text.split(self.stop)[0] if self.stop else text
        if self.pattern is None:
            return text
        answers = re.findall(self.pattern, text)
        return answers[-1] if answers else ""

    def measures(self, records: Sequence[Record]) -> dict[str, Measure]:
        name = "exact-match accuracy"
        return {name: Measure(name, by_row(records, [float(record["right"]) for record in records]))}

    def quality(self, records: Sequence[Record]) -> float:
        """Return the share of right answers."""
        return self.measures(records)["exact-match accuracy"].score


def prompts_of(net: LmNet, items: Sequence[Item]) -> dict[str, Tensor]:
    """Return a batch of the prompts of rows on the LM's device. A prompt is the last piece of its row without counted tokens."""
    prompts = []
    for item in items:
        piece = item.pieces[-1]
        kept = [position for position, label in enumerate(piece.labels) if label == IGNORED]
        prompts.append(replace(item, pieces=[select_tokens(piece, kept)]))
    device = next(net.lm.parameters()).device
    return {name: value.to(device) for name, value in gather_items(prompts).items()}


def normalised(text: str) -> str:
    """Return a number without commas, currency sign and trailing zeros. Other text is normalised as SQuAD does it."""
    plain = text.strip().strip("$").replace(",", "").rstrip(".")
    try:
        number = Decimal(plain)
    except InvalidOperation:  # text that is not a number
        number = Decimal("NaN")
    if number.is_finite() and abs(number.adjusted()) < 100:  # a larger number would be a text of as many digits
        digits = f"{number:f}"  # Decimal.normalize would round to 28 digits
        return digits.rstrip("0").rstrip(".") if "." in digits else digits
    words = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", words).split())
