"""What the numbers of a recipe may be: declared at their fields, checked in one place.

A field says it in its type, ``workers: CountOrZero = 4``, where neither the command line nor JSON
sees more than an ``int``; the ``__post_init__`` of its class calls :func:`check_ranges`. Numbers
that are not finite, or of more than 64 bits, are refused in every field of such a class, declared
or not.
"""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any

from frugal.common.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Range:
    """Finite numbers between two ends, each of which belongs to it or not."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    words: str = ""
    """What a number must be, where the ends do not say it best."""
    hint: str = ""
    """What to do instead."""

    def holds(self, number: float) -> bool:
        """Whether a number is one of these."""
        return (
            math.isfinite(number)
            and (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """What a number must be, and what to do instead."""
        return (self.words or self._words()) + (f"; {self.hint}" if self.hint else "")

    def _words(self) -> str:
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if high is None:
            return "must be positive and finite" if self.above == 0 else f"must be at least {low}"
        if self.above is not None and self.most is not None:
            return f"must lie above {low} and be at most {high}"
        if self.above is not None and self.below is not None:
            return f"must lie between {low} and {high}, and be neither"
        if self.least is not None and self.below is not None:
            return f"must lie in [{low}, {high})"
        return f"must lie between {low} and {high}"


Count = Annotated[int, Range(least=1)]
CountOrZero = Annotated[int, Range(least=0)]
Seed = Annotated[int, Range(least=0, most=2**63 - 1)]
Positive = Annotated[float, Range(above=0)]
Weight = Annotated[float, Range(above=0, hint="leave out what is not to be read")]
NotNegative = Annotated[float, Range(least=0, words="must not be negative or infinite")]
Share = Annotated[float, Range(least=0, most=1)]
Probability = Annotated[float, Range(least=0, most=1, words="must be a probability")]
ShareBelowOne = Annotated[float, Range(least=0, below=1)]
"""Of what may go without all of it going."""
PositiveShare = Annotated[float, Range(above=0, most=1)]
OpenShare = Annotated[float, Range(above=0, below=1)]


_ANY = Range(words="must be a finite number")
"""Of a field that declares nothing."""


def check_ranges(part: object, name: str = "") -> None:
    """Refuse a part of a recipe one of whose numbers is not what its field declares.

    Args:
        part: a dataclass.
        name: of the part, as the command line has it.

    Raises:
        InputError: naming the field, its value and what is allowed.
    """
    kind: Any = type(part)
    for field, hint in _numeric_hints(kind).items():
        value = getattr(part, field)
        for number, wanted, allowed in _numbers(value, hint):
            if sentence := _refusal(number, wanted, allowed):
                full = f"{name}.{field}" if name else field
                raise InputError(f"{full} is {value!r}, {sentence}")


def check_choices(part: object, name: str) -> None:
    """Refuse a part of a recipe in which a field of type ``Literal`` holds no such value.

    Args:
        part: a dataclass.
        name: of the part, as the command line has it.

    Raises:
        InputError: naming the field, its value and the choices.
    """
    kind: Any = type(part)
    for field, choices in _choices(kind).items():
        value = getattr(part, field)
        if value not in choices:
            raise InputError(
                f"{name}.{field} is {value!r}; choose from {', '.join(map(str, choices))}"
            )


@functools.cache
def _choices(kind: Any) -> dict[str, tuple[Any, ...]]:
    """Choices of every field of type ``Literal``."""
    hints = typing.get_type_hints(kind)
    return {
        f.name: typing.get_args(hints[f.name])
        for f in fields(kind)
        if typing.get_origin(hints[f.name]) is typing.Literal
    }


def _refusal(number: Any, wanted: type, allowed: Range) -> str:
    """What a number must be, "" where it is that."""
    if not isinstance(number, int | float):  # from a file that somebody edited
        return "must be a number"
    if wanted is int and not isinstance(number, int):
        return "must be a whole number"
    if isinstance(number, int) and abs(number) >= 2**63:  # what tensors count with
        return "must be less than 2^63"
    if allowed.holds(number):
        return ""
    return str(allowed)


@functools.cache
def _numeric_hints(kind: Any) -> dict[str, Any]:
    """Types, with what they are annotated with, of the fields that hold numbers."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in fields(kind) if _is_numeric(hints[f.name])}


def _is_numeric(hint: Any) -> bool:
    if hint in (int, float):
        return True
    if typing.get_origin(hint) is Annotated:
        return _is_numeric(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (tuple, typing.Union, types.UnionType):
        return any(map(_is_numeric, typing.get_args(hint)))
    return False


def _numbers(
    value: Any, hint: Any, allowed: Range | None = None
) -> Iterator[tuple[Any, type, Range]]:
    """Every number of a value with its type and what it may be."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        ranges = [extra for extra in hint.__metadata__ if isinstance(extra, Range)]
        yield from _numbers(value, arguments[0], ranges[0] if ranges else allowed)
    elif origin in (typing.Union, types.UnionType):
        is_several = isinstance(value, tuple | list)
        for choice in arguments:
            inner = typing.get_args(choice)[0] if typing.get_origin(choice) is Annotated else choice
            if _is_numeric(choice) and (typing.get_origin(inner) is tuple) == is_several:
                yield from () if value is None else _numbers(value, choice, allowed)
    elif origin is tuple:
        kinds = [kind for kind in arguments if kind is not ...]
        for place, item in enumerate(value):
            yield from _numbers(item, kinds[min(place, len(kinds) - 1)], allowed)
    elif hint in (int, float):
        yield value, hint, allowed or _ANY
