"""Reads JSON request bodies with limits on size, depth and time, and rejects text that can't be stored or displayed.

Guarantees: reading and checking a body takes time proportional to its size, which `ZETA_MAX_SPEC_BYTES` limits. Large
bodies are checked in a thread. Duplicate names in an object are rejected, because parsers disagree about which of the
values to keep.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, NoReturn

from fastapi import Request

from zeta_core.contract.errors import InvalidRequest, MalformedRequest, RequestTimeout, TooLarge
from zeta_core.contract.text import control_character
from zeta_core.contract.validation import cut

MAX_DEPTH = 100
MAX_DIGITS = 400  # more than any float needs, and fewer than Python's limit for int()
BODY_SECONDS = 60.0  # until the whole body must have arrived
INLINE_BYTES = 8 * 1024  # larger bodies are checked in a thread


async def read_json(request: Request, max_bytes: int, *, empty: Any = None) -> Any:
    """The body as JSON data; an empty body is read as ``empty`` if that is given.

    Raises `TooLarge`, `MalformedRequest`, `RequestTimeout`, or `InvalidRequest` for text that cannot be stored.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            content = await _read(request, max_bytes)
    except TimeoutError as error:
        raise RequestTimeout(f"The request body did not arrive within {BODY_SECONDS:g} s; send it again.") from error
    if not content and empty is not None:
        return empty
    if len(content) <= INLINE_BYTES:
        return _checked(content)
    return await asyncio.to_thread(_checked, content)


def _checked(content: bytes) -> Any:
    try:
        data = json.loads(content, parse_constant=_refuse_constant, parse_int=_whole_number, object_pairs_hook=_object)
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:
        where = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise MalformedRequest(f"The request body is not valid JSON: {reason}{where}.", code="invalid_json") from error
    try:
        _refuse_unacceptable(data, 0)
    except _Unacceptable as found:
        param = ".".join(reversed(found.path)) or None
        raise InvalidRequest(f"{param or 'The body'} {found.reason}.", code=found.code, param=param) from None
    return data


async def _read(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and (len(announced) > 18 or int(announced) > max_bytes):
        raise _too_large(max_bytes)
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(content)


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(
        f"The request body is larger than the limit of {max_bytes} bytes (ZETA_MAX_SPEC_BYTES); "
        "upload data with POST /v1/files and refer to it by its id."
    )


def check_size(data: Any, max_bytes: int) -> None:
    """Raise `TooLarge` for JSON data that exceeds the limit of a request body."""
    if len(json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()) > max_bytes:
        raise _too_large(max_bytes)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a valid JSON number")


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits is too large")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _given_twice([name for name, _ in pairs])
    return found


def _given_twice(names: list[str]) -> InvalidRequest:
    seen: set[str] = set()
    twice = next(name for name in names if name in seen or seen.add(name))
    if (wrong := control_character(twice)) is not None:
        return InvalidRequest(f"A name {_contains(wrong)}.", code="invalid_text")
    shown = cut(twice)
    return InvalidRequest(
        f"{shown!r} is given twice in one object; keep one of them.", code="duplicate_field", param=shown
    )


def _too_deep() -> MalformedRequest:
    return MalformedRequest(
        f"The body is nested more than {MAX_DEPTH} levels deep; send fewer levels.", code="too_deep"
    )


class _Unacceptable(Exception):
    """A value that is rejected. ``path``, innermost part first, is extended while the exception propagates."""

    def __init__(self, reason: str, code: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code
        self.path: list[str] = []


def _refuse_unacceptable(value: Any, depth: int) -> None:
    """Raise for any value that is valid JSON but can't be stored in a database or shown on a terminal."""
    if depth > MAX_DEPTH:
        raise _too_deep()
    if isinstance(value, str):
        _refuse_controls(value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _Unacceptable("is too large; use a smaller number", "out_of_range")
    elif isinstance(value, dict):
        for name, item in value.items():
            try:
                _refuse_controls(name, in_line=True)
            except _Unacceptable as found:
                found.path.append("(name)")
                raise
            try:
                _refuse_unacceptable(item, depth + 1)
            except _Unacceptable as found:
                found.path.append(cut(name))
                raise
    elif isinstance(value, list):
        for index, item in enumerate(value):
            try:
                _refuse_unacceptable(item, depth + 1)
            except _Unacceptable as found:
                found.path.append(str(index))
                raise


def _refuse_controls(text: str, *, in_line: bool = False) -> None:
    if (wrong := control_character(text, in_line=in_line)) is not None:
        raise _Unacceptable(_contains(wrong), "invalid_text")


def _contains(character: str) -> str:
    return f"contains the control character {character}; remove it"
