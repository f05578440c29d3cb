"""The topics of the Python reference: what `help()` shows, in two splits without a common topic."""

from __future__ import annotations

from pydoc_data.topics import topics

from vismt.data.check import check
from vismt.data.texts.text_set import open_texts


def test_splits_share_no_topic_and_hold_all_texts() -> None:
    train, test = open_texts("python_topics", "train"), open_texts("python_topics", "test")
    assert len(test) == len(topics) // 4 and len(train) + len(test) == len(topics)
    rows = train.rows + test.rows
    assert {row["topic"]: row["text"] for row in rows} == {name: text.strip() for name, text in topics.items()}
    assert sorted(train.ids + test.ids) == sorted(open_texts("python_topics").ids)
    assert [row["topic"] for row in test.rows] == sorted(topics)[3::4]
    assert train.content() != test.content()


def test_check_finds_the_file() -> None:
    assert check("python_topics").ok
