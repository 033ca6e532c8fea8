"""JSON request bodies: read no further than the limit, and refuse what the databases or JSON itself cannot hold.

A name that an object holds twice is refused too: every parser keeps another of the two values, and none tells.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from fastapi import Request

from zeta_core.contract.errors import InvalidRequest, MalformedRequest, TooLarge

MAX_JSON_BYTES = 2**20
MAX_DEPTH = 100
MAX_DIGITS = 400  # more than the largest float has, and fewer than Python refuses to read


async def read_json(request: Request, *, empty: Any = None) -> Any:
    """The body as JSON data; ``empty``, if given, stands for no body at all.

    Raises `TooLarge`, `MalformedRequest`, or `InvalidRequest` for text nobody can store.
    """
    content = await _read(request)
    if not content and empty is not None:
        return empty
    try:
        data = json.loads(content, parse_constant=_refuse_constant, parse_int=_whole_number, object_pairs_hook=_object)
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:
        where = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise MalformedRequest(f"The body is not JSON: {reason}{where}.", code="invalid_json") from error
    _refuse_unstorable(data, "", 0)
    return data


async def _read(request: Request) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > MAX_JSON_BYTES:
        raise _too_large()
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_JSON_BYTES:
            raise _too_large()
    return bytes(content)


def _too_large() -> TooLarge:
    return TooLarge(
        f"The body is larger than the {MAX_JSON_BYTES} bytes that a JSON body may have; "
        "upload data with POST /v1/files and name it by its id."
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits is beyond any that can be stored")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        _refuse_unstorable(twice, "(name)", 0)
        shown = twice[:80]
        raise InvalidRequest(
            f"{shown!r} is given twice in one object; keep one of them.", code="duplicate_field", param=shown
        )
    return found


def _too_deep() -> MalformedRequest:
    return MalformedRequest(
        f"The body is nested more than {MAX_DEPTH} levels deep; send fewer levels.", code="too_deep"
    )


def _refuse_unstorable(value: Any, param: str, depth: int) -> None:
    """JSON allows what no database stores: the character NUL, half a surrogate pair, numbers beyond any float."""
    if depth > MAX_DEPTH:
        raise _too_deep()
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise InvalidRequest(
                f"{param or 'The body'} holds the character NUL or half a surrogate pair; remove it.",
                code="invalid_text",
                param=param or None,
            )
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidRequest(
                f"{param or 'The body'} is a number beyond the largest one that can be stored; use a smaller one.",
                code="out_of_range",
                param=param or None,
            )
    elif isinstance(value, dict):
        for name, item in value.items():
            _refuse_unstorable(name, f"{param}.(name)" if param else "(name)", depth + 1)
            _refuse_unstorable(item, f"{param}.{name}" if param else name, depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_unstorable(item, f"{param}.{index}" if param else str(index), depth + 1)
