"""Which sets a study may train, validate and test on."""

from __future__ import annotations

from pathlib import Path

import pytest

from vismt.base.errors import UserError
from vismt.data.set_entries import overlap
from vismt.engine.parts import PartsConfig, check_parts
from vismt.storage.paths import shipped


@pytest.mark.parametrize(
    "parts",
    [
        {"train": ["a:train"], "validation": ["a:val"], "test": ["a:test"]},
        {"train": ["a"], "validation_share": 0.1, "test_share": 0.1},
        {"train": ["a:train"], "validation": ["b"], "test": ["c", "a:test"]},
        {"validation": ["a:val"], "test": ["a:test"]},
    ],
)
def test_parts_of_their_own(parts):
    check_parts({"data": PartsConfig(**parts)})


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"train": ["a"], "test": ["a:test"]}, "test 'a:test' shares examples with data: train 'a'"),
        (
            {"train": ["a:train"], "test": ["b"], "validation": ["a:train"]},
            "validation 'a:train' shares examples with data: train 'a:train'",
        ),
        (
            {"train": ["a:train"], "test": ["a:test"], "validation": ["a:test"]},
            "test 'a:test' shares examples with data: validation 'a:test'",
        ),
        (
            {"train": ["a:train"], "test": ["b", "c:all"], "validation": ["d", "c:x"]},
            "test 'c:all' shares examples with data: validation 'c:x'",
        ),
        (
            {"train": ["a:train"], "test": ["c:x"], "validation": ["c"]},
            "test 'c:x' shares examples with data: validation 'c'",
        ),
        (
            {"test": ["c:x"], "validation": ["c:x"]},
            "shares examples with data: validation",
        ),  # a task that is tested alone
    ],
)
def test_no_example_is_in_two_parts(parts, words):
    with pytest.raises(UserError) as caught:
        check_parts({"data": PartsConfig(**parts)})
    assert words in str(caught.value) and str(caught.value).startswith("data: ")


def test_no_task_trains_on_what_another_is_tested_on() -> None:
    first, second = PartsConfig(train=["a:train"], test=["a:test"]), PartsConfig(train=["b"], test_share=0.2)
    check_parts({"tasks: one": first, "tasks: two": second})
    for train, words in (
        (["a:test"], "tasks: one: test 'a:test' shares examples with tasks: two: train 'a:test'"),
        (["c", "a"], "tasks: one: test 'a:test' shares examples with tasks: two: train 'a'"),
    ):
        with pytest.raises(UserError, match=words):
            check_parts({"tasks: one": first, "tasks: two": PartsConfig(train=train, test_share=0.2)})


def test_two_tasks_divide_a_set_alike() -> None:
    one, other = PartsConfig(train=["a"], test_share=0.2), PartsConfig(train=["b", "a"], test_share=0.2)
    check_parts({"tasks: one": one, "tasks: two": other})
    for changed in (PartsConfig(train=["a"], test_share=0.3), PartsConfig(train=["a"], test=["c"])):
        with pytest.raises(UserError, match="tasks: two: train 'a' is divided otherwise in tasks: one"):
            check_parts({"tasks: one": one, "tasks: two": changed})


def test_what_calibrates_counts_as_training() -> None:
    sections = {"data": PartsConfig(train=["a:train"], test=["a:test"])}
    check_parts(sections, ["a:train", "b"])
    with pytest.raises(UserError, match=r"data: test 'a:test' shares examples with calibration\.data 'a'"):
        check_parts(sections, ["a"])


def test_a_set_is_the_same_by_its_name_and_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = shipped("datasets") / "digits"
    (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "test").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "card.yaml").write_text("name: own\n")
    monkeypatch.chdir(tmp_path)
    for first, second in (
        ("digits", str(card)),
        ("digits", str(card / "card.yaml")),
        ("own", "own/card.yaml"),
        ("own:train", f"{tmp_path}/own/../own:train"),
        ("images", str(tmp_path / "images")),
        ("images", "link"),
        ("images", "images/test"),  # a folder of the other
        ("images:test", "images"),
        ("<birds 12ab34cd>", "<others 12ab34cd>"),  # one object under two titles
        ("md_omniglot:train", "omniglot:evaluation"),  # other splits of the same drawings
        ("md_cub:train", "fg_cub:novel"),
        ("dtd10", "dtd"),
    ):
        assert overlap(first, second) and overlap(second, first), (first, second)
    for first, second in (
        ("digits", "mnist"),
        ("own:train", "own/card.yaml:test"),
        ("images/train", "images/test"),
        ("images:train", "images/test"),
        ("own", "images"),
        ("md_omniglot:train", "md_omniglot:test"),
        ("md_omniglot:train", "md_cub:test"),
        ("nowhere", "elsewhere"),
        ("<birds 12ab34cd>", "<birds 12ab34ce>"),
    ):
        assert not overlap(first, second) and not overlap(second, first), (first, second)
