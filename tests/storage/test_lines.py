"""Line files: a torn last line is dropped, every other difference is refused with file and line."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from vismt.base.errors import UserError
from vismt.storage.lines import LineFile, read_lines, write_lines

ROWS = [{"step": 1, "loss": 0.5}, {}, {"name": 'a, "checksum": "00000000"}', "list": [1, None]}, {"ümlaut": "ß"}]


def test_rows_come_back_and_lines_are_json_objects(tmp_path: Path) -> None:
    import json

    path = tmp_path / "a" / "rows.jsonl"
    assert read_lines(path) == []
    write_lines(path, ROWS)
    assert read_lines(path) == ROWS
    parsed = [json.loads(line) for line in path.read_text().splitlines()]
    assert [{name: value for name, value in row.items() if name not in ("checksum", "last")} for row in parsed] == ROWS


def test_appended_lines_continue_the_file(tmp_path: Path) -> None:
    path, whole = tmp_path / "rows.jsonl", tmp_path / "whole.jsonl"
    file = LineFile(path, ROWS[:1])
    file.add(ROWS[1])
    file.add(*ROWS[2:])
    file.sync()
    LineFile(whole, ROWS)
    assert path.read_bytes() == whole.read_bytes()


def test_a_whole_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_lines(path, ROWS)
    assert read_lines(path, whole=True) == ROWS
    lines = path.read_bytes().splitlines(keepends=True)
    for count in range(1, len(lines)):
        path.write_bytes(b"".join(lines[:count]))
        assert read_lines(path) == ROWS[:count]
        with pytest.raises(UserError, match=f"was cut after line {count}"):
            read_lines(path, whole=True)
    path.write_bytes(b"".join(lines)[:-1])
    with pytest.raises(UserError, match="was cut after line 3"):
        read_lines(path, whole=True)
    write_lines(path, [])
    assert read_lines(path, whole=True) == []


def test_a_torn_last_line_is_dropped_at_any_length(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_lines(path, ROWS)
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        assert read_lines(path) == ROWS[: content[:size].count(b"\n")]


def test_every_flipped_bit_is_refused_or_tears_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_lines(path, ROWS)
    content = path.read_bytes()
    draw = random.Random(0)
    for place in draw.sample(range(8 * len(content)), 400):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        if place // 8 == len(content) - 1:  # the newline of the last line
            assert read_lines(path) == ROWS[:-1]
            continue
        number = content[: place // 8].count(b"\n") + 1
        with pytest.raises(UserError, match=rf"'{path}' line {number} was changed or damaged"):
            read_lines(path)


@pytest.mark.parametrize(
    "change,number",
    [
        (lambda lines: lines[:1] + lines[2:], 2),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1),
        (lambda lines: [*lines, lines[-1]], 5),
        (lambda lines: [*lines[:2], b"", *lines[2:]], 3),
    ],
    ids=["missing", "moved", "repeated", "empty"],
)
def test_missing_moved_and_repeated_lines_are_refused(
    tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], number: int
) -> None:
    path = tmp_path / "rows.jsonl"
    write_lines(path, ROWS)
    path.write_bytes(b"".join(line + b"\n" for line in change(path.read_bytes().splitlines())))
    with pytest.raises(UserError, match=f"line {number} was changed"):
        read_lines(path)


def test_other_refusals_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=f"'{path}' line 1 was changed or damaged"):
        read_lines(path)
    write_lines(path, ROWS)
    with pytest.raises(
        UserError, match=f"'{path}' line 2 does not have the content that a run writes: it lacks 'step'"
    ):
        read_lines(path, {"step": int})
    with pytest.raises(UserError, match=f"'{tmp_path}' cannot be read"):
        read_lines(tmp_path)
    (tmp_path / "folder").mkdir()
    file = LineFile(tmp_path / "folder" / "rows.jsonl", [])
    (tmp_path / "folder" / "rows.jsonl").unlink()
    (tmp_path / "folder").rmdir()
    with pytest.raises(UserError, match="cannot write"):
        file.add({})
