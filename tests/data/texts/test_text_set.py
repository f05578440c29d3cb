"""Sets of texts: the three forms, the quoting and line ends found in the wild, what is refused, and the real sets."""

from __future__ import annotations

import json

import pytest

from vismt.base.errors import UserError
from vismt.data.check import check
from vismt.data.images import open_images
from vismt.data.texts.text_set import open_texts

LINES = '{kind: text, root: t, files: {all: a.txt}, fields: [text, label], form: lines, separators: ["\\t"], splits: {all: %s}%s}'
REAL = {  # name: (split, rows, {field: values})
    "gsm8k": ("test", 1319, {}),
    "arc_easy": ("train", 2000, {"answer": {f"answer{i}" for i in range(1, 6)}}),
    "arc_challenge": ("test", 1172, {"answer": {f"answer{i}" for i in range(1, 5)}}),
    "obqa": ("test", 500, {"answer": {f"answer{i}" for i in range(1, 5)}}),
    "boolq": ("test", 3270, {"answer": {"true", "false"}}),
    "winogrande": ("test", 1267, {"answer": {"option1", "option2"}}),
    "sst2": ("dev", 872, {"label": {"0", "1"}}),
    "amazon_cells": ("all", 1000, {"label": {"0", "1"}}),
    "yelp": ("all", 1000, {"label": {"0", "1"}}),
    "imdb": ("all", 1000, {"label": {"0", "1"}}),
    "trec": ("all", 5452, {"label": {"ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"}}),
    "wikitext2": ("test", 60, {}),
    "nq_open": ("dev", 3610, {}),
}


@pytest.fixture
def put(home, write_card):
    """put(bytes, source): a card over the file t/a.txt."""

    def write(content: bytes, source: str):
        (home / "data" / "t").mkdir(exist_ok=True)
        (home / "data" / "t" / "a.txt").write_bytes(content)
        return write_card(f"  - {source}", classes=0)

    return write


def test_mixed_line_ends_and_bare_quotes(put):
    # A csv reader takes the quote before "So with" as the beginning of a field and swallows the two rows after it.
    content = b'plain\t1\r"whole ""field"" here"\t0\r"So with\t1\nend of line \x85 is none\t0\r\n"also" bare\t1'
    data = open_texts(put(content, LINES % (5, ", encoding: latin-1")))
    assert [row["text"] for row in data.rows] == [
        "plain",
        'whole "field" here',
        '"So with',
        "end of line \x85 is none",
        '"also" bare',
    ]
    assert [row["label"] for row in data.rows] == ["1", "0", "1", "0", "1"]
    assert data.ids == [f"all:{i}" for i in range(5)] and data.take([3, 1]).ids == ["all:3", "all:1"]
    assert data.take([3, 1]).content() != data.take([1, 3]).content() != data.content()


def test_separators_are_taken_in_turn(put):
    fields = 'fields: [kind, fine, text], form: lines, separators: [":", " "]'
    source = f"{{kind: text, root: t, files: {{all: a.txt}}, {fields}, splits: {{all: 1}}}}"
    assert open_texts(put(b"NUM:date When: 3 : 4 ?\n", source)).rows == [
        {"kind": "NUM", "fine": "date", "text": "When: 3 : 4 ?"}
    ]


def test_json_lines_and_groups(put):
    source = (
        "{kind: text, root: t, files: {all: a.txt}, fields: [answer], splits: {all: 2},"
        " extract: {answer: '(?s)(?P<why>.*?)(?: or (?P<other>.*?))? #### (?P<final>.*)'}}"
    )
    rows = [{"answer": "a\nb #### 7", "left": 1}, {"answer": "x or y #### 8"}]
    data = open_texts(put("\n".join(json.dumps(row) for row in rows).encode(), source))
    assert data.rows == [
        {"answer": "a\nb #### 7", "why": "a\nb", "final": "7"},
        {"answer": "x or y #### 8", "why": "x", "other": "y", "final": "8"},
    ]


def test_documents(put):
    starts = "form: documents, starts: '(?m)^= .* =$'"
    source = f"{{kind: text, root: t, files: {{all: a.txt}}, fields: [text], {starts}, splits: {{all: 2}}}}"
    assert [row["text"] for row in open_texts(put(b"\n= A =\none\n = no =\n= B =\ntwo\n", source)).rows] == [
        "= A =\none\n = no =",
        "= B =\ntwo",
    ]
    with pytest.raises(UserError, match="no document starts at the beginning"):
        open_texts(put(b"before\n= A =\n= B =", source))


def test_check_tells_a_changed_file(home, put):
    path = put(b"a\t1\nb\t0\n", LINES % (2, ", manifest: m.json"))
    from vismt.data.cards import load_card
    from vismt.data.copies import write_manifest

    source = load_card(path).sources[0]
    write_manifest(path.parent / "m.json", source.list_files(home / "data" / "t"))
    report = check(path)
    assert report.ok and "2 rows" in str(report) and "1 hash agrees" in str(report)
    (home / "data" / "t" / "a.txt").write_bytes(b"a\t1\nc\t0\n")
    assert not check(path).ok and "changed 'a.txt'" in str(check(path))


@pytest.mark.parametrize(("content", "message"), [
    (b"a\t1\n", "1 of 2 rows found under .VISMT_DATA/t"),
    (b"a\t1\nb\n", r"line 2: has no '\\t' after 'b'; it must hold text, label"),
    (b"a\t1\nb\t0\tc\n", "line 2: has more than the fields text, label"),
    (b"a\t1\n\xe5\t0\n", "a.txt' cannot be read: 'utf-8' codec"),
])  # fmt: skip
def test_rows_that_the_card_does_not_describe(put, content, message):
    with pytest.raises(UserError, match=message):
        open_texts(put(content, LINES % (2, "")))


@pytest.mark.parametrize(("change", "message"), [
    ("form: line", "form: 'line' is not known. Near: 'lines'"),
    ("separators: []", "need 1 separators"),
    ("files: {test: a.txt}", "they must agree"),
    ("encoding: latin-99", "encoding 'latin-99' is not known"),
    ("extract: {text: '(?P<label>.)'}", "named like no other field"),
    ("extract: {text: '('}", "is not a regular expression"),
    ("starts: x", "form 'documents' needs 'starts' and one field"),
    ("files: {all: ../a.txt}", "must be a relative path"),
])  # fmt: skip
def test_cards_that_contradict_themselves(put, change, message):
    key = change.partition(":")[0]
    base = {
        "kind": "text",
        "root": "t",
        "files": "{all: a.txt}",
        "fields": "[text, label]",
        "form": "lines",
        "separators": '["\\t"]',
        "splits": "{all: 1}",
    }
    base[key] = change.partition(": ")[2]
    with pytest.raises(UserError, match=message):
        open_texts(put(b"a\t1", "{" + ", ".join(f"{name}: {value}" for name, value in base.items()) + "}"))


def test_the_wrong_door(put, pets):
    with pytest.raises(UserError, match=r"is a set of texts \(kind text\); open it with open_texts"):
        open_images(put(b"a\t1", LINES % (1, "")))
    with pytest.raises(UserError, match=r"is a set of labelled images \(kind folder\); open it with open_images"):
        open_texts(pets)
    path = put(b"a\t1", LINES % (1, ""))
    with pytest.raises(UserError, match=r"no split 'al'. Near: 'all'"):
        open_texts(path, "al")
    (path.parent.parent.parent / "data" / "t" / "a.txt").unlink()
    with pytest.raises(UserError, match="nothing found under"):
        open_texts(path)


@pytest.mark.realdata
@pytest.mark.parametrize("name", REAL)
def test_the_real_sets(name):
    split, count, values = REAL[name]
    try:
        data = open_texts(name, split)
    except UserError as error:
        if "nothing found" in str(error):
            pytest.skip(str(error))
        raise
    assert len(data) == count and len(set(data.ids)) == count
    assert all(
        isinstance(value, str) and value and "\r" not in value
        for row in data.rows
        for key, value in row.items()
        if key in ("text", "question", "sentence")
    )
    for field, expected in values.items():
        assert {row[field] for row in data.rows} == expected
    assert check(name).ok and check(name).groups
