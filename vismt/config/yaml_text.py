"""YAML text to plain values, within bounds: the cost of reading a file does not depend on who wrote it.

The reader takes mappings, lists, text, numbers, booleans and null. It refuses repeated keys, tags (`!!set`), nesting and
numbers beyond a bound, and aliases that expand to more values than a configuration can need. Booleans follow YAML 1.2, in which
`precision: no` is text. Dates are text.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from vismt.base.errors import UserError, shown_value
from vismt.storage.files import JsonObject
from vismt.storage.paths import read_bytes

_MAX_BYTES = 2**20
MAX_DEPTH = 50
MAX_VALUES = 10_000  # number of values of the whole text, with every alias replaced by what it stands for
MAX_DIGITS = 100  # characters of a number
_LEFT_OUT = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """SafeLoader that counts values and depth while it composes, before anything is constructed."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.values = 0
        self.values_below: dict[int, int] = {}  # by identity of the node of an anchor

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise self.refusal(f"the tag '{event.tag}' is not read; write text in quotes", event)
        before = self.values
        self.depth += 1
        self.values += 1
        if self.depth > MAX_DEPTH:
            raise self.refusal(f"it is nested deeper than {MAX_DEPTH}", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self.values_below:
                raise self.refusal(f"the alias '*{event.anchor}' is inside its own anchor", event)
            self.values += self.values_below[id(node)]
        elif event.anchor is not None:
            self.values_below[id(node)] = self.values - before
        if self.values > MAX_VALUES:
            raise self.refusal(f"it holds more than {MAX_VALUES:,} values, aliases expanded", event)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        # JSON escapes a character beyond 16 bits as two, \ud83d\ude00. YAML reads them one by one.
        node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        if node.tag in NUMBER_TAGS and len(node.value) > MAX_DIGITS:
            raise self.refusal(f"a number of {len(node.value):,} digits; at most {MAX_DIGITS} are read", node)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise self.refusal(f"key '{key.value}' is given twice", key)
                seen.add(key.value)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        mapping = super().construct_mapping(node, deep)
        types = {type(key) for key in mapping}
        # keys of several types have no order, and a null key is a slip: `: 3`
        if types - {str, int} or len(types) > 1:
            key = next(key for key in mapping if type(key) is not str)
            raise self.refusal(f"the key {shown_value(key)} is not text; write it in quotes", node)
        return mapping

    def refusal(self, problem: str, at: Any) -> yaml.YAMLError:
        return yaml.constructor.ConstructorError(None, None, problem, at.start_mark)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _LEFT_OUT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def parse_yaml(text: str) -> Any:
    """Return the plain value of `text`. Raise yaml.YAMLError for invalid text."""
    try:
        return yaml.load(text, _Loader)
    except ValueError as error:  # `0x_` looks like a number
        raise yaml.YAMLError(str(error)) from error


def read_yaml(path: Path, source: str) -> JsonObject:
    """Return the mapping in the file `path`. `source` names the file in errors.

    Raise UserError for a file that cannot be read, is not YAML within the bounds, repeats a key or holds something else.
    """
    try:
        loaded = parse_yaml(read_bytes(path, _MAX_BYTES).decode("utf8"))
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not readable as YAML: {' '.join(str(error).split())}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read: {error}.") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{source}: holds {type(loaded).__name__}, must hold `key: value` lines.")
    return loaded
