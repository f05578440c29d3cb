"""Texts that name items: prompts with titles, with slots for item vectors, or with both, and the reading of written answers.

    titles          "played Enigma, Morcheeba."          a language model that reads titles alone
    both            "played Enigma *, Morcheeba *."      LLaRA's hybrid prompt (arXiv 2312.02445)
    slots           "played *, *."                       items by their vectors alone

A slot is one token, which the vector of its item replaces (vismt.llm.ilora.hybrid). HitRatio@1 of written answers is correct /
all; relative to valid answers only it would rise with each invalid answer.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from vismt.base.errors import UserError
from vismt.llm.tasks.base import answer_tokens, context_tokens


class ItemPrompt:
    """A template with places for lists of items.

    Args:
        key: key of the configuration that holds the template, for messages.
        template: text with each of the places once, in braces.
        places: their names.
        join: text between the items of a list.
        slot: text of the one token that an item vector replaces.

    Raises:
        UserError: a template that cannot be read, or one with other places.
    """

    def __init__(self, key: str, template: str, places: Sequence[str], join: str, slot: str) -> None:
        try:
            self.sections = [(text, name or "") for text, name, _, _ in string.Formatter().parse(template)]
        except ValueError as error:
            raise UserError(
                f"tasks: {key} '{template}' is not a template ({error}); double a literal brace."
            ) from error
        found = [name for _, name in self.sections if name]
        if sorted(found) != sorted(places):
            needed = " and ".join(f"{{{name}}}" for name in places)
            raise UserError(f"tasks: {key}: has the places {found}; 'recommendation' needs {needed}, each once.")
        self.join = join
        self.slot = slot

    def tokens(
        self,
        tokenizer: Any,
        lists: Mapping[str, Sequence[int]],
        titles: Sequence[str] | None,
        slots: bool,
        after: str | None = None,
    ) -> tuple[list[int], list[int]]:
        """Return the tokens and the item number of each token, -1 for none.

        Args:
            tokenizer: of the LM.
            lists: the items of each place.
            titles: of all items; None to leave titles out.
            slots: whether a slot follows each item.
            after: the end of the text before; None for a text that begins a sequence, with the special tokens for that.
        """
        texts = [""]  # before, between and after the slots
        numbers = []  # the item of each slot
        for literal, name in self.sections:
            texts[-1] += literal
            for position, number in enumerate(lists.get(name, ())):
                if position:
                    texts[-1] += self.join
                if titles is not None:
                    texts[-1] += titles[number]
                if slots:
                    numbers.append(number)
                    texts.append("")
        ids = context_tokens(tokenizer, texts[0]) if after is None else answer_tokens(tokenizer, texts[0], after)
        items = [-1] * len(ids)
        for number, text in zip(numbers, texts[1:]):
            further = answer_tokens(tokenizer, text)
            ids += [single_token(tokenizer, "slot", self.slot), *further]
            items += [number, *[-1] * len(further)]
        return ids, items


def single_token(tokenizer: Any, key: str, text: str) -> int:
    """Return the token of a text; raise UserError where it is several."""
    ids = answer_tokens(tokenizer, text)
    if len(ids) != 1:
        raise UserError(f"tasks: {key} '{text}' is {len(ids)} tokens, needed one; take a sign such as ' *'.")
    return ids[0]


def read_answer(text: str, titles: Sequence[str], label: int) -> dict[str, bool]:
    """Return whether a written answer is right and valid: its first line equals a title, or contains one; case is ignored.

    Of titles that contain each other the longest counts, which LLaRA's released reading treats as invalid.
    """
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
    return " ".join(text.casefold().split())
