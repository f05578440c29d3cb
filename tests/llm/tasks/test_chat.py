"""Chats: which tokens are counted, and what a template or row must be like."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.lm_parts import tokenizer

from vismt.base.errors import UserError
from vismt.llm.tasks import make_text_task
from vismt.llm.tasks.pieces import IGNORED

TURN = "{% for m in messages %}<s>{{ m.role[0] }} {{ m.content }}</s>{% endfor %}"
TEMPLATE = TURN + "{% if add_generation_prompt %}<s>a{% endif %}"
# Drops what an answer says before "#" once another turn follows, as templates drop reasoning.
REWRITING = TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('#')[-1] }}")


def turns(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts)]}


def words(template: str | None = TEMPLATE) -> Any:
    made = tokenizer()
    made.chat_template = template
    return made


def test_every_turn_of_the_assistant_is_counted_and_nothing_else() -> None:
    made = words()
    (part,) = make_text_task("chat", "", {}).encode("a", turns("sky", "blue", "grass", "green one"), made).pieces
    assert made.decode(part.ids) == "<s>u sky</s><s>a blue</s><s>u grass</s><s>a green one</s>"
    counted = [token if label != IGNORED else made.unk_token_id for token, label in zip(part.ids, part.labels)]
    unknown = "<unk>"
    shown = [text for text in made.decode(counted).replace(unknown, "|").split("|") if text]
    assert shown == [" blue</s>", " green one</s>"]  # with the end of each turn, which the model has to write


def test_turns_of_sharegpt_are_turns_of_messages() -> None:
    made, row = words(), turns("sky", "blue")
    named = {"user": "human", "assistant": "gpt"}
    shared = [{"from": named[turn["role"]], "value": turn["content"], "weight": 1} for turn in row["messages"]]
    task = make_text_task("chat", "", {"messages": "conversations"})
    assert task.encode("a", {"conversations": shared}, made) == make_text_task("chat", "", {}).encode("a", row, made)
    system = {"from": "system", "value": "one"}
    assert made.decode(task.ask("a", {"conversations": [system, *shared]}, made).pieces[0].ids).startswith(
        "<s>s one</s>"
    )


def test_a_long_chat_keeps_its_end() -> None:
    made = words()
    (part,) = (
        make_text_task("chat", "", {"length": 4}).encode("a", turns("sky", "blue", "grass", "green one"), made).pieces
    )
    assert made.decode(part.ids) == "a green one</s>"


def test_what_is_asked_ends_with_the_beginning_of_the_answer() -> None:
    made, task = words(), make_text_task("chat", "", {})
    for row in (turns("sky"), turns("sky", "blue")):  # the answer of a training row is not shown
        assert made.decode(task.ask("a", row, made).pieces[0].ids) == "<s>u sky</s><s>a"


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (None, turns("sky", "blue"), "the tokenizer has no chat template"),
        (TEMPLATE, turns("sky"), "row 'a' has no turn of the assistant"),
        (TEMPLATE, {"text": "sky"}, "'messages' is not a list of turns such as"),
        (TEMPLATE, {"messages": [{"role": "user"}]}, "'messages' is not a list of turns such as"),
        (REWRITING, turns("sky", "one # blue", "grass", "green"), "the chat template rewrites earlier turns"),
        ("{{ raise_exception('no') }}", turns("sky", "blue"), "the chat template refuses the turns user"),
    ],
)
def test_rows_and_templates_that_do_not_fit(template: str | None, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_text_task("chat", "", {}).encode("a", row, words(template))


def test_a_template_that_rewrites_serves_one_question() -> None:
    assert make_text_task("chat", "", {}).encode("a", turns("sky", "one # blue"), words(REWRITING)).pieces[0].counted
    with pytest.raises(UserError, match="'chat' takes no prompt"):
        make_text_task("chat", "{text}", {})
