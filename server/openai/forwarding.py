"""Forwarding requests to an engine of the operator (vLLM, SGLang, llama.cpp), whose URL is `ZETA_SERVE_URL`.

Such engines pin other versions of torch, so they run in environments of their own. The engine gets the request's body
unchanged, and its response is passed on unchanged, so it decides which models and parameters it supports. The caller's
key is not sent to it. Jobs of other projects are rejected before a request is forwarded.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from server.jobs.event_stream import IsDisconnected
from server.openai.answers import POLL_SECONDS, ClientGone
from server.settings import ServerSettings
from zeta_core.contract.errors import InvalidRequest, Unavailable

CONNECT_SECONDS = 5.0

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class ForwardedResponse:
    """The engine's response; ``content`` must be read to its end, or closed."""

    status: int
    headers: dict[str, str]
    content: AsyncGenerator[bytes]


def requested_model(body: Any) -> str:
    """The model in the body of a request. Raises `InvalidRequest`."""
    model = body.get("model") if isinstance(body, Mapping) else None
    if not isinstance(model, str):
        raise InvalidRequest("model is missing; set it to the name of a model.", param="model", code="missing")
    return model


async def forward(settings: ServerSettings, path: str, body: Any, is_disconnected: IsDisconnected) -> ForwardedResponse:
    """Send a request to the engine; ``path`` is relative to ``/v1``.

    Raises `Unavailable` if it can't be reached or is silent for too long, and `ClientGone` if the client disconnects
    before it responds.
    """
    assert settings.serve_url is not None, "the caller has checked it"
    url = f"{settings.serve_url}{path}"
    headers = {"Content-Type": "application/json"}
    if settings.serve_api_key is not None:
        headers["Authorization"] = f"Bearer {settings.serve_api_key}"
    async with AsyncExitStack() as stack:
        timeout = httpx.Timeout(settings.serve_seconds, connect=CONNECT_SECONDS)
        client = await stack.enter_async_context(
            httpx.AsyncClient(timeout=timeout, trust_env=False, verify=url.startswith("https:"))
        )
        try:
            request = client.build_request("POST", url, content=json.dumps(body).encode(), headers=headers)
            response = await _unless_disconnected(client.send(request, stream=True), is_disconnected)
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            raise Unavailable(
                f"The engine in ZETA_SERVE_URL did not respond within {settings.serve_seconds:g} s "
                "(ZETA_SERVE_SECONDS); request less, or let the response be streamed.",
                code="engine_timeout",
            ) from error
        except httpx.RequestError as error:
            raise Unavailable(
                "The engine in ZETA_SERVE_URL can't be reached; start it, or unset the variable.", code="no_engine"
            ) from error
        stack.push_async_callback(response.aclose)
        passed = {name: value for name, value in response.headers.items() if name in ("content-type", "retry-after")}
        return ForwardedResponse(response.status_code, passed, _content(response, stack.pop_all(), is_disconnected))


async def _content(
    response: httpx.Response, stack: AsyncExitStack, is_disconnected: IsDisconnected
) -> AsyncGenerator[bytes]:
    """The bytes of the response, until the client disconnects."""
    async with stack:
        pieces = response.aiter_bytes()
        while True:
            try:
                content = await _unless_disconnected(anext(pieces, None), is_disconnected)
            except (ClientGone, httpx.RequestError):
                return  # if the engine has closed the connection or is silent, the response stays incomplete
            if content is None:
                return
            yield content


async def _unless_disconnected(awaitable: Awaitable[ResultT], is_disconnected: IsDisconnected) -> ResultT:
    """The result of ``awaitable``, which is cancelled if the client disconnects. Raises `ClientGone`."""
    task = asyncio.ensure_future(awaitable)
    try:
        while not (await asyncio.wait({task}, timeout=POLL_SECONDS))[0]:
            if await is_disconnected():
                raise ClientGone
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
