"""Asks a checkpoint or a base model, and streams the answer as it is generated (server-sent events)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
from httpx_sse import EventSource
from pydantic import BaseModel, ConfigDict, ValidationError

from zeta.errors import InternalServerError, InvalidResponse, error_from
from zeta.transport import HttpTransport
from zeta_core.contract.errors import ErrorBody, Unavailable

PATH = "/openai/v1"
READ_SECONDS = 1800.0  # until the first token: a large model may have to be loaded
_END = "[DONE]"


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True)

    role: str
    content: str


class Usage(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")

    prompt_tokens: int
    completion_tokens: int


class Answer(BaseModel):
    """A complete answer.

    ``system_fingerprint`` is the SHA-256 of the checkpoint's manifest, or of a base model's source.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    text: str
    finish_reason: str | None
    usage: Usage | None
    system_fingerprint: str | None


def ask(
    transport: HttpTransport,
    model: str,
    prompt: Sequence[ChatMessage] | str,
    options: dict[str, Any],
    on_text: Callable[[str], None] = lambda _: None,
) -> Answer:
    """The answer to a conversation, or the continuation of a text. ``on_text`` is called with each piece of it.

    ``options`` are parameters of OpenAI's API; those that are ``None`` are omitted. Raises the server's errors,
    including one in the middle of an answer, and `Unavailable` if the model can't answer now or the connection fails.
    """
    body: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    body |= {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if isinstance(prompt, str):
        path = f"{PATH}/completions"
        body["prompt"] = prompt
    else:
        path = f"{PATH}/chat/completions"
        body["messages"] = [message.model_dump() for message in prompt]
    text: list[str] = []
    last: dict[str, Any] = {}
    finish_reason: str | None = None
    try:
        with transport.stream("POST", path, json=body, read_seconds=READ_SECONDS) as response:
            for chunk in _chunks(response):
                last = chunk
                for choice in chunk["choices"]:
                    piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                    finish_reason = choice.get("finish_reason") or finish_reason
                    if piece:
                        text.append(piece)
                        on_text(piece)
    except httpx.TransportError as error:
        raise transport.unreachable(error) from error
    except InternalServerError as error:
        if error.code == InternalServerError.code or isinstance(error, InvalidResponse):
            raise
        raise Unavailable(error.message, code=error.code) from error  # it may be sent again
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise InvalidResponse(f"The server's answer has an unknown form: {error}") from error
    usage = last.get("usage")
    return Answer(
        model=model,
        text="".join(text),
        finish_reason=finish_reason,
        usage=None if usage is None else Usage.model_validate(usage),
        system_fingerprint=last.get("system_fingerprint"),
    )


def _chunks(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The chunks of a stream. Raises the error that ends it."""
    for event in EventSource(response).iter_sse():
        if event.data == _END:
            return
        chunk = event.json()
        if "error" in chunk:
            raise error_from(ErrorBody.model_validate(chunk).error)
        yield chunk
    raise Unavailable("The connection ended before the answer did; ask again.", code="incomplete_answer")
