"""Reads JSON request bodies strictly (`contract.strict_json`), with limits on size and time.

Guarantees: reading and checking a body takes time proportional to its size, which is limited: for specs by
`ZETA_MAX_SPEC_BYTES`, for other bodies by the route. Large bodies are checked in a thread.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request

from zeta_core.contract.errors import InvalidRequest, MalformedRequest, RequestTimeout, TooLarge
from zeta_core.contract.strict_json import JsonFault, read_json

BODY_SECONDS = 60.0  # for the whole body to arrive
MAX_FIELDS = 1000  # of a form
INLINE_BYTES = 8 * 1024  # larger bodies are checked in a thread
SPEC_SETTING = "ZETA_MAX_SPEC_BYTES"


async def read_body(request: Request, max_bytes: int, *, empty: Any = None, setting: str | None = None) -> Any:
    """The body as JSON data; an empty body is read as ``empty`` if that is given.

    ``setting`` is the name of the setting that determines ``max_bytes``; without it, the limit is fixed.

    Raises `TooLarge`, `MalformedRequest`, `RequestTimeout`, or `InvalidRequest` for text that cannot be stored.
    """
    content = await read_bytes(request, max_bytes, setting=setting)
    if not content and empty is not None:
        return empty
    if len(content) <= INLINE_BYTES:
        return _parse(content)
    return await asyncio.to_thread(_parse, content)


async def read_bytes(request: Request, max_bytes: int, *, setting: str | None = None) -> bytes:
    """The whole body. Raises `TooLarge` and `RequestTimeout`."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _read(request, max_bytes, setting)
    except TimeoutError as error:
        raise RequestTimeout(f"The request body did not arrive within {BODY_SECONDS:g} s; send it again.") from error


async def read_form(request: Request, max_bytes: int) -> dict[str, str]:
    """The fields of a form that a page sent, URL-encoded; of a repeated field, the last value.

    Raises `TooLarge`, `MalformedRequest` or `RequestTimeout`.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            content = await _read(request, max_bytes, None)
        return dict(parse_qsl(content.decode(), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS))
    except TimeoutError as error:
        raise RequestTimeout(f"The form did not arrive within {BODY_SECONDS:g} s; send it again.") from error
    except ValueError as error:
        raise MalformedRequest("The form is not valid URL-encoded text.", code="invalid_form") from error


def _parse(content: bytes) -> Any:
    try:
        return read_json(content)
    except JsonFault as fault:
        message = f"{fault.subject or 'The request body'} {fault.reason}."
        if fault.code in ("invalid_encoding", "invalid_json"):
            raise MalformedRequest(message, code="invalid_json") from fault
        if fault.code == "too_deep":
            raise MalformedRequest(message, code=fault.code) from fault
        raise InvalidRequest(message, code=fault.code, param=fault.param) from fault


async def _read(request: Request, max_bytes: int, setting: str | None) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > 18 or int(declared) > max_bytes):
        raise _too_large(max_bytes, setting)
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > max_bytes:
            raise _too_large(max_bytes, setting)
    return bytes(content)


def _too_large(max_bytes: int, setting: str | None) -> TooLarge:
    if setting is None:
        return TooLarge(f"The request body is larger than the fixed limit of {max_bytes} bytes; shorten it.")
    return TooLarge(
        f"The request body is larger than the limit of {max_bytes} bytes ({setting}); "
        "upload data with POST /v1/files and refer to it by its id."
    )


def check_size(data: Any, max_bytes: int) -> None:
    """Raise `TooLarge` for JSON data that exceeds the limit of a spec."""
    if len(json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")) > max_bytes:
        raise _too_large(max_bytes, SPEC_SETTING)
