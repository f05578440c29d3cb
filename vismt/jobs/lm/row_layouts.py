"""Known layouts of rows of text, for `vismt init lm --texts`: which task rows set, by the names of their fields.

    messages or conversations          chats (of ShareGPT, too)
    a prompt, choices and an answer    multiple choice: choices is a list of texts, answer the number or letter of the right one
    a prompt and an answer             Alpaca: instruction, input, output. Dolly: instruction, context, response.
    a text and a label                 classes; with a title, the title and the text
    a text                             every token; with a title, the title and the text

All rows are read: a field that the task reads has a text in each of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from vismt.base.errors import UserError, shown_value
from vismt.storage.wheels import one_line

CHATS = ("messages", "conversations")
PROMPTS = ("prompt", "question", "instruction", "query")
ABOUT = ("input", "context", "passage")  # what a prompt is about; it may be empty
CHOICES = ("choices", "options", "endings")
ANSWERS = ("answer", "response", "completion", "output")
TITLES, TEXTS = ("title",), ("text", "sentence", "content", "document")
LABELS = ("label", "class", "category")
RIGHT = ("answerkey", "answer_key", "target", *LABELS)  # the right one of several choices, where no answer is named


@dataclass(frozen=True)
class Layout:
    """The task of rows.

    Args:
        learned: What the model learns, for a comment.
        task: Keys of the task in a configuration.
        read: Fields that the task reads.
        unused: Other fields of the rows.
        notes: Lines for the user.
    """

    learned: str
    task: dict[str, Any]
    read: Collection[str]
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Table:
    """Rows with the names of all their fields. what: Begins every error."""

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
            raise UserError(
                f"{self.what}: the fields {listed} have one meaning; leave all but one out, or rename them."
            )
        return found[0] if found else None

    def refuse(self, number: int, reason: str) -> UserError:
        return UserError(f"{self.what}: row {number:,} {reason}.")

    def values(self, name: str, kind: type | tuple[type, ...] = (str, int, float), needed: str = "a text") -> list[Any]:
        """Return the value of a field in each row. Raises UserError for a row without it, and for a value of another kind."""
        found = []
        for number, row in enumerate(self.rows, 1):
            if row.get(name) is None:
                raise self.refuse(
                    number, f"has no '{name}', which other rows have; leave the row out, or write an empty text"
                )
            if not isinstance(row[name], kind):
                kinds: dict[type, str] = {list: "a list", dict: "an object"}
                seen = kinds.get(type(row[name])) or one_line(repr(row[name]), 60)
                raise self.refuse(number, f"has {seen} as '{name}'; needed is {needed}")
            found.append(row[name])
        return found

    def empty(self, *names: str) -> list[int]:
        """Return the numbers of the rows in which all these fields are blank."""
        columns = [self.values(name) for name in names]
        return [number for number, texts in enumerate(zip(*columns), 1) if not any(str(text).strip() for text in texts)]


def layout_of(what: str, rows: Sequence[Mapping[str, Any]]) -> Layout:
    """Return the task of rows of a known layout, with the fields that it leaves out.

    Raises UserError, which begins with `what`, for fields of no known layout or of two, and a row that does not fit the others.
    """
    table = Table(what, rows)
    makers = (_chat, _choices, _answer, _label, _text)
    found = next((layout for layout in (make(table) for make in makers) if layout is not None), None)
    if found is None:
        raise UserError(
            f"{what}: the fields are {one_line(', '.join(table.fields)) or 'none'}; needed are prompt and answer, prompt, "
            "choices and answer, messages, text, or text and label."
        )
    unused = [name for name in table.fields if name not in found.read]
    notes = [*found.notes, *([f"not used: {one_line(', '.join(unused))}"] if unused else [])]
    return Layout(found.learned, found.task, found.read, unused, notes)


def _chat(table: Table) -> Layout | None:
    from vismt.llm.tasks.chat import ASSISTANT, Chat

    name = table.one(*CHATS)
    if name is None:
        return None
    chat = Chat("", name)
    for number, row in enumerate(table.rows, 1):
        turns = chat.turns(f"{number:,}", row)
        if not any(turn["role"] == ASSISTANT for turn in turns):
            raise table.refuse(number, f"has no turn of the {ASSISTANT}; leave the row out")
    options = {} if name == CHATS[0] else {"options": {"messages": name}}
    return Layout("the assistant's turns", {"kind": "chat", **options}, [name])


def _prompt(table: Table) -> list[str]:
    """Return the fields of the prompt. Raises UserError for a row in which all of them are empty."""
    main = table.one(*PROMPTS)
    names = [*([main] if main else []), *table.named(ABOUT)]
    blank = table.empty(*names) if names else []
    if blank:
        raise table.refuse(blank[0], f"has an empty prompt ({', '.join(names)}); leave the row out")
    return names


def _choices(table: Table) -> Layout | None:
    name, right = table.one(*CHOICES), table.one(*ANSWERS) or table.one(*RIGHT)
    if name is None or right is None or not table.named((*PROMPTS, *ABOUT)):
        return None
    lists = table.values(name, list, "a list of texts")
    for number, texts in enumerate(lists, 1):
        if not 2 <= len(texts) <= len(ascii_uppercase) or not all(
            isinstance(text, str) and text.strip() for text in texts
        ):
            raise table.refuse(number, f"has {one_line(repr(texts), 80)} as '{name}'; needed are 2 to 26 texts")
    most = max(map(len, lists))
    numbers = [str(number) for number in range(most + 1)]
    answers = [str(value) for value in table.values(right)]
    ways = {"from 0": numbers[:most], "from 1": numbers[1:], "from A": [*ascii_uppercase], "from a": [*ascii_lowercase]}

    def misfit(keys: Sequence[str]) -> int | None:
        pairs = zip(answers, lists, strict=True)
        return next((at for at, (answer, texts) in enumerate(pairs, 1) if answer not in keys[: len(texts)]), None)

    way = next((way for way, keys in ways.items() if misfit(keys) is None), None)
    if way is None:
        number = max(misfit(keys) or 0 for keys in ways.values())
        seen = one_line(repr(answers[number - 1]), 60)
        raise table.refuse(number, f"has {seen} as '{right}'; needed is the number or the letter of one of its choices")
    asked = _prompt(table)
    templates = {key: f" {{{name}[{place}]}}" for place, key in enumerate(ways[way][:most])}
    task = {"kind": "answers", "prompt": f"{_joined(asked)}\nAnswer:"}
    options = {"answers": templates, "label": f"{{{right}}}"}
    note = f"'{right}' counts the choices {way}"
    return Layout("the right choice", {**task, "options": options}, [*asked, name, right], notes=[note])


def _answer(table: Table) -> Layout | None:
    answer = table.one(*ANSWERS)
    asked = _prompt(table) if answer else []
    if answer is None or not asked:
        return None
    # The prompt is the user's turn in the chat template of the model, where it has one.
    task = {"kind": "causal", "prompt": _joined(asked), "chat": True, "options": {"answer": f"{{{answer}}}"}}
    return Layout("the answer", task, [*asked, answer], notes=_named_empty(table, answer))


def _label(table: Table) -> Layout | None:
    title, text, label = table.one(*TITLES), table.one(*TEXTS), table.one(*LABELS)
    if text is None or label is None:
        return None
    blank = table.empty(label)
    if blank:
        raise table.refuse(blank[0], f"has an empty '{label}'; leave the row out")
    labels = sorted({str(value) for value in table.values(label)})
    alike: dict[str, str] = {}
    for name in labels:
        other = alike.setdefault(" ".join(name.split()), name)
        if other != name:
            raise UserError(
                f"{table.what}: the labels {shown_value(other)} and {shown_value(name)} in the column '{label}' differ in "
                "blanks alone; write one of them."
            )
    if not 2 <= len(labels) <= len(ascii_uppercase):
        raise UserError(f"{table.what}: {len(labels)} labels in the column '{label}'; needed are 2 to 26.")
    read = [title, text] if title else [text]
    notes = _named_empty(table, *read)
    answers = {name: f" {letter}" for name, letter in zip(labels, ascii_uppercase)}
    listed = "".join(f"\n({letter.strip()}) {name}" for name, letter in answers.items())
    prompt = f"{_joined(read)}{listed.replace('{', '{{').replace('}', '}}')}\nAnswer:"
    task = {"kind": "classes", "prompt": prompt, "options": {"answers": answers, "label": f"{{{label}}}"}}
    return Layout("the label", task, [*read, label], notes=notes)


def _text(table: Table) -> Layout | None:
    title, text = table.one(*TITLES), table.one(*TEXTS)
    if text is None:
        return None
    read = [title, text] if title else [text]
    task = {"kind": "causal", "options": {"answer": _joined(read)}}
    return Layout("every token", task, read, notes=_named_empty(table, *read))


def _joined(names: Sequence[str]) -> str:
    return "\n\n".join(f"{{{name}}}" for name in names)


def _named_empty(table: Table, *names: str) -> list[str]:
    """Return a line about the rows in which all these fields are empty, if there are some."""
    rows = table.empty(*names)
    if not rows:
        return []
    title = " and ".join(f"'{name}'" for name in names)
    return [
        f"{title} of {len(rows):,} rows is empty, the first is row {rows[0]:,}; leave out what is not to be learned"
    ]
