"""What commands may write: files of the user stay, inputs are no outputs, and two outputs are two files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vismt.base.errors import UserError
from vismt.storage.files import atomic_write
from vismt.storage.outputs import LONGEST, NOTE, check_folder, check_folder_outputs, check_outputs, note_outputs, noted


def test_an_output_that_is_an_input_is_refused_under_each_of_its_names(tmp_path: Path) -> None:
    photo = tmp_path / "a.png"
    photo.write_bytes(b"photo")
    (tmp_path / "link").symlink_to(tmp_path)
    os.link(photo, tmp_path / "b.png")
    for name in ("a.png", "link/a.png", "b.png"):
        path = tmp_path / name
        with pytest.raises(UserError, match="is an input and would be replaced by an output; give another --to"):
            check_outputs("predict", [(path, "")], [photo], own=[path])
    check_outputs("predict", [(tmp_path / "c.png", "")], [photo, tmp_path / "missing.png"])


def test_two_outputs_of_one_name_are_refused(tmp_path: Path) -> None:
    outputs = [(tmp_path / "a-depth.png", "a.png"), (tmp_path / "a-depth.png", "a-depth.png")]
    with pytest.raises(UserError, match=r"'a.png' and 'a-depth.png' would both become a-depth.png"):
        check_outputs("predict", outputs)


def test_an_output_that_could_not_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    longest = tmp_path / ("é" * ((LONGEST - 4) // 2) + ".png")
    check_outputs("predict", [(longest, "a.png")])
    atomic_write(longest, "")
    with pytest.raises(UserError, match=r"needs a shorter name; rename 'a.png'"):
        check_outputs("predict", [(longest.with_suffix(".longer"), "a.png")])
    for check in (
        lambda folder: check_folder_outputs("predict", folder, []),
        lambda folder: check_folder("compare", folder),
    ):
        with pytest.raises(UserError, match="is a file; name a folder"):
            check(longest)


def test_a_command_replaces_what_it_noted_and_nothing_else(tmp_path: Path) -> None:
    for names in (["a.png"], ["b.png"], ["a.png"]):
        check_folder_outputs("predict", tmp_path, [(name, "") for name in names])
        note_outputs("predict", tmp_path, names)
        for name in names:
            (tmp_path / name).write_bytes(b"")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    for command, name in (("predict", "dangling.png"), ("other", "a.png")):
        with pytest.raises(UserError, match=f"{command}: '{tmp_path / name}' exists and would be overwritten"):
            check_folder_outputs(command, tmp_path, [(name, "")])
    assert noted(tmp_path) == {"predict": ["a.png", "b.png"]}


def test_a_folder_as_a_whole_is_empty_or_noted(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    check_folder("compare", folder)
    assert not folder.exists()
    note_outputs("compare", folder)
    (folder / "report.md").write_text("old")
    check_folder("compare", folder)
    with pytest.raises(UserError, match=r"report.md' exists"):
        check_folder("pool", folder)
    (folder / NOTE).write_text("[]")
    with pytest.raises(UserError, match=r"vismt.json is not what vismt writes there"):
        check_folder("compare", folder)
    assert (folder / NOTE).read_text() == "[]"
