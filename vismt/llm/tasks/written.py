"""The reading of a written answer as one of the candidates of a recommendation.

A written line is an exact answer where it equals the title of a candidate, and an answer by substring where it contains one
title: of titles that contain each other the longest counts, which LLaRA's released reading treats as invalid. HitRatio@1 is
correct / all; relative to valid answers only it would rise with each invalid answer.
"""

from __future__ import annotations

from collections.abc import Sequence


def read_answer(text: str, titles: Sequence[str], label: int) -> dict[str, bool]:
    """Return whether a written answer is right and valid: its first line equals a title, or contains one; case is ignored."""
    names = [_plain(title) for title in titles]
    line = _plain(text.split("\n")[0])
    contained = [name for name in names if name in line]
    longest = [name for name in contained if not any(name != other and name in other for other in contained)]
    return {
        "right": line == names[label],
        "valid": line in names,
        "right_substring": longest == [names[label]],
        "valid_substring": len(longest) == 1,
    }


def _plain(text: str) -> str:
    """Return the text in lower case with single spaces."""
    return " ".join(text.casefold().split())
