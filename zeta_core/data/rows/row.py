"""Rows of data, in units that are cheap to skip, so several processes can each parse a share of the units."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from zeta_core.failures import InvalidData


@dataclass(frozen=True)
class Row:
    """One row or line, numbered from 1; or a part of a text file (number 0), which is a single document."""

    number: int
    fields: Mapping[str, object]
    ends_document: bool = True
    begins_document: bool = True
    unread: tuple[str, ...] = ()  # the columns of a table that were not read, and those that the spec drops
    group_value: object = None  # the value of ``group_by``
    fault: InvalidData | None = None  # the row can't be parsed, but the rows after it can
    group: int = 0  # a hash of the value of ``group_by``


# Chooses the columns to read, given the names of all columns, and of those that may contain numbers or lists of
# numbers.
ChooseColumns = Callable[[Sequence[str], Collection[str]], Sequence[str]]


@dataclass(frozen=True)
class Unit:
    """Some rows, which are parsed only on request; ``position`` is the position in the source after them."""

    rows: Callable[[], Iterator[Row]]
    position: int


# Verbs with which a fault without a subject begins.
_VERBS = ("has ", "is ", "contains ", "starts ", "calls ")


def at_location(location: str, fault: str) -> str:
    """One sentence about a row. A fault without a subject, such as "has no 'text'.", gets the location as subject."""
    return f"{location} {fault}" if fault.startswith(_VERBS) else f"{location}: {fault}"


def describe_type(value: object) -> str:
    """The type of a value in the words of JSON, as in "is a number"."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list() | tuple():
            return "a list"
        case Mapping():
            return "an object"
        case bytes():
            return "binary data"
        case _:
            return f"a {type(value).__name__}"


def parsed_list(value: object) -> object:
    """The value of a column of lists, parsed if it is JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def rows_between(units: Iterator[Unit], first: int, last: int) -> Iterator[Unit]:
    """The units with only those rows whose numbers are greater than ``first`` and at most ``last``."""
    is_complete = False
    for unit in units:
        if is_complete:
            return

        def load(unit: Unit = unit) -> Iterator[Row]:
            nonlocal is_complete
            for row in unit.rows():
                if row.number > last:
                    is_complete = True
                    return
                if row.number > first:
                    yield row

        yield Unit(load, unit.position)
