"""/openai/v1/chat/completions and /openai/v1/completions: answers of checkpoints and base models.

The scope `read` suffices, because it also allows downloading the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from server.auth import Caller
from server.http.bodies import read_body
from server.openai import answers, forwarding
from server.openai.answer_weights import find_weights
from server.openai.errors import OPENAI_ERRORS, OpenAIRoute
from server.routes.job_output import EVENT_STREAM, STREAM_HEADERS, LiveResponse
from server.routes.routing import Router, TheCaller, TheService, json_body
from server.service import Service
from zeta_core.contract.openai.answer_parameters import MAX_REQUEST_BYTES, AnswerQuery, chat_query, text_query

router = Router(prefix="/openai/v1", tags=["openai"], route_class=OpenAIRoute, responses=OPENAI_ERRORS)

STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {EVENT_STREAM: {}}}}


@router.post(
    "/chat/completions", openapi_extra=json_body("ChatParameters", required=True), response_model=None, responses=STREAM
)
async def create_chat_completion(service: TheService, caller: TheCaller, request: Request) -> Response:
    """Answer a conversation with a checkpoint or a base model, with `stream` as server-sent events."""
    return await _respond(service, caller, request, "/chat/completions", chat_query)


@router.post(
    "/completions", openapi_extra=json_body("TextParameters", required=True), response_model=None, responses=STREAM
)
async def create_completion(service: TheService, caller: TheCaller, request: Request) -> Response:
    """Continue a text with a checkpoint or a base model, with `stream` as server-sent events."""
    return await _respond(service, caller, request, "/completions", text_query)


async def _respond(
    service: Service, caller: Caller, request: Request, path: str, read_query: Callable[[Any], AnswerQuery]
) -> Response:
    body = await read_body(request, MAX_REQUEST_BYTES)
    try:
        if service.settings.serve_url is not None:
            return await _forward(service, caller, request, path, body)
        return await _answer(service, caller, request, read_query(body))
    except answers.ClientGone:
        return Response(status_code=499)  # nobody receives it; it appears in the request log


async def _forward(service: Service, caller: Caller, request: Request, path: str, body: Any) -> Response:
    model = forwarding.requested_model(body)
    if model.startswith(("job_", "ft:")):
        await find_weights(service, caller, model)  # another project's job is not found
    response = await forwarding.forward(service.settings, path, body, request.is_disconnected)
    return LiveResponse(response.content, response.status, headers={**response.headers, **STREAM_HEADERS})


async def _answer(service: Service, caller: Caller, request: Request, query: AnswerQuery) -> Response:
    weights = await find_weights(service, caller, query.model)
    if query.stream:
        events = await answers.answer_stream(service, query, weights, request.is_disconnected)
        return LiveResponse(events, media_type=EVENT_STREAM, headers=STREAM_HEADERS)
    return JSONResponse(await answers.answer_whole(service, query, weights, request.is_disconnected))
