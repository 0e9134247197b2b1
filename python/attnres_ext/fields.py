"""Fields that users fill in: what each takes, and what is said of a value that it does not take.

A choice is declared once, as a field of a dataclass. A configuration file, Python and the command
line (:func:`attnres_ext.cli.arguments.add_fields`) are held to that declaration, and refuse in the
same sentence: "NAME is VALUE, expected WANTED".
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")

_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    Path: "a path",
}


def field(default: Any = dataclasses.MISSING, **about: Any) -> Any:
    """A dataclass' field; bounds of :class:`Wanted`, and what else is to be known of it.

    Args:
        default: Its default; without one it must be given.
        about: Its metadata.
    """
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True)
class Wanted:
    """What a value must be.

    Attributes:
        kind: Its type: bool, int, float, str or Path; of a list that of each value.
        collection: list or tuple, if there are several values.
        nullable: Whether it may be None.
        least: Smallest number.
        above: What a number must be larger than.
        below: What a number must be smaller than.
        most: Largest number. An integer of more than 32 bits is a slip where none is named.
        one_of: The words to choose from.
    """

    kind: type
    collection: type | None = None
    nullable: bool = False
    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: float | None = None
    one_of: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.one_of:
            return f"one of {', '.join(self.one_of)}"
        if (self.kind, self.least, self.most) == (int, 1, None):
            return "a positive integer"
        if None not in (self.least, self.most):
            return f"{_KINDS[self.kind]} from {self.least} to {self.most}"
        bounds = (
            ("of at least", self.least), ("above", self.above),
            ("below", self.below), ("of at most", self.most),
        )  # fmt: skip
        said = " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
        return f"{_KINDS[self.kind]} {said}".rstrip()

    def _fits(self, value: Any) -> bool:
        if self.kind not in (int, float):
            return isinstance(value, self.kind) and (not self.one_of or value in self.one_of)
        kinds = int if self.kind is int else int | float
        if not isinstance(value, kinds) or isinstance(value, bool) or not abs(value) < math.inf:
            return False
        most = 2**31 - 1 if self.kind is int and self.most is None else self.most
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (most is None or value <= most)
        )

    def problem(self, name: str, value: Any) -> str | None:
        """What is wrong with a value, in a sentence that begins with ``name``; None if nothing."""
        null = ", or null" if self.nullable else ""
        if value is None and self.nullable:
            return None
        if self.collection is None:
            return None if self._fits(value) else f"{name} is {value!r}, expected {self}{null}"
        if not isinstance(value, list | tuple):
            return f"{name} is {value!r}, expected a list{null}"
        wrong = [each for each in value if not self._fits(each)]
        return f"{name} has {wrong[0]!r}, expected {self} each" if wrong else None

    def parse(self, text: str) -> Any:
        """The value that ``text`` stands for; of a list one of its values.

        Raises:
            ValueError: It is not what is wanted: "is VALUE, expected WANTED".
        """
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        if not self._fits(value):
            raise ValueError(f"is {text!r}, expected {self}")
        return value


@cache
def wanted_by(cls: type) -> dict[str, Wanted]:
    """What the fields of a dataclass take, without those that are tables of their own."""
    found = {}
    hints = typing.get_type_hints(cls)
    bounds = {entry.name for entry in dataclasses.fields(Wanted)}
    for entry in dataclasses.fields(cls):
        hint = hints[entry.name]
        kind, *others = typing.get_args(hint) or (hint,)
        if kind in _KINDS:
            collection = typing.get_origin(hint)
            found[entry.name] = Wanted(
                kind,
                collection if collection in (list, tuple) else None,
                type(None) in others,
                **{name: value for name, value in entry.metadata.items() if name in bounds},
            )
    return found


def problems(values: Any, prefix: str = "") -> list[str]:
    """A sentence for every field of a dataclass' instance that is not as declared.

    Args:
        values: The instance.
        prefix: What to put before the fields' names.
    """
    found = (
        wanted.problem(prefix + name, getattr(values, name))
        for name, wanted in wanted_by(type(values)).items()
    )
    return [problem for problem in found if problem]


def build(cls: type[_T], values: Mapping[str, Any], prefix: str = "") -> _T:
    """``cls(**values)`` of what JSON holds: tuples are lists in it, and paths strings.

    Raises:
        ValueError: A field is unknown or missing, or what ``cls`` raises.
    """
    fields = {entry.name: entry for entry in dataclasses.fields(cls)}
    for key in values.keys() - fields.keys():
        close = difflib.get_close_matches(key, fields, n=1)
        hint = f"; did you mean {prefix}{close[0]}?" if close else ""
        raise ValueError(f"{prefix}{key} is not a known field{hint}")
    missing = [
        prefix + name
        for name, entry in fields.items()
        if name not in values and entry.default is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing")
    wanted = wanted_by(cls)
    return cls(**{name: _from_json(wanted.get(name), value) for name, value in values.items()})


def _from_json(wanted: Wanted | None, value: Any) -> Any:
    if wanted and wanted.collection is tuple and isinstance(value, list):
        return tuple(value)
    return Path(value) if wanted and wanted.kind is Path and isinstance(value, str) else value


def plain(value: Any) -> Any:
    """A field's value as JSON gives it back; a path is written from the root on."""
    if isinstance(value, tuple):
        return list(value)
    return str(value.resolve()) if isinstance(value, Path) else value
