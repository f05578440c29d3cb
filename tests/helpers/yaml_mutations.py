"""Hypothesis strategies that damage YAML: one value of its tree, or its text."""

from __future__ import annotations

import copy
from typing import Any

import yaml
from hypothesis import strategies as st

VALUES: list[Any] = [
    None, True, False, 0, 1, 2, -1, 0.5, -0.5, 1e-320, 1e308, float("inf"), float("nan"), 2**31, 2**63, 10**15, 10**30,
    "", " ", ".", "..", "a/b", "../..", "/", "no", "all", "1e999", "1e-3", "\0", "\x1b[2J\n", "\ud800", "x" * 300,
    "{x}", "{", "%s", "2020-99-99", [], [[]], [None], ["", ""], [0, 0], [-1], {}, {"": {}}, {"1": []}, {None: 1},
    {1: 2, "a": 3}, {"a": {"b": {"c": []}}},
]  # fmt: skip
CHUNKS = [
    "[" * 60, "{a: " * 60, "a: " + "9" * 5000, "a: 0x_", "- a\n", "? [a]\n: 1\n", ": 1\n", "<<: 3\n", "a: &a [*a]\n",
    "a: *b\n", "\t", "!!python/object/apply:os.system [true]\n", "!!set {a}\n", "!!int x\n", "!!binary x\n",
    "a: !!timestamp x\n", "\0", "\x85", "---\n", "...\n", "%YAML 9.9\n", "'", '"', "|\n", ">\n", "{", "}", "]", ",", ":",
    "#", "@", "`", "a: 1:99:99\n", "\ufeff", "a: .inf\n",
    "x: &x {a: 1}\ny: &y {<<: [*x, *x, *x]}\nz: {<<: [*y, *y]}\n",
]  # fmt: skip


def paths(tree: Any) -> list[tuple[Any, ...]]:
    """Return the path of every value inside `tree`."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path for key, value in items for path in [(key,), *((key, *below) for below in paths(value))]]


def _inside(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@st.composite
def damaged_trees(draw: st.DrawFn, tree: dict[str, Any]) -> str:
    """YAML of `tree` with one or two values replaced, removed, repeated, swapped or given another key."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        choices = paths(tree)
        *above, key = draw(st.sampled_from(choices)) if choices else ["task"]
        parent = _inside(tree, tuple(above))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "wrap", "swap"]))
        if kind == "replace":
            parent[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif kind == "remove":
            del parent[key]
        elif kind == "wrap":
            parent[key] = [parent[key]]
        elif kind == "swap":
            parent[key] = copy.deepcopy(_inside(tree, draw(st.sampled_from(choices))))
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(["", "..", "a/b", "name", f"{key}s", "\n"]))] = parent.pop(key)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=False)


@st.composite
def damaged_texts(draw: st.DrawFn, text: str) -> bytes:
    """`text` with a piece cut out, repeated or put in, or with other bytes."""
    kind = draw(st.sampled_from(["cut", "repeat", "insert", "insert", "insert", "bytes"]))
    start = draw(st.integers(0, len(text) - 1))
    end = min(len(text), start + draw(st.integers(1, 200)))
    if kind == "cut":
        return (text[:start] + text[end:]).encode()
    if kind == "repeat":
        return (text[:end] + text[start:]).encode()
    if kind == "bytes":
        return text[:start].encode() + draw(st.binary(min_size=1, max_size=8)) + text[end:].encode()
    start = text.rfind("\n", 0, start) + 1 if draw(st.booleans()) else start
    return (text[:start] + draw(st.sampled_from(CHUNKS)) + text[start:]).encode()
