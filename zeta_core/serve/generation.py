"""Answering several requests at once: each step computes the next token of every choice of every request.

A new request joins after the current step, one choice per step, so that a long prompt delays the others once. Requests
wait in order while the cache would exceed its share of the memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from zeta_core.contract.wire.answers import Failure, FailureCode, Generate, Generated, Piece
from zeta_core.environment import total_memory_bytes
from zeta_core.serve.batch import DecodingBatch
from zeta_core.serve.choice import Choice
from zeta_core.serve.loading import LoadedModel
from zeta_core.serve.prompts import InvalidPrompt, encode_prompts
from zeta_core.serve.sampling import NotFinite
from zeta_core.serve.tool_calls import tool_format

MAX_SEQUENCES = 64
CACHE_SHARE = 0.25  # of the memory, for the cache of a batch


class _Answer:
    """The choices of one request that have not ended."""

    def __init__(self, choices: list[Choice], prompt_tokens: int) -> None:
        self.choices = choices
        self.prompt_tokens: int | None = prompt_tokens  # until it was sent


class Generation:
    """``send`` is called with everything that is generated.

    ``free_cache_bytes`` returns what the cache of the batch may occupy: by default, `CACHE_SHARE` of the memory.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        send: Callable[[Generated], None],
        free_cache_bytes: Callable[[], int] | None = None,
    ) -> None:
        self._loaded = loaded
        self._send = send
        self._batch = DecodingBatch(loaded.model, loaded.device)
        self._answers: dict[str, _Answer] = {}
        self._waiting: deque[Choice] = deque()
        self._active: list[Choice] = []  # in the order of the batch
        limit = cache_limit_bytes(loaded.device)
        self._free_cache_bytes = free_cache_bytes or (lambda: limit)

    @property
    def is_idle(self) -> bool:
        return not self._answers

    @property
    def cache_bytes(self) -> int:
        """The bytes of the cache if every sequence of the batch reached its largest length."""
        return self._batch.padded_tokens() * self._batch.bytes_per_token

    def add(self, request: Generate) -> None:
        """Begin to answer a request, or report why it is invalid."""
        try:
            answer = self._prepared(request)
        except InvalidPrompt as error:
            self._fail(request.request_id, "invalid_request", error.message, param=error.param)
            return
        self._answers[request.request_id] = answer
        self._waiting.extend(answer.choices)

    def cancel(self, request_id: str) -> None:
        """End a request without an answer; harmless if it has ended."""
        answer = self._answers.pop(request_id, None)
        if answer is not None:
            self._remove(answer.choices)

    def step(self) -> None:
        """Let one waiting choice join, then compute the next token of every choice in the batch."""
        if self._waiting and self._fits(self._waiting[0]):
            self._join(self._waiting.popleft())
        if self._active:
            self._deliver(self._accepted(self._active, self._batch.step()))

    def _prepared(self, request: Generate) -> _Answer:
        """The choices of a request. Raises `InvalidPrompt`."""
        loaded, options = self._loaded, request.options
        ids_of_prompts = encode_prompts(loaded.tokenizer, request.prompt)
        longest = max(map(len, ids_of_prompts))
        if loaded.context_tokens - longest < (options.max_tokens or 1):
            asked = "" if options.max_tokens is None else f", and max_tokens is {options.max_tokens}"
            raise InvalidPrompt(
                f"The model's context is {loaded.context_tokens} tokens, but the prompt has {longest}{asked}; "
                "shorten the prompt or lower max_tokens.",
                "messages" if request.prompt.messages is not None else "prompt",
            )
        tools = None
        if request.prompt.tools:
            tools = tool_format(str(loaded.tokenizer.get_chat_template(None, request.prompt.tools)))
        choices = [
            Choice.of_request(
                request.request_id,
                number,
                ids,
                options.max_tokens or loaded.context_tokens - len(ids),
                loaded,
                options,
                tools,
            )
            for number, ids in enumerate(ids for ids in ids_of_prompts for _ in range(options.n))
        ]
        return _Answer(choices, sum(map(len, ids_of_prompts)))

    def _fits(self, choice: Choice) -> bool:
        if not len(self._batch):
            return True
        if len(self._batch) >= MAX_SEQUENCES:
            return False
        tokens = self._batch.padded_tokens(choice.sequence.max_length)
        return tokens * self._batch.bytes_per_token <= self._free_cache_bytes()

    def _join(self, choice: Choice) -> None:
        try:
            logits_V = self._batch.add(choice.sequence)
        except (RuntimeError, MemoryError) as error:  # such as torch.OutOfMemoryError
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            self._end(choice.request_id, f"The model can't compute the prompt: {reason}.")
            return
        self._active.append(choice)
        self._deliver(self._accepted([choice], [logits_V]))

    def _accepted(self, choices: list[Choice], logits: list[torch.Tensor]) -> list[tuple[Choice, Piece]]:
        pieces: list[tuple[Choice, Piece]] = []
        for choice, logits_V in zip(list(choices), logits, strict=True):
            try:
                piece = choice.accept(logits_V)
            except NotFinite:
                self._end(choice.request_id, "The model computed values that are not finite; its weights are damaged.")
                continue
            if piece is not None:
                pieces.append((choice, piece))
        return pieces

    def _deliver(self, pieces: list[tuple[Choice, Piece]]) -> None:
        """Send the pieces by request, and remove the choices that have ended."""
        by_request: dict[str, list[Piece]] = {}
        ended: list[Choice] = []
        for choice, piece in pieces:
            if choice.request_id in self._answers:
                by_request.setdefault(choice.request_id, []).append(piece)
                ended += [choice] if choice.finish_reason is not None else []
        for choice in ended:
            self._answers[choice.request_id].choices.remove(choice)
        self._remove(ended)
        for request_id, own in by_request.items():
            answer = self._answers[request_id]
            is_last = not answer.choices
            self._send(
                Generated(request_id=request_id, pieces=own, prompt_tokens=answer.prompt_tokens, is_last=is_last)
            )
            answer.prompt_tokens = None
            if is_last:
                del self._answers[request_id]

    def _remove(self, choices: list[Choice]) -> None:
        if not choices:
            return
        self._waiting = deque(choice for choice in self._waiting if choice not in choices)
        self._active = [choice for choice in self._active if choice not in choices]
        self._batch.remove([choice.sequence for choice in choices])

    def _end(self, request_id: str, message: str) -> None:
        self.cancel(request_id)
        self._fail(request_id, "model_failed", message)

    def _fail(self, request_id: str, code: FailureCode, message: str, *, param: str | None = None) -> None:
        failure = Failure(code=code, message=message, param=param)
        self._send(Generated(request_id=request_id, is_last=True, failure=failure))


def cache_limit_bytes(device: torch.device) -> int:
    """The largest size of all caches of a process."""
    total = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else total_memory_bytes()
    return int(CACHE_SHARE * total)
