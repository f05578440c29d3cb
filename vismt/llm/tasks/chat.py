"""Chats of several turns, as the chat template of the tokenizer writes them. The loss counts only the assistant's turns.

    row: {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    or   {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}, as of ShareGPT

The tokens of an assistant's turn are what the template adds after the prompt for it, including the end-of-turn token. Some
templates rewrite earlier turns later (for example, they drop the reasoning of all but the last turn). Such a template has no
such tokens and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vismt.base.errors import UserError
from vismt.data.texts.text_set import TextRow
from vismt.llm.tasks import TEXT_TASKS
from vismt.llm.tasks.base import Item, Tokenizer, answer_tokens, chat_text, turn_end
from vismt.llm.tasks.causal import Causal
from vismt.llm.tasks.pieces import IGNORED, Piece

ASSISTANT = "assistant"
SHAREGPT = {"human": "user", "gpt": ASSISTANT}  # ShareGPT's names of roles (other roles have the same names)


@TEXT_TASKS.register("chat")
class Chat(Causal):
    """Chats.

    Args:
        prompt: Empty, because the rows have the turns.
        messages: Name of the field with the list of turns.
        length: Largest number of tokens of a chat. A longer chat loses its beginning.
        pack: Whether several rows share a training piece.

    Raises:
        UserError: If a prompt is given.
    """

    def __init__(self, prompt: str, messages: str = "messages", length: int = 512, pack: bool = False) -> None:
        if prompt:
            raise UserError("tasks: 'chat' takes no prompt, as its rows have the turns; leave it out.")
        super().__init__("", f"{{{messages}}}", length, end=False, pack=pack)
        self.messages = messages

    @property
    def about(self) -> str:
        return f"tokens of the assistant's turns, at most {self.length} in all"

    def encode(self, name: str, row: TextRow, tokenizer: Tokenizer) -> Item:
        turns = self.turns(name, row)
        ids: list[int] = []
        labels: list[int] = []
        done = ""
        for place, turn in enumerate(turns):
            if turn["role"] != ASSISTANT:
                continue
            for text, counted in (
                (chat_text(tokenizer, turns[:place]), False),
                (chat_text(tokenizer, turns[: place + 1], prompt=False), True),
            ):
                if not text.startswith(done):
                    raise UserError(
                        f"tasks: row '{name}': the chat template rewrites earlier turns, so the tokens of an answer change; "
                        "give one question and answer a row, or another tokenizer."
                    )
                tokens = answer_tokens(tokenizer, text[len(done) :], done)
                ids += tokens
                labels += tokens if counted else [IGNORED] * len(tokens)
                done = text
        part = Piece(tuple(ids[-self.length :]), tuple(labels[-self.length :]))
        if not part.counted:
            raise UserError(f"tasks: row '{name}' has no turn of the {ASSISTANT}, so no token is counted.")
        return Item(name, [part])

    def turns(self, name: str, row: Mapping[str, object]) -> Sequence[Mapping[str, str]]:
        """Return the turns of a row. Raise UserError unless it is a list of turns with role and content."""
        turns = row.get(self.messages)
        if isinstance(turns, list):
            turns = [_with_role(turn) for turn in turns]
        if not isinstance(turns, list) or not all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in turns or [None]
        ):
            raise UserError(
                f"tasks: row '{name}': '{self.messages}' is not a list of turns such as "
                '{"role": "user", "content": "..."}.'
            )
        return turns

    def stops(self, tokenizer: Tokenizer) -> list[int]:
        return turn_end(tokenizer)[-1:]

    def ask(self, name: str, row: TextRow, tokenizer: Tokenizer) -> Item:
        turns = self.turns(name, row)
        if turns[-1]["role"] == ASSISTANT:  # the answer of a training row
            turns = turns[:-1]
        return self.asked(name, tokenizer(chat_text(tokenizer, turns), add_special_tokens=False)["input_ids"])


def _with_role(turn: object) -> object:
    """Return a turn of ShareGPT in the form of messages, and any other turn unchanged."""
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        return turn
    return {"role": SHAREGPT.get(str(turn["from"]), turn["from"]), "content": turn["value"]}
