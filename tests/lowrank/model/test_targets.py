"""Patterns of module paths: paths are looked up, expressions match as `re` does within a time limit; work grows with layers."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
from helpers.every_method import LAYERS, OPTIONS
from helpers.faults import many
from helpers.tiny import images, tiny_vit
from hypothesis import given
from hypothesis import strategies as st

import vismt
from vismt.base.errors import UserError
from vismt.llm import collect_covariance
from vismt.lowrank.model import targets
from vismt.lowrank.model.targets import Expression, match_patterns, pattern_values
from vismt.methods import METHODS

ATOMS = st.sampled_from(["a", "b", r"\.", ".", r"\d", "[ab]", "[^a]", "^", "$", r"\b", "1", r"\x61"])


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    counts = st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{,2}", "{2,}", "*?", "+?"])
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, counts).map(lambda pair: f"({pair[0]}){pair[1]}"),
        inner.map(lambda part: f"(?={part})"),
        inner.map(lambda part: f"(?!{part})"),
        inner.map(lambda part: rf"({part})\1"),
        inner.map(lambda part: f"(?i:{part})"),
    )


@many(200)
@given(pattern=st.recursive(ATOMS, larger, max_leaves=8), text=st.text("abA.1", max_size=7))
def test_expressions_match_as_re_does(pattern: str, text: str) -> None:
    try:
        expected = re.fullmatch(pattern, text) is not None
    except re.error:  # a reference into another group
        return
    assert bool(Expression("x", pattern).match(text)) == expected


@pytest.mark.parametrize(
    "text", ["(", ")", "a)", "[a", "*a", "a**", "a{2}{3}", "a{3,2}", "\\", "(?P<a", "(?z)", "(?R)"]
)
def test_what_re_refuses_is_one_clear_line(text: str) -> None:
    with pytest.raises(re.error):
        re.compile(text)
    with pytest.raises(UserError, match=r"^adapt.targets: '.*' is not a regular expression that can be matched: "):
        Expression("adapt.targets", text)


@pytest.mark.parametrize(
    "text",
    [
        "((([ab]{99}){99}){99}){99}",
        "(" * 60 + "a" + ")+" * 60,
        "(" * 60 + "a" + "){1,}" * 60,
        "(" * 5000 + ")" * 5000,
        "a{1234567890}",
        "a{99999999999}",
        "a+" * 10**5,
    ],
)
def test_expressions_that_take_memory_are_refused_before_they_are_compiled(text: str) -> None:
    began = time.thread_time()
    with pytest.raises(UserError, match=r"^x: '.* is not a regular expression that can be matched: ") as caught:
        Expression("x", text)
    assert time.thread_time() - began < 1 and len(str(caught.value)) < 500


HOSTILE = (
    r"(.|..)+\d",
    r"(?:.|.|.)*\d",
    r"((.|..)+)+\d",
    r"(?:(.)|(..))+\d",
    r"(?<!x)(.|..)*(?<=!)",
    r"(?=(.|..)+\d$).*",
    r"(.|.)*\1{99}",
    r"(.(.(.|..)*)*)*\d",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_expression_stops_within_its_limit(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the limit, each of them runs for years."""
    monkeypatch.setattr(targets, "LIMIT_S", 0.1)
    began = time.process_time()
    with pytest.raises(UserError, match=r"^adapt.exclude: matching '.*' takes more than 0.1 s; give a simpler"):
        match_patterns("adapt.exclude", [text], [f"model.layers.{number}.self_attn.q_proj" for number in range(10, 99)])
    assert time.process_time() - began < 1


def test_all_matches_of_an_expression_share_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "LIMIT_S", 0.05)
    expression = Expression("x", r"(.|..)+\d")
    with pytest.raises(UserError, match="takes more than"):
        for _ in range(2000):
            expression.match("layers.self_attn")  # a millisecond each


def test_paths_are_looked_up() -> None:
    paths = [f"layers.{number}.q_proj" for number in range(3000)]
    expression = Expression("x", "|".join(re.escape(path) for path in paths))
    assert expression.match(paths[-1]) and not expression.match("layers.3000.q_proj")
    assert not expression.match("layersx1.q_proj")
    assert match_patterns("x", paths, paths) == {path: [path] for path in paths}


def test_a_pattern_that_is_a_path_names_that_path_and_what_ends_in_it() -> None:
    """No character stands for another: the dots of a path are dots."""
    paths = ["layers.1.q", "model.layers.1.q", "layersx1.q", "model.layersx1.q"]
    assert match_patterns("x", ["layers.1.q", "layers.1.."], paths) == {
        "layers.1.q": paths[:2],
        "layers.1..": ["layers.1.q", "layersx1.q"],
    }
    with pytest.raises(UserError, match=r"^x: no module matches 'layers.2.q'. Near: "):
        match_patterns("x", ["layers.2.q"], paths)


def test_the_first_pattern_that_matches_a_path_gives_its_value() -> None:
    paths = ["a.q", "a.k", "b.q"]
    assert pattern_values("x", {r"a\..*": 1, "q": 2}, paths) == {"a.q": 1, "a.k": 1, "b.q": 2}


def count_calls(function: Callable[[], object]) -> int:
    """Return the number of calls of Python functions that a call makes."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("method", METHODS)
def test_adapting_takes_work_in_proportion_to_the_layers(method: str) -> None:
    """Quadratic work would make each step four times as large as the one before it."""
    patterns = {"exclude": [r"patch_embed\.\w+|blocks\.0\.mlp"], "also_train": [r"blocks\.\d+\.norm1\..*"]}
    options = {name: value for name, value in patterns.items() if name in METHODS[method].options}
    counts = []
    for depth in (2, 2, 4, 8, 16):  # the first call imports
        model = tiny_vit(depth=depth)
        more = {"covariances": collect_covariance(model, [images()], LAYERS)} if method == "corda" else {}
        counts.append(count_calls(partial(vismt.adapt, model, method, **options, **OPTIONS.get(method, {}), **more)))
    steps = [after - before for before, after in pairwise(counts[1:])]
    assert steps[1] < 2.2 * steps[0] and steps[2] < 2.2 * steps[1], counts
