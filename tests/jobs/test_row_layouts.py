"""`vismt init lm --texts`: the task of each known layout of rows, what is left out, and rows that do not fit."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.lm_parts import tokenizer
from helpers.tiny_runs import refused

from vismt.cli import main
from vismt.jobs import load_config
from vismt.jobs.lm.config import task_of

Row = dict[str, Any]
ALPACA = [
    {"instruction": "plus one", "input": "", "output": "sky", "text": "Below is an instruction. plus one sky"},
    {"instruction": "what colour", "input": "the grass", "output": "green"},
]
CHAT = [{"role": "user", "content": "sky"}, {"role": "assistant", "content": "blue"}]
SHAREGPT = [{"from": "human", "value": "sky"}, {"from": "gpt", "value": "blue"}]


def rows_of(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def begun(folder: Path, rows: list[Row]) -> Any:
    """Return the task of the configuration that is written for rows."""
    path = rows_of(folder / "mine.jsonl", rows)
    assert main(["init", "lm", "--texts", str(path), "--to", str(folder)]) == 0
    config = load_config(folder / "lm.yaml")
    assert [Path(name).resolve() for name in config.tasks[0].train] == [path]
    return config.tasks[0]


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"question": "one plus one", "response": "two"}, "one plus one", "two"),
        (ALPACA[1] | {"text": "all"}, "what colour\n\nthe grass", "green"),
        ({"input": "the sky", "instruction": "what colour", "output": "blue"}, "what colour\n\nthe sky", "blue"),
        ({"input": "the sky", "output": "blue"}, "the sky", "blue"),
        (
            {"category": "qa", "context": "the sky is blue", "instruction": "what colour", "response": "blue"},
            "what colour\n\nthe sky is blue",
            "blue",
        ),
        ({"question": "one", "answer": 1, "label": "easy"}, "one", "1"),
    ],
)
def test_all_parts_of_a_prompt_are_in_the_task(row: Row, prompt: str, answer: str, tmp_path: Path, capsys) -> None:
    section = begun(tmp_path, [row] * 3)
    task = task_of(section)
    assert section.kind == "causal" and section.chat and section.test_share == 0.3
    assert task.prompt.format_map(row) == prompt and task.answer.format_map(row) == answer
    unused = [name for name in row if name in ("text", "category", "label")]
    shown, text = capsys.readouterr().out, (tmp_path / "lm.yaml").read_text()
    assert [f"not used: {name}" in shown and f"#   Not used: {name}\n" in text for name in unused] == [True] * len(
        unused
    )
    assert unused or "ot used" not in shown + text


def test_an_empty_input_leaves_the_instruction_alone(tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    task = task_of(begun(tmp_path, [ALPACA[0], ALPACA[1] | {"text": ""}]))
    assert words.decode(task.ask("a", ALPACA[0], words).pieces[0].ids) == "plus one|"


@pytest.mark.parametrize(
    "row", [{"messages": CHAT, "id": 1}, {"id": 1, "conversations": [{"from": "system", "value": "one"}, *SHAREGPT]}]
)
def test_chats_keep_their_turns(row: Row, tmp_path: Path, capsys) -> None:
    section = begun(tmp_path, [row] * 3)
    assert section.kind == "chat" and [turn["role"] for turn in task_of(section).turns("a", row)][-2:] == [
        "user",
        "assistant",
    ]
    assert "not used: id" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("right", "keys", "way"),
    [
        ([0, 2], "012", "from 0"),
        ([1, 3], "123", "from 1"),
        (["1", "0"], "012", "from 0"),
        (["B", "C"], "ABC", "from A"),
        (["a", "b"], "abc", "from a"),
    ],
)
def test_choices_are_answers(right: list[Any], keys: str, way: str, tmp_path: Path, capsys) -> None:
    """Rows may have different numbers of choices."""
    choices = [["blue", "green"], ["one", "two", "three"]]
    rows = [{"question": "what", "choices": texts, "answer": answer} for texts, answer in zip(choices, right)]
    section = begun(tmp_path, rows)
    task, words = task_of(section), tokenizer()
    assert section.kind == "answers" and task.prompt.format_map(rows[0]) == "what\nAnswer:"
    assert f"'answer' counts the choices {way}" in capsys.readouterr().out
    for row, texts, answer in zip(rows, choices, right):
        named = {key: template.format_map(row) for key, template in task.choices_of(row).items()}
        assert named == {key: f" {text}" for key, text in zip(keys, texts)}
        assert task.encode("a", row, words).label == keys.index(str(answer))


LABELLED = {"text": ["blue", "green"], "label": ["A", "B"]}


@pytest.mark.parametrize(
    ("row", "prompt", "texts", "way"),
    [
        (
            {"question_stem": "what", "choices": LABELLED, "answerKey": "B"},
            "what",
            {"A": "blue", "B": "green"},
            "from A",
        ),
        ({"question": "what", "A": "blue", "B": "green", "answer": "B"}, "what", {"A": "blue", "B": "green"}, "from A"),
        ({"goal": "what", "sol1": "blue", "sol2": "green", "label": 1}, "what", {"0": "blue", "1": "green"}, "from 0"),
        (
            {"option2": "green", "sentence": "what", "option1": "blue", "answer": "2"},
            "what",
            {"1": "blue", "2": "green"},
            "from 1",
        ),
        ({"ctx": "what", "endings": ["blue", "green"], "label": "1"}, "what", {"0": "blue", "1": "green"}, "from 0"),
    ],
)
def test_choices_with_labels_and_choices_in_columns(
    row: Row, prompt: str, texts: dict[str, str], way: str, tmp_path: Path, capsys
) -> None:
    """As the published files of common sets have them."""
    section = begun(tmp_path, [row | {"id": 1}] * 3)
    task = task_of(section)
    shown = capsys.readouterr().out
    assert section.kind == "answers" and f"counts the choices {way}" in shown and "not used: id\n" in shown
    assert task.prompt.format_map(row) == f"{prompt}\nAnswer:"
    assert {key: text.format_map(row) for key, text in task.answers.items()} == {
        k: f" {text}" for k, text in texts.items()
    }
    assert task.encode("a", row, tokenizer()).label == 1


@pytest.mark.parametrize("columns", [{"a": "x", "b": "y"}, {"A": "x", "C": "y"}, {"B": "x", "C": "y"}, {"A": "x"}])
def test_columns_without_the_answer_or_with_a_gap_are_no_choices(columns: Row, tmp_path: Path, capsys) -> None:
    answer = "b is y" if "b" in columns else "A"
    section = begun(tmp_path, [{"question": "what", **columns, "answer": answer}] * 3)
    assert section.kind == "causal" and f"not used: {', '.join(columns)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "kind", "text"),
    [
        ({"text": "the sky {was} blue"}, "causal", "the sky {was} blue"),
        ({"id": 1, "title": "sky", "text": "it was blue"}, "causal", "sky\n\nit was blue"),
        ({"sentence": "the sky was blue", "label": "a{b}"}, "classes", "the sky was blue\n(A) a{b}\n(B) c\nAnswer:"),
        ({"title": "sky", "content": "blue", "label": 3}, "classes", "sky\n\nblue\n(A) 3\n(B) c\nAnswer:"),
    ],
)
def test_texts_have_their_title_and_classes_their_labels(row: Row, kind: str, text: str, tmp_path: Path) -> None:
    section = begun(tmp_path, [row, {**row, "label": "c"} if "label" in row else row] * 2)
    task = task_of(section)
    assert section.kind == kind and not section.chat
    assert (task.prompt if kind == "classes" else task.answer).format_map(row) == text
    if kind == "classes":
        assert task.answers == {str(row["label"]): " A", "c": " B"}
        assert task.class_of(row) == str(row["label"])


def test_the_released_file_of_alpaca_is_a_json_list(tmp_path: Path, capsys) -> None:
    path = tmp_path / "alpaca_data.json"
    rows = [{key: row[key] for key in ("instruction", "input", "output")} for row in ALPACA]
    path.write_text(json.dumps([*rows, rows[0] | {"output": ""}, *rows * 20], indent=4))
    assert main(["init", "lm", "--texts", str(path), "--to", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "43 rows, of which the model learns the answer" in shown
    assert "'output' of 1 rows is empty, the first is row 3" in shown
    config = load_config(tmp_path / "lm.yaml")
    assert config.tasks[0].test_share == 0.1 and Path(config.tasks[0].train[0]).resolve() == path
    for content, message in (("{}", "is not a list of objects"), ("[1]", "entry 1: is not an object with a field")):
        path.write_text(content)
        assert message in refused(capsys, "init", "lm", "--texts", path, "--to", tmp_path / "other")


LATE = [{"id": 1, "text": "a", "note": ""}, *[{"text": "b", "label": one} for one in "xy"]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"x": 1}],
            "the fields are x; needed are prompt and answer, prompt, choices and answer, messages, text, or text",
        ),
        ([], "the fields are none; needed are"),
        (LATE, "row 1 has no 'label', which other rows have"),
        ([{"text": "a", "label": None}, {"text": "b", "label": "x"}], "row 1 has no 'label'"),
        ([{"text": "a", "label": n} for n in range(30)], "30 labels in the column 'label'; needed are 2 to 26"),
        (
            [{"text": "a", "label": one} for one in ("pos", "neg", "pos ")],
            "the labels 'pos' and 'pos ' in the column 'label' differ",
        ),
        ([{"text": "a", "label": ["x"]}], "row 1 has a list as 'label'; needed is a text"),
        ([{"text": "a", "label": one} for one in ("pos", " ", "neg")], "row 2 has an empty 'label'; leave the row out"),
        (
            [{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": ["b", "c"]}],
            "row 2 has a list as 'answer'; needed is a text",
        ),
        ([{"prompt": CHAT, "completion": "b"}], "row 1 has a list as 'prompt'"),
        ([{"prompt": "a", "answer": {"text": "b"}}], "row 1 has an object as 'answer'"),
        ([{"prompt": " ", "answer": "b"}], "row 1 has an empty prompt (prompt)"),
        ([*ALPACA, {"instruction": "a", "output": "b"}], "row 3 has no 'input'"),
        ([{"prompt": "a", "question": "b", "answer": "c"}], "the fields 'prompt' and 'question' have one meaning"),
        ([{"prompt": "a", "answer": "b", "response": "c"}], "the fields 'answer' and 'response' have one meaning"),
        ([{"messages": CHAT[:1]}], "row 1 has no turn of the assistant"),
        ([{"messages": CHAT}, {"messages": "sky"}], "row '2': 'messages' is not a list of turns"),
        (
            [{"question": "a", "choices": ["yes", "no"], "answer": "yes"}],
            "row 1 has 'yes' as 'answer'; needed is the number or the letter",
        ),
        (
            [
                {"question": "a", "choices": ["b", "c"], "answer": 0},
                {"question": "a", "choices": ["b", "c"], "answer": 7},
            ],
            "row 2 has '7' as",
        ),
        (
            [{"question": "a", "choices": {"text": ["b", "c"]}, "answer": 0}],
            "row 1 has {'text': ['b', 'c']} as 'choices'; needed are 2 to 26 texts",
        ),
        (
            [{"question": "a", "choices": "b, c", "answer": 0}],
            "row 1 has 'b, c' as 'choices'; needed is a list of texts",
        ),
        (
            [
                {"question": "a", "choices": {"text": ["b", "c"], "label": list(two)}, "answerKey": two[0]}
                for two in ("AB", "BA")
            ],
            "row 2 has 'B' as 'answerKey'; needed is the number or the letter",
        ),
        (
            [{"conversations": SHAREGPT}, {"conversations": []}],
            "mine.jsonl: row '2': 'conversations' is not a list of turns",
        ),
        ([{"question": "a", "choices": ["b"], "answer": 0}], "row 1 has ['b'] as 'choices'; needed are 2 to 26 texts"),
    ],
)
def test_rows_of_no_known_layout_are_named(rows: list[Row], message: str, tmp_path: Path, capsys) -> None:
    path = rows_of(tmp_path / "mine.jsonl", rows)
    error = refused(capsys, "init", "lm", "--texts", path, "--to", tmp_path, "--quiet")
    assert message in error and len(error) < 600 and not (tmp_path / "lm.yaml").exists()


def test_a_table_with_a_late_column_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text", "label"], *[[n, "a", "xy"[n % 2]] for n in range(4)]])
    assert main(["init", "lm", "--texts", str(path), "--to", str(tmp_path), "--quiet"]) == 0
    assert load_config(tmp_path / "lm.yaml").tasks[0].kind == "classes"
