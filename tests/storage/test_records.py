"""Records of an evaluation: batches that are whole or run again, what another header means, and arrays as fields."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vismt.base.errors import UserError
from vismt.storage.records import Field, Header, Records, Row, array_of, array_text

HEADER = Header("w", "images", {"data": "digits"}, {"passes": 2})
BATCHES = [["a", "b"], ["c", "d"], ["e"]]


def run(
    path: Path | None, header: Header = HEADER, batches: Sequence[Sequence[str]] = BATCHES
) -> tuple[list[Row], list[int]]:
    """Return the rows of all batches and the numbers of the batches that were run."""
    ran: list[int] = []

    def rows(number: int) -> list[Row]:
        ran.append(number)
        return [{"id": name, "value": ord(name[0]) / 1000} for name in batches[number]]

    return Records(path, header, {"value": Field(0, 1)}).complete(batches, rows, "test"), ran


@pytest.mark.parametrize("kept", range(7))
def test_a_batch_is_on_record_whole_or_is_run_again(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "records.jsonl"
    expected, ran = run(path)
    assert ran == [0, 1, 2] and [row["id"] for row in expected] == ["a", "b", "c", "d", "e"]
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:kept]) + (lines[kept][:9] if kept < len(lines) else b""))
    rows, again = run(path)
    names = {name for row in lines[1:kept] for name in "abcde" if f'"id": "{name}"'.encode() in row}
    assert again == [number for number, batch in enumerate(BATCHES) if not names >= {*batch}]
    assert rows == expected and path.read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "different"),
    [
        ({"weights": "other"}, "weights"),
        ({"protocol": {"data": "usps"}}, "data"),
        ({"settings": {"passes": 3}}, "passes"),
        ({"settings": {}}, "passes"),
        ({"settings": {"passes": 2, "ood": ["x"]}}, "ood"),
    ],
)
def test_another_header_is_refused_and_nothing_lost(tmp_path: Path, changes: dict, different: str) -> None:
    path = tmp_path / "records.jsonl"
    run(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=rf"of another run \(different: {different}\)"):
        run(path, replace(HEADER, **changes))
    assert path.read_bytes() == before


def test_a_complete_record_of_other_examples_is_named_and_an_incomplete_one_refused(tmp_path: Path, capsys) -> None:
    path, other = tmp_path / "records.jsonl", replace(HEADER, examples="other images")
    first, _ = run(path)
    assert run(path, other) == (first, []) and "is of other examples than are there now" in capsys.readouterr().out
    assert Records(path, other, {"value": Field()}).examples == "images"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    with pytest.raises(UserError, match=r"are of other examples than are there now; move the file away"):
        run(path, other)
    assert run(path, replace(HEADER, examples=""))[0] == first  # not known


def test_a_name_that_comes_twice_is_refused() -> None:
    with pytest.raises(UserError, match="comes twice"):
        run(None, batches=[["a", "b"], ["b"]])


@pytest.mark.parametrize("array", [np.arange(6).reshape(2, 3), np.array([0.1, 1 / 3, 1e-300]), np.array(7)])
def test_an_array_keeps_every_bit(array: np.ndarray) -> None:
    text = array_text(array)
    found = array_of(text, np.zeros_like(array))
    assert found.dtype == array.dtype and np.array_equal(found, array) and Field(array=array).fits(text)


@pytest.mark.parametrize(
    "text",
    [
        3,
        "no base64!",
        base64.b64encode(b"no zlib").decode(),
        array_text(np.zeros(3)),
        array_text(np.array([1.0, np.nan])),
        base64.b64encode(zlib.compress(b"\0" * 10**6)).decode(),
    ],
)
def test_another_text_is_no_array(text: object) -> None:
    assert not Field(array=np.zeros(2)).fits(text)
    with pytest.raises(UserError, match=r"is not an array of float64 \(2,\)"):
        array_of(text, np.zeros(2))
