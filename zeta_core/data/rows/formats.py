"""The valid rows of each data format.

A row is one object of a JSON file, or one row of a table. `fault_in` returns what is wrong with a row, as the end of a
sentence that starts with the name of its file and line. `zeta_core.data.rows.columns` detects the format of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from zeta_core.contract.spec.sources import PREFERENCE_FORMATS
from zeta_core.data.rows.row import describe_type
from zeta_core.data.rows.token_rows import MASKS
from zeta_core.data.rows.turns import InvalidTurn, Message, read_tools, read_turn

RowFormat = Literal["text", "messages", "prompt_completion", "preference", "unpaired_preference", "tokens"]
Fields = Mapping[str, object]

# The columns that each format reads, and the required ones. A ``preference`` row without ``prompt`` contains two
# complete texts or conversations with a common beginning.
COLUMNS: dict[RowFormat, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages", "tools", "functions", "parallel_tool_calls", "system"),
    "prompt_completion": ("prompt", "completion", "tools", "functions"),
    "preference": ("prompt", "chosen", "rejected", "tools", "functions"),
    "unpaired_preference": ("prompt", "completion", "label", "tools", "functions"),
    "tokens": ("input_ids", *MASKS),
}
OPTIONAL = {"tools", "functions", "parallel_tool_calls", "system", "prompt", *MASKS}
# Columns that a file format without lists, such as CSV, contains as JSON text.
JSON_LISTS = frozenset({"messages", "conversations", "input_ids", *MASKS})
CONVERSATIONS = "conversations"  # ShareGPT's name for messages


def required(row_format: RowFormat) -> tuple[str, ...]:
    """The columns that a row of this format must have."""
    if row_format == "prompt_completion":
        return ("prompt", "completion")
    if row_format == "unpaired_preference":
        return ("prompt", "completion", "label")
    return tuple(name for name in COLUMNS[row_format] if name not in OPTIONAL)


def candidate_formats(columns: Mapping[str, str], method: str) -> list[RowFormat]:
    """The formats that ``auto`` may select, in order. ``columns`` maps the standard names to the names in the data.

    Formats with a mapped column come first, so a user can read chosen answers as completions.
    """
    formats: tuple[RowFormat, ...] = ("messages", "preference", "prompt_completion", "text")
    if method in PREFERENCE_FORMATS:
        wanted = PREFERENCE_FORMATS[method]
        formats = (wanted, *(row_format for row_format in formats if row_format != wanted))
    return sorted(formats, key=lambda row_format: not columns.keys() & set(required(row_format)))


def column_in(row: Fields, name: str, columns: Mapping[str, str]) -> str:
    """The name of a column in the data. If ``messages`` is missing, ``conversations`` takes its place."""
    if name == "messages" and name not in columns and row.get(name) is None and row.get(CONVERSATIONS) is not None:
        return CONVERSATIONS
    return columns.get(name, name)


def fault_in(
    row: object, row_format: RowFormat, columns: Mapping[str, str], drop_fields: Sequence[str] = ()
) -> str | None:
    """The fault in a row, as the end of a sentence that begins with the row's location; ``None`` if there is none."""
    if not isinstance(row, Mapping):
        return "is not an object with named fields."
    fields = cast(Fields, row)
    for name in required(row_format):
        if column_in(fields, name, columns) not in fields:
            return _missing(fields, name, columns)
    shown = {name: repr(column_in(fields, name, columns)) for name in COLUMNS[row_format]}
    values = {name: fields.get(column_in(fields, name, columns)) for name in COLUMNS[row_format]}
    match row_format:
        case "text":
            return _fault_in_text(values["text"], shown["text"])
        case "tokens":
            ids = values["input_ids"]
            right = isinstance(ids, list) and all(type(item) is int and item >= 0 for item in cast(list[Any], ids))
            return None if right else f"{shown['input_ids']} is not a list of token ids."
        case "messages":
            fault = _fault_in_messages(values["messages"], shown["messages"], drop_fields)
            return (
                fault
                or _fault_in_system(values, drop_fields)
                or _fault_in_parallel(values, drop_fields)
                or _fault_in_tools(values)
            )
        case "prompt_completion" | "unpaired_preference":
            fault = _fault_in_turns(values["prompt"], shown["prompt"], drop_fields)
            fault = fault or _fault_in_turns(values["completion"], shown["completion"], drop_fields)
            if not fault and row_format == "unpaired_preference" and read_label(values["label"]) is None:
                fault = f"{shown['label']} is {describe_type(values['label'])}; it must be true or false."
            return fault or _fault_in_tools(values)
        case "preference":
            return _fault_in_preference(values, shown, drop_fields)


def read_label(value: object) -> bool | None:
    """Whether an answer is desirable: true or false, as 1 or 0, or as text in a CSV file. ``None``: none of these."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int) and value in (0, 1) else None


def tools_in(fields: Mapping[str, object]) -> list[dict[str, Any]] | None:
    """The tools of a row. Raises `InvalidTurn`."""
    return read_tools(fields.get("tools"), fields.get("functions"))


def messages_in(fields: Mapping[str, object], drop_fields: Sequence[str] = ()) -> list[Message]:
    """The conversation of a row of messages, with the system text of a separate column. Raises `InvalidTurn`."""
    turns = cast("list[object]", fields[column_in(fields, "messages", {})])
    messages = [read_turn(turn, drop_fields) for turn in turns]
    system = cast("str | None", fields.get("system"))
    return [{"role": "system", "content": system}, *messages] if system else messages


def _missing(row: Fields, name: str, columns: Mapping[str, str]) -> str:
    column = columns.get(name, name)
    has = ", ".join(sorted(str(key) for key in row)[:8]) or "none"
    if "input_ids" in row and name == "text":
        return f"has no {column!r} but 'input_ids'; set use_pretokenized to train on rows of token ids."
    return f'has no {column!r} (it has: {has}); name the right one with columns: {{"{name}": "..."}} in the source.'


def _fault_in_text(value: object, shown: str) -> str | None:
    return None if isinstance(value, str) else f"{shown} is {describe_type(value)}; it must be text."


def _fault_in_turns(value: object, shown: str, drop_fields: Sequence[str]) -> str | None:
    """The fault in a value that must be a text, a message, or a list of messages."""
    if isinstance(value, str):
        return None if value.strip() else f"{shown} is empty."
    if isinstance(value, Mapping):
        value = [cast(Fields, value)]
    if isinstance(value, list):
        return _fault_in_messages(cast(object, value), shown, drop_fields)
    return f"{shown} is {describe_type(value)}; give text, or a list of messages."


def _fault_in_preference(
    values: Mapping[str, object], shown: Mapping[str, str], drop_fields: Sequence[str]
) -> str | None:
    for name in ("chosen", "rejected", "prompt"):
        optional = name == "prompt" and values[name] is None
        if not optional and (fault := _fault_in_turns(values[name], shown[name], drop_fields)):
            return fault
    return _fault_in_tools(values)


def _fault_in_messages(value: object, shown: str, drop_fields: Sequence[str]) -> str | None:
    if not isinstance(value, list):
        return f"{shown} is {describe_type(value)}; give a list of messages."
    if not value:
        return f"{shown} is empty; give at least one message."
    for number, message in enumerate(cast(list[object], value), 1):
        try:
            read_turn(message, drop_fields)
        except InvalidTurn as error:
            return f"{shown}: message {number} {error}"
    return None


def _fault_in_system(values: Mapping[str, object], drop_fields: Sequence[str]) -> str | None:
    """The fault in a conversation with a separate system text."""
    system = values["system"]
    if not isinstance(system, str):
        return None if system is None else f"'system' is {describe_type(system)}; give text."
    first = read_turn(cast("list[object]", values["messages"])[0], drop_fields)
    double = bool(system) and first["role"] in ("system", "developer")
    return "has both a 'system' column and a system turn; provide one of them." if double else None


def _fault_in_parallel(values: Mapping[str, object], drop_fields: Sequence[str]) -> str | None:
    """OpenAI's ``parallel_tool_calls`` is a setting of a request; a conversation must not contradict it."""
    if values["parallel_tool_calls"] is False:
        for number, turn in enumerate(cast("list[object]", values["messages"]), 1):
            if len(read_turn(turn, drop_fields).get("tool_calls", ())) > 1:
                return f"message {number} has several tool calls, but 'parallel_tool_calls' is false; correct one."
    return None


def _fault_in_tools(values: Mapping[str, object]) -> str | None:
    try:
        tools_in(values)
    except InvalidTurn as error:
        return str(error)
    return None
