"""Reads the lists of the API page by page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from zeta.errors import parse_response
from zeta.transport import HttpTransport
from zeta_core.contract.job.responses import Page

PAGE_SIZE = 1000

ItemT = TypeVar("ItemT", bound=BaseModel)


def read_pages(
    transport: HttpTransport, model: type[ItemT], path: str, params: Mapping[str, Any], limit: int | None
) -> Iterator[ItemT]:
    """The items of a list, at most ``limit``; ``None`` means all of them."""
    after: str | None = None
    left = limit
    while left is None or left > 0:
        size = PAGE_SIZE if left is None else min(left, PAGE_SIZE)
        response = transport.request("GET", path, params={**params, "limit": size, "after": after})
        page = parse_response(Page[model], response)
        yield from page.data
        after = page.next_after or page.last_id  # older servers send no next_after
        if not page.has_more or after is None:
            return
        left = None if left is None else left - len(page.data)
