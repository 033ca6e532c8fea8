"""A router that answers HEAD wherever it answers GET (RFC 9110, section 9.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter


class Router(APIRouter):
    """Registers each GET route for HEAD, too.

    The server never sends the body of an answer to HEAD. A handler looks at the method only where making the body
    is expensive.
    """

    def add_api_route(  # pyright: ignore[reportIncompatibleMethodOverride] - FastAPI spells out 25 options
        self, path: str, endpoint: Callable[..., Any], *, methods: Sequence[str] | None = None, **options: Any
    ) -> None:
        super().add_api_route(path, endpoint, methods=list(methods or ("GET",)), **options)
        if methods is None or "GET" in methods:
            undescribed: dict[str, Any] = {**options, "include_in_schema": False}
            super().add_api_route(path, endpoint, methods=["HEAD"], **undescribed)
