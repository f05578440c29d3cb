"""Causal language modelling: the answer after a prompt, or a whole text in windows; the loss counts answer tokens alone.

    loss = sum over answer tokens of -log p(token | tokens before) / number of answer tokens in the batch

With an empty prompt the answer is a text: it is cut into windows that overlap by one token, so each token is counted once. The
perplexity is e to the nats a token over all tokens of all rows, never a mean of perplexities over batches or rows. With `pack`
several rows share one training piece (pieces.py); records are of single rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vismt.errors import UserError
from vismt.llm.net import Batch, LmNet
from vismt.llm.tasks.base import (
    Item,
    Measure,
    Record,
    Task,
    answer_tokens,
    context_tokens,
    fill,
    mean_of,
    ratio_measures,
)
from vismt.llm.tasks.pieces import pack, piece, windows


class Causal(Task):
    """answer: a template; end: whether an end-of-text token follows it and is counted; pack: rows share training pieces.

    windows: with an empty prompt, the first windows of each text, so many at most; null for all.
    """

    def __init__(
        self,
        prompt: str,
        answer: str,
        length: int = 512,
        end: bool = True,
        pack: bool = False,
        windows: int | None = None,
    ) -> None:
        super().__init__(prompt, length)
        if windows is not None and (prompt or windows < 1):
            raise UserError(f"tasks: windows {windows}; it must be at least 1, and is of texts that have no prompt.")
        if not answer:
            raise UserError("tasks: answer: is empty; name the field that is to be predicted, such as '{text}'.")
        self.answer, self.end, self.packed, self.windows = answer, end, pack, windows

    @property
    def about(self) -> str:
        """What is counted."""
        if self.prompt:
            return f"answer tokens, at most {self.length} in all"
        held = (
            "all tokens"
            if self.windows is None
            else f"the first {self.windows * (self.length - 1) + 1} tokens of each text"
        )
        return f"{held}, context {self.length}"

    def encode(self, name: str, row: Mapping[str, Any], tokenizer: Any) -> Item:
        context = context_tokens(tokenizer, fill(self.prompt, row, "tasks: prompt"))
        answer = answer_tokens(tokenizer, fill(self.answer, row, "tasks: answer"))
        if self.end:
            if tokenizer.eos_token_id is None:
                raise UserError("tasks: end: the tokenizer has no end-of-text token; set the option end to false.")
            answer.append(tokenizer.eos_token_id)
        pieces = (
            [piece(context, answer, self.length)]
            if self.prompt
            else windows(context, answer, self.length)[: self.windows]
        )
        if not sum(one.counted for one in pieces):
            raise UserError(f"tasks: row '{name}' has no token that is counted.")
        return Item(name, pieces)

    def training(self, items: Sequence[Item]) -> list[Item]:
        pieces = [one for item in items for one in item.pieces if one.counted]
        pieces = pack(pieces, self.length) if self.packed else pieces
        return [Item(f"piece {number}", [one]) for number, one in enumerate(pieces)]

    def loss(self, net: LmNet, batch: Batch) -> dict[str, Tensor]:
        nats, tokens = net.token_nll(batch)
        return {"loss": nats.sum() / tokens.sum()}

    def score(self, net: LmNet, batch: Batch, items: Sequence[Item]) -> list[Record]:
        nats, tokens = (values.double().cpu() for values in net.token_nll(batch))
        sums = [values.new_zeros(len(items)).index_add(0, batch["row"].cpu(), values) for values in (nats, tokens)]
        return [{"id": item.id, "nats": float(own), "tokens": int(count)} for item, own, count in zip(items, *sums)]

    def measures(self, records: Sequence[Record]) -> dict[str, Measure]:
        return ratio_measures(records)

    def quality(self, records: Sequence[Record]) -> float:
        """1 / perplexity."""
        return 1 / mean_of(ratio_measures(records)["perplexity"])
