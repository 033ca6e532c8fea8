"""Bodies of requests under ``/openai/v1``: JSON, or the same fields as a form.

The `openai` client sends JSON, or a form if a script sets the header ``Content-Type: multipart/form-data``. The command
``curl -d`` sends a form, too. A form has one field for each entry of an object, such as ``metadata[team]=a``, and all
values are texts.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from pydantic import BaseModel
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser

from server.http.bodies import MAX_FIELDS, SPEC_SETTING, read_body, read_bytes
from zeta_core.contract.errors import InvalidRequest, InvalidSpec, MalformedRequest, ZetaError
from zeta_core.contract.spec.validation import parse, shown

MULTIPART, URL_ENCODED = "multipart/form-data", "application/x-www-form-urlencoded"
MAX_DEPTH = 8  # of brackets
_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)\Z")
_KEY = re.compile(r"\[([^\[\]]+)\]")


async def read_fields(
    request: Request, max_bytes: int, model: type[BaseModel], *, error_class: type[ZetaError] = InvalidSpec
) -> Any:
    """The body as JSON data, limited by `ZETA_MAX_SPEC_BYTES`. A form is converted to the types of ``model``.

    Raises the errors of `read_body`, and ``error_class`` for a form with invalid values.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in (MULTIPART, URL_ENCODED):
        return await read_body(request, max_bytes, setting=SPEC_SETTING)
    fields = await _form_fields(request, await read_bytes(request, max_bytes, setting=SPEC_SETTING), content_type)
    parsed = parse(model, nested(fields), error_class=error_class, is_text=True)
    return parsed.model_dump(mode="json", exclude_unset=True)


def nested(fields: list[tuple[str, str]]) -> dict[str, Any]:
    """The objects that names such as ``a[b][c]`` describe. Raises `InvalidRequest` for lists and contradictions."""
    root: dict[str, Any] = {}
    for name, value in fields:
        match = _NAME.match(name)
        if match is None:
            raise _invalid_name(name, "which is not a name such as 'metadata[team]'; send lists in a JSON body")
        path = [match.group(1), *_KEY.findall(match.group(2))]
        if len(path) > MAX_DEPTH:
            raise _invalid_name(name, f"which has more than {MAX_DEPTH} levels; remove some")
        inner = root
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise _invalid_name(name, "but a part of it is also given as a value; remove one of them")
        if path[-1] in inner:
            raise _invalid_name(name, "which is given twice; remove one of them")
        inner[path[-1]] = value
    return root


async def _form_fields(request: Request, content: bytes, content_type: str) -> list[tuple[str, str]]:
    """The names and values of a form without files. Raises `MalformedRequest` and `InvalidRequest`."""

    async def stream() -> AsyncGenerator[bytes]:
        yield content
        yield b""

    try:
        if content_type == URL_ENCODED:
            form = await FormParser(request.headers, stream()).parse()
        else:
            form = await MultiPartParser(request.headers, stream(), max_files=0, max_fields=MAX_FIELDS).parse()
    except (MultiPartException, ValueError, KeyError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise MalformedRequest(f"The form can't be read: {reason}; send JSON instead.", code="invalid_form") from error
    return [(name, value) for name, value in form.multi_items() if isinstance(value, str)]


def _invalid_name(name: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"The form has the field {shown(name)}, {reason}.", code="invalid_form")
