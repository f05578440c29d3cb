"""The next item of a user's history, out of candidates named in the prompt (LLaRA's protocol, arXiv 2312.02445; iLoRA's, too).

    p(text)  = max(0, 1 - k / (curriculum K))     of training batch k of K: titles alone; else titles and item vectors
    loss     = sum over the right title's tokens and the end of its line of -log p(token | before) / number of these tokens
    choose:    s_c = sum over candidate c's tokens of log p(token | prompt),  HitRatio@1 = share with the right c first
    write:     greedy generation up to the end of the line, read as one of the candidates

In a hybrid prompt a slot, one token, follows each title, and the item's vector takes its place (vismt.llm.hybrid). Candidates
are fixed for each row; the released loader of Last.fm draws one negative and leaves the right item out. HitRatio@1 is
correct / all: of the valid answers alone it would rise with each refusal. A written line counts as exact where it is a
candidate's title, and by substring where one title is in it: of titles within each other the longest, which the released
reading calls invalid. Left out: item tokens in the vocabulary, beam search.
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
from vismt.llm.tasks.answers import LENGTHS
from vismt.llm.tasks.base import (
    Item,
    Listed,
    Measure,
    Record,
    Task,
    answer_tokens,
    context_tokens,
    gather,
    mean_of,
    probability_measures,
)
from vismt.llm.tasks.pieces import IGNORE, Piece, stem, tree
from vismt.lowrank.instance_gates import instance_gates
from vismt.seeds import mix_seed

ANSWERS = ("choose", "write")
PLACES = ("history", "candidates")


class Recommendation(Task):
    """candidates: to choose from; history: the last items that the prompt and the recommender see; join: between titles.

    items: whether item vectors stand beside the titles, in the place of the token `slot`. curriculum: over which share of
    the training text prompts give way to them. normalise: a candidate's log-likelihood by "none", "token" or "character".
    new_tokens: written at most. seed: of the candidates.
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
        for name, value, known in (("answer", answer, ANSWERS), ("normalise", normalise, LENGTHS)):
            if value not in known:
                raise UserError(f"tasks: {name} '{value}'.{near(str(value), known)}")
        if candidates < 2 or history < 1 or new_tokens < 1 or not 0 <= curriculum <= 1:
            raise UserError(
                f"tasks: candidates {candidates}, history {history}, new_tokens {new_tokens}, curriculum {curriculum:g}; "
                "needed 2, 1 and 1 at least, and a share in [0, 1]."
            )
        self.parts = _parts(prompt)
        self.answer, self.candidates, self.history, self.items = answer, candidates, history, items
        self.curriculum, self.normalise, self.new_tokens = curriculum, normalise, new_tokens
        self.slot, self.join, self.seed = slot, join, seed
        self._decode: Any = None

    @property
    def reads(self) -> bool:
        """Candidates are read, answers are written."""
        return self.answer == "choose"

    @property
    def about(self) -> str:
        """What is asked."""
        by = "" if self.normalise == "none" else f" a {self.normalise}"
        how = (
            f"largest log-likelihood{by}"
            if self.answer == "choose"
            else f"written greedily, at most {self.new_tokens} tokens"
        )
        return f"the next of {self.candidates} items, {how}"

    def encode(self, name: str, row: Mapping[str, Any], tokenizer: Any) -> Item:
        if "catalogue" not in row:
            raise UserError(f"tasks: row '{name}' has no items; 'recommendation' needs sets of kind interactions.")
        self._decode, titles = tokenizer, row["catalogue"].titles
        chosen = draw_candidates(row["catalogue"], row["history"], row["next"], self.candidates, name, self.seed)
        history, label = list(row["history"][-self.history :]), chosen.index(row["next"])
        if not history:
            raise UserError(f"tasks: row '{name}' has no history; set 'shortest' in its card to 1 or more.")
        listed = Listed(history, chosen, [titles[i] for i in chosen])
        answers = [answer_tokens(tokenizer, f" {title}\n") for title in listed.titles]

        def item(hybrid: bool) -> Item:
            ids, items = self._context(tokenizer, history, chosen, titles, hybrid)
            one = tree(ids, answers, self.length, items if hybrid else None)
            pieces = [one if self.answer == "choose" else stem(one, label)]
            return Item(name, pieces, label, sizes=[len(title) for title in listed.titles], listed=listed)

        return replace(item(False), hybrid=item(True) if self.items else None)

    def _context(
        self, tokenizer: Any, history: Sequence[int], chosen: Sequence[int], titles: Sequence[str], hybrid: bool
    ) -> tuple[list[int], list[int]]:
        """Tokens of the prompt, and at each the number of its item or -1."""
        texts, slots = [""], []  # text before, between and after the slots
        for literal, name in self.parts:
            texts[-1] += literal
            for place, number in enumerate({"history": history, "candidates": chosen}.get(name, ())):
                texts[-1] += (self.join if place else "") + titles[number]
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
        ids = answer_tokens(tokenizer, self.slot)
        if len(ids) != 1:
            raise UserError(f"tasks: slot '{self.slot}' is {len(ids)} tokens, needed one; take a sign such as ' *'.")
        return ids[0]

    def training(self, items: Sequence[Item]) -> list[Item]:
        """The right answer alone; of the forms of a row those that the curriculum shows."""
        found = []
        for item in items:
            text, hybrid = (None if one is None else self._answered(one) for one in (item, item.hybrid))
            found.append(hybrid if hybrid is not None and not self.curriculum else replace(text, hybrid=hybrid))
        return found

    def _answered(self, item: Item) -> Item:
        pieces = [stem(one, item.label) if one.shared else one for one in item.pieces]
        return replace(item, pieces=pieces, hybrid=None)

    def form(self, items: Sequence[Item], number: int, of: int, seed: int) -> list[Item]:
        """All rows of a batch in one form: the text prompt with the probability of the curriculum, drawn from (seed, number)."""
        text = 1 - number / (self.curriculum * of) if self.curriculum else 0.0
        if mix_seed(seed, "text prompt", number) / 2**63 < text:
            return list(items)
        return [item.hybrid or item for item in items]

    def shown(self, net: LmNet, items: Sequence[Item]) -> list[Item]:
        """A net that has item vectors is asked with them; the LM before training has none."""
        return [item.hybrid or item for item in items] if isinstance(net.head, Hybrid) else list(items)

    def loss(self, net: LmNet, batch: Batch) -> dict[str, Tensor]:
        with _seen(net, batch) as whole:
            nats, tokens = net.token_nll(whole)
        return {"loss": nats.sum() / tokens.sum(), "hybrid": torch.tensor(float("items" in batch), device=nats.device)}

    def score(self, net: LmNet, batch: Batch, items: Sequence[Item]) -> list[Record]:
        if self.answer == "write":
            return [
                {"id": item.id, "text": text, **judged(text, item.listed.titles, item.label)}
                for item, text in zip(items, self._written(net, items))
            ]
        with _seen(net, batch) as whole:
            nats, tokens = net.branch_nll(whole)
        scores = -nats / {"token": tokens, "character": batch["size"], "none": 1}[self.normalise]
        found = scores.double().log_softmax(1).cpu().tolist()
        return [{"id": item.id, "label": item.label, "log_p": own} for item, own in zip(items, found)]

    @torch.no_grad()
    def _written(self, net: LmNet, items: Sequence[Item]) -> list[str]:
        """What the LM writes after each prompt, padded on the left."""
        prompts = [replace(item, pieces=[_prompt(item.pieces[0])]) for item in items]
        device = next(net.lm.parameters()).device
        named = {name: value.to(device) for name, value in gather(prompts).items()}
        end, line = self._decode.eos_token_id, answer_tokens(self._decode, "\n")
        stops = [*([end] if end is not None else []), *(line if len(line) == 1 else [])]
        with _seen(net, named) as whole, net.inserted(whole):
            made = net.lm.generate(
                named["ids"],
                attention_mask=named["mask"].long(),
                do_sample=False,
                max_new_tokens=self.new_tokens,
                pad_token_id=end if end is not None else 0,
                eos_token_id=stops or None,
            )
        return self._decode.batch_decode(made[:, named["ids"].shape[1] :], skip_special_tokens=True)

    def measures(self, records: Sequence[Record]) -> dict[str, Measure]:
        if self.answer == "choose":
            found = probability_measures(records)
            return {"HitRatio@1": replace(found["accuracy"], counts=True), "NLL in nats": found["NLL in nats"]}
        columns = {
            "HitRatio@1": "right",
            "ValidRatio": "valid",
            "HitRatio@1 by substring": "right_substring",
            "ValidRatio by substring": "valid_substring",
        }
        return {name: Measure([float(record[key]) for record in records], counts=True) for name, key in columns.items()}

    def quality(self, records: Sequence[Record]) -> float:
        """Geometric mean of the right candidate's probability; the share of hits where answers are written."""
        found = self.measures(records)
        return mean_of(found["HitRatio@1"]) if self.answer == "write" else math.exp(-mean_of(found["NLL in nats"]))


def judged(text: str, titles: Sequence[str], label: int) -> dict[str, bool]:
    """What a written answer says: its first line is a title (exact), or one title is in it (substring), case left aside."""
    names = [_plain(title) for title in titles]
    line = _plain(text.split("\n")[0])
    held = [name for name in names if name in line]
    longest = [name for name in held if not any(name != other and name in other for other in held)]
    return {
        "right": line == names[label],
        "valid": line in names,
        "right_substring": longest == [names[label]],
        "valid_substring": len(longest) == 1,
    }


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


@contextmanager
def _seen(net: LmNet, batch: Batch) -> Iterator[Batch]:
    """The batch with its item vectors, under the gates of its users."""
    if not isinstance(net.head, Hybrid):
        yield batch
        return
    items = batch.get("items")
    whole = batch if items is None else {**batch, "vectors": net.head.vectors(items[items >= 0])}
    gates = net.head.gates(net.lm, batch)
    if gates is None:
        yield whole
        return
    with instance_gates(gates):
        yield whole


def _prompt(one: Piece) -> Piece:
    """A piece without what is counted of it."""
    kept = [place for place, label in enumerate(one.labels) if label == IGNORE]
    items = None if one.items is None else tuple(one.items[place] for place in kept)
    return Piece(tuple(one.ids[place] for place in kept), (IGNORE,) * len(kept), items=items)


def _parts(prompt: str) -> list[tuple[str, str]]:
    """(text, name of the place after it or "") of a prompt with {history} and {candidates}."""
    try:
        parts = [(literal, name or "") for literal, name, _, _ in string.Formatter().parse(prompt)]
    except ValueError as error:
        raise UserError(f"tasks: prompt '{prompt}' is no template ({error}); double a brace that is meant.") from error
    named = [name for _, name in parts if name]
    if sorted(named) != sorted(PLACES):
        told = "'recommendation' needs {history} and {candidates}, each once."
        raise UserError(f"tasks: prompt: has the places {named}; {told}")
    return parts
