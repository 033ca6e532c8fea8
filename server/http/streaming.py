"""Answers that go on until a job ends, and that notice by themselves when their reader has left.

Starlette cancels the task of a streamed answer when its client leaves. A cancellation in the middle of a database
statement costs its connection, which SQLAlchemy drops. So these answers are never cancelled; what writes them asks
`IsDisconnected` each time it has waited.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

IsDisconnected = Callable[[], Awaitable[bool]]  # Request.is_disconnected


class LiveResponse(StreamingResponse):
    """A streamed answer without Starlette's own watch over the client; the answer to HEAD ends with its headers."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": b""})
            return
        await self.stream_response(send)
