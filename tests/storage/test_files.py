"""Files written whole or not at all, and locks of folders."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from helpers.faults import no_hang

from vismt.base.errors import UserError
from vismt.report.panels import read_panel
from vismt.storage.cache import note_use
from vismt.storage.files import (
    PARTIAL,
    atomic_write,
    file_digest,
    new_files,
    read_sealed,
    read_tensors,
    remove_partial,
    sealed,
    write_tensors,
)
from vismt.storage.lines import read_lines
from vismt.storage.locks import HOLDER, is_locked, locked


def test_tensors_are_read_back_by_safetensors(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.bfloat16, torch.float32, torch.float16, torch.int64, torch.uint8, torch.int8]
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}
    tied = torch.randn(3, 2)
    tensors |= {"bool": torch.tensor([True, False, True]), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    tensors |= {"ümlaut": tied, "tied": tied, "view": tied[1:], "turned": tied.T, "parameter": torch.nn.Parameter(tied)}
    digest = write_tensors(tmp_path / "a-{digest}.safetensors", tensors, {"about": "tests"})
    path = tmp_path / f"a-{digest[:12]}.safetensors"
    assert list(tmp_path.iterdir()) == [path]
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() == file_digest(path)
    read = safetensors.torch.load_file(path)
    assert set(read) == set(tensors)
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name], value), name
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"about": "tests"}
    with pytest.raises(UserError, match=r"'a' has dtype torch\.complex64, which safetensors does not have"):
        write_tensors(tmp_path / "b", {"a": torch.zeros(1, dtype=torch.complex64)})


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    atomic_write(path, "old")
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(UserError, match=f"cannot write '{path}': No space left on device"):
                atomic_write(path, "new")
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_pipe_in_the_place_of_tensors_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"adapter: '.*a\.safetensors' is damaged .*it is a named pipe"):
        read_tensors(tmp_path / "a.safetensors", "adapter")


def test_unfinished_files_are_removed(tmp_path: Path) -> None:
    left = tmp_path / "deep" / f".a.x7{PARTIAL}"
    left.parent.mkdir()
    for path in (left, left.parent / ".a.tmp", left.parent / "a"):
        path.write_text("")
    (left.parent / f".new{PARTIAL}" / "deeper").mkdir(parents=True)
    remove_partial(tmp_path)
    assert {path.name for path in left.parent.iterdir()} == {".a.tmp", "a"}


def test_several_files_take_their_places_together(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    with pytest.raises(UserError, match="refused"), new_files(folder, "note") as scratch:
        (scratch / "a").write_text("new")
        raise UserError("refused")
    assert not folder.exists()
    folder.mkdir()
    (folder / "own").write_text("of the user")
    (folder / f".new{PARTIAL}").mkdir()
    (folder / f".new{PARTIAL}" / "half").write_text("of a killed process")
    with new_files(folder, "note") as scratch:
        for name in ("a", "deep/b", "note"):
            atomic_write(scratch / name, "new")
        assert not (folder / "a").exists()
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert found == {"a": "new", "deep/b": "new", "note": "new", "own": "of the user"}
    with pytest.raises(UserError, match=r"cannot write .*own': "), new_files(folder / "own", "note"):
        pass


def test_a_changed_json_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content = {"lr": 0.01, "validation": {"0.01": None}, "seeds": (1, 2)}
    path.write_text(sealed(content))
    assert read_sealed(path, "run") == {**content, "seeds": [1, 2]}
    path.write_text(path.read_text().replace("0.01,", "0.02,"))
    with pytest.raises(UserError, match=f"run: '{path}' was changed or damaged after it was written"):
        read_sealed(path, "run")
    for text in ("[]", "{}", "null", '{"lr": 0.01}'):
        path.write_text(text)
        with pytest.raises(UserError, match="was changed or damaged"):
            read_sealed(path, "run", {"lr": float})
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_sealed(path, "run")


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (1, float, True),
        (True, float, False),
        (True, int, False),
        (10**400, float, False),
        (2**64, int, False),
        ("1", int, False),
        (None, float | None, True),
        ([1, 2.5], list[float], True),
        ([1, "2"], list[float], False),
        ({"a": {"b": 1}}, dict[str, dict[str, float]], True),
        ({"a": {"b": None}}, dict[str, dict[str, float]], False),
        ([], dict[str, float], False),
    ],
)
def test_values_of_another_type_are_refused(tmp_path: Path, value: object, hint: Any, fits: bool) -> None:
    path = tmp_path / "a.json"
    path.write_text(sealed({"x": value}))
    if fits:
        assert read_sealed(path, "run", {"x": hint}, {"y": int}) == {"x": value}
        return
    for types in ({"needed": {"x": hint}}, {"may": {"x": hint}}):
        with pytest.raises(UserError, match="does not have the content that a run writes: 'x' is "):
            read_sealed(path, "run", **types)
    with pytest.raises(UserError, match="it lacks 'y'"):
        read_sealed(path, "run", {"y": hint})


@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_files_that_have_no_end_are_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(2**36)
    readers: list[Callable[[Path], object]] = [
        read_lines,
        lambda p: read_sealed(p, "run"),
        read_panel,
    ]
    for read in readers:
        with no_hang(kind), pytest.raises(UserError, match=r"a named pipe|a device|68,719,476,736 bytes"):
            read(path)
    (tmp_path / HOLDER).unlink(missing_ok=True)
    path.rename(tmp_path / HOLDER)
    with no_hang(kind), locked(tmp_path):
        assert is_locked(tmp_path)


def test_a_file_that_was_deleted_meanwhile_is_not_made_anew(tmp_path: Path) -> None:
    """By `make_room` of another process, after it was read: an empty one would be damaged."""
    note_use(tmp_path / "gone.safetensors")
    assert not any(tmp_path.iterdir())
    (tmp_path / "there").touch()
    os.utime(tmp_path / "there", (0, 0))
    note_use(tmp_path / "there")
    assert (tmp_path / "there").stat().st_mtime > 0
