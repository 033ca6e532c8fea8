"""Parses the JSON files of a model with limits on memory and nesting depth."""

from __future__ import annotations

import json
from typing import Any, cast

from zeta_core.contract.model_files.faults import InvalidModelFiles

# The largest known: the tokenizer of Gemma 3 has 33 MB, 1.5 million commas and half a million lists.
MAX_BYTES = 64 << 20
MAX_VALUES, MAX_CONTAINERS = 8_000_000, 2_000_000
MAX_DEPTH = 64


def parse_object(content: bytes, file: str) -> dict[str, Any]:
    """The JSON object in a file. Raises `InvalidModelFiles`."""
    value = parse_any(content, file)
    if not isinstance(value, dict):
        raise InvalidModelFiles(f"{file} holds {type(value).__name__}, not a JSON object.")
    return cast("dict[str, Any]", value)


def parse_any(content: bytes, file: str) -> object:
    """The JSON value in a file. Raises `InvalidModelFiles`."""
    if len(content) > MAX_BYTES:
        raise InvalidModelFiles(f"{file} has {len(content)} bytes; a JSON file of a model has at most {MAX_BYTES}.")
    if content.count(b",") > MAX_VALUES or content.count(b"[") + content.count(b"{") > MAX_CONTAINERS:
        raise InvalidModelFiles(f"{file} has too many values for a file of a model (at most {MAX_VALUES}).")
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise InvalidModelFiles(f"{file} is nested more than {MAX_DEPTH} levels deep; flatten it.") from None
    except ValueError as error:
        raise InvalidModelFiles(f"{file} is not JSON: {error}.") from None
    if isinstance(value, (dict, list)) and is_deeper(value, MAX_DEPTH):
        raise InvalidModelFiles(f"{file} is nested more than {MAX_DEPTH} levels deep; flatten it.")
    return value


def is_deeper(value: object, levels: int) -> bool:
    """Whether objects and lists are nested more than so many levels deep."""
    level: list[object] = [value]
    for _ in range(levels):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else cast("list[object]", outer))
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True
