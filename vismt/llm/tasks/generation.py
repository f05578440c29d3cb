"""Answers written out: greedy generation after the prompt, read by a pattern, right where it is one of the gold answers.

Training is that of causal.py on the answer. What is compared is the first group of the last match of `pattern` in what was
generated up to `stop` (the whole of it without a pattern), normalised as numbers (thousands commas and trailing zeros off)
or as text (case, articles and punctuation off, as in SQuAD's evaluation).
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import Any

import torch

from vismt.errors import UserError
from vismt.llm.net import Batch, LmNet
from vismt.llm.tasks.base import Item, Measure, Record, mean_of
from vismt.llm.tasks.causal import Causal
from vismt.llm.tasks.pieces import collate, piece


class Generation(Causal):
    """gold: field with the right answer or the list of them; pattern: regular expression with one group; new_tokens: at most."""

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
            raise UserError(f"tasks: pattern '{pattern}' is no regular expression: {error}.") from error
        if groups != 1:
            raise UserError(f"tasks: pattern '{pattern}' has {groups} groups, needed one: the answer.")
        self.gold, self.pattern, self.stop, self.new_tokens = gold, pattern, stop, new_tokens
        self._decode: Any = None

    @property
    def about(self) -> str:
        """What is asked."""
        return f"exact match, greedy, at most {self.new_tokens} tokens"

    def encode(self, name: str, row: Mapping[str, Any], tokenizer: Any) -> Item:
        if self.gold not in row:
            raise UserError(f"tasks: gold: row '{name}' has no field '{self.gold}'.")
        self._decode = tokenizer
        held = row[self.gold] if isinstance(row[self.gold], list) else [row[self.gold]]
        return replace(super().encode(name, row, tokenizer), gold=[str(one) for one in held])

    @torch.no_grad()
    def score(self, net: LmNet, batch: Batch, items: Sequence[Item]) -> list[Record]:
        texts = self.generate(net, items)
        found = [normalised(self.read(text)) for text in texts]
        return [
            {"id": item.id, "right": one in {normalised(gold) for gold in item.gold}, "text": text}
            for item, one, text in zip(items, found, texts)
        ]

    def generate(self, net: LmNet, items: Sequence[Item]) -> list[str]:
        """What the LM writes after each prompt."""
        prompts = [
            [t for t, label in zip(one.ids, one.labels) if label < 0] for one in (item.pieces[0] for item in items)
        ]
        batch = collate([piece(prompt, [], self.length) for prompt in prompts])
        device = next(net.lm.parameters()).device
        end = self._decode.eos_token_id
        made = net.lm.generate(
            batch["ids"].to(device),
            attention_mask=batch["mask"].long().to(device),
            do_sample=False,
            max_new_tokens=self.new_tokens,
            pad_token_id=end if end is not None else 0,
            eos_token_id=end,
        )
        return self._decode.batch_decode(made[:, batch["ids"].shape[1] :], skip_special_tokens=True)

    def read(self, text: str) -> str:
        """The answer in what was generated; empty where the pattern finds none."""
        text = text.split(self.stop)[0] if self.stop else text
        if self.pattern is None:
            return text
        found = re.findall(self.pattern, text)
        return found[-1] if found else ""

    def measures(self, records: Sequence[Record]) -> dict[str, Measure]:
        return {"exact-match accuracy": Measure([float(record["right"]) for record in records])}

    def quality(self, records: Sequence[Record]) -> float:
        """The share of right answers."""
        return mean_of(self.measures(records)["exact-match accuracy"])


def normalised(text: str) -> str:
    """A number without commas, currency sign and trailing zeros; other text as SQuAD compares it."""
    plain = text.strip().strip("$").replace(",", "").rstrip(".")
    try:
        number = Decimal(plain)
    except InvalidOperation:  # it is no number, but text
        number = Decimal("NaN")
    if number.is_finite():
        return f"{number.normalize():f}"
    words = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", words).split())
