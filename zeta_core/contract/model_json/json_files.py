"""Reads the JSON files of a model, with limits on memory and nesting depth.

Vocabularies may contain control characters, and configs infinite numbers (the ``time_step_limit`` of Mamba 2).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from zeta_core.contract.model_json.faults import InvalidModelFiles
from zeta_core.contract.strict_json import JsonFault, JsonRules, read_json

# The largest known: the tokenizer of Gemma 3 has 33 MB, 1.5 million commas and half a million lists.
MAX_BYTES = 64 << 20
MAX_VALUES, MAX_CONTAINERS = 8_000_000, 2_000_000
MAX_DEPTH = 64

_RULES = JsonRules(max_depth=MAX_DEPTH, allow_nonfinite=True, allow_control_characters=True)


def parse_object(content: bytes, file: str, *, allow_duplicate_names: bool = False) -> dict[str, Any]:
    """The JSON object in a file. Raises `InvalidModelFiles`."""
    value = parse_any(content, file, allow_duplicate_names=allow_duplicate_names)
    if not isinstance(value, dict):
        raise InvalidModelFiles(f"{file} contains {_KINDS[type(value)]}; it must contain a JSON object.")
    return cast("dict[str, Any]", value)


_KINDS: dict[type, str] = {
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def parse_any(content: bytes, file: str, *, allow_duplicate_names: bool = False) -> object:
    """The JSON value in a file; the last value of an allowed duplicate name counts. Raises `InvalidModelFiles`."""
    if len(content) > MAX_BYTES:
        raise InvalidModelFiles(
            f"{file} has {len(content)} bytes; the limit for a JSON file of a model is {MAX_BYTES}."
        )
    if content.count(b",") > MAX_VALUES or content.count(b"[") + content.count(b"{") > MAX_CONTAINERS:
        raise InvalidModelFiles(f"{file} has too many values for a file of a model (at most {MAX_VALUES}).")
    try:
        return read_json(content, replace(_RULES, allow_duplicate_names=allow_duplicate_names))
    except JsonFault as fault:
        raise InvalidModelFiles(fault.sentence(file)) from None
