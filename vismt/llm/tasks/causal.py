"""Causal language modelling: the answer after a prompt, or a whole text in windows. The loss counts only answer tokens.

    loss = sum over answer tokens of -log p(token | tokens before) / number of answer tokens in the batch

With an empty prompt the answer is a text. It is cut into windows that overlap by one token, so that each token is counted once.
The perplexity is e to the nats per token over all tokens of all rows. It is not a mean of perplexities over batches or rows. With
`pack`, several rows share one training piece (pieces.py). Records always describe single rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vismt.base.errors import UserError
from vismt.data.texts.text_set import TextRow
from vismt.llm.net import LmNet, TextBatch, counted_tokens
from vismt.llm.tasks import TEXT_TASKS
from vismt.llm.tasks.base import (
    Item,
    LmTask,
    Record,
    Reply,
    Tokenizer,
    Writing,
    answer_tokens,
    by_row,
    context_tokens,
    fill_template,
    split_spaces,
    turn_end,
)
from vismt.llm.tasks.pieces import pack, piece, windows
from vismt.uncertainty.intervals import LOWER, NUMBER, Measure


@TEXT_TASKS.register("causal")
class Causal(LmTask):
    """Causal language modelling.

    Args:
        prompt: Template of the prompt. Empty for whole texts.
        answer: Template of the answer or text.
        length: Largest number of tokens of a piece.
        end: Whether the end of the assistant's turn (in a chat) or of the text follows the answer and is counted.
        pack: Whether several rows share a training piece.
        windows: Largest number of windows of a text, counted from its start, if the prompt is empty. None for all windows.

    Raises:
        UserError: If the answer is empty, or `windows` is below 1 or given with a prompt.
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
            raise UserError(f"tasks: windows {windows}; it must be at least 1, and is for texts without a prompt.")
        if not answer:
            raise UserError("tasks: answer: is empty; name the field to predict, such as '{text}'.")
        self.answer, self.end, self.documents, self.windows = answer, end, pack, windows

    @property
    def about(self) -> str:
        if self.prompt:
            return f"answer tokens, at most {self.length} in all"
        counted = "all tokens"
        if self.windows is not None:
            counted = f"the first {self.windows * (self.length - 1) + 1} tokens of each text"
        return f"{counted}, context {self.length}"

    def encode(self, name: str, row: TextRow, tokenizer: Tokenizer) -> Item:
        context, before, spaces = self.context(row, tokenizer)
        text = fill_template(self.answer, row, "tasks: answer")
        if not text.strip():
            raise UserError(f"tasks: row '{name}' has an empty answer; leave the row out.")
        answer = answer_tokens(tokenizer, spaces + text, before)
        if self.end:
            answer += self._end(tokenizer)
        pieces = (
            [piece(context, answer, self.length)]
            if self.prompt
            else windows(context, answer, self.length)[: self.windows]
        )
        if not sum(part.counted for part in pieces):
            raise UserError(f"tasks: row '{name}' has no token that is counted.")
        return Item(name, pieces)

    def _end(self, tokenizer: Tokenizer) -> list[int]:
        """Return the tokens after an answer: the end of the turn if a chat template writes one, otherwise the end of text."""
        ids = turn_end(tokenizer) if self.chat else []
        if ids:
            return ids
        if tokenizer.eos_token_id is None:
            raise UserError("tasks: end: the tokenizer has no end-of-text token; set the option end to false.")
        return [tokenizer.eos_token_id]

    def stops(self, tokenizer: Tokenizer) -> list[int]:
        """Return the token that ends an answer in a chat, if it differs from the end of the text."""
        return turn_end(tokenizer)[-1:] if self.chat else []

    def ask(self, name: str, row: TextRow, tokenizer: Tokenizer) -> Item:
        """Return the prompt of a row, or the text that is to be continued."""
        if self.prompt:
            context = self.context(row, tokenizer)[0]
        else:
            context = context_tokens(tokenizer, fill_template(self.answer, row, "tasks: answer"))
        return self.asked(name, context)

    def reply(
        self, net: LmNet, batch: TextBatch, rows: Sequence[Mapping[str, object]], tokenizer: Tokenizer, how: Writing
    ) -> list[Reply]:
        texts = written(net, batch, tokenizer, how, self.stops(tokenizer))
        if self.chat:
            return [Reply(text) for text in texts]
        # The prompt already has the spaces.
        spaces = [split_spaces(fill_template(self.prompt, row, "tasks: prompt"))[1] for row in rows]
        return [Reply(text.removeprefix(begin)) for text, begin in zip(texts, spaces, strict=True)]

    def training(self, items: Sequence[Item]) -> list[Item]:
        pieces = [part for item in items for part in item.pieces if part.counted]
        if self.documents:
            pieces = pack(pieces, self.length)
        return [Item(f"piece {number}", [part]) for number, part in enumerate(pieces)]

    def loss(self, net: LmNet, batch: TextBatch) -> dict[str, Tensor]:
        return {"loss": net.mean_nll(batch)}

    def examples(self, batch: TextBatch) -> Tensor:
        return counted_tokens(batch)

    def score(self, net: LmNet, batch: TextBatch, items: Sequence[Item]) -> list[Record]:
        rows = batch["row"].cpu()
        nats, tokens = (
            torch.zeros(len(items), dtype=torch.float64).index_add(0, rows, by_piece.cpu().double())
            for by_piece in net.token_nll(batch)
        )
        return [
            {"id": item.id, "nats": row_nats, "tokens": int(row_tokens)}
            for item, row_nats, row_tokens in zip(items, nats.tolist(), tokens.tolist())
        ]

    def measures(self, records: Sequence[Record]) -> dict[str, Measure]:
        tokens = sum(record["tokens"] for record in records)
        mean = math.fsum(record["nats"] for record in records) / tokens
        shift = [(record["nats"] - mean * record["tokens"]) * len(records) / tokens for record in records]
        perplexity = math.exp(mean)
        nats, scaled = [mean + value for value in shift], [perplexity * (1 + value) for value in shift]
        return {
            name: Measure(name, by_row(records, values), NUMBER, LOWER)
            for name, values in (("NLL in nats a token", nats), ("perplexity", scaled))
        }

    def quality(self, records: Sequence[Record]) -> float:
        """Return 1 / perplexity."""
        return 1 / self.measures(records)["perplexity"].score


def written(net: LmNet, batch: TextBatch, tokenizer: Tokenizer, how: Writing, stops: Sequence[int] = ()) -> list[str]:
    """Generate a continuation for each prompt of a batch, up to a token of `stops`, the end of text or the end of the turn."""
    own = getattr(getattr(net.lm, "generation_config", None), "eos_token_id", None)
    # A chat model names the end of a turn beside the end of text.
    known = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]), *stops]
    ends = [end for end in dict.fromkeys(known) if end is not None]
    tokens = net.generate(batch, how.new_tokens, ends, how.temperature, how.seed)
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)
