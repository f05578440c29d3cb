"""Multiple choice by log-likelihood. Each answer after the prompt is scored by its nats per token, list-wise over the choices.

    s_c = sum over the answer's tokens of log p(token | tokens before) / length_c       p = softmax_c(s_c)
    loss = -log p_right

A right answer alone (`right_answer`) has the loss of a language model: the mean of -log p over its tokens.

The length is the number of tokens ("token"), the number of characters ("character", the acc_norm of lm-eval-harness, with
scores per character), or 1 ("none"). Rows may have different numbers of answers. The prompt runs once, as the stem of a tree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from vismt.base.errors import UserError, require_known
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
    fields_of,
    fill_template,
    has_fields,
    item_names,
    probability_measures,
)
from vismt.llm.tasks.pieces import stem, tree
from vismt.uncertainty.intervals import Measure

LENGTHS = ("token", "character", "none")


@TEXT_TASKS.register("answers")
class AnswerChoice(LmTask):
    """Multiple choice.

    Args:
        prompt: Template of the prompt.
        answers: Templates of the answers, {label: template}. An answer with a field that a row lacks, or that is null, is not a
            choice of that row. A field may be a place in a list, such as {choices[0]}.
        label: Template of the label of the right answer.
        normalise: "token", "character" or "none".
        length: Largest number of tokens of prompt and answer.

    Raises:
        UserError: If the prompt is missing, fewer than two answers are given, or the value of `normalise` is unknown.
    """

    documents = True

    def __init__(
        self, prompt: str, answers: dict[str, str], label: str = "{answer}", normalise: str = "token", length: int = 512
    ) -> None:
        super().__init__(prompt, length)
        require_known("tasks: normalise", [normalise], LENGTHS)
        if not prompt or len(answers) < 2:
            raise UserError(f"tasks: 'answers' needs a prompt and two answers at least, has {len(answers)}.")
        self.answers = {str(key): text for key, text in answers.items()}
        self.label = label
        self.normalise = normalise

    @property
    def about(self) -> str:
        unit = "" if self.normalise == "none" else f" a {self.normalise}"
        return f"the answer of the largest log-likelihood{unit}"

    def class_of(self, row: Mapping[str, object]) -> str:
        """Return the right answer if all rows have the same choices. A place in a row's own list is not a class."""
        own = any(fields_of(text, "tasks: answers") for text in self.answers.values())
        return "" if own else fill_template(self.label, row, "tasks: label")

    def encode(self, name: str, row: TextRow, tokenizer: Tokenizer) -> Item:
        label, choices = fill_template(self.label, row, "tasks: label"), list(self.choices_of(row))
        if label not in choices or len(choices) < 2:
            raise UserError(
                f"tasks: row '{name}' has label '{label}' and answers {choices}; needed two, the right one among them."
            )
        return replace(self.ask(name, row, tokenizer), label=choices.index(label))

    def choices_of(self, row: Mapping[str, object]) -> dict[str, str]:
        """Return the templates of the answers that are choices of a row, by label."""
        return {key: text for key, text in self.answers.items() if has_fields(text, row, "tasks: answers")}

    def ask(self, name: str, row: TextRow, tokenizer: Tokenizer) -> Item:
        context, before, spaces = self.context(row, tokenizer)
        templates = self.choices_of(row)
        if len(templates) < 2:
            raise UserError(f"tasks: row '{name}' has the answers {list(templates)}; needed two at least.")
        texts = [fill_template(text, row, "tasks: answers") for text in templates.values()]
        answers = [answer_tokens(tokenizer, spaces + text, before) for text in texts]
        if not context or not all(answers):
            raise UserError(f"tasks: row '{name}' has a prompt or an answer without a token.")
        sizes = [max(1, len(text.strip())) for text in texts]
        return Item(name, [tree(context, answers, self.length)], sizes=sizes)

    def reply(
        self, net: LmNet, batch: TextBatch, rows: Sequence[Mapping[str, object]], tokenizer: Tokenizer, how: Writing
    ) -> list[Reply]:
        log_p = answer_scores(net, batch, self.normalise).cpu().double().log_softmax(1)
        choices = [list(self.choices_of(row)) for row in rows]
        return [Reply(choices=names, log_p=values[: len(names)]) for names, values in zip(choices, log_p)]

    def loss(self, net: LmNet, batch: TextBatch) -> dict[str, Tensor]:
        if "branch" not in batch:  # of `right_answer`
            return {"loss": net.mean_nll(batch)}
        scores = answer_scores(net, batch, self.normalise)
        right = scores.argmax(1) == batch["label"]
        return {"loss": F.cross_entropy(scores, batch["label"]), "accuracy": right.float().mean()}

    def examples(self, batch: TextBatch) -> Tensor:
        return super().examples(batch) if "branch" in batch else counted_tokens(batch)

    def score(self, net: LmNet, batch: TextBatch, items: Sequence[Item]) -> list[Record]:
        return choice_records(items, answer_scores(net, batch, self.normalise))

    def measures(self, records: Sequence[Record]) -> dict[str, Measure]:
        # There is no AUROC, because the position of an answer in the list is not a class.
        return {name: measure for name, measure in probability_measures(records).items() if name != "AUROC"}


def right_answer(item: Item, *, prompt: bool) -> Item:
    """Return a question and its right answer as one text. The loss counts the answer, and the prompt too if `prompt` is true."""
    text = stem(item.pieces[0], item.label)
    return replace(item, pieces=[replace(text, labels=text.ids) if prompt else text])


def answer_scores(net: LmNet, batch: TextBatch, normalise: str) -> Tensor:
    """Return the scores (b, most choices) of the answers of trees. A choice that a row does not have is -inf."""
    nats, tokens = net.branch_nll(batch)
    length: Tensor | int = {"token": tokens.clamp_min(1), "character": batch["size"]}.get(normalise, 1)
    return (-nats / length).masked_fill(tokens == 0, -math.inf)


def choice_records(items: Sequence[Item], scores: Tensor) -> list[Record]:
    """Return a record for each row from the scores (b, most choices) of its answers. A row with a user names the user."""
    log_p = scores.cpu().double().log_softmax(1).tolist()
    return [
        {**item_names(item), "label": item.label, "log_p": values[: len(item.sizes)]}
        for item, values in zip(items, log_p)
    ]
