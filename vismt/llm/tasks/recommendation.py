r"""The next item of a user's history, out of candidates (LLaRA's protocol, arXiv 2312.02445, which iLoRA follows).

    choose:  s_c = sum over the tokens of title c of log p(token | prompt)       loss = nats a token of the right title and "\n"
    judge:   s_c = logit(" yes") - logit(" no") after the question about c       loss = -log softmax_c(s) of the right candidate
    write:   greedy generation up to the end of the line, read as a candidate    loss as for choose

HitRatio@1 is the share of rows whose right candidate has the largest s_c, or was written. "choose" and "write" name all
candidates in the prompt. "judge" asks one question for each candidate, as a branch after the shared history. p(title) measures
how common the words of a title are, and a question does not. The negatives of "judge" in training are the first negatives among
the row's candidates.

In a hybrid prompt a slot of one token stands for each item, and the vector of the item replaces it (vismt.llm.ilora.hybrid):

    p(text)  = max(0, 1 - k / (curriculum K))     of training batch k of K: titles only; else hybrid

The candidates of a row are fixed. The released loader of Last.fm draws one negative and leaves out the right item. A user with
several rows is scored by the mean of the rows. Intervals and differences are then over users, who are independent, while rows
of one user are not. Left out: item tokens in the vocabulary, beam search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.base.errors import UserError, require_known
from vismt.base.seeds import mix_seed
from vismt.data.texts.interactions import draw_candidates
from vismt.data.texts.text_set import TextRow
from vismt.llm.ilora.hybrid import Hybrid, conditioned
from vismt.llm.net import LmNet, TextBatch, counted_tokens
from vismt.llm.tasks import TEXT_TASKS
from vismt.llm.tasks.answers import LENGTHS, answer_scores, choice_records
from vismt.llm.tasks.base import (
    Item,
    Listed,
    LmTask,
    Record,
    Tokenizer,
    Writing,
    answer_tokens,
    by_row,
    item_names,
    probability_measures,
)
from vismt.llm.tasks.causal import written
from vismt.llm.tasks.generation import prompts_of
from vismt.llm.tasks.item_prompts import ItemPrompt, read_answer, single_token
from vismt.llm.tasks.pieces import prune, stem, tree
from vismt.uncertainty.intervals import Measure

_ANSWERS = ("choose", "judge", "write")
_SAMPLES = ("rows", "users")


@TEXT_TASKS.register("recommendation")
class Recommendation(LmTask):
    """The next item of a history.

    Args:
        prompt: Template with the place {history} and, except for "judge", the place {candidates}.
        answer: Way of answering: "choose" a candidate by log-likelihood, "judge" each candidate by a question, or "write" a
            title.
        question: Template of the question of "judge", with the place {candidate}. It follows the prompt, and the LM answers yes
            or no.
        negatives: Number of wrong candidates of a row in training, for "judge".
        candidates: Number of candidates.
        history: Number of last items in the prompt and for the recommender.
        shown: Number of these items that are in the prompt, if the gates should know more than the prompt. null for all.
        items: Whether item vectors follow the titles, at the token `slot`.
        titles: Whether hybrid prompts have titles beside the item vectors.
        sample: "rows", or "users". With "users" a batch draws users and one row of each, and a limit on the rows keeps equally
            many of each.
        curriculum: Share of the training over which text prompts are replaced by hybrid prompts.
        normalise: Length that the log-likelihood of a candidate is divided by: "none", "token" or "character".
        new_tokens: Largest number of generated tokens.
        slot: Text of the one token that item vectors replace.
        join: Text between titles.
        seed: Seed of the candidates.
        length: Largest number of tokens of prompt and answer.

    Raises:
        UserError: If a name is unknown, a number is out of range, or a template has other places.
    """

    labelled = False

    def __init__(
        self,
        prompt: str,
        answer: str = "choose",
        question: str = "",
        negatives: int = 7,
        candidates: int = 20,
        history: int = 10,
        shown: int | None = None,
        items: bool = True,
        titles: bool = True,
        sample: str = "rows",
        curriculum: float = 1.0,
        normalise: str = "none",
        new_tokens: int = 32,
        slot: str = " *",
        join: str = ", ",
        seed: int = 0,
        length: int = 768,
    ) -> None:
        super().__init__(prompt, length)
        require_known("tasks: answer", [answer], _ANSWERS)
        require_known("tasks: normalise", [normalise], LENGTHS)
        require_known("tasks: sample", [sample], _SAMPLES)
        if candidates < 2 or history < 1 or new_tokens < 1 or not 0 <= curriculum <= 1:
            raise UserError(
                f"tasks: candidates {candidates}, history {history}, new_tokens {new_tokens}, curriculum {curriculum:g}; "
                "needed 2, 1 and 1 at least, and a share in [0, 1]."
            )
        if shown is not None and not 1 <= shown <= history:
            raise UserError(f"tasks: shown {shown} of a history of {history}; needed 1 to {history}, or null for all.")
        if answer == "judge" and not 1 <= negatives < candidates:
            raise UserError(f"tasks: negatives {negatives} of {candidates} candidates; needed 1 to {candidates - 1}.")
        if question and answer != "judge":
            raise UserError(f"tasks: question: is for answer judge, and answer is '{answer}'; leave it out.")
        places = ["history"] if answer == "judge" else ["history", "candidates"]
        self.item_prompt = ItemPrompt("prompt", prompt, places, join, slot)
        self.question = ItemPrompt("question", question, ["candidate"], join, slot) if answer == "judge" else None
        self.answer, self.negatives, self.candidates = answer, negatives, candidates
        self.history, self.shown_items = history, history if shown is None else shown
        self.items, self.titles, self.by_user = items, titles, sample == "users"
        self.curriculum, self.normalise, self.new_tokens, self.seed = curriculum, normalise, new_tokens, seed
        self.reads = self.documents = answer != "write"
        self._tokenizer: Tokenizer  # the tokenizer of the latest row

    @property
    def about(self) -> str:
        unit = "" if self.normalise == "none" else f" a {self.normalise}"
        how = {
            "choose": f"largest log-likelihood{unit}",
            "judge": "each judged by a question",
            "write": f"written greedily, at most {self.new_tokens} tokens",
        }
        return f"the next of {self.candidates} items, {how[self.answer]}"

    def encode(self, name: str, row: TextRow, tokenizer: Tokenizer) -> Item:
        if "catalogue" not in row:
            raise UserError(f"tasks: row '{name}' has no items; 'recommendation' needs sets of kind interactions.")
        self._tokenizer = tokenizer
        titles = row["catalogue"].titles
        candidates = draw_candidates(row["catalogue"], row["history"], row["next"], self.candidates, name, self.seed)
        label = candidates.index(row["next"])
        history = list(row["history"][-self.history :])
        if not history:
            raise UserError(f"tasks: row '{name}' has no history; set 'shortest' in its card to 1 or more.")
        end = self.prompt_end(tokenizer)
        listed = Listed(row["user"], history, candidates, [titles[number] for number in candidates])

        def item(hybrid: bool) -> Item:
            shown = None if hybrid and not self.titles else titles
            lists = {"history": history[-self.shown_items :], "candidates": candidates}
            ids, items = self.item_prompt.tokens(tokenizer, lists, shown, hybrid)
            answer_items = None
            if self.question is None:
                answers = [answer_tokens(tokenizer, f" {titles[number]}\n", end) for number in candidates]
            else:
                asked = [
                    self.question.tokens(tokenizer, {"candidate": [c]}, shown, hybrid, after=end) for c in candidates
                ]
                answers, answer_items = [ids for ids, _ in asked], [items for _, items in asked]
            whole = tree(ids, answers, self.length, items if hybrid else None, answer_items)
            pieces = [stem(whole, label) if self.answer == "write" else whole]
            return Item(name, pieces, label, sizes=[len(title) for title in listed.titles], listed=listed)

        return replace(item(False), hybrid=item(True) if self.items else None)

    def training(self, items: Sequence[Item]) -> list[Item]:
        """Return the items with the answers of the loss only, in the forms (text, hybrid) that the curriculum uses."""
        trained = []
        for item in items:
            text = self._answered(item)
            hybrid = None if item.hybrid is None else self._answered(item.hybrid)
            if hybrid is None or self.curriculum:
                trained.append(replace(text, hybrid=hybrid))
            else:
                trained.append(hybrid)
        return trained

    def _answered(self, item: Item) -> Item:
        if self.answer != "judge":
            pieces = [stem(piece, item.label) if piece.shared else piece for piece in item.pieces]
            return replace(item, pieces=pieces, hybrid=None)
        wrong = [number for number in range(self.candidates) if number != item.label][: self.negatives]
        kept = sorted([item.label, *wrong])
        listed = listed_of(item)
        return Item(
            item.id,
            [prune(item.pieces[0], kept)],
            kept.index(item.label),
            sizes=[item.sizes[number] for number in kept],
            listed=replace(
                listed,
                candidates=[listed.candidates[number] for number in kept],
                titles=[listed.titles[number] for number in kept],
            ),
        )

    def form(self, items: Sequence[Item], number: int, of: int, seed: int) -> list[Item]:
        """Return all items of a batch in one form: text with the probability of the curriculum, drawn from (seed, number)."""
        text_probability = 1 - number / (self.curriculum * of) if self.curriculum else 0.0
        if mix_seed(seed, "text prompt", number) / 2**63 < text_probability:
            return list(items)
        return [item.hybrid or item for item in items]

    def shown(self, net: LmNet, items: Sequence[Item]) -> list[Item]:
        """Return hybrid prompts for a net with item vectors. The LM before training has none."""
        return [item.hybrid or item for item in items] if isinstance(net.head, Hybrid) else list(items)

    def loss(self, net: LmNet, batch: TextBatch) -> dict[str, Tensor]:
        hybrid = torch.tensor(float("items" in batch), device=batch["ids"].device)
        if self.answer == "judge":
            scores = self._judgements(net, batch)
            hits = (scores.argmax(1) == batch["label"]).float().mean()
            return {"loss": F.cross_entropy(scores, batch["label"]), "hits": hits, "hybrid": hybrid}
        with conditioned(net, batch) as given:
            return {"loss": net.mean_nll(given), "hybrid": hybrid}

    def examples(self, batch: TextBatch) -> Tensor:
        return super().examples(batch) if self.answer == "judge" else counted_tokens(batch)

    def _judgements(self, net: LmNet, batch: TextBatch) -> Tensor:
        verdicts = [single_token(self._tokenizer, "the answer", text) for text in (" yes", " no")]
        with conditioned(net, batch) as given:
            logits = net.branch_logits(given, verdicts)
        return logits[..., 0] - logits[..., 1]

    def score(self, net: LmNet, batch: TextBatch, items: Sequence[Item]) -> list[Record]:
        if self.answer == "judge":
            return choice_records(items, self._judgements(net, batch))
        if self.answer == "choose":
            with conditioned(net, batch) as given:
                return choice_records(items, answer_scores(net, given, self.normalise))
        line_end = answer_tokens(self._tokenizer, "\n")
        stops = line_end if len(line_end) == 1 else []
        with conditioned(net, prompts_of(net, items)) as given, net.inserted(given):
            texts = written(net, given, self._tokenizer, Writing(self.new_tokens), stops)
        return [
            {**item_names(item), "text": text, **read_answer(text, listed_of(item).titles, item.label)}
            for item, text in zip(items, texts)
        ]

    def measures(self, records: Sequence[Record]) -> dict[str, Measure]:
        if self.reads:
            measures = probability_measures(records)
            hits = replace(measures["accuracy"], metric="HitRatio@1", counts=True, chance=1 / self.candidates)
            return {"HitRatio@1": by_user(records, hits), "NLL in nats": by_user(records, measures["NLL in nats"])}
        columns = {
            "HitRatio@1": "right",
            "ValidRatio": "valid",
            "HitRatio@1 by substring": "right_substring",
            "ValidRatio by substring": "valid_substring",
        }
        return {
            name: by_user(
                records, Measure(name, by_row(records, [float(record[key]) for record in records]), counts=True)
            )
            for name, key in columns.items()
        }

    def quality(self, records: Sequence[Record]) -> float:
        """Return the geometric mean of the probability of the right candidate, or the hit ratio of written answers."""
        return super().quality(records) if self.reads else self.measures(records)["HitRatio@1"].score


def listed_of(item: Item) -> Listed:
    """Return history and candidates of a row."""
    assert item.listed is not None, "a row of a recommendation has a history and candidates"
    return item.listed


def by_user(records: Sequence[Record], measure: Measure) -> Measure:
    """Return a measure whose examples are users, each with the mean of its rows. If no user has two rows, nothing changes.

    Rows of one user are not independent. Their means by user are, so that intervals and paired differences hold.
    """
    rows: dict[str, list[float]] = {}
    for record in records:
        rows.setdefault(record["user"] if "user" in record else record["id"], []).append(measure.values[record["id"]])
    if len(rows) == len(records):
        return measure
    return replace(
        measure, values={user: math.fsum(values) / len(values) for user, values in rows.items()}, counts=False
    )
