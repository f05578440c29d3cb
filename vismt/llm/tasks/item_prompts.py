"""Texts that name items: prompts with titles, with slots for item vectors, or with both, and the reading of written answers.

    titles          "played Enigma, Morcheeba."          a language model that reads titles alone
    both            "played Enigma *, Morcheeba *."      LLaRA's hybrid prompt (arXiv 2312.02445)
    slots           "played *, *."                       items by their vectors alone

A slot is one token, which the vector of its item replaces (vismt.llm.ilora.hybrid). HitRatio@1 of written answers is correct /
all. Relative to valid answers only, it would rise with each invalid answer.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

from vismt.base.errors import UserError
from vismt.llm.tasks.base import Tokenizer, answer_tokens, context_tokens


class ItemPrompt:
    """A template with places for lists of items.

    Args:
        key: Name of the configuration key that holds the template, for messages.
        template: Text that has each of the places once, in braces.
        places: Names of the places.
        join: Text between the items of a list.
        slot: Text of the one token that an item vector replaces.

    Raises:
        UserError: If the template cannot be read, or has other places.
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
        tokenizer: Tokenizer,
        lists: Mapping[str, Sequence[int]],
        titles: Sequence[str] | None,
        slots: bool,
        after: str | None = None,
    ) -> tuple[list[int], list[int]]:
        """Return the tokens and the item number of each token, -1 for none.

        Args:
            tokenizer: Tokenizer of the LM.
            lists: Items of each place.
            titles: Titles of all items. None leaves titles out.
            slots: Whether a slot follows each item.
            after: End of the text before. None for a text that begins a sequence, with the special tokens for that.
        """
        texts = [""]  # texts before, between and after the slots
        numbers = []  # item of each slot
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


def single_token(tokenizer: Tokenizer, key: str, text: str) -> int:
    """Return the token of a text. Raise UserError if the text has several tokens."""
    ids = answer_tokens(tokenizer, text)
    if len(ids) != 1:
        raise UserError(f"tasks: {key} '{text}' is {len(ids)} tokens, needed one; take a sign such as ' *'.")
    return ids[0]


def read_answer(text: str, titles: Sequence[str], label: int) -> dict[str, bool]:
    """Return whether a written answer is right and whether it is valid.

    An answer is valid if its first line equals or contains a title. Case is ignored. If titles contain each other, the longest
    counts. LLaRA's released reading treats such an answer as invalid.
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
