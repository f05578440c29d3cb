"""Classification by answer tokens: a head on the last token of the prompt, with one row for each answer.

    features = last hidden state at the last token (after the final norm)      logits = features W^T + b, W (k, d)

W starts as the rows of the LM's output embedding for the answer tokens, so that step 0 is the zero-shot LM restricted to the
answers. The protocol is the one of the baselines in Wang et al., BLoB, arXiv 2406.11675, without its quirks (inverted
verbaliser of BoolQ, swapped letters). An answer must be one token, because only the first token of a longer answer would be
scored.

`AlternatingObjective` trains by PoLAR-VBLL's alternating steps (vismt.uncertainty.vbll).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vismt.base.errors import UserError, require_known
from vismt.data.texts.text_set import TextRow
from vismt.llm.net import LmNet, TextBatch
from vismt.llm.tasks import TEXT_TASKS
from vismt.llm.tasks.base import (
    Item,
    LmObjective,
    LmTask,
    Record,
    Reply,
    Tokenizer,
    Writing,
    answer_tokens,
    fill_template,
    probability_measures,
    split_spaces,
)
from vismt.uncertainty.intervals import Measure
from vismt.uncertainty.last_layers import log_predictive
from vismt.uncertainty.predictive import GaussianHead
from vismt.uncertainty.vbll import VBLLClassifier, alternating_loss

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@TEXT_TASKS.register("classes")
class Classes(LmTask):
    """Classification by answer tokens.

    Args:
        prompt: Template of the prompt.
        answers: Answers in the order of the classes, {label of the rows: answer}. Each answer is one token.
        label: Template of the label of a row.
        length: Largest number of tokens of the prompt. A longer prompt loses its beginning.

    Raises:
        UserError: If the prompt is missing, or fewer than two answers are given.
    """

    head = True

    def __init__(self, prompt: str, answers: dict[str, str], label: str = "{label}", length: int = 512) -> None:
        super().__init__(prompt, length)
        if not prompt or len(answers) < 2:
            raise UserError(f"tasks: 'classes' needs a prompt and two answers at least, has {len(answers)}.")
        self.answers = {str(key): text for key, text in answers.items()}
        self.label = label

    @property
    def about(self) -> str:
        return f"one of {len(self.answers)} answers"

    def tokens(self, tokenizer: Tokenizer) -> list[int]:
        """Return the token of each answer. Raise UserError for an answer of several tokens and for equal tokens."""
        tokens: list[int] = []
        end = self.prompt_end(tokenizer)
        before, spaces = (end, "") if self.chat else split_spaces(end)
        for answer in self.answers.values():
            text = spaces + answer
            ids = answer_tokens(tokenizer, text, before or "a")
            if len(ids) != 1:
                raise UserError(
                    f"tasks: answer '{text}' is {tokenizer.convert_ids_to_tokens(ids)}, needed one token; begin it with one "
                    "space, which may be the end of the prompt, or choose another."
                )
            tokens += ids
        if len(set(tokens)) < len(tokens):
            raise UserError(f"tasks: answers {list(self.answers.values())} share a token; choose different answers.")
        return tokens

    def class_of(self, row: Mapping[str, object]) -> str:
        return fill_template(self.label, row, "tasks: label")

    def encode(self, name: str, row: TextRow, tokenizer: Tokenizer) -> Item:
        label = self.class_of(row)
        require_known(f"tasks: row '{name}' has label", [label], self.answers)
        return replace(self.ask(name, row, tokenizer), label=list(self.answers).index(label))

    def ask(self, name: str, row: TextRow, tokenizer: Tokenizer) -> Item:
        return self.asked(name, self.context(row, tokenizer)[0])

    def reply(
        self, net: LmNet, batch: TextBatch, rows: Sequence[Mapping[str, object]], tokenizer: Tokenizer, how: Writing
    ) -> list[Reply]:
        log_p = log_predictive(net.head, net.features(batch)).cpu().double()
        return [Reply(choices=list(self.answers), log_p=values) for values in log_p]

    def loss(self, net: LmNet, batch: TextBatch) -> dict[str, Tensor]:
        return {"loss": net.head.loss(net.features(batch), batch["label"])}

    def score(self, net: LmNet, batch: TextBatch, items: Sequence[Item]) -> list[Record]:
        features = net.features(batch)
        log_p = log_predictive(net.head, features).tolist()
        records = [{"id": item.id, "label": item.label, "log_p": values} for item, values in zip(items, log_p)]
        if isinstance(net.head, GaussianHead):
            means = net.head(features).cpu().double().log_softmax(1).tolist()
            records = [{**record, "mean_log_p": values} for record, values in zip(records, means)]
        return records

    def measures(self, records: Sequence[Record]) -> dict[str, Measure]:
        return probability_measures(records)


class AlternatingObjective(LmObjective):
    """The objective of alternating steps: update the posterior on fixed features, then the LM under the posterior.

    The posterior has its own Adam optimiser, whose moments are buffers. They are saved with the training and resumed bit for
    bit. The optimiser of the training loop finds no gradient on the posterior and skips it.

    Args:
        net: LM with a variational head.
        task: Classification task.
        lr: Learning rate of the posterior's means and noise.
        spread_lr: Learning rate of the posterior's covariances.
        steps: Number of updates of the posterior for each batch.

    Raises:
        UserError: If the head is not variational.
    """

    def __init__(self, net: LmNet, task: Classes, lr: float, spread_lr: float, steps: int) -> None:
        super().__init__(net, task)
        if not isinstance(net.head, VBLLClassifier):
            raise UserError(
                "head.alternate: needs a variational posterior; set head.name to vbll, or alternate to null."
            )
        self.rates = (lr, spread_lr)
        self.steps = steps
        self._adam: torch.optim.Adam | None = None
        for number, parameter in enumerate(net.head.parameters()):
            for name in MOMENTS:
                start = torch.zeros(()) if name == "step" else torch.zeros_like(parameter)
                self.register_buffer(f"{name}{number}", start)

    def forward(self, batch: TextBatch) -> dict[str, Tensor]:
        if self._adam is None:  # now the module is on its device, and the buffers hold the moments of a resumed run
            self._adam = torch.optim.Adam(self.net.head.parameter_groups(*self.rates))
            for number, parameter in enumerate(self.net.head.parameters()):
                self._adam.state[parameter] = {name: getattr(self, f"{name}{number}") for name in MOMENTS}
        features = self.net.features(batch)
        loss = alternating_loss(self.net.head, self._adam, features, batch["label"], self.steps)
        return {"loss": loss, "kl": self.net.head.kl().detach()}
