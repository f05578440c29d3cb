"""Multiple choice by log-likelihood: each answer after the prompt, scored by its nats a token, list-wise over the choices.

    s_c = sum over the answer's tokens of log p(token | tokens before) / length_c       p = softmax_c(s_c)
    loss = -log p_right

The length is the number of tokens ("token"), of characters ("character", what lm-eval-harness calls acc_norm; the scores are
then per character), or 1 ("none"). Rows may have different numbers of answers. The prompt runs once, as the stem of a tree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vismt.errors import UserError, near
from vismt.llm.net import Batch, LmNet
from vismt.llm.tasks.base import (
    Item,
    Measure,
    Record,
    Task,
    answer_tokens,
    context_tokens,
    fill,
    has_fields,
    mean_of,
    probability_measures,
)
from vismt.llm.tasks.pieces import tree

LENGTHS = ("token", "character", "none")


class Answers(Task):
    """answers: {label: template}; those whose fields a row lacks are no choices of it. label: template of the right one."""

    def __init__(
        self, prompt: str, answers: dict[str, str], label: str = "{answer}", normalise: str = "token", length: int = 512
    ) -> None:
        super().__init__(prompt, length)
        if normalise not in LENGTHS:
            raise UserError(f"tasks: normalise '{normalise}'.{near(str(normalise), LENGTHS)}")
        if not prompt or len(answers) < 2:
            raise UserError(f"tasks: 'answers' needs a prompt and two answers at least, has {len(answers)}.")
        self.answers, self.label, self.normalise = {str(key): text for key, text in answers.items()}, label, normalise

    @property
    def about(self) -> str:
        """What is asked."""
        by = "" if self.normalise == "none" else f" a {self.normalise}"
        return f"the answer of the largest log-likelihood{by}"

    def encode(self, name: str, row: Mapping[str, Any], tokenizer: Any) -> Item:
        context = context_tokens(tokenizer, fill(self.prompt, row, "tasks: prompt"))
        held = {key: text for key, text in self.answers.items() if has_fields(text, row, "tasks: answers")}
        label = fill(self.label, row, "tasks: label")
        if label not in held or len(held) < 2:
            raise UserError(
                f"tasks: row '{name}' has label '{label}' and answers {list(held)}; needed two, and the right one."
            )
        texts = [fill(text, row, "tasks: answers") for text in held.values()]
        answers = [answer_tokens(tokenizer, text) for text in texts]
        if not all(answers):
            raise UserError(f"tasks: row '{name}' has an answer without a token.")
        sizes = [max(1, len(text.strip())) for text in texts]
        return Item(name, [tree(context, answers, self.length)], list(held).index(label), sizes=sizes)

    def loss(self, net: LmNet, batch: Batch) -> dict[str, Tensor]:
        scores = self._scores(net, batch)
        right = scores.argmax(1) == batch["label"]
        return {"loss": F.cross_entropy(scores, batch["label"]), "accuracy": right.float().mean()}

    def score(self, net: LmNet, batch: Batch, items: Sequence[Item]) -> list[Record]:
        found = self._scores(net, batch).double().log_softmax(1).cpu().tolist()
        return [
            {"id": item.id, "label": item.label, "log_p": own[: len(item.sizes)]} for item, own in zip(items, found)
        ]

    def _scores(self, net: LmNet, batch: Batch) -> Tensor:
        """(b, most choices), -inf where a row has fewer."""
        nats, tokens = net.branch_nll(batch)
        length = {"token": tokens.clamp_min(1), "character": batch["size"], "none": 1}[self.normalise]
        return (-nats / length).masked_fill(tokens == 0, -math.inf)

    def measures(self, records: Sequence[Record]) -> dict[str, Measure]:
        found = probability_measures(records)
        return {name: measure for name, measure in found.items() if name != "AUROC"}  # a place in a list is no class

    def quality(self, records: Sequence[Record]) -> float:
        """Geometric mean of the right answer's probability."""
        return math.exp(-mean_of(probability_measures(records)["NLL in nats"]))
