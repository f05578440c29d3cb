"""The keys of a configuration, from the dataclasses that read it: for the terminal, for the page of a job and as a JSON schema.

The meaning of a key is its entry under `Args:` in the docstring of its dataclass. `Names` and `within` in its type give the
known names and the range.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal

from vismt.base.errors import UserError, near
from vismt.base.exports import docstring
from vismt.config.sections import RunConfig, default_of
from vismt.config.typed import MAPPINGS, Names, Range, describe_type, is_union
from vismt.jobs import JOBS, job_config
from vismt.storage.files import JsonObject

SCHEMA = "https://json-schema.org/draft/2020-12/schema"
DEFAULT_JOB = RunConfig.task  # of a configuration without the key
JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", NoneType: "null"}
BOUNDS = {"least": "minimum", "most": "maximum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}
ENTRY = re.compile(r"    (\w+): (.*)")


@dataclass(frozen=True)
class Key:
    """One key of a configuration. path: Dotted path, with [] for the items of a list. section: Whether it holds other keys."""

    path: str
    type: str
    default: str
    meaning: str
    names: list[str]
    section: bool

    def __str__(self) -> str:
        known = [f"    known: {', '.join(self.names)}"] if self.names else []
        return "\n".join([f"{self.path}   {self.type}   default: {self.default}", f"    {self.meaning}", *known])


def meanings(cls: type) -> dict[str, str]:
    """Return the meaning of every field of a dataclass: the entries under `Args:` in its docstring and in its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        entries = docstring(base).partition("\nArgs:\n")[2]
        name = ""
        for line in entries.splitlines():
            entry = ENTRY.fullmatch(line)
            if entry:
                name = entry[1]
                found[name] = entry[2]
            elif line.startswith(" " * 8):
                found[name] += f" {line.strip()}"
            else:
                break
    return {field.name: found.get(field.name, "") for field in dataclasses.fields(cls)}


def keys(job: str) -> list[Key]:
    """Return every key of a job's configuration, sections before their keys."""
    return list(_keys(job_config(job), ""))


def find_keys(job: str, name: str) -> list[Key]:
    """Return the key of a dotted name and the keys below it.

    Raises UserError for a name that is not a key. The message says where it is set instead, or has similar names.
    """
    every = keys(job)
    found = [key for key in every if key.path == name or key.path.startswith((f"{name}.", f"{name}["))]
    if not found:
        elsewhere = job_config(job).ELSEWHERE.get(name)
        hint = f" {elsewhere}" if elsewhere else near(name, [key.path for key in every])
        raise UserError(f"config {job}: no key '{name}'.{hint}")
    return found


def _keys(cls: type, prefix: str) -> Iterator[Key]:
    hints = typing.get_type_hints(cls, include_extras=True)
    texts = meanings(cls)
    for field in dataclasses.fields(cls):
        hint, path = hints[field.name], f"{prefix}{field.name}"
        inner = _section(hint)
        text = describe_type(hint) if inner is None else describe_type(hint).replace(inner.__name__, "section")
        kind = ", ".join([text, *(str(mark) for mark in _marks(hint) if isinstance(mark, Range))])
        yield Key(path, kind, _default_text(field), texts[field.name], _names(hint), inner is not None)
        if inner is not None:
            listed = any(typing.get_origin(member) is list for member in _members(hint))
            yield from _keys(inner, f"{path}[]." if listed else f"{path}.")
        for mark in _marks(hint):
            if isinstance(mark, Names) and mark.options:
                registry: Any = mark.known()
                for name in registry:
                    about = docstring(registry[name]).splitlines()[0]
                    yield Key(f"{path}[{name}]", "section", "its keys' defaults", about, [], True)
                    yield from _keys(registry[name], f"{path}[{name}].")


def _plain(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _members(hint: Any) -> list[Any]:
    """Return the members of a union other than null, and any other type alone, each without its annotations."""
    plain = _plain(hint)
    members = typing.get_args(plain) if is_union(plain) else [plain]
    return [_plain(member) for member in members if member is not NoneType]


def _section(hint: Any) -> type | None:
    """Return the dataclass that a type holds, alone or in a list. None if it holds values."""
    for member in _members(hint):
        item = typing.get_args(member)[0] if typing.get_origin(member) is list else member
        if dataclasses.is_dataclass(item):
            return typing.cast(type, item)
    return None


def _marks(hint: Any) -> Iterator[Any]:
    """Yield the annotations of a type and of its members, without the annotations of a section's keys."""
    if typing.get_origin(hint) is Annotated:
        yield from typing.get_args(hint)[1:]
    if typing.get_origin(hint) is not Literal:
        for member in typing.get_args(hint):
            yield from _marks(member)


def _names(hint: Any) -> list[str]:
    names = [str(name) for mark in _marks(hint) if isinstance(mark, Names) for name in mark]
    literals = [member for member in _members(hint) if typing.get_origin(member) is Literal]
    return list(dict.fromkeys(names + [str(choice) for literal in literals for choice in typing.get_args(literal)]))


def _default(field: dataclasses.Field[Any]) -> Any:
    value = default_of(field)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return value


def _default_text(field: dataclasses.Field[Any]) -> str:
    value = _default(field)
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, dict) and value and _section_like(field):
        return "its keys' defaults"
    return json.dumps(value)


def _section_like(field: dataclasses.Field[Any]) -> bool:
    return field.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(field.default_factory)


def schema() -> JsonObject:
    """Return the JSON schema of all configurations, which differ in the key `task`."""
    definitions: JsonObject = {}
    branches = []
    for job in JOBS:
        condition: JsonObject = {"properties": {"task": {"const": job}}}
        if job != DEFAULT_JOB:
            condition["required"] = ["task"]
        branches.append({"if": condition, "then": _reference(job_config(job), definitions)})
    task = {"task": {"enum": list(JOBS), "default": DEFAULT_JOB, "description": "the job."}}
    about = {"$schema": SCHEMA, "title": "Configuration of a vismt run", "type": "object", "properties": task}
    return {**about, "allOf": branches, "$defs": definitions}


def _reference(cls: type, definitions: JsonObject) -> JsonObject:
    if cls.__name__ not in definitions:
        definitions[cls.__name__] = {}  # its place, so that sections stand in the order of their first use
        hints = typing.get_type_hints(cls, include_extras=True)
        texts = meanings(cls)
        properties, required = {}, []
        for field in dataclasses.fields(cls):
            default = _default(field)
            if default is dataclasses.MISSING:
                required.append(field.name)
            given = {} if default is dataclasses.MISSING or _section_like(field) else {"default": default}
            value = _schema_of(hints[field.name], definitions)
            properties[field.name] = {"description": texts[field.name], **value, **given}
        content = {"type": "object", "additionalProperties": False, "properties": properties}
        definitions[cls.__name__] = {**content, "required": required} if required else content
    return {"$ref": f"#/$defs/{cls.__name__}"}


def _schema_of(hint: Any, definitions: JsonObject) -> JsonObject:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        inner = _schema_of(arguments[0], definitions)
        for mark in arguments[1:]:
            if isinstance(mark, Names):
                inner.get("items", inner)["enum" if mark.closed else "examples"] = list(mark)
            elif isinstance(mark, Range):
                bounds = {word: getattr(mark, name) for name, word in BOUNDS.items()}
                inner |= {word: bound for word, bound in bounds.items() if bound is not None}
        return inner
    if is_union(hint):
        return {"anyOf": [_schema_of(member, definitions) for member in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in MAPPINGS:
        return {"type": "object", "additionalProperties": _schema_of(arguments[1], definitions)}
    if origin in (list, tuple):
        return _schema_of_list(origin, arguments, definitions)
    if dataclasses.is_dataclass(hint):
        return _reference(typing.cast(type, hint), definitions)
    return {"type": JSON_TYPES[hint]} if hint in JSON_TYPES else {}


def _schema_of_list(origin: Any, arguments: Sequence[Any], definitions: JsonObject) -> JsonObject:
    if origin is list or arguments[-1] is Ellipsis:
        return {"type": "array", "items": _schema_of(arguments[0], definitions)}
    items = [_schema_of(argument, definitions) for argument in arguments]
    return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}


def schema_text() -> str:
    """Return the JSON schema as the content of a file."""
    return json.dumps(schema(), indent=1) + "\n"
