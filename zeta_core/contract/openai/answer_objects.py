"""The responses of ``/chat/completions`` and ``/completions``: whole objects, and the chunks of a stream.

The shapes are those of the types in `openai` 3.57: ``ChatCompletion``, ``ChatCompletionChunk`` and ``Completion``.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from zeta_core.contract.openai.answer_parameters import AnswerQuery
from zeta_core.contract.wire.answers import FinishReason, Piece, TokenLogprob, ToolCall


@dataclass
class _Choice:
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    tool_calls: list[ToolCall] = field(default_factory=list[ToolCall])
    finish_reason: FinishReason | None = None
    num_tokens: int = 0


class AnswerObject:
    """Collects the pieces of one answer, and builds the response's JSON objects."""

    def __init__(self, query: AnswerQuery, fingerprint: str) -> None:
        self._query = query
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl' if query.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": query.model,
            "system_fingerprint": fingerprint,
        }
        self._choices = [_Choice() for _ in range(len(query.prompt.texts) * query.options.n)]
        self._begun: set[int] = set()
        self.prompt_tokens = 0

    def add(self, piece: Piece) -> None:
        choice = self._choices[piece.choice]
        choice.text += piece.text
        choice.logprobs += piece.logprobs
        choice.tool_calls += piece.tool_calls
        choice.num_tokens = piece.num_tokens
        choice.finish_reason = piece.finish_reason or choice.finish_reason

    def whole(self) -> dict[str, Any]:
        """The complete response."""
        build = self._chat_choice if self._query.is_chat else self._text_choice
        choices = [build(number, choice) for number, choice in enumerate(self._choices)]
        kind = "chat.completion" if self._query.is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage()}

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks of a stream for a piece, which must have been added."""
        if not self._query.is_chat:
            offset = len(self._choices[piece.choice].text) - len(piece.text)
            logprobs = self._text_logprobs(piece.logprobs, offset)
            text = piece.text if piece.choice in self._begun else self._echoed(piece.choice) + piece.text
            self._begun.add(piece.choice)
            choice = {"index": piece.choice, "text": text, "logprobs": logprobs}
            return [self._chunk([{**choice, "finish_reason": piece.finish_reason}])]
        deltas: list[tuple[dict[str, Any], FinishReason | None]] = []
        if piece.choice not in self._begun:
            self._begun.add(piece.choice)
            deltas.append(({"role": "assistant", "content": ""}, None))
        content: dict[str, Any] = {"content": piece.text}
        if piece.text or piece.logprobs:
            deltas.append((content, None))
        if piece.tool_calls:
            calls = [{"index": number, **_tool_call(call)} for number, call in enumerate(piece.tool_calls)]
            deltas.append(({"tool_calls": calls}, None))
        if piece.finish_reason is not None:
            deltas.append(({}, piece.finish_reason))
        return [
            self._chunk(
                [
                    {
                        "index": piece.choice,
                        "delta": delta,
                        "logprobs": self._chat_logprobs(piece.logprobs) if delta is content else None,
                        "finish_reason": reason,
                    }
                ]
            )
            for delta, reason in deltas
        ]

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream with ``include_usage``."""
        return {**self._chunk([]), "usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._query.is_chat else "text_completion"
        usage = {"usage": None} if self._query.include_usage else {}
        return {**self._head, "object": kind, "choices": choices, **usage}

    def _usage(self) -> dict[str, int]:
        completion_tokens = sum(choice.num_tokens for choice in self._choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }

    def _chat_choice(self, number: int, choice: _Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.tool_calls:
            message["content"] = choice.text or None
            message["tool_calls"] = [_tool_call(call) for call in choice.tool_calls]
        logprobs = self._chat_logprobs(choice.logprobs)
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _text_choice(self, number: int, choice: _Choice) -> dict[str, Any]:
        logprobs = self._text_logprobs(choice.logprobs, 0)
        text = self._echoed(number) + choice.text
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _echoed(self, number: int) -> str:
        """The prompt of a choice, if the request asks for it."""
        echoed = self._query.echoed
        return echoed[number // self._query.options.n] if echoed else ""

    def _chat_logprobs(self, entries: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._query.options.logprobs:
            return None
        content = [
            {
                "token": entry.token,
                "bytes": entry.bytes,
                "logprob": entry.logprob,
                "top_logprobs": [top.model_dump() for top in entry.top],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _text_logprobs(self, entries: list[TokenLogprob], offset: int) -> dict[str, Any] | None:
        """The older format. ``offset`` is the position of the first token in the text."""
        if not self._query.options.logprobs:
            return None
        offsets: list[int] = []
        for entry in entries:
            offsets.append(offset)
            offset += len(bytes(entry.bytes).decode(errors="ignore"))
        return {
            "tokens": [entry.token for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{top.token: top.logprob for top in entry.top} for entry in entries],
            "text_offset": offsets,
        }


def _tool_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
