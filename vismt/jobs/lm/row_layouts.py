"""Known layouts of rows of text, for `vismt init lm --texts`. The names of the fields determine the task.

    messages or conversations          chats, also of ShareGPT
    a prompt, choices and an answer    multiple choice. Choices are a list, {"text": [...], "label": [...]}, or columns (A, B, or
                                       option1, option2). The answer is the number or letter of the right choice
    a prompt and an answer             Alpaca: instruction, input, output. Dolly: instruction, context, response
    a text and a label                 classes. The text follows the title, if there is one
    a text                             every token. The text follows the title, if there is one

All rows are read. A field that the task reads has a text in each row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from vismt.base.errors import UserError, shown_value
from vismt.storage.files import JsonObject
from vismt.storage.wheels import one_line

CHATS = ("messages", "conversations")
PROMPTS = ("prompt", "question", "instruction", "query", "question_stem", "goal", "ctx")
ABOUT = ("input", "context", "passage")  # context of a prompt, which may be empty
CHOICES = ("choices", "options", "endings")
CHOICE = re.compile(r"(?:option|choice|ending|sol|op)?[ _]?([a-z]|[1-9])")  # the column of one choice
_ANSWERS = ("answer", "response", "completion", "output")
TITLES, _TEXTS = ("title",), ("text", "sentence", "content", "document")
_LABELS = ("label", "class", "category")
_RIGHT = ("answerkey", "answer_key", "target", *_LABELS)  # the right choice, if no answer is named
_MOST = len(ascii_uppercase)  # choices or labels


@dataclass(frozen=True)
class Layout:
    """The task of rows.

    learned: What the model learns. read, unused: Fields of the rows. notes: Lines for the user.
    """

    learned: str
    task: JsonObject
    read: list[str]
    notes: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


class RowTable:
    """Rows with the names of all their fields. what: Begin of every error."""

    def __init__(self, what: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.what = what
        self.rows = rows
        self.fields = list(dict.fromkeys(name for row in rows for name in row))

    def named(self, names: Sequence[str]) -> list[str]:
        """Return the fields that have one of these names, in the order of the names."""
        return [found for name in names for found in self.fields if found.lower() == name]

    def one(self, *names: str) -> str | None:
        """Return the field that has one of these names, None for no such field. Raises UserError for several."""
        found = self.named(names)
        if len(found) > 1:
            listed = " and ".join(f"'{name}'" for name in found)
            raise self.refuse(f"the fields {listed} have one meaning; leave all but one out, or rename them")
        return found[0] if found else None

    def texts(self) -> list[str]:
        """Return the fields of the title, if there is one, and of the text. [] without a text."""
        names = self.one(*TITLES), self.one(*_TEXTS)
        return [name for name in names if name] if names[1] else []

    def refuse(self, reason: str, row: int | None = None) -> UserError:
        return UserError(f"{self.what}: {reason if row is None else f'row {row:,} {reason}'}.")

    def values(self, name: str, kind: type | tuple[type, ...] = (str, int, float), needed: str = "a text") -> list[Any]:
        """Return the value of a field in each row. Raises UserError for a row without it, and for a value of another kind."""
        for number, row in enumerate(self.rows, 1):
            value = row.get(name)
            if value is None:
                reason = f"has no '{name}', which other rows have; leave the row out, or write an empty text"
                raise self.refuse(reason, number)
            if not isinstance(value, kind):
                kinds: dict[type, str] = {list: "a list", dict: "an object"}
                seen = kinds.get(type(value)) or one_line(repr(value), 60)
                raise self.refuse(f"has {seen} as '{name}'; needed is {needed}", number)
        return [row[name] for row in self.rows]

    def empty(self, *names: str) -> list[int]:
        """Return the numbers of the rows in which all these fields are blank."""
        columns = [self.values(name) for name in names]
        return [number for number, texts in enumerate(zip(*columns), 1) if not any(str(text).strip() for text in texts)]


def layout_of(what: str, rows: Sequence[Mapping[str, Any]]) -> Layout:
    """Return the task of rows of a known layout, with the fields that it leaves out.

    Raises UserError, which begins with `what`, for fields of no known layout or of two, and a row that does not fit the others.
    """
    table = RowTable(what, rows)
    for make in (_chat, _choices, _answer, _label, _text):
        found = make(table)
        if found is not None:
            unused = [name for name in table.fields if name not in found.read]
            notes = [*found.notes, *([f"not used: {one_line(', '.join(unused))}"] if unused else [])]
            return replace(found, unused=unused, notes=notes)
    raise table.refuse(
        f"the fields are {one_line(', '.join(table.fields)) or 'none'}; needed are prompt and answer, prompt, choices and "
        "answer, messages, text, or text and label"
    )


def _chat(table: RowTable) -> Layout | None:
    from vismt.llm.tasks.chat import ASSISTANT, Chat

    name = table.one(*CHATS)
    if name is None:
        return None
    chat = Chat("", name)
    for number, row in enumerate(table.rows, 1):
        try:
            turns = chat.turns(f"{number:,}", row)
        except UserError as error:
            raise UserError(f"{table.what}: {str(error).removeprefix('tasks: ')}") from error
        if not any(turn["role"] == ASSISTANT for turn in turns):
            raise table.refuse(f"has no turn of the {ASSISTANT}; leave the row out", number)
    options = {} if name == CHATS[0] else {"options": {"messages": name}}
    return Layout("the assistant's turns", {"kind": "chat", **options}, [name])


def _prompt(table: RowTable) -> list[str]:
    """Return the fields of the prompt. Raises UserError for a row in which all of them are empty."""
    main = table.one(*PROMPTS)
    names = [*([main] if main else []), *table.named(ABOUT)]
    blank = table.empty(*names) if names else []
    if blank:
        raise table.refuse(f"has an empty prompt ({', '.join(names)}); leave the row out", blank[0])
    return names


def _choices(table: RowTable) -> Layout | None:
    """Return the task of rows with choices. Columns count as choices only if they have the answer of every row."""
    name, right = table.one(*CHOICES), table.one(*_ANSWERS) or table.one(*_RIGHT)
    columns = [] if name else _columns(table)
    asked = (_prompt(table) or table.texts()) if right and (name or columns) else []
    if right is None or not asked:
        return None
    templates, names = _listed(table, name) if name else ([f" {{{column}}}" for column in columns], [])
    sizes = [len(row) for row in names] if name else [len(columns)] * len(table.rows)
    answers = [str(value) for value in table.values(right)]

    def misfit(keys: Sequence[str]) -> int | None:
        """Return the first row with an answer, or with labels of its choices, that the keys do not count."""
        for number, (answer, size) in enumerate(zip(answers, sizes), 1):
            labels = names[number - 1] if names else [None]
            if answer not in keys[:size] or (labels[0] is not None and labels != keys[:size]):
                return number
        return None

    numbers = [str(number) for number in range(_MOST + 1)]
    ways = {"from 0": numbers[:-1], "from 1": numbers[1:], "from A": [*ascii_uppercase], "from a": [*ascii_lowercase]}
    way = next((way for way, keys in ways.items() if misfit(keys) is None), None)
    if way is None and columns:
        return None
    if way is None:
        number = max(misfit(keys) or 0 for keys in ways.values())
        seen = one_line(repr(answers[number - 1]), 60)
        reason = f"has {seen} as '{right}'; needed is the number or the letter of one of its choices"
        raise table.refuse(reason, number)
    options = {"answers": dict(zip(ways[way], templates)), "label": f"{{{right}}}"}
    task = {"kind": "answers", "prompt": f"{_joined(asked)}\nAnswer:", "options": options}
    read = [*asked, *([name] if name else columns), right]
    return Layout("the right choice", task, read, [f"'{right}' counts the choices {way}"])


def _columns(table: RowTable) -> list[str]:
    """Return the columns of the choices, in order. [] if they do not begin with A or 1, or leave one out."""
    matches = {match[1]: name for name in table.fields if (match := CHOICE.fullmatch(name.lower()))}
    found = "".join(sorted(matches))
    counted = len(found) > 1 and (ascii_lowercase.startswith(found) or "123456789".startswith(found))
    return [matches[place] for place in found] if counted else []


def _listed(table: RowTable, name: str) -> tuple[list[str], list[list[Any]]]:
    """Return a template of each choice in a field, and the labels of the choices of each row (None without labels)."""
    values = table.values(name, (list, dict), "a list of texts")
    labelled = all(isinstance(value, dict) and {"text", "label"} <= value.keys() for value in values)
    lists = [value["text"] for value in values] if labelled else values
    for number, texts in enumerate(lists, 1):
        fits = isinstance(texts, list) and 2 <= len(texts) <= _MOST
        if not fits or not all(isinstance(text, str) and text.strip() for text in texts):
            raise table.refuse(f"has {one_line(repr(texts), 80)} as '{name}'; needed are 2 to {_MOST} texts", number)
    place = f"{name}[text]" if labelled else name
    templates = [f" {{{place}[{at}]}}" for at in range(max(map(len, lists)))]
    return templates, [[*map(str, value["label"])] if labelled else [None] * len(value) for value in values]


def _answer(table: RowTable) -> Layout | None:
    answer = table.one(*_ANSWERS)
    asked = _prompt(table) if answer else []
    if answer is None or not asked:
        return None
    # The prompt is the user's turn in the chat template of the model, if it has a template.
    task = {"kind": "causal", "prompt": _joined(asked), "chat": True, "options": {"answer": f"{{{answer}}}"}}
    return Layout("the answer", task, [*asked, answer], _named_empty(table, answer))


def _label(table: RowTable) -> Layout | None:
    read, label = table.texts(), table.one(*_LABELS)
    if not read or label is None:
        return None
    blank = table.empty(label)
    if blank:
        raise table.refuse(f"has an empty '{label}'; leave the row out", blank[0])
    labels = sorted({str(value) for value in table.values(label)})
    if not 2 <= len(labels) <= _MOST:
        raise table.refuse(f"{len(labels)} labels in the column '{label}'; needed are 2 to {_MOST}")
    for one, other in combinations(labels, 2):
        if one.split() == other.split():
            alike = f"{shown_value(one)} and {shown_value(other)} in the column '{label}'"
            raise table.refuse(f"the labels {alike} differ only in blanks; write one of them")
    answers = {name: f" {letter}" for name, letter in zip(labels, ascii_uppercase)}
    listed = "".join(f"\n({letter.strip()}) {name}" for name, letter in answers.items())
    prompt = f"{_joined(read)}{listed.replace('{', '{{').replace('}', '}}')}\nAnswer:"
    task = {"kind": "classes", "prompt": prompt, "options": {"answers": answers, "label": f"{{{label}}}"}}
    return Layout("the label", task, [*read, label], _named_empty(table, *read))


def _text(table: RowTable) -> Layout | None:
    read = table.texts()
    task = {"kind": "causal", "options": {"answer": _joined(read)}}
    return Layout("every token", task, read, _named_empty(table, *read)) if read else None


def _joined(names: Sequence[str]) -> str:
    return "\n\n".join(f"{{{name}}}" for name in names)


def _named_empty(table: RowTable, *names: str) -> list[str]:
    """Return a line about the rows in which all these fields are empty, if there are some."""
    rows = table.empty(*names)
    title = " and ".join(f"'{name}'" for name in names)
    seen = f"{title} of {len(rows):,} rows is empty, the first is row {rows[0]:,}" if rows else ""
    return [f"{seen}; leave out what is not to be learned"] if rows else []
