"""YAML text to plain values.

The reader takes mappings, lists, text, numbers, booleans and null. It refuses repeated keys and tags (`!!set`). Booleans follow
YAML 1.2, in which `precision: no` is text. Dates are text.
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

_LEFT_OUT = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")


class _Loader(yaml.SafeLoader):
    """SafeLoader of plain values."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.deep_construct = True  # so that an alias inside its own anchor is an error

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise self.refusal(f"the tag '{event.tag}' is not read; write text in quotes", event)
        return super().compose_node(parent, index)

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        # JSON escapes a character beyond 16 bits as two, \ud83d\ude00. YAML reads them one by one.
        node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
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
    except (ValueError, RecursionError) as error:  # `0x_` looks like a number, and "[[[..." has no end
        raise yaml.YAMLError(str(error)) from error


def read_yaml(path: Path, source: str) -> JsonObject:
    """Return the mapping in the file `path`. `source` names the file in errors.

    Raise UserError for a file that cannot be read, is not YAML, repeats a key or holds something else.
    """
    try:
        loaded = parse_yaml(read_bytes(path).decode("utf8"))
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not readable as YAML: {' '.join(str(error).split())}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read: {error}.") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{source}: holds {type(loaded).__name__}, must hold `key: value` lines.")
    return loaded
