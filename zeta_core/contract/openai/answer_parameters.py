"""The parameters of ``/chat/completions`` and ``/completions``: validating them, and the request that they describe.

Unknown parameters, and those that have no effect here, are rejected by name. Libraries send some parameters with the
value that OpenAI documents as their default; such values are accepted, because they ask for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from zeta_core.contract.errors import InvalidRequest
from zeta_core.contract.spec.validation import StrictModel, parse
from zeta_core.contract.wire.answers import MAX_CHOICES, MAX_STOPS, MAX_TOP_LOGPROBS, AnswerOptions, Prompt

MAX_REQUEST_BYTES = 4 * 2**20
TEXT_TOKENS = 16  # the default of max_tokens for /completions
MAX_TEXT_LOGPROBS = 5
MAX_TEXT_CHOICES = 128  # of all prompts of a request together
_TEXT_FIELDS = ("name", "tool_call_id")

Stop = Annotated[str, Field(min_length=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(StrictModel):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None  # chunks are never padded here


class FunctionCall(StrictModel):
    name: str
    arguments: str


class MessageToolCall(StrictModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class ChatMessage(StrictModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None


class Function(StrictModel):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: Literal[False] | None = None  # only the default


class Tool(StrictModel):
    type: Literal["function"]
    function: Function


class TextFormat(StrictModel):
    type: Literal["text"]


class _Parameters(StrictModel):
    """The parameters that both routes have."""

    model: str = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, le=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None  # only the default


class ChatParameters(_Parameters):
    """The body of ``/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    # Only the defaults of these:
    parallel_tool_calls: Literal[True] | None = None
    response_format: TextFormat | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto"] | None = None
    modalities: list[Literal["text"]] | None = None


class TextParameters(_Parameters):
    """The body of ``/completions``."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TEXT_LOGPROBS)
    echo: bool | None = None
    best_of: Literal[1] | None = None  # only the default


@dataclass(frozen=True)
class AnswerQuery:
    """A validated request: the requested model, the prompt, how to answer, and the form of the response.

    ``prompt`` may contain several texts, and each gets ``options.n`` answers. ``echoed`` contains these texts if the
    answers must begin with them.
    """

    model: str
    prompt: Prompt
    options: AnswerOptions
    is_chat: bool
    stream: bool
    include_usage: bool
    echoed: tuple[str, ...] = ()


def chat_query(body: Any) -> AnswerQuery:
    """The request in a body of ``/chat/completions``. Raises `InvalidRequest` naming every faulty parameter."""
    parameters = parse(ChatParameters, _without_null_fields(body), error_class=InvalidRequest)
    if parameters.max_tokens is not None and parameters.max_completion_tokens is not None:
        raise InvalidRequest(
            "max_tokens and max_completion_tokens can't be combined; remove max_tokens.", param="max_tokens"
        )
    if parameters.top_logprobs is not None and not parameters.logprobs:
        raise InvalidRequest("top_logprobs is set, but logprobs is not true; set it.", param="top_logprobs")
    for number, message in enumerate(parameters.messages):
        if message.content is None and not message.tool_calls:
            raise InvalidRequest(
                f"messages.{number}.content is null; only a message with tool_calls may have no content.",
                param=f"messages.{number}.content",
            )
    # The model sees only tools that it may call.
    offered = parameters.tools if parameters.tool_choice != "none" else None
    tools = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in offered or []]
    prompt = Prompt(messages=[_rendered(message) for message in parameters.messages], tools=tools or None)
    max_tokens = parameters.max_completion_tokens or parameters.max_tokens
    options = _options(parameters, max_tokens, parameters.logprobs or False, parameters.top_logprobs or 0)
    return _query(parameters, prompt, options, is_chat=True)


def text_query(body: Any) -> AnswerQuery:
    """The request in a body of ``/completions``. Raises `InvalidRequest` naming every faulty parameter."""
    parameters = parse(TextParameters, body, error_class=InvalidRequest)
    texts = Prompt(text=parameters.prompt).texts
    prompt = Prompt(text=texts[0] if len(texts) == 1 else parameters.prompt)  # older workers know single prompts only
    num_choices = len(texts) * (parameters.n or 1)
    if not 1 <= num_choices <= MAX_TEXT_CHOICES:
        raise InvalidRequest(
            f"prompt has {len(texts)} texts with {parameters.n or 1} answers each; a request has 1 to "
            f"{MAX_TEXT_CHOICES} answers.",
            param="prompt",
        )
    has_logprobs = parameters.logprobs is not None
    echoed = tuple(text for text in texts if isinstance(text, str)) if parameters.echo else ()
    if parameters.echo and (has_logprobs or not echoed):
        what = "logprobs" if has_logprobs else "a prompt of token ids"
        raise InvalidRequest(f"echo can't be combined with {what} here; omit one of them.", param="echo")
    options = _options(parameters, parameters.max_tokens or TEXT_TOKENS, has_logprobs, parameters.logprobs or 0)
    return replace(_query(parameters, prompt, options, is_chat=False), echoed=echoed)


def _options(parameters: _Parameters, max_tokens: int | None, logprobs: bool, top_logprobs: int) -> AnswerOptions:
    stop = parameters.stop or []
    return AnswerOptions(
        max_tokens=max_tokens,
        temperature=1.0 if parameters.temperature is None else parameters.temperature,
        top_p=1.0 if parameters.top_p is None else parameters.top_p,
        stop=[stop] if isinstance(stop, str) else stop,
        seed=parameters.seed,
        n=parameters.n or 1,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        presence_penalty=parameters.presence_penalty or 0.0,
        frequency_penalty=parameters.frequency_penalty or 0.0,
    )


def _query(parameters: _Parameters, prompt: Prompt, options: AnswerOptions, *, is_chat: bool) -> AnswerQuery:
    stream = parameters.stream or False
    if parameters.stream_options is not None and not stream:
        raise InvalidRequest("stream_options is set, but stream is not true; remove it.", param="stream_options")
    include_usage = parameters.stream_options is not None and bool(parameters.stream_options.include_usage)
    return AnswerQuery(parameters.model, prompt, options, is_chat, stream, include_usage)


def _rendered(message: ChatMessage) -> dict[str, JsonValue]:
    """A message as chat templates expect it: plain text, and the arguments of tool calls as objects."""
    content = message.content
    text = "".join(part.text for part in content) if isinstance(content, list) else content
    rendered: dict[str, JsonValue] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": text if text is not None else "",
    }
    rendered |= {name: value for name in _TEXT_FIELDS if (value := getattr(message, name)) is not None}
    if message.tool_calls:
        rendered["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return rendered


def _arguments(text: str) -> JsonValue:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _without_null_fields(body: Any) -> Any:
    """The body without null fields in its messages: clients send back messages of earlier responses."""
    if not isinstance(body, Mapping) or not isinstance(body.get("messages"), list):
        return body
    messages = [
        {name: value for name, value in message.items() if value is not None}
        if isinstance(message, Mapping)
        else message
        for message in body["messages"]
    ]
    return {**body, "messages": messages}
