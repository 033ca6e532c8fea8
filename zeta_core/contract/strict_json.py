"""Reads untrusted JSON strictly: request bodies, job specs and the files of a model.

Guarantees: the text is UTF-8, nesting and integers are limited, and no string contains a lone surrogate, which can't be
encoded. Unless the rules allow them, a byte order mark, infinite and NaN numbers, control characters and duplicate
names are rejected, too; parsers disagree about which value of a duplicate name to keep. Reading takes time proportional
to the size, which the caller limits.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NoReturn, cast

from zeta_core.contract.printable import printable
from zeta_core.contract.spec.validation import cut
from zeta_core.contract.text import control_character

MAX_DEPTH = 100  # of a request body or a spec
BYTE_ORDER_MARK = "\ufeff"
MAX_DIGITS = 400  # more than any float needs, and fewer than Python's limit for int()

JsonFaultCode = Literal[
    "invalid_encoding", "invalid_json", "too_deep", "duplicate_field", "invalid_text", "out_of_range"
]
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE_CODES = range(0xD800, 0xE000)
_SURROGATE = re.compile("[\ud800-\udfff]")


class JsonFault(Exception):
    """Why JSON is rejected: ``reason`` completes a sentence about ``subject``, or about the document if that is `None`.

    Callers raise their own error from it. ``param`` is the dotted path of the field, for errors that name one.
    """

    def __init__(
        self, code: JsonFaultCode, reason: str, *, param: str | None = None, subject: str | None = None
    ) -> None:
        super().__init__(reason)
        self.code: JsonFaultCode = code
        self.param = param
        self.subject = subject
        self.reason = reason

    def sentence(self, file: str) -> str:
        """The message, with the name of the file."""
        return f"{file}: {self.subject} {self.reason}." if self.subject else f"{file} {self.reason}."


@dataclass(frozen=True)
class JsonRules:
    """What a kind of JSON document may contain, beyond the strict rules."""

    max_depth: int = MAX_DEPTH
    allow_byte_order_mark: bool = False
    allow_duplicate_names: bool = False
    allow_nonfinite: bool = False
    allow_control_characters: bool = False


STRICT = JsonRules(allow_byte_order_mark=True)  # Windows editors and PowerShell write one (RFC 8259, section 8.1)


def read_json(content: bytes, rules: JsonRules = STRICT) -> Any:
    """The value in UTF-8 encoded JSON. Raises `JsonFault`."""
    return parse_json(decode(content), rules)


def decode(content: bytes) -> str:
    """The UTF-8 text. Raises `JsonFault` for other encodings."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:4]:
        raise JsonFault("invalid_encoding", "is UTF-16 or UTF-32 text; encode it as UTF-8")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise JsonFault(
            "invalid_encoding",
            f"is not UTF-8 text (byte 0x{content[error.start]:02x} in line {line}); encode it as UTF-8",
        ) from error


def parse_json(text: str, rules: JsonRules = STRICT) -> Any:
    """The value in JSON text. Raises `JsonFault`."""
    if rules.allow_byte_order_mark:
        text = text.removeprefix(BYTE_ORDER_MARK)
    elif text.startswith(BYTE_ORDER_MARK):
        raise JsonFault("invalid_encoding", "starts with a byte order mark; encode it as UTF-8 without one")
    try:
        value = json.loads(
            text,
            parse_int=_integer,
            parse_constant=None if rules.allow_nonfinite else _refuse_constant,
            object_pairs_hook=None if rules.allow_duplicate_names else partial(_object, rules),
        )
    except json.JSONDecodeError as error:
        reason = f"is not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        raise JsonFault("invalid_json", reason) from error
    except RecursionError as error:
        raise too_deep(rules.max_depth) from error
    if not rules.allow_control_characters or _SURROGATE_ESCAPE.search(text) is not None:
        check_values(value, rules)
    elif is_deeper(value, rules.max_depth):
        raise too_deep(rules.max_depth)
    return value


def check_values(value: object, rules: JsonRules = STRICT) -> None:
    """Raise `JsonFault` for JSON data that is nested too deeply, or contains a string or number that is rejected."""
    if is_deeper(value, rules.max_depth):
        raise too_deep(rules.max_depth)
    _check_value(value, rules, [])


def is_deeper(value: object, levels: int) -> bool:
    """Whether objects and lists are nested more than ``levels`` deep."""
    level: list[object] = [value] if isinstance(value, (dict, list)) else []
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


def too_deep(levels: int) -> JsonFault:
    return JsonFault("too_deep", f"is nested more than {levels} levels deep; use fewer levels")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise JsonFault("invalid_json", f"is not valid JSON: an integer of {len(digits)} digits is too large")
    return int(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise JsonFault("invalid_json", f"is not valid JSON: {name} is not a valid JSON number")


def _object(rules: JsonRules, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))
        if not rules.allow_control_characters and (wrong := control_character(name, in_line=True)) is not None:
            raise JsonFault("invalid_text", _contains(wrong), subject="A name")
        reason = f"contains {cut(name)!r} twice in one object; keep one of them"
        raise JsonFault("duplicate_field", reason, param=printable(cut(name)))
    return members


def _check_value(value: object, rules: JsonRules, path: list[str]) -> None:
    if isinstance(value, str):
        _check_text(value, rules, path, in_line=False)
    elif isinstance(value, float):
        if not rules.allow_nonfinite and not math.isfinite(value):
            reason = "is not a number" if math.isnan(value) else "is too large; use a smaller number"
            raise _field_fault("out_of_range", reason, path)
    elif isinstance(value, dict):
        for name, item in cast("dict[str, object]", value).items():
            path.append("(name)")
            _check_text(name, rules, path, in_line=True)
            path[-1] = name
            _check_value(item, rules, path)
            path.pop()
    elif isinstance(value, list):
        for index, item in enumerate(cast("list[object]", value)):
            path.append(str(index))
            _check_value(item, rules, path)
            path.pop()


def _check_text(text: str, rules: JsonRules, path: list[str], *, in_line: bool) -> None:
    if rules.allow_control_characters:
        match = _SURROGATE.search(text)
        wrong = None if match is None else f"U+{ord(match.group()):04X}"
    else:
        wrong = control_character(text, in_line=in_line)
    if wrong is not None:
        raise _field_fault("invalid_text", _contains(wrong), path)


def _contains(character: str) -> str:
    kind = "lone surrogate" if int(character.removeprefix("U+"), 16) in _SURROGATE_CODES else "control character"
    return f"contains the {kind} {character}; remove it"


def _field_fault(code: JsonFaultCode, reason: str, path: list[str]) -> JsonFault:
    param = ".".join(map(cut, path)) or None
    return JsonFault(code, reason, param=param, subject=param)
