"""Which sets a study may train, validate and test on."""

from __future__ import annotations

import pytest

from vismt.engine.splits import PartsConfig, check_parts
from vismt.errors import UserError


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
    check_parts(PartsConfig(**parts), "data")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"train": ["a"], "test": ["a:test"]}, "test 'a:test' is in train 'a', too"),
        (
            {"train": ["a:train"], "test": ["b"], "validation": ["a:train"]},
            "validation 'a:train' is in train 'a:train', too",
        ),
        (
            {"train": ["a:train"], "test": ["a:test"], "validation": ["a:test"]},
            "validation 'a:test' is in test 'a:test', too",
        ),
        (
            {"train": ["a:train"], "test": ["b", "c:all"], "validation": ["d", "c:x"]},
            "validation 'c:x' is in test 'c:all', too",
        ),
        ({"train": ["a:train"], "test": ["c:x"], "validation": ["c"]}, "validation 'c' is in test 'c:x', too"),
        ({"test": ["c:x"], "validation": ["c:x"]}, "is in test"),  # a task that is tested alone
    ],
)
def test_no_example_is_in_two_parts(parts, words):
    with pytest.raises(UserError) as caught:
        check_parts(PartsConfig(**parts), "data")
    assert words in str(caught.value) and str(caught.value).startswith("data: ")
