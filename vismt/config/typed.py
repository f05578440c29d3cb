"""Strict reading of YAML and JSON into dataclasses: run configurations, data and asset cards, the files of adapters.

`read_yaml` (yaml_text.py) and `read_json` (storage/files.py) read the mapping of a file. `build` turns a mapping into a
dataclass with typed, possibly nested fields. Every mistake is a UserError that names the file, the dotted key
(`tasks[0].validation_share`), the expected type, the value and, for an unknown key, similar keys. Numbers are finite, whole
numbers fit 64 bits, and text can be written as UTF-8.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from vismt.base.errors import GONE, UserError, near, shown_value
from vismt.storage.paths import stays_inside

T = TypeVar("T")
EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")  # YAML 1.1 reads 1e-3 as text
UNWRITABLE = re.compile("[\0\ud800-\udfff]")
PLAIN_NAME = re.compile(r"(?!\.+$)[\w.+-]{1,100}")
LONGEST_NAME = 255  # bytes, the limit of the usual file systems
SCALARS = (bool, int, float, str)
NUMBERS = (int, float)
MAPPINGS = (dict, Mapping)
_CONTAINERS = (*MAPPINGS, list, tuple)


class JsonFile(str):
    """A JSON file as the `source` of `build`. Its text is never a number, as 1e-3 without quotes is in YAML 1.1."""


@dataclass(frozen=True)
class Names:
    """The known names of a field, `Annotated[str, Names(...)]`.

    Documentation and editors show them. With `only`, `build` refuses any other text, also in a list.

    source: Names, or "module:attribute" of names or of a function that returns them, imported on demand. A registry may know
    more names than it lists, the names of a family. options: Whether each name stands for a dataclass. The fields of the
    dataclass are then keys of an item with this name.
    """

    source: str | Iterable[str]
    only: bool = False
    options: bool = False

    def __iter__(self) -> Iterator[str]:
        return iter(self.known())

    def __call__(self, value: object, where: str) -> None:
        if not self.only:
            return
        known = self.known()
        for name in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(name, str) and name not in known:
                own = getattr(known, "hint", None)
                hint = (own(name) if own else near(name, known)) or f" Known: {', '.join(map(repr, known))}."
                raise UserError(f"{where}: '{name}' is not known.{hint}")

    @property
    def closed(self) -> bool:
        """Whether the listed names are all that `build` accepts."""
        return self.only and not getattr(self.known(), "families", None)

    def known(self) -> Collection[str]:
        """Return the names, or the registry of what they stand for."""
        if not isinstance(self.source, str):
            return tuple(self.source)
        module, _, attribute = self.source.partition(":")
        names = getattr(importlib.import_module(module), attribute)
        return names() if callable(names) else names


@dataclass(frozen=True)
class Range:
    """The range of a finite number. `build` refuses numbers outside of it.

    least and most belong to the range, above and below do not. unit: Unit of the number, for messages. A value of another type
    passes, because it belongs to another member of a union.
    """

    least: float | None = None
    most: float | None = None
    _: dataclasses.KW_ONLY
    above: float | None = None
    below: float | None = None
    unit: str = ""

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        bounds = (("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below))
        return " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)

    def __call__(self, value: Any, where: str) -> None:
        if not issubclass(type(value), Real):
            return
        if not math.isfinite(value):
            raise UserError(f"{where} is {value}; a number must be finite.")
        inside = (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        if not inside:
            verb = "lies" if self.least is not None and self.most is not None else "must be"
            raise UserError(f"{where} is {value}; it {verb} {self}{self.unit and f', in {self.unit}'}.")


within = Range  # reads well in an annotation: Annotated[float, within(0, 1)]


class Checked:
    """A dataclass whose annotations are also checked if Python makes it, without `build`.

    KEY: Key of the section, for messages.
    """

    KEY: ClassVar[str]

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]  # a class is hashable
            _check(getattr(self, name), hint, f"{self.KEY}.{name}")


@cache
def _hints(cls: type) -> dict[str, object]:
    return typing.get_type_hints(cls, include_extras=True)


def _check(value: object, hint: object, where: str) -> None:
    """Call the checks in a type, and the checks of the values of a mapping."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        if (arguments[0] is int and isinstance(value, float)) or (arguments[0] is str and not isinstance(value, str)):
            raise UserError(
                f"{where}: expected {describe_type(hint)}, got {shown_value(value)} ({type(value).__name__})."
            )
        for check in arguments[1:]:
            check(value, where)
    elif is_union(hint):
        for member in arguments:
            _check(value, member, where)
    elif origin in MAPPINGS and isinstance(value, Mapping):
        for name, item in value.items():
            _check(item, arguments[1], _join(where, name))


def build(cls: type[T], values: object, source: str, key: str = "", /, **given: object) -> T:
    """Return an instance of the dataclass `cls` with fields from a mapping of plain values.

    Fields may be bool, int, float, str, Any, Literal, dataclasses, and unions, lists, tuples and mappings from str of these. A
    whole number fits a float field, and a bool is not a number. Text that spells a number ("1e-3", "0x10") fits a number field
    or a field of type Any. Each `Annotated[type, check]` calls check(value, source and key), which may raise.

    Args:
        cls: Dataclass. A field without default is a required key.
        values: Mapping of plain values. It is not changed, and the result shares no object with it.
        source: Name of the file in error messages. A JsonFile for values of JSON.
        key: Dotted key of `values` in that file, "" for the whole file.
        given: Fields that the caller sets and that are not keys of the mapping.

    Raises:
        UserError: If a key is unknown or missing, a value has another type, or a check or `cls` itself refuses a value.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: {key or 'the file'} is {shown_value(values)}, not a section.")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init and field.name not in given}  # type: ignore[arg-type]
    hints = _hints(cls)  # type: ignore[arg-type]  # a class is hashable
    unknown = next((name for name in values if name not in fields), None)
    if unknown is not None:
        raise unknown_key(cls, str(unknown), source, _join(key, unknown), fields)
    converted = given | _convert_all(values, hints, source, key)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{source}: key '{_join(key, name)}' is missing.")
    try:
        return cls(**converted)
    except ValueError as error:  # a check in __post_init__ (a UserError is a ValueError)
        if not isinstance(source, JsonFile):
            raise UserError(f"{source}: {error}") from error
        where, end = (f"{source}: {key}" if key else source), "" if str(error).endswith(".") else "."
        raise UserError(f"{where}: {error}{end}") from error


def arguments(
    function: Callable[..., object], options: Mapping[str, object], source: str, key: str = ""
) -> dict[str, Any]:
    """Return options of a function or class, each typed by the annotation of its parameter.

    source, key: See `build`. Options without a parameter are copied. Raise UserError for a value of another type.
    """
    initialisers = (
        [vars(base)["__init__"] for base in reversed(inspect.getmro(function)) if "__init__" in vars(base)]
        if inspect.isclass(function)
        else [function]
    )
    hints = {
        name: hint for item in initialisers for name, hint in typing.get_type_hints(item, include_extras=True).items()
    }
    return _convert_all(options, {name: hints.get(name, Any) for name in options}, source, key)


def unknown_key(cls: type, name: str, source: str, key: str, known: Iterable[str]) -> UserError:
    """Return the error for an unknown key. It says where the setting is made, or names similar keys or all keys of the section.

    A class may have a dictionary ELSEWHERE: {name: where that is set}.
    """
    choices = list(known)
    elsewhere = getattr(cls, "ELSEWHERE", {}).get(name) or GONE.get(key)
    hint = f" {elsewhere}" if elsewhere else near(name, choices) or f" Known: {', '.join(map(repr, sorted(choices)))}."
    return UserError(f"{source}: unknown key '{key}'.{hint}")


def _convert_all(values: Mapping[str, object], hints: Mapping[str, object], source: str, key: str) -> dict[str, Any]:
    """Return the values, each as an object of the type in `hints`, in the order of `hints`."""
    try:
        given = [name for name in hints if name in values]
        return {name: _convert(values[name], hints[name], source, _join(key, name)) for name in given}
    except (_WrongType, _OutOfRange) as error:
        raise UserError(f"{source}: {error}") from error


class _OutOfRange(ValueError):
    """A scalar that fits no field."""


class _WrongType(Exception):
    """A value of another type than its field."""

    def __init__(self, key: str, hint: object, value: object) -> None:
        self.key = key
        members = (
            [member for member in typing.get_args(hint) if member is not types.NoneType] if is_union(hint) else [hint]
        )
        if value is None:
            text = f"{key} is null; it needs a value."
        elif [dataclasses.is_dataclass(member) for member in members] == [True]:
            text = f"{key} is {shown_value(value)}, not a section."
        else:
            quotes = "; text needs quotes here" if isinstance(value, NUMBERS) and str in members else ""
            text = f"{key}: expected {describe_type(hint)}, got {shown_value(value)} ({type(value).__name__}){quotes}."
        super().__init__(text)


def _join(key: str, name: object) -> str:
    text = str(name) if str(name).isprintable() else shown_value(name)
    return f"{key}.{text}" if key else text


def is_union(hint: object) -> bool:
    """Return whether a type is a union."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def describe_type(hint: object) -> str:
    """Return a type as error messages name it: 'int or null', 'list of str'."""
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if is_union(hint):
        return " or ".join(dict.fromkeys(describe_type(member) for member in arguments))
    if origin is Annotated:
        return describe_type(arguments[0])
    if origin is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if origin in MAPPINGS:
        return f"mapping of str to {describe_type(arguments[1])}"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"list of {len(arguments)} values ({', '.join(describe_type(member) for member in arguments)})"
    if origin in (list, tuple):
        return f"list of {describe_type(arguments[0])}"
    return "null" if hint is types.NoneType else str(getattr(hint, "__name__", hint))


def _convert(value: object, hint: object, source: str, key: str) -> object:
    """Return `value` as an object of the type `hint`. Raises _WrongType."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        plain, *checks = typing.get_args(hint)
        converted = _convert(value, plain, source, key)
        for check in checks:
            check(converted, f"{source}: {key}")
        return converted
    if is_union(hint):
        return _convert_union(value, hint, source, key)
    if origin in _CONTAINERS:
        return _convert_container(value, hint, source, key)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise _WrongType(key, hint, value)
        return build(typing.cast(type, hint), value, source, key)
    return _convert_scalar(value, hint, source, key)


def _convert_union(value: object, hint: object, source: str, key: str) -> object:
    """Return `value` as the first member of the union that it fits."""
    errors = []
    for member in typing.get_args(hint):
        try:
            return _convert(value, member, source, key)
        except _WrongType as error:
            errors.append(error)
    inner = next((error for error in errors if error.key != key), None)  # the list fits, and one of its items does not
    raise inner or _WrongType(key, hint, value)


def _convert_container(value: object, hint: object, source: str, key: str) -> object:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in MAPPINGS:
        if not isinstance(value, Mapping):
            raise _WrongType(key, hint, value)
        for name in value:
            if not isinstance(name, arguments[0]):
                raise UserError(f"{source}: {key}: the key {shown_value(name)} is not text; write it in quotes.")
            _check_scalar(name, key)
        return {name: _convert(item, arguments[1], source, _join(key, name)) for name, item in value.items()}
    if not isinstance(value, (list, tuple)):
        raise _WrongType(key, hint, value)
    of_any_length = origin is list or arguments[-1] is Ellipsis
    hints = [arguments[0]] * len(value) if of_any_length else list(arguments)
    if len(hints) != len(value):
        raise _WrongType(key, hint, value)
    items = [_convert(item, of, source, f"{key}[{i}]") for i, (item, of) in enumerate(zip(value, hints))]
    return items if origin is list else tuple(items)


def _convert_scalar(value: Any, hint: Any, source: str, key: str) -> object:
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise _WrongType(key, hint, value)
        return value
    if isinstance(source, JsonFile) and hint is Any:  # `read_json` has bounded it, and it belongs to this call alone
        return value
    if isinstance(value, str) and hint in (int, float, Any) and not isinstance(source, JsonFile):
        value = _number_in(value)
    if hint is Any:
        return _copied(value, key)
    _check_scalar(value, key)
    if hint is float and type(value) in NUMBERS:
        return float(value)
    fits = type(value) is hint if hint in SCALARS else isinstance(value, hint)
    if not fits:
        raise _WrongType(key, hint, value)
    return value


def _copied(value: object, key: str) -> object:
    """Return a deep copy of a plain value, checked."""
    if isinstance(value, Mapping):
        for name in value:
            _check_scalar(name, key)
        return {name: _copied(item, _join(key, name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, f"{key}[{i}]") for i, item in enumerate(value))
    _check_scalar(value, key)
    return value


def _check_scalar(value: object, key: str) -> None:
    """Raise _OutOfRange for a value that no run could record: not finite, beyond 64 bits, or not writable as UTF-8."""
    if isinstance(value, float) and not math.isfinite(value):
        raise _OutOfRange(f"{key} is {value}; a number must be finite.")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise _OutOfRange(f"{key} is {value}; a whole number must fit 64 bits.")
    if isinstance(value, str) and UNWRITABLE.search(value):
        raise _OutOfRange(
            f"{key} is {shown_value(value)}; text must not hold a null character or half of a surrogate pair."
        )


def _number_in(text: str) -> int | float | str:
    """Return the number that `text` spells, or `text`."""
    stripped = text.strip()
    if not stripped or stripped[0] not in "+-.0123456789":
        return text
    if EXPONENT.fullmatch(stripped):
        return float(stripped)
    import yaml  # files of JSON do not need it

    from vismt.config.yaml_text import parse_yaml

    try:
        value = parse_yaml(stripped)
    except yaml.YAMLError:
        return text
    return value if type(value) in NUMBERS else text


def relative_path(text: str, name: str) -> str:
    """Return `text` if it is a relative path that stays inside its folder.

    Otherwise raise a UserError that starts with `name`.
    """
    if max((len(part.encode("utf8", "surrogatepass")) for part in text.split("/")), default=0) > LONGEST_NAME:
        raise UserError(f"{name}: {shown_value(text)} holds a name of more than {LONGEST_NAME} bytes.")
    if not stays_inside(text) or UNWRITABLE.search(text):
        raise UserError(f"{name}: '{text}' must be a relative path with '/' and without '..'.")
    return text


RelativePath = Annotated[str, relative_path]


def plain_name(text: str, where: str) -> str:
    """Return `text` if it can name a file on every system. Otherwise raise a UserError that starts with `where`."""
    if not PLAIN_NAME.fullmatch(text):
        raise UserError(f"{where}: {shown_value(text)} cannot be a name; use up to 100 letters, digits and + - . _")
    return text
