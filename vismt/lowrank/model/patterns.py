"""Regular expressions of module paths, matched in bounded time: those of a file must not stop the program.

Python's `re` tries one way after another, which for `(a+)+x` are exponentially many. Here each part of the expression maps a
set of positions to the set of all ends of its matches; a set is an integer, bit p for position p of the path. The syntax is
that of `re` without back-references, conditions, atomic groups, possessive repeats and inline flags.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache

LONGEST, DEEPEST, MOST_PARTS, MOST_REPEATS = 200_000, 10, 1000, 1000

ANCHORS: dict[str, Callable[[str, int], bool]] = {
    "^": lambda path, at: at == 0,
    "\\A": lambda path, at: at == 0,
    "$": lambda path, at: at == len(path) or path[at:] == "\n",
    "\\Z": lambda path, at: at == len(path),
    "\\b": lambda path, at: _word(path, at - 1) != _word(path, at),
    "\\B": lambda path, at: _word(path, at - 1) == _word(path, at),
}


class PatternError(ValueError):
    """An expression that is malformed, too large, or has syntax that is left out."""


class Pattern:
    """A compiled expression. Raises PatternError."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise PatternError(f"it has {len(text):,} characters; at most {LONGEST:,} are read")
        parser = _Parser(text)
        self._root = parser.alternatives(0)
        if parser.at < len(text):
            raise PatternError(f"unbalanced ')' at {parser.at}")
        choices = self._root.parts if isinstance(self._root, _Choice) else [self._root]
        texts = [choice.text for choice in choices if isinstance(choice, _Text)]
        # The exact paths that it expands to: an exported adapter may name hundreds.
        self.exact = frozenset(texts) if len(texts) == len(choices) else None
        if self.exact is None and parser.parts > MOST_PARTS:
            raise PatternError(f"it has {parser.parts} parts; at most {MOST_PARTS} are matched")

    def ends(self, path: str, start: int = 0) -> list[int]:
        """Return where matches that begin at `start` end, the longest first."""
        ends = _Run(path).step(self._root, 1 << start)
        return [at for at in range(len(path), -1, -1) if ends >> at & 1]

    def matches(self, path: str) -> bool:
        """Return whether the expression matches the whole path, as `re.fullmatch` does."""
        if self.exact is not None:
            return path in self.exact
        return bool(_Run(path).step(self._root, 1) >> len(path))


@lru_cache(maxsize=4096)
def compiled(text: str) -> Pattern:
    """Return the Pattern of a text; raises PatternError."""
    return Pattern(text)


class _Run:
    """The matching of one path; remembers what each part made of each set of positions."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.known: dict[tuple[int, int], int] = {}

    def step(self, part: _Part, starts: int) -> int:
        key = (id(part), starts)
        if key not in self.known:
            self.known[key] = part.step(self, starts) if starts else 0
        return self.known[key]

    def where(self, holds: Callable[[int], object]) -> int:
        """Return the set of the positions where `holds`, the end of the path among them."""
        return sum(1 << at for at in range(len(self.path) + 1) if holds(at))


class _Part(ABC):
    @abstractmethod
    def step(self, run: _Run, starts: int) -> int:
        """Return the set of positions where a match ends that begins in the set `starts`."""


class _Atom(_Part):
    """What matches `length` characters at some positions of a path, whatever comes before."""

    length = 0

    def step(self, run: _Run, starts: int) -> int:
        key = (id(self), -1)
        if key not in run.known:
            run.known[key] = run.where(lambda at: self.fits(run, at))
        return (starts & run.known[key]) << self.length

    @abstractmethod
    def fits(self, run: _Run, at: int) -> bool:
        """Return whether it matches at a position."""


class _Text(_Atom):
    def __init__(self, text: str) -> None:
        self.text, self.length = text, len(text)

    def fits(self, run: _Run, at: int) -> bool:
        return run.path.startswith(self.text, at)


class _Character(_Atom):
    length = 1

    def __init__(self, text: str) -> None:
        try:
            self.accepts = re.compile(text).match
        except (re.error, OverflowError) as error:
            raise PatternError(str(error)) from error

    def fits(self, run: _Run, at: int) -> bool:
        return at < len(run.path) and self.accepts(run.path[at]) is not None


class _Anchor(_Atom):
    def __init__(self, name: str) -> None:
        self.holds = ANCHORS[name]

    def fits(self, run: _Run, at: int) -> bool:
        return self.holds(run.path, at)


class _Look(_Atom):
    """(?=...), (?!...), (?<=...), (?<!...)."""

    def __init__(self, part: _Part, ahead: bool, wanted: bool) -> None:
        self.part, self.ahead, self.wanted = part, ahead, wanted

    def fits(self, run: _Run, at: int) -> bool:
        if self.ahead:
            return bool(run.step(self.part, 1 << at)) is self.wanted
        return bool(run.step(self.part, (2 << at) - 1) >> at & 1) is self.wanted


class _Sequence(_Part):
    def __init__(self, parts: list[_Part]) -> None:
        self.parts = parts

    def step(self, run: _Run, starts: int) -> int:
        for part in self.parts:
            starts = run.step(part, starts)
        return starts


class _Choice(_Part):
    def __init__(self, parts: list[_Part]) -> None:
        self.parts = parts

    def step(self, run: _Run, starts: int) -> int:
        ends = 0
        for part in self.parts:
            ends |= run.step(part, starts)
        return ends


class _Repeat(_Part):
    def __init__(self, part: _Part, least: int, most: int | None) -> None:
        self.part, self.least, self.most = part, least, most

    def step(self, run: _Run, starts: int) -> int:
        for _ in range(self.least):
            following = run.step(self.part, starts)
            if following == starts:
                break
            starts = following
        reached, count = starts, self.least
        while starts and (self.most is None or count < self.most):
            starts = run.step(self.part, starts) & ~reached
            reached, count = reached | starts, count + 1
        return reached


GROUPS = {"(?:": None, "(?=": (True, True), "(?!": (True, False), "(?<=": (False, True), "(?<!": (False, False)}
COUNT = re.compile(r"\{(\d{0,6})(,?)(\d{0,6})\}")


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at, self.parts = text, 0, 0

    def alternatives(self, depth: int) -> _Part:
        if depth > DEEPEST:
            raise PatternError(f"groups are nested more than {DEEPEST} deep")
        choices = [self._sequence(depth)]
        while self.text[self.at : self.at + 1] == "|":
            self.at += 1
            choices.append(self._sequence(depth))
        return choices[0] if len(choices) == 1 else _Choice(choices)

    def _sequence(self, depth: int) -> _Part:
        parts: list[_Part] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            part = self._repeated(self._atom(depth))
            if isinstance(part, _Text) and parts and isinstance(parts[-1], _Text):
                parts[-1] = _Text(parts[-1].text + part.text)
            else:
                parts.append(part)
                self.parts += 1
        if not parts:
            return _Text("")
        return parts[0] if len(parts) == 1 else _Sequence(parts)

    def _atom(self, depth: int) -> _Part:
        character = self.text[self.at]
        if character == "(":
            return self._group(depth)
        if character == "[":
            match = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]", re.DOTALL).match(self.text, self.at)
            if match is None:
                raise PatternError(f"unterminated character set at {self.at}")
            self.at = match.end()
            return _Character(match[0])
        if character == "\\":
            return self._escape()
        self.at += 1
        if character == ".":
            return _Character(".")
        if character in "^$":
            return _Anchor(character)
        if character in "*+?":
            raise PatternError(f"nothing to repeat at {self.at - 1}")
        return _Text(character)

    def _group(self, depth: int) -> _Part:
        opened = self.at
        kind = re.compile(r"\(\?(?:P<\w+>|<?[=!]|:)|\((?!\?)").match(self.text, opened)
        if kind is None:
            raise PatternError(f"'{self.text[opened : opened + 4]}' at {opened} is not supported")
        self.at = kind.end()
        inner = self.alternatives(depth + 1)
        if self.text[self.at : self.at + 1] != ")":
            raise PatternError(f"missing ), unterminated subpattern at {opened}")
        self.at += 1
        look = GROUPS.get(kind[0])
        # A sequence of its own, so that its text does not run into what stands beside it.
        return _Sequence([inner]) if look is None else _Look(inner, *look)

    def _escape(self) -> _Part:
        name = self.text[self.at : self.at + 2]
        self.at += 2
        if name in ANCHORS:
            return _Anchor(name)
        if name[1:] and name[1] in "dDwWsS":
            return _Character(name)
        if len(name) < 2 or (name[1].isascii() and name[1].isalnum()):
            raise PatternError(f"'{name}' at {self.at - 2} is not supported")
        return _Text(name[1])

    def _repeated(self, part: _Part) -> _Part:
        counts = self._counts()
        if counts is None:
            return part
        if isinstance(part, _Anchor):
            raise PatternError(f"nothing to repeat before {self.at}")
        least, most = counts
        if most is not None and least > most:
            raise PatternError("min repeat greater than max repeat")
        if max(least, most or 0) > MOST_REPEATS:
            raise PatternError(f"it repeats a part more than {MOST_REPEATS} times")
        follows = self.text[self.at : self.at + 1]
        if follows == "?":  # the shortest match first: the same matches
            self.at += 1
        elif follows == "+":
            raise PatternError(f"the possessive repeat at {self.at} is not supported")
        self.parts += 10  # its part is matched again from each new position
        if self._counts() is not None:
            raise PatternError(f"multiple repeat at {self.at}")
        return _Repeat(part, least, most)

    def _counts(self) -> tuple[int, int | None] | None:
        character = self.text[self.at : self.at + 1]
        if character and character in "*+?":
            self.at += 1
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[character]
        match = COUNT.match(self.text, self.at)
        if match is None or not (match[1] or match[2]):
            return None
        self.at = match.end()
        least = int(match[1] or 0)
        return least, least if not match[2] else int(match[3]) if match[3] else None


def _word(path: str, at: int) -> bool:
    return 0 <= at < len(path) and re.match(r"\w", path[at]) is not None
