"""Resumable downloads: Range (a single range or a suffix), If-Range, If-None-Match and HEAD.

Content is a list of parts, each either bytes or a file. A plain file has one part and a .tar many, so both use the same
code and only one chunk of memory. Source: RFC 9110, sections 13 and 14.
"""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import RedirectResponse, Response, StreamingResponse

from server.http.error_responses import RangeNotSatisfiable
from zeta_core.contract.errors import Unavailable
from zeta_core.contract.spec.validation import shown
from zeta_core.system.artifact_store import ArtifactStore, storage_errors

LINK_RESPONSES: dict[int | str, dict[str, Any]] = {
    307: {"description": "With `ZETA_DOWNLOADS=redirect`: the link to the content in the object store."}
}
LINK_SECONDS = 300  # within which a download by link must begin
CHUNK_BYTES = 1 << 20  # 3.5 times faster than the usual 64 KiB
_RANGE = re.compile(r"^bytes=(\d{0,18})-(\d{0,18})$")


@dataclass(frozen=True)
class FilePart:
    """The first ``num_bytes`` bytes of a stored file, which must be at least that long."""

    store: ArtifactStore
    key: PurePosixPath
    num_bytes: int

    def read(self) -> bytes:
        """All bytes of a small file. Raises `FileNotFoundError` and `Unavailable`."""
        with storage_errors(), io.BufferedReader(cast(io.RawIOBase, self.store.open(self.key))) as file:
            return file.read(self.num_bytes)


Part = bytes | FilePart


@dataclass(frozen=True)
class Content:
    """The content of a download; ``etag`` identifies its exact bytes."""

    parts: Sequence[Part]
    etag: str
    media_type: str
    filename: str | None = None

    @property
    def num_bytes(self) -> int:
        return sum(_size(part) for part in self.parts)


async def serve(request: Request, content: Content, *, by_link: bool = False) -> Response:
    """The response to GET or HEAD; with ``by_link``, a redirect to the object store if the content is one object.

    Raises `RangeNotSatisfiable`, and `Unavailable` if the store fails.
    """
    etag = f'"{content.etag}"'
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Cache-Control": "private, no-transform"}
    if content.filename is not None:
        headers["Content-Disposition"] = _disposition(content)
    if _matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    num_bytes = content.num_bytes
    start, end = 0, num_bytes
    status = 200
    range_header = request.headers.get("range") if request.method == "GET" else None
    is_current = request.headers.get("if-range", etag) == etag
    if range_header is not None and is_current:
        byte_range = _range(range_header, num_bytes)
        if byte_range is not None:
            (start, end), status = byte_range, 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{num_bytes}"
    headers["Content-Length"] = str(end - start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=content.media_type)
    # A store that knows If-Range compares an ETag of its own, so outdated content is replaced from here.
    if by_link and is_current and (link := await _link(content)) is not None:
        return RedirectResponse(link, 307, headers={"Cache-Control": "private, no-store"})
    body = _send(list(_slices(content.parts, start, end)))
    try:
        first = await anext(body, b"")  # before the headers, so that a failing store is an error and not a short body
    except (FileNotFoundError, EOFError) as error:
        raise Unavailable(
            "The content is missing in the artifact store, or was replaced just now; try again later.",
            code="storage_unavailable",
        ) from error
    return StreamingResponse(_continue(first, body), status, headers=headers, media_type=content.media_type)


async def _link(content: Content) -> str | None:
    if len(content.parts) != 1 or not isinstance(part := content.parts[0], FilePart):
        return None
    with storage_errors():
        return await asyncio.to_thread(
            part.store.signed_link,
            part.key,
            seconds=LINK_SECONDS,
            media_type=content.media_type,
            disposition=_disposition(content),
        )


def _disposition(content: Content) -> str:
    """The value of Content-Disposition."""
    name = "" if content.filename is None else f"; filename*=UTF-8''{quote(content.filename, safe='')}"
    return f"attachment{name}"


async def _continue(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(rest):
        yield first
        async for chunk in rest:
            yield chunk


def _range(header: str, num_bytes: int) -> tuple[int, int] | None:
    """The range ``start`` to ``end`` (exclusive); ``None`` if the header must be ignored (not one range of bytes)."""
    match = _RANGE.match(header.replace(" ", ""))
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, end = max(0, num_bytes - int(last)), num_bytes
    else:
        start, end = int(first), min(num_bytes, int(last) + 1) if last else num_bytes
        if last and int(last) < int(first):
            return None
    if start >= num_bytes or start == end:
        raise RangeNotSatisfiable(
            f"Range is {shown(header)}, which is outside the content of {num_bytes} bytes; use a range inside it.",
            num_bytes,
        )
    return start, end


def _matches(header: str | None, etag: str) -> bool:
    """Whether If-None-Match contains this ETag."""
    if header is None:
        return False
    return header.strip() == "*" or etag in [name.strip().removeprefix("W/") for name in header.split(",")]


@dataclass(frozen=True)
class _Slice:
    part: Part
    start: int
    end: int


def _slices(parts: Sequence[Part], start: int, end: int) -> Iterator[_Slice]:
    """The section of each part between ``start`` and ``end``."""
    offset = 0
    for part in parts:
        size = _size(part)
        low, high = max(start - offset, 0), min(end - offset, size)
        if low < high:
            yield _Slice(part, low, high)
        offset += size


async def _send(slices: Sequence[_Slice]) -> AsyncGenerator[bytes]:
    """The bytes; if a file has been truncated, the response ends early, which the client detects by Content-Length."""
    for slice_ in slices:
        if isinstance(slice_.part, bytes):
            yield slice_.part[slice_.start : slice_.end]
            continue
        with storage_errors():
            file = await asyncio.to_thread(_open, slice_.part, slice_.start)
        try:
            remaining = slice_.end - slice_.start
            while remaining:
                with storage_errors():
                    chunk = await asyncio.to_thread(file.read, min(CHUNK_BYTES, remaining))
                if not chunk:
                    raise EOFError(f"{slice_.part.key} is shorter than the {slice_.part.num_bytes} bytes announced")
                remaining -= len(chunk)
                yield chunk
        finally:
            file.close()


def _open(part: FilePart, start: int) -> BinaryIO:
    file = part.store.open(part.key)
    file.seek(start)
    return file


def _size(part: Part) -> int:
    return len(part) if isinstance(part, bytes) else part.num_bytes
