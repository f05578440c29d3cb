"""The strict reader of YAML into dataclasses: what fits which field, and what errors say."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from vismt.base.errors import UserError
from vismt.config.typed import Names, RelativePath, build, within
from vismt.config.yaml_text import parse_yaml, read_yaml


@dataclass
class Inner:
    rate: float = 0.1
    names: list[str] = field(default_factory=list)


@dataclass
class Outer:
    title: str
    count: int | None = None
    rate: float | str = 0.0
    flag: bool = False
    inner: Inner = field(default_factory=Inner)
    optional: Inner | None = None
    many: list[Inner] = field(default_factory=list)
    by_name: dict[str, Inner] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    pair: tuple[int | None, float] = (None, 0.0)
    series: tuple[int, ...] = ()
    levels: list[float | list[float]] = field(default_factory=list)
    mode: Literal["fast", "exact"] = "fast"
    options: dict[str, Any] = field(default_factory=dict)
    path: RelativePath | None = None


def outer(**values: object) -> Outer:
    return build(Outer, {"title": "t", **values}, "f.yaml")


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        ({"rate": 1}, "rate", 1.0),
        ({"rate": "1e-3"}, "rate", 1e-3),
        ({"rate": "4.5/255"}, "rate", "4.5/255"),
        ({"count": "0x10"}, "count", 16),
        ({"count": None}, "count", None),
        ({"inner": {"rate": 2}}, "inner", Inner(2.0)),
        ({"optional": None}, "optional", None),
        ({"many": [{"names": ["a"]}, {}]}, "many", [Inner(names=["a"]), Inner()]),
        ({"by_name": {"x": {"rate": 3}}}, "by_name", {"x": Inner(3.0)}),
        ({"shares": {"a": 1}}, "shares", {"a": 1.0}),
        ({"pair": [2, "1e2"]}, "pair", (2, 100.0)),
        ({"series": [1, 2, 3]}, "series", (1, 2, 3)),
        ({"levels": [1, [2, 3]]}, "levels", [1.0, [2.0, 3.0]]),
        ({"mode": "exact"}, "mode", "exact"),
        (
            {"options": {"lr": "1e-3", "text": "no", "list": ["1"]}},
            "options",
            {"lr": 1e-3, "text": "no", "list": ["1"]},
        ),
    ],
)
def test_values_that_fit(values: dict[str, Any], name: str, expected: object) -> None:
    value = getattr(outer(**values), name)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"titel": 1}, "f.yaml: unknown key 'titel'. Near: 'title'."),
        ({"many": [{}, {"rat": 1}]}, "f.yaml: unknown key 'many[1].rat'. Near: 'rate'."),
        ({"count": 1.5}, "f.yaml: count: expected int or null, got 1.5 (float)."),
        ({"count": True}, "f.yaml: count: expected int or null, got True (bool)."),
        ({"flag": 1}, "f.yaml: flag: expected bool, got 1 (int)."),
        ({"title": 3}, "f.yaml: title: expected str, got 3 (int); text needs quotes here."),
        ({"title": None}, "f.yaml: title is null; it needs a value."),
        ({"inner": 3}, "f.yaml: inner is 3, not a section."),
        ({"optional": [1]}, "f.yaml: optional is [1], not a section."),
        ({"by_name": {"x": {"names": "a"}}}, "f.yaml: by_name.x.names: expected list of str, got 'a' (str)."),
        ({"by_name": {1: {}}}, "f.yaml: by_name: the key 1 is not text; write it in quotes."),
        ({"levels": [1, [2, "x"]]}, "f.yaml: levels[1][1]: expected float, got 'x' (str)."),
        ({"pair": [1]}, "f.yaml: pair: expected list of 2 values (int or null, float), got [1] (list)."),
        ({"mode": "slow"}, "f.yaml: mode: expected 'fast' or 'exact', got 'slow' (str)."),
        ({"path": f"a/{'x' * 300}"}, f"f.yaml: path: 'a/{'x' * 198}…' holds a name of more than 255 bytes."),
        ({"path": "../x"}, "f.yaml: path: '../x' must be a relative path with '/' and without '..'."),
    ],
)
def test_values_that_do_not_fit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        outer(**values)
    assert str(error.value) == message


def test_missing_keys_and_fields_of_the_caller() -> None:
    with pytest.raises(UserError, match=r"^f.yaml: key 'a.title' is missing\.$"):
        build(Outer, {}, "f.yaml", "a")
    with pytest.raises(UserError, match=r"^f.yaml: a is \[\], not a section\.$"):
        build(Outer, [], "f.yaml", "a")
    assert build(Outer, {}, "f.yaml", title="mine").title == "mine"
    with pytest.raises(UserError, match="unknown key 'title'"):
        build(Outer, {"title": "x"}, "f.yaml", title="mine")


def test_nothing_is_shared_with_the_values() -> None:
    values = {"title": "t", "options": {"inside": [1]}, "levels": [[1]]}
    built = build(Outer, values, "f.yaml")
    built.options["inside"].append(2)
    built.levels.append(3.0)
    assert values == {"title": "t", "options": {"inside": [1]}, "levels": [[1]]}


def test_yaml_has_the_booleans_of_version_1_2_and_no_repeated_keys(tmp_path) -> None:
    assert parse_yaml("{a: no, b: on, c: true, d: False}") == {"a": "no", "b": "on", "c": True, "d": False}
    path = tmp_path / "x.yaml"
    for text, message in (
        ("a: 1\na: 2", "key 'a' is given twice"),
        ("- 1", "x: holds list"),
        ("a: [", "not readable as YAML"),
        ("b: {a: 1, a: 2}", "key 'a' is given twice"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_yaml(path, "x")


def test_a_large_configuration_takes_milliseconds() -> None:
    many = [{"rate": number, "names": ["a"]} for number in range(100)]
    outer(many=many)
    start = time.perf_counter()
    outer(many=many)
    assert time.perf_counter() - start < 0.5


@dataclass
class Checked:
    share: Annotated[float, within(0, 1)] = 0.5
    count: Annotated[int, within(1)] | None = None
    crop: Annotated[float, within(above=0, most=1)] = 1.0
    rates: dict[str, Annotated[float, within(above=0)]] = field(default_factory=dict)
    name: Annotated[str | None, Names(("adam", "sgd"), only=True)] = None
    names: Annotated[list[str], Names(("adam", "sgd"), only=True)] = field(default_factory=list)
    free: Annotated[str, Names(("adam",))] = "adam"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 2}, "f.yaml: share is 2.0; it lies from 0 to 1."),
        ({"count": 0}, "f.yaml: count is 0; it must be at least 1."),
        ({"crop": 0}, "f.yaml: crop is 0.0; it must be above 0 and at most 1."),
        ({"rates": {"head": 0}}, "f.yaml: rates.head is 0.0; it must be above 0."),
        ({"name": "adamm"}, "f.yaml: name: 'adamm' is not known. Near: 'adam'."),
        ({"names": ["sgd", "x"]}, "f.yaml: names: 'x' is not known. Known: 'adam', 'sgd'."),
    ],
)
def test_ranges_and_names_of_an_annotation(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        build(Checked, values, "f.yaml")
    assert str(error.value) == message
    assert build(Checked, {"share": 1, "count": 1, "name": "sgd", "free": "another"}, "f.yaml").name == "sgd"
