"""One choice of an answer while it is generated: its tokens, its text, and the decision when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from zeta_core.contract.wire.answers import AnswerOptions, FinishReason, Piece, TokenLogprob
from zeta_core.serve.batch import SequenceState
from zeta_core.serve.loading import LoadedModel
from zeta_core.serve.sampling import TokenSampler
from zeta_core.serve.text import StopFilter, TextDecoder, TokenBytes
from zeta_core.serve.tool_calls import Format, parse_calls, starts_call


@dataclass(eq=False)
class Choice:
    """Choice ``number`` of a request. `accept` chooses its next token, until ``finish_reason`` is set."""

    request_id: str
    number: int
    sequence: SequenceState
    max_tokens: int
    sampler: TokenSampler
    decoder: TextDecoder
    stops: StopFilter
    token_bytes: TokenBytes
    ends: frozenset[int]
    tools: Format | None
    logprobs: bool
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    _held: str = field(default="", init=False)  # text that is, or may become, a tool call

    @classmethod
    def of_request(
        cls,
        request_id: str,
        number: int,
        ids: list[int],
        max_tokens: int,
        loaded: LoadedModel,
        options: AnswerOptions,
        tools: Format | None,
    ) -> Choice:
        return cls(
            request_id,
            number,
            SequenceState(list(ids), max_length=len(ids) + max_tokens),
            max_tokens,
            TokenSampler(options, number % options.n),  # so each prompt gets the text that it gets alone
            TextDecoder(loaded.tokenizer, keeps_special=tools in ("mistral", "llama")),
            StopFilter(options.stop),
            TokenBytes(loaded.tokenizer),
            loaded.ends,
            tools,
            options.logprobs,
        )

    def accept(self, logits_V: torch.Tensor) -> Piece | None:
        """Choose the next token. Returns the new text, if any is complete. Raises `NotFinite`."""
        chosen = self.sampler.choose(logits_V)
        self.num_tokens += 1
        self.sequence.ids.append(chosen.token)
        logprobs: list[TokenLogprob] = []
        if chosen.token in self.ends:
            text = self.stops.add(self.decoder.finish(), is_last=True)
            self.finish_reason = "stop"
        else:
            if self.logprobs:
                logprobs.append(self.token_bytes.logprob(chosen))
            text = self.stops.add(self.decoder.add(chosen.token))
            if self.stops.has_stopped:
                self.finish_reason = "stop"
            elif self.num_tokens >= self.max_tokens:
                text += self.stops.add(self.decoder.finish(), is_last=True)
                self.finish_reason = "length"
        return self._piece(text, logprobs)

    def _piece(self, text: str, logprobs: list[TokenLogprob]) -> Piece | None:
        if self.tools is None:
            if not (text or logprobs or self.finish_reason):
                return None
            return self._new_piece(text, logprobs)
        self._held += text
        if self.finish_reason is None:
            start = starts_call(self._held, self.tools)
            text, self._held = (self._held, "") if start is None else (self._held[:start], self._held[start:])
            return self._new_piece(text, logprobs) if text or logprobs else None
        text, calls = parse_calls(self._held, self.tools)
        if calls:
            self.finish_reason = "tool_calls"
        return self._new_piece(text, logprobs).model_copy(update={"tool_calls": calls})

    def _new_piece(self, text: str, logprobs: list[TokenLogprob]) -> Piece:
        return Piece(
            choice=self.number,
            text=text,
            num_tokens=self.num_tokens,
            logprobs=logprobs,
            finish_reason=self.finish_reason,
        )
