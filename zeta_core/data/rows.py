"""What a row of training data may look like, by its format.

A row is one object of a JSON-lines file, or one row of a table. `format_of` finds the format that ``auto`` means, and
`fault_in` says in one sentence what is wrong with a row, ready to follow the name of its file and line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, cast

RowFormat = Literal["text", "messages", "prompt_completion", "preference", "tokens"]
Row = Mapping[str, object]

ROLES = ("system", "user", "assistant", "tool")

# The columns that each format reads, and those of them that a row must have. A ``preference`` row without ``prompt``
# holds two whole texts or conversations that begin alike.
COLUMNS: dict[RowFormat, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages", "tools"),
    "prompt_completion": ("prompt", "completion", "tools"),
    "preference": ("prompt", "chosen", "rejected", "tools"),
    "tokens": ("input_ids",),
}
OPTIONAL = {"tools", "prompt"}


def required(row_format: RowFormat) -> tuple[str, ...]:
    """The columns without which a row is not of this format."""
    if row_format == "prompt_completion":
        return ("prompt", "completion")
    return tuple(name for name in COLUMNS[row_format] if name not in OPTIONAL)


def format_of(row: Row, columns: Mapping[str, str]) -> RowFormat | None:
    """The format that a row's columns tell; ``None`` where they fit none. ``columns`` maps our names to the data's.

    A format one of whose own columns is named there comes first: chosen answers may be read as completions.
    """
    formats: tuple[RowFormat, ...] = ("messages", "preference", "prompt_completion", "text")
    for row_format in sorted(formats, key=lambda one: not columns.keys() & set(required(one))):
        if all(columns.get(name, name) in row for name in required(row_format)):
            return row_format
    return None


def fault_in(row: object, row_format: RowFormat, columns: Mapping[str, str]) -> str | None:
    """What is wrong with a row, as the end of a sentence that begins with its place; ``None`` for a good one."""
    if not isinstance(row, Mapping):
        return "is not an object with named fields."
    fields = cast(Row, row)
    for name in required(row_format):
        if columns.get(name, name) not in fields:
            return _missing(fields, name, columns)
    values = {name: fields.get(columns.get(name, name)) for name in COLUMNS[row_format]}
    shown = {name: repr(columns.get(name, name)) for name in values}
    match row_format:
        case "text":
            return _wrong_text(values["text"], shown["text"])
        case "tokens":
            ids = values["input_ids"]
            right = isinstance(ids, list) and all(type(item) is int and item >= 0 for item in cast(list[Any], ids))
            return None if right else f"{shown['input_ids']} is not a list of token ids."
        case "messages":
            return _wrong_messages(values["messages"], shown["messages"]) or _wrong_tools(values["tools"])
        case "prompt_completion":
            fault = _wrong_turns(values["prompt"], shown["prompt"])
            fault = fault or _wrong_turns(values["completion"], shown["completion"])
            return fault or _wrong_tools(values["tools"])
        case "preference":
            return _wrong_preference(values, shown)


def tools_of(value: object) -> list[dict[str, Any]] | None:
    """The tools of a row: a list of objects, or the same as JSON text (tables have no other way to hold it)."""
    if isinstance(value, str) and value.strip():
        value = json.loads(value)
    return cast("list[dict[str, Any]]", value) or None


def _missing(row: Row, name: str, columns: Mapping[str, str]) -> str:
    column = columns.get(name, name)
    has = ", ".join(sorted(str(key) for key in row)[:8]) or "none"
    if "input_ids" in row and name == "text":
        return f"has no {column!r} but 'input_ids'; set use_pretokenized to train on rows of token ids."
    missing = f"{column!r} (it has: {has})"
    if name == column == "text" and format_of(row, columns) is None:  # also where no format was named
        missing += ", nor 'messages', nor 'prompt' and 'completion'"
    return f'has no {missing}; name the right one with columns: {{"{name}": "..."}} in the source.'


def _wrong_text(value: object, shown: str) -> str | None:
    return None if isinstance(value, str) else f"{shown} is {_kind(value)}, not text."


def _wrong_turns(value: object, shown: str) -> str | None:
    """A text, a message, or a list of them."""
    if isinstance(value, str):
        return None if value.strip() else f"{shown} is empty."
    if isinstance(value, Mapping):
        value = [cast(Row, value)]
    if isinstance(value, list):
        return _wrong_messages(cast(object, value), shown)
    return f"{shown} is {_kind(value)}; give text, or a list of messages."


def _wrong_preference(values: Mapping[str, object], shown: Mapping[str, str]) -> str | None:
    for name in ("chosen", "rejected", "prompt"):
        optional = name == "prompt" and values[name] is None
        if not optional and (fault := _wrong_turns(values[name], shown[name])):
            return fault
    return _wrong_tools(values["tools"])


def _wrong_messages(value: object, shown: str) -> str | None:
    if not isinstance(value, list):
        return f"{shown} is {_kind(value)}; give a list of messages."
    if not value:
        return f"{shown} is empty; give at least one message."
    for number, message in enumerate(cast(list[object], value), 1):
        fault = _wrong_message(message)
        if fault is not None:
            return f"{shown}: message {number} {fault}"
    return None


def _wrong_message(message: object) -> str | None:
    if not isinstance(message, Mapping):
        return "is not an object with 'role' and 'content'."
    said = cast(Row, message)
    role, content = said.get("role"), said.get("content")
    if role is None:
        has = ", ".join(sorted(str(key) for key in said)[:8]) or "none"
        return f"has no 'role' (it has: {has})."
    if role not in ROLES:
        return f"has the role {str(role)[:40]!r}; use {', '.join(ROLES)}."
    if said.get("weight") not in (None, 0, 1):
        return f"has the weight {str(said['weight'])[:40]}; use 0 for a turn that is not learned, or 1."
    calls = said.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        return f"has 'tool_calls' {_kind(calls)}; give a list."
    if not all(_is_call(call) for call in cast("list[object]", calls or [])):
        return 'has a tool call without a name; give {"function": {"name": "...", "arguments": {...}}}.'
    if isinstance(content, list):
        texts = all(isinstance(p, Mapping) and isinstance(cast(Row, p).get("text"), str) for p in cast(Any, content))
        return None if texts else "has a part of 'content' that is not text; only text can be trained on."
    if content is None:
        spoken = calls or said.get("reasoning_content")
        return None if spoken else "has no 'content', and no 'tool_calls' in its place."
    return None if isinstance(content, str) else f"has 'content' {_kind(content)}, not text."


def _is_call(call: object) -> bool:
    inner = cast(Row, call).get("function", cast(object, call)) if isinstance(call, Mapping) else None
    return isinstance(inner, Mapping) and isinstance(cast(Row, inner).get("name"), str)


def _wrong_tools(value: object) -> str | None:
    try:
        tools = cast(object, tools_of(value))
    except ValueError:
        return "'tools' is text that is not JSON."
    if tools is None:
        return None
    right = isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in cast(list[Any], tools))
    return None if right else f"'tools' is {_kind(tools)}; give a list of objects."


def _kind(value: object) -> str:
    """What a value is, in a user's words."""
    return "null" if value is None else f"of type {type(value).__name__}"
