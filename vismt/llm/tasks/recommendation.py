"""The next item of a user's history, out of candidates named in the prompt (LLaRA's protocol, arXiv 2312.02445; iLoRA's, too).

    p(text)  = max(0, 1 - k / (curriculum K))     of training batch k of K: titles only; else titles and item vectors
    loss     = sum over the tokens of the right title and of its line end of -log p(token | before) / number of these tokens
    choose:    s_c = sum over the tokens of candidate c of log p(token | prompt),  HitRatio@1 = share with the right c first
    write:     greedy generation up to the end of the line, read as one of the candidates

In a hybrid prompt a slot of one token follows each title, and the vector of the item replaces it (vismt.llm.hybrid). The
candidates of a row are fixed; the released loader of Last.fm draws one negative and leaves out the right item. HitRatio@1 is
correct / all; relative to valid answers only it would rise with each invalid answer. A written line is an exact answer where it
equals the title of a candidate, and an answer by substring where it contains one title: of titles that contain each other the
longest counts, which the released reading treats as invalid. Left out: item tokens in the vocabulary, beam search.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vismt.data.interactions import draw_candidates
from vismt.errors import UserError, near
from vismt.llm.hybrid import Hybrid
from vismt.llm.net import Batch, LmNet
from vismt.llm.tasks import TASKS
from vismt.llm.tasks.answers import LENGTHS
from vismt.llm.tasks.base import (
    Item,
    Listed,
    LmTask,
    Record,
    answer_tokens,
    by_row,
    context_tokens,
    gather,
    probability_measures,
)
from vismt.llm.tasks.pieces import IGNORE, Piece, select_tokens, stem, tree
from vismt.lowrank.instance_gates import instance_gates
from vismt.seeds import mix_seed
from vismt.stats import Measure

ANSWERS = ("choose", "write")
PLACES = ("history", "candidates")


@TASKS.register("recommendation")
class Recommendation(LmTask):
    """The next item of a history.

    Args:
        prompt: template with the places {history} and {candidates}.
        answer: "choose" a candidate by log-likelihood or "write" a title.
        candidates: number of candidates.
        history: number of last items in the prompt and for the recommender.
        items: whether item vectors follow the titles, in place of the token `slot`.
        curriculum: share of the training over which text prompts are replaced by hybrid prompts.
        normalise: length that the log-likelihood of a candidate is divided by: "none", "token" or "character".
        new_tokens: largest number of generated tokens.
        slot: text of the one token that item vectors replace.
        join: text between titles.
        seed: of the candidates.
        length: largest number of tokens of prompt and answer.

    Raises:
        UserError: unknown names, numbers out of range, or a prompt without the two places.
    """

    labelled = False

    def __init__(
        self,
        prompt: str,
        answer: str = "choose",
        candidates: int = 20,
        history: int = 10,
        items: bool = True,
        curriculum: float = 1.0,
        normalise: str = "none",
        new_tokens: int = 32,
        slot: str = " *",
        join: str = ", ",
        seed: int = 0,
        length: int = 768,
    ) -> None:
        super().__init__(prompt, length)
        for name, value, choices in (("answer", answer, ANSWERS), ("normalise", normalise, LENGTHS)):
            if value not in choices:
                raise UserError(f"tasks: {name} '{value}'.{near(str(value), choices)}")
        if candidates < 2 or history < 1 or new_tokens < 1 or not 0 <= curriculum <= 1:
            raise UserError(
                f"tasks: candidates {candidates}, history {history}, new_tokens {new_tokens}, curriculum {curriculum:g}; "
                "needed 2, 1 and 1 at least, and a share in [0, 1]."
            )
        self.sections = _sections(prompt)
        self.answer = answer
        self.candidates = candidates
        self.history = history
        self.items = items
        self.curriculum = curriculum
        self.normalise = normalise
        self.new_tokens = new_tokens
        self.slot = slot
        self.join = join
        self.seed = seed
        self.reads = answer == "choose"
        self._tokenizer: Any = None

    @property
    def about(self) -> str:
        unit = "" if self.normalise == "none" else f" a {self.normalise}"
        how = f"largest log-likelihood{unit}"
        if self.answer == "write":
            how = f"written greedily, at most {self.new_tokens} tokens"
        return f"the next of {self.candidates} items, {how}"

    def encode(self, name: str, row: Mapping[str, Any], tokenizer: Any) -> Item:
        if "catalogue" not in row:
            raise UserError(f"tasks: row '{name}' has no items; 'recommendation' needs sets of kind interactions.")
        self._tokenizer = tokenizer
        titles = row["catalogue"].titles
        candidates = draw_candidates(row["catalogue"], row["history"], row["next"], self.candidates, name, self.seed)
        label = candidates.index(row["next"])
        history = list(row["history"][-self.history :])
        if not history:
            raise UserError(f"tasks: row '{name}' has no history; set 'shortest' in its card to 1 or more.")
        listed = Listed(history, candidates, [titles[number] for number in candidates])
        answers = [answer_tokens(tokenizer, f" {title}\n") for title in listed.titles]

        def item(hybrid: bool) -> Item:
            ids, items = self._context(tokenizer, history, candidates, titles, hybrid)
            whole = tree(ids, answers, self.length, items if hybrid else None)
            pieces = [whole if self.answer == "choose" else stem(whole, label)]
            return Item(name, pieces, label, sizes=[len(title) for title in listed.titles], listed=listed)

        return replace(item(False), hybrid=item(True) if self.items else None)

    def _context(
        self, tokenizer: Any, history: Sequence[int], candidates: Sequence[int], titles: Sequence[str], hybrid: bool
    ) -> tuple[list[int], list[int]]:
        """Return the tokens of the prompt and the item number of each token, -1 for none."""
        texts = [""]  # before, between and after the slots
        slots = []  # the item of each slot
        for literal, name in self.sections:
            texts[-1] += literal
            for position, number in enumerate({"history": history, "candidates": candidates}.get(name, ())):
                if position:
                    texts[-1] += self.join
                texts[-1] += titles[number]
                if hybrid:
                    slots.append(number)
                    texts.append("")
        ids = context_tokens(tokenizer, texts[0])
        items = [-1] * len(ids)
        for number, text in zip(slots, texts[1:]):
            after = answer_tokens(tokenizer, text)
            ids += [self._slot(tokenizer), *after]
            items += [number, *[-1] * len(after)]
        return ids, items

    def _slot(self, tokenizer: Any) -> int:
        """Return the token that item vectors replace."""
        ids = answer_tokens(tokenizer, self.slot)
        if len(ids) != 1:
            raise UserError(f"tasks: slot '{self.slot}' is {len(ids)} tokens, needed one; take a sign such as ' *'.")
        return ids[0]

    def training(self, items: Sequence[Item]) -> list[Item]:
        """Return the items with the right answer only, in the forms (text, hybrid) that the curriculum uses."""
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
        """Return the item with its right answer only."""
        pieces = [stem(piece, item.label) if piece.shared else piece for piece in item.pieces]
        return replace(item, pieces=pieces, hybrid=None)

    def form(self, items: Sequence[Item], number: int, of: int, seed: int) -> list[Item]:
        """Return all items of a batch in one form: text with the probability of the curriculum, drawn from (seed, number)."""
        text_probability = 1 - number / (self.curriculum * of) if self.curriculum else 0.0
        if mix_seed(seed, "text prompt", number) / 2**63 < text_probability:
            return list(items)
        return [item.hybrid or item for item in items]

    def shown(self, net: LmNet, items: Sequence[Item]) -> list[Item]:
        """Return hybrid prompts for a net with item vectors; the LM before training has none."""
        return [item.hybrid or item for item in items] if isinstance(net.head, Hybrid) else list(items)

    def loss(self, net: LmNet, batch: Batch) -> dict[str, Tensor]:
        with _conditioned(net, batch) as conditioned:
            nats, tokens = net.token_nll(conditioned)
        return {"loss": nats.sum() / tokens.sum(), "hybrid": torch.tensor(float("items" in batch), device=nats.device)}

    def score(self, net: LmNet, batch: Batch, items: Sequence[Item]) -> list[Record]:
        if self.answer == "write":
            return [
                {"id": item.id, "text": text, **judged(text, item.listed.titles, item.label)}
                for item, text in zip(items, self._written(net, items))
            ]
        with _conditioned(net, batch) as conditioned:
            nats, tokens = net.branch_nll(conditioned)
        scores = -nats / {"token": tokens, "character": batch["size"], "none": 1}[self.normalise]
        log_p = scores.double().log_softmax(1).cpu().tolist()
        return [{"id": item.id, "label": item.label, "log_p": values} for item, values in zip(items, log_p)]

    @torch.no_grad()
    def _written(self, net: LmNet, items: Sequence[Item]) -> list[str]:
        """Return the text that the LM generates after each prompt."""
        prompts = [replace(item, pieces=[_prompt(item.pieces[0])]) for item in items]
        device = next(net.lm.parameters()).device
        named = {name: value.to(device) for name, value in gather(prompts).items()}
        end = self._tokenizer.eos_token_id
        line_end = answer_tokens(self._tokenizer, "\n")
        stops = [] if end is None else [end]
        if len(line_end) == 1:
            stops += line_end
        with _conditioned(net, named) as conditioned, net.inserted(conditioned):
            generated = net.lm.generate(
                named["ids"],
                attention_mask=named["mask"].long(),
                do_sample=False,
                max_new_tokens=self.new_tokens,
                pad_token_id=end if end is not None else 0,
                eos_token_id=stops or None,
            )
        return self._tokenizer.batch_decode(generated[:, named["ids"].shape[1] :], skip_special_tokens=True)

    def measures(self, records: Sequence[Record]) -> dict[str, Measure]:
        if self.answer == "choose":
            measures = probability_measures(records)
            hits = replace(measures["accuracy"], metric="HitRatio@1", counts=True)
            return {"HitRatio@1": hits, "NLL in nats": measures["NLL in nats"]}
        columns = {
            "HitRatio@1": "right",
            "ValidRatio": "valid",
            "HitRatio@1 by substring": "right_substring",
            "ValidRatio by substring": "valid_substring",
        }
        return {
            name: Measure(name, by_row(records, [float(record[key]) for record in records]), counts=True)
            for name, key in columns.items()
        }

    def quality(self, records: Sequence[Record]) -> float:
        """Return the geometric mean of the probability of the right candidate, or the hit ratio of written answers."""
        measures = self.measures(records)
        if self.answer == "write":
            return measures["HitRatio@1"].score
        return math.exp(-measures["NLL in nats"].score)


def judged(text: str, titles: Sequence[str], label: int) -> dict[str, bool]:
    """Return whether a written answer is right and valid: its first line equals a title, or contains one; case is ignored."""
    names = [_plain(title) for title in titles]
    line = _plain(text.split("\n")[0])
    contained = [name for name in names if name in line]
    longest = [name for name in contained if not any(name != other and name in other for other in contained)]
    return {
        "right": line == names[label],
        "valid": line in names,
        "right_substring": longest == [names[label]],
        "valid_substring": len(longest) == 1,
    }


def _plain(text: str) -> str:
    """Return the text in lower case with single spaces."""
    return " ".join(text.casefold().split())


@contextmanager
def _conditioned(net: LmNet, batch: Batch) -> Iterator[Batch]:
    """Yield the batch with its item vectors, within the gates of its users."""
    if not isinstance(net.head, Hybrid):
        yield batch
        return
    items = batch.get("items")
    with_vectors = batch if items is None else {**batch, "vectors": net.head.vectors(items[items >= 0])}
    gates = net.head.gates(net.lm, batch)
    if gates is None:
        yield with_vectors
        return
    with instance_gates(gates):
        yield with_vectors


def _prompt(piece: Piece) -> Piece:
    """Return the piece without its counted tokens."""
    return select_tokens(piece, [position for position, label in enumerate(piece.labels) if label == IGNORE])


def _sections(prompt: str) -> list[tuple[str, str]]:
    """Return (text, name of the place after it or "") for the parts of a prompt with {history} and {candidates}."""
    try:
        sections = [(literal, name or "") for literal, name, _, _ in string.Formatter().parse(prompt)]
    except ValueError as error:
        raise UserError(f"tasks: prompt '{prompt}' is not a template ({error}); double a literal brace.") from error
    places = [name for _, name in sections if name]
    if sorted(places) != sorted(PLACES):
        raise UserError(
            f"tasks: prompt: has the places {places}; 'recommendation' needs {{history}} and {{candidates}}, each once."
        )
    return sections
