"""Streaming responses that last until the job ends, or until the client disconnects."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

IsDisconnected = Callable[[], Awaitable[bool]]  # Request.is_disconnected


class LiveResponse(StreamingResponse):
    """A streaming response that isn't cancelled when the client disconnects; for HEAD, it ends after the headers.

    Starlette would cancel the task of the response, possibly within a database statement, which loses the connection.
    Instead, the generator of the body calls `IsDisconnected` after each wait.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": b""})
            return
        await self.stream_response(send)
