"""Parts of requests: JSON bodies, segments of paths, and the headers of a request that creates something."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from zeta_core.contract.errors import InvalidRequest


def json_body(sent: Mapping[str, Any]) -> bytes:
    """The body as JSON. Raises `InvalidRequest` for values that JSON does not have."""
    try:
        return json.dumps(sent, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"The spec cannot be written as JSON: {error}. Use only JSON types.") from error


def creation_headers(idempotency_key: str | None) -> dict[str, str]:
    """The headers of a request that creates something. By default, each request has its own key, so it may be retried.

    Raises `InvalidRequest` for a key that is invalid in a header.
    """
    key = idempotency_key or str(uuid4())
    if not (key.isascii() and key.isprintable()):
        raise InvalidRequest(f"idempotency_key is {key!r}; use printable ASCII, because it is sent in an HTTP header.")
    return {"Content-Type": "application/json", "Idempotency-Key": key}


def path_segment(text: str) -> str:
    """``text`` as one segment of a URL path. Raises `InvalidRequest` if it could change the path."""
    if not text or not all(sign.isascii() and (sign.isalnum() or sign in "_-.") for sign in text) or ".." in text:
        raise InvalidRequest(
            f"{text!r} is not a valid id or checkpoint name; `zeta jobs` and `zeta checkpoints` list them."
        )
    return text
