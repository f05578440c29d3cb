"""Every room of the package has a ceiling of its size, and the ceilings only go down (house_budget.json).

A room is a folder of vismt/. `code` counts lines of code, without blank lines, comments and docstrings. `hooks` counts the public
members of abstract classes. A room that became smaller lowers its ceilings in the same commit:

    REWRITE_BUDGET=1 pytest tests/test_budget.py
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from helpers import pages

from vismt.jobs import JOBS
from vismt.jobs.reference import keys

ROOT = Path(__file__).resolve().parent.parent
BUDGET = Path(__file__).with_name("house_budget.json")
SLACK = 0.02  # share by which a room may lie below its ceiling
LOWER = "run REWRITE_BUDGET=1 pytest tests/test_budget.py, which lowers ceilings and raises none"
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def parsed() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf8")) for path in sorted((ROOT / "vismt").rglob("*.py"))}


def code_lines(text: str) -> int:
    """Return the number of lines that hold code."""
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT:
            held.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            held -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(held)


def rooms() -> dict[str, dict[str, int]]:
    """Return the size of every room."""
    sizes: dict[str, Counter[str]] = {}
    hooks = Counter(path for path, _, _ in members())
    for path in parsed():
        parts = path.relative_to(ROOT / "vismt").parts
        size = sizes.setdefault(parts[0] if len(parts) > 1 else "top", Counter())
        text = path.read_text(encoding="utf8")
        size.update(code=code_lines(text), lines=text.count("\n"), files=int(bool(text)), hooks=hooks[path])
    found = {room: dict(size) for room, size in sorted(sizes.items())}
    lines = sum(path.read_text(encoding="utf8").count("\n") for path in (ROOT / "tests").rglob("*.py"))
    return found | {"tests": {"lines": lines}}


@cache
def classes() -> dict[str, tuple[Path, ast.ClassDef]]:
    return {
        node.name: (path, node)
        for path, tree in parsed().items()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def bases(node: ast.ClassDef) -> list[str]:
    return [name for base in node.bases for name in re.findall(r"\w+", ast.unparse(base))]


def public(node: ast.ClassDef) -> set[str]:
    """Return the names of public methods and attributes that a class defines."""
    names = {item.name for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))}
    for item in node.body:
        targets = (
            item.targets if isinstance(item, ast.Assign) else [item.target] if isinstance(item, ast.AnnAssign) else []
        )
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def members() -> Iterator[tuple[Path, str, str]]:
    """Yield file, class and name of the public members of abstract classes."""
    for name, (path, node) in classes().items():
        if "ABC" in bases(node) or "raise NotImplementedError" in ast.unparse(node):
            yield from ((path, name, member) for member in sorted(public(node)))


def below(name: str) -> set[str]:
    """Return the names of the classes that inherit from a class, directly or not."""
    direct = {child for child, (_, node) in classes().items() if name in bases(node)}
    return direct.union(*map(below, direct))


def lonely_hooks() -> list[str]:
    """Return the members of abstract classes that one class of the package defines anew."""
    users = Counter(
        f"{name}.{member}"
        for _, name, member in members()
        for child in below(name)
        if member in public(classes()[child][1])
    )
    return sorted(hook for hook, count in users.items() if count == 1)


def named_keys(values: Any) -> Iterator[str]:
    """Yield every piece of every key in nested values: `adapt.rank` gives adapt and rank."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from str(key).split(".")
            yield from named_keys(value)
    elif isinstance(values, list):
        for value in values:
            yield from named_keys(value)


def silent_keys() -> list[str]:
    """Return the keys of configurations that no shipped configuration sets and no page that a person wrote names."""
    texts = [path.read_text(encoding="utf8") for path in (ROOT / "configs").rglob("*.yaml")]
    written = [page for page in pages.PAGES if "reference" not in page.parts]
    texts += [block.code for page in written for block in pages.blocks(page, "yaml")]
    said = {key for text in texts for key in named_keys(yaml.safe_load(text))}
    for page in written:
        for code in re.findall(r"`([^`]+)`|```(.*?)```", pages.read(page), re.S):
            said |= set(re.findall(r"\b\w+\b(?=\s*[:=.]|$)|(?<=\.)\w+", "".join(code)))
    paths = {key.path for job in JOBS for key in keys(job) if not key.path.endswith("]")}
    return sorted(path for path in paths if path.rpartition(".")[2] not in said)


def measured() -> dict[str, Any]:
    return {
        "rooms": rooms(),
        "hooks with one user": lonely_hooks(),
        "keys in no configuration and no page": silent_keys(),
    }


def faults(budget: dict[str, Any], now: dict[str, Any], slack: float) -> list[str]:
    """Return where the figures of now lie above a ceiling, or so far below it that it goes down."""
    found = []
    for room, size in now["rooms"].items():
        for what, value in size.items():
            ceiling = budget["rooms"].get(room, {}).get(what, 0)
            if value > ceiling:
                found.append(
                    f"{room}: {value:,} {what}, at most {ceiling:,}; another room that pays lowers its ceiling here"
                )
            elif ceiling - value > slack * ceiling:
                found.append(f"{room}: {value:,} {what}, the ceiling is {ceiling:,}; {LOWER}")
    for name in (name for name in now if name != "rooms"):
        found += [f"{name}: {new} is new" for new in sorted(set(now[name]) - set(budget[name]))]
        found += [f"{name}: {gone} is none any more; {LOWER}" for gone in sorted(set(budget[name]) - set(now[name]))]
    return found


def lowered(budget: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the ceilings that are not above the figures of now, and the names that stand in both lists."""
    sizes = {
        room: {what: min(value, budget["rooms"].get(room, size).get(what, value)) for what, value in size.items()}
        for room, size in now["rooms"].items()
    }
    lists = {name: [item for item in now[name] if item in budget[name]] for name in now if name != "rooms"}
    return {"rooms": sizes, **lists}


def test_no_room_outgrows_its_ceiling() -> None:
    budget, now = json.loads(BUDGET.read_text()), measured()
    if os.environ.get("REWRITE_BUDGET"):
        budget = lowered(budget, now)
        BUDGET.write_text(json.dumps(budget, indent=1) + "\n")
    assert faults(budget, now, SLACK) == []


def test_ceilings_go_down_only_and_growth_is_noticed() -> None:
    old = {"rooms": {"a": {"code": 100}, "b": {"code": 100}}, "names": ["x", "y"]}
    new = {"rooms": {"a": {"code": 101}, "b": {"code": 97}}, "names": ["y", "z"]}
    assert [fault.partition(",")[0] for fault in faults(old, new, SLACK)] == [
        "a: 101 code",
        "b: 97 code",
        "names: z is new",
        f"names: x is none any more; {LOWER.partition(',')[0]}",
    ]
    assert lowered(old, new) == {"rooms": {"a": {"code": 100}, "b": {"code": 97}}, "names": ["y"]}
    assert faults(old, old, SLACK) == []


def test_lines_of_code_are_counted_without_words() -> None:
    assert (
        code_lines(
            '"""A\nB."""\n\n# C\nx = (\n    1  # D\n)\n\n\ndef f():\n    """E."""\n    return """\n    F\n    """\n'
        )
        == 7
    )
