"""Answering a request: a whole response, or a stream of server-sent events.

Nothing is sent before the first part of the answer has arrived, so a request that can't be answered gets an error with
its status. An error after that is the last event of the stream. A client that disconnects ends its request.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from server.engine.answers import OpenAnswer
from server.jobs.event_stream import IsDisconnected
from server.openai.errors import error_body
from server.service import Service
from zeta_core.contract.errors import InvalidRequest, Unavailable, ZetaError
from zeta_core.contract.openai.answer_objects import AnswerObject
from zeta_core.contract.openai.answer_parameters import AnswerQuery
from zeta_core.contract.wire.answers import AnswerPart, Failure, ServedWeights

POLL_SECONDS = 0.25  # between two checks whether the client has disconnected
END = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client has disconnected."""


async def answer_whole(
    service: Service, query: AnswerQuery, weights: ServedWeights, is_disconnected: IsDisconnected
) -> dict[str, Any]:
    """The complete response. Raises `InvalidRequest`, `Unavailable`, and `ClientGone`."""
    built = AnswerObject(query, weights.fingerprint)
    async with service.engine.answers.ask(weights, query.prompt, query.options) as answer:
        while True:
            part = await _next_part(service, answer, is_disconnected)
            built.prompt_tokens = part.prompt_tokens or built.prompt_tokens
            for piece in part.pieces:
                built.add(piece)
            if part.is_last:
                return built.whole()


async def answer_stream(
    service: Service, query: AnswerQuery, weights: ServedWeights, is_disconnected: IsDisconnected
) -> AsyncGenerator[bytes]:
    """The events of the response, once the first part of the answer has arrived.

    Raises `InvalidRequest`, `Unavailable`, and `ClientGone` before it returns.
    """
    events = _events(service, query, weights, is_disconnected)
    first = await anext(events)
    return _chained(first, events)


async def _chained(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


async def _events(
    service: Service, query: AnswerQuery, weights: ServedWeights, is_disconnected: IsDisconnected
) -> AsyncGenerator[bytes]:
    """The events. An error before the first event is raised; a later one becomes the last event."""
    built = AnswerObject(query, weights.fingerprint)
    has_begun = False
    async with service.engine.answers.ask(weights, query.prompt, query.options) as answer:
        try:
            is_last = False
            while not is_last:
                part = await _next_part(service, answer, is_disconnected)
                is_last = part.is_last
                built.prompt_tokens = part.prompt_tokens or built.prompt_tokens
                for piece in part.pieces:
                    built.add(piece)
                    has_begun = True
                    yield b"".join(map(_event, built.chunks(piece)))
        except ClientGone:
            if not has_begun:
                raise
            return
        except ZetaError as error:
            if not has_begun:
                raise
            yield _event(error_body(error))
            return
        if query.include_usage:
            yield _event(built.usage_chunk())
        yield END


async def _next_part(service: Service, answer: OpenAnswer, is_disconnected: IsDisconnected) -> AnswerPart:
    """The next part. Raises the error that ended the answer, or `ClientGone`."""
    while True:
        part = await answer.next_part(POLL_SECONDS)
        if part is not None:
            if part.failure is not None:
                raise _error(part.failure)
            return part
        if await is_disconnected():
            raise ClientGone
        if service.stopping.requested:
            raise Unavailable("The server is stopping; send the request again.", code="stopping")


def _error(failure: Failure) -> ZetaError:
    if failure.code in ("invalid_request", "model_failed"):
        return InvalidRequest(failure.message, code=failure.code, param=failure.param)
    return Unavailable(failure.message, code=failure.code)


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
