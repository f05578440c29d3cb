"""Hostile files of a user's own data: each is refused in one line, with exit code 2, in bounded time and memory, or is read."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from helpers.faults import cases, no_hang, refused_or_harmless
from helpers.own_images import write_folder
from helpers.run_folder import make_folder
from helpers.tiny_runs import refused

from vismt.base.errors import UserError
from vismt.cli import main
from vismt.data.cards import load_card
from vismt.data.images import open_images
from vismt.data.source_types import DATA_KINDS
from vismt.data.texts.text_set import open_texts

HEAD = "name: mine\ntitle: t\nsource: s\nlicence: l\nclasses: 2\nsources:\n"
IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
LABELS = np.array([0, 1])


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """Load the kinds of sources outside of the tests, whose time is bounded."""
    assert "arrays" in list(DATA_KINDS)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VISMT_DATA", raising=False)
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path / "cache"))


def header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    """Return the header of an npy file that claims any shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def flagged(data: bytes, *, flag: int = 0, method: int | None = None) -> bytes:
    """Return a zip whose members all have a flag or a method of compression."""
    changed = bytearray(data)
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = changed.find(magic)
        while place >= 0:
            flags, old = struct.unpack_from("<HH", changed, place + offset)
            struct.pack_into("<HH", changed, place + offset, flags | flag, old if method is None else method)
            place = changed.find(magic, place + 4)
    return bytes(changed)


def arrays(**changes: np.ndarray | bytes | None) -> dict[str, bytes]:
    """Return the members of a sound file with some replaced; None takes one out."""
    given = {"x": IMAGES, "y": LABELS, **changes}
    return {
        f"{name}.npy": value if isinstance(value, bytes) else npy(value)
        for name, value in given.items()
        if value is not None
    }


def packed(shape: np.ndarray, rows: np.ndarray | None = None) -> dict[str, bytes]:
    rows = np.zeros((2, 2), np.uint8) if rows is None else rows
    return arrays(x=None, x_packed=rows, shape=shape)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "a shape of a terabyte": lambda: zipped(arrays(x=header((2, 2**20, 2**19)))),
    "a shape beyond 64 bits": lambda: zipped(arrays(x=header((2, 2**40, 2**40)))),
    "a negative shape": lambda: zipped(arrays(x=header((2, -3, -4)) + bytes(24))),
    "no pixels": lambda: zipped(arrays(x=np.zeros((2, 0, 4), np.uint8))),
    "fewer bytes than the shape": lambda: zipped(arrays(x=header((2, 3, 4)) + bytes(5))),
    "an unknown version": lambda: zipped(arrays(x=b"\x93NUMPY\x09\x00" + bytes(80))),
    "a member that is no array": lambda: zipped({**arrays(), "x.npy": b"text"}),
    "an encrypted member": lambda: flagged(zipped(arrays()), flag=1),
    "an unknown compression": lambda: flagged(zipped(arrays()), method=97),
    "a damaged stream": lambda: zipped(arrays(x=bytes(Random(0).randbytes(4000)))).replace(b"NUMPY", b"NUMPI"),
    "labels of text": lambda: zipped(arrays(y=np.array(["cat", "dog"]))),
    "labels of nan": lambda: zipped(arrays(y=np.array([0, np.nan]))),
    "labels beyond 63 bits": lambda: zipped(arrays(y=np.array([0, 2**64 - 1], np.uint64))),
    "labels as objects": lambda: zipped(arrays(y=np.array([0, "dog"], object))),
    "labels as one number": lambda: zipped(arrays(y=np.array(1))),
    "images as records": lambda: zipped(arrays(x=np.zeros(2, [("a", "u1")]))),
    "a shape of nan": lambda: zipped(packed(np.array([2, np.nan, 4]))),
    "a shape of one number": lambda: zipped(packed(np.array(3))),
    "an empty shape": lambda: zipped(packed(np.array([], int))),
    "a product that wraps to zero": lambda: zipped(packed(np.array([2, 2**32, 2**32]), np.zeros((2, 0), np.uint8))),
    "classes as records": lambda: zipped(arrays(classes=np.zeros((), [("a", "u1")]))),
    "an array that is no zip": lambda: npy(IMAGES),
    "a pickle": lambda: b"\x80\x04N.",
    "nothing": bytes,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_npz_files(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(HOSTILE[name]())
    (tmp_path / "card.yaml").write_text(f"{HEAD}  - {{kind: arrays, file: a.npz}}\n")
    with no_hang(name), pytest.raises(UserError) as caught:
        open_images(tmp_path / "card.yaml")
    assert "\n" not in str(caught.value)


def test_an_npz_takes_no_more_memory_than_is_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of kilobytes that unpacks to more; the test lowers the limit."""
    monkeypatch.setattr("vismt.data.formats.arrays.MAX_BYTES", 2**20)
    (tmp_path / "card.yaml").write_text(f"{HEAD}  - {{kind: arrays, file: a.npz}}\n")
    for members in (
        arrays(x=np.zeros((2, 800, 800), np.uint8)),
        arrays(z=np.zeros((2, 800, 800), np.uint8)),
        packed(np.array([2, 3000, 400]), np.zeros((2, 150_000), np.uint8)),
    ):
        (tmp_path / "a.npz").write_bytes(zipped(members))
        with pytest.raises(UserError, match=r"1,048,576 are read in all|does not hold images of shape"):
            open_images(tmp_path / "card.yaml")


@cases(60, 6000)
def test_random_npz_files(cases: int, tmp_path: Path) -> None:
    """Members, shapes, types and single bytes at random."""
    (tmp_path / "card.yaml").write_text(f"{HEAD}  - {{kind: arrays, file: a.npz}}\n")
    types = ("u1", "i8", "f4", "U3", "S2", "?", "c8", "O", "M8[s]")
    for seed in range(cases):
        random = Random(seed)

        def some(random: Random = random) -> np.ndarray | bytes:
            shape = tuple(random.choice((0, 1, 2, 3, 4)) for _ in range(random.randrange(5)))
            kind = random.choice(types)
            if random.random() < 0.2:
                return header(tuple(random.choice((-1, 2, 2**33)) for _ in range(random.randrange(4))), "|u1")
            return np.zeros(shape, kind)

        names = random.sample(("x", "y", "x_packed", "shape", "classes"), random.randrange(3))
        data = bytearray(zipped(arrays(**{name: some() for name in names})))
        for _ in range(random.choice((0, 0, 1, 5))):
            data[random.randrange(len(data))] = random.randrange(256)
        (tmp_path / "a.npz").write_bytes(bytes(data))
        with refused_or_harmless(seed):
            images = open_images(tmp_path / "card.yaml")
            assert images.read(0).shape[0] == 3


def test_a_label_of_thousands_of_digits(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", count=1)
    path = folder / "t.csv"
    path.write_text(f"path,label\nblue/00.png,{'9' * 5000}\nred/00.png,7\n")
    images = open_images(path)
    assert images.classes == ["7", "9" * 5000] and images.labels.tolist() == [1, 0]


def test_a_table_of_as_many_classes_as_rows_takes_linear_time(tmp_path: Path) -> None:
    for row in range(4_000):
        (tmp_path / f"{row}.png").touch()

    def seconds(rows: int) -> float:
        path = tmp_path / f"{rows}.csv"
        path.write_text("path,label\n" + "".join(f"{row}.png,label {row}\n" for row in range(rows)))
        start = time.process_time()
        assert len(open_images(path).classes) == rows
        return time.process_time() - start

    # Quadratic time is 16 times as long; the least of three is hardly disturbed by other processes.
    assert min(seconds(4_000) for _ in range(3)) < 10 * max(min(seconds(1_000) for _ in range(3)), 0.02)


@pytest.mark.parametrize("line", ['{"text": ' + "[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000])
def test_json_lines_that_are_nested_too_deep(line: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"line 1: is not JSON .*nested too deep"):
        open_texts(str(tmp_path / "x.jsonl"))
    (tmp_path / "i.txt").write_text("1|One\n2|Two\n")
    for name in ("base.json", "dataset_spec.json"):
        (tmp_path / name).write_text(line)
    for opened, source in (
        (open_images, "{kind: filelist, splits: {base: 2}, classes_per_split: {base: 2}}"),
        (open_images, "{kind: meta_dataset, splits: {train: 4}, classes_per_split: {train: 2}}"),
        (
            open_texts,
            "{kind: interactions, items: i.txt, item_separator: '|', files: {test: x.jsonl}, splits: {test: 1}}",
        ),
    ):
        (tmp_path / "card.yaml").write_text(f"{HEAD}  - {source}\n")
        with pytest.raises(UserError, match="nested too deep"):
            opened(tmp_path / "card.yaml")


def test_half_of_a_surrogate_pair_in_a_row_of_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')
    assert open_texts(str(tmp_path / "x.jsonl")).rows == [{"text": "😀"}]
    (tmp_path / "x.jsonl").write_text('{"text": "\\ud83d"}\n')
    with pytest.raises(UserError, match=r"line 1: is not JSON .*surrogates"):
        open_texts(str(tmp_path / "x.jsonl"))


def test_names_of_files_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "images", count=1)
    os.rename(folder / "red" / "00.png", os.fsencode(folder / "red") + b"/caf\xe9.png")
    with pytest.raises(UserError, match=r"red/caf\?.png.* not UTF-8; rename"):
        open_images(folder)
    assert main(["data", "check", str(folder)]) == 1 and "caf?.png" in capsys.readouterr().out
    os.rename(os.fsencode(folder / "red") + b"/caf\xe9.png", folder / "red" / "00.png")
    os.rename(folder / "red", os.fsencode(folder) + b"/r\xe9d")
    with pytest.raises(UserError, match="not UTF-8"):
        open_images(folder)
    argument = os.fsdecode(os.fsencode(folder) + b"/r\xe9d")
    with no_hang(argument):
        assert "not UTF-8" in refused(capsys, "data", "check", argument)


@pytest.mark.parametrize("encoding", ["rot13", "undefined", "base64", "hex", "nothing", "utf-8\\x00", "x" * 3000])
def test_encodings_of_a_card_that_decode_no_text(encoding: str, tmp_path: Path) -> None:
    source = f'{{kind: text, files: {{all: x.txt}}, fields: [text], form: lines, encoding: "{encoding}"}}'
    (tmp_path / "x.txt").write_text("a\n")
    (tmp_path / "card.yaml").write_text(f"{HEAD}  - {source}\n")
    with pytest.raises(UserError, match="encoding"):
        open_texts(str(tmp_path / "card.yaml"))


@pytest.mark.parametrize("pattern", ["a**b", "./", "**b/c", "[", "a/**c"])
def test_folders_of_a_card_that_are_no_pattern(pattern: str, tmp_path: Path) -> None:
    source = f"{{kind: table, table: t.csv, folders: ['{pattern}'], column: name, keep: [c, d], label: label}}"
    (tmp_path / "t.csv").write_text("name,label\na.png,c\nb.png,d\n")
    (tmp_path / "card.yaml").write_text(f"{HEAD}  - {source}\n")
    with pytest.raises(UserError):
        open_images(tmp_path / "card.yaml")


def test_an_emoji_that_json_escapes(tmp_path: Path) -> None:
    """json.dumps writes it as two escapes, which are one character; half of a pair is refused as before."""
    (tmp_path / "card.yaml").write_text(
        f"title: {json.dumps('Cats 😀')}\n" + HEAD.replace("title: t\n", "") + "  - {kind: folder}\n"
    )
    assert load_card(tmp_path / "card.yaml").title == "Cats 😀"
    (tmp_path / "card.yaml").write_text(HEAD.replace("title: t", 'title: "\\ud83d"') + "  - {kind: folder}\n")
    with pytest.raises(UserError, match="half of a surrogate pair"):
        load_card(tmp_path / "card.yaml")


@pytest.mark.parametrize("place", ["config.resolved.yaml", "run.json", "results.jsonl"])
def test_compare_where_a_file_of_a_run_is_a_folder(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_folder(tmp_path / name) for name in "ab"]
    (runs[0] / place).unlink(missing_ok=True)
    (runs[0] / place).mkdir()
    with no_hang(place):
        assert place in refused(capsys, "compare", *runs, "--out", tmp_path / "out")
    assert str(runs[0] / "nothing") in refused(capsys, "compare", runs[0] / "nothing", runs[1])
