"""The checkpoint's answers to prompts (`zeta_core.export.prompts`). An export is compared with them.

T: tokens of an answer   V: vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import log_softmax

from zeta_core.export.prompts import Prompts

MAX_ANSWER_TOKENS = 32


@dataclass(frozen=True)
class GreedyAnswer:
    """A greedy answer. ``prompt`` and ``tokens`` are ids; ``has_ended`` means that the last one is an end token."""

    prompt: list[int]
    tokens: list[int]
    has_ended: bool

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.tokens]


@dataclass(frozen=True)
class Reference:
    """The answers of the checkpoint. ``logprobs`` has one matrix (T, V) for each, in float32 on the CPU.

    ``base_logprobs`` are those of the base model without the adapter, for the same tokens; ``None`` without an adapter.
    """

    answers: list[GreedyAnswer]
    logprobs: list[torch.Tensor]
    base_logprobs: list[torch.Tensor] | None
    ends: frozenset[int]
    template: str | None
    prompts: Prompts


def end_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """The tokens at which ``generate`` of transformers ends; the tokenizer's own if the model names none."""
    generation: Any = getattr(model, "generation_config", None)
    named = getattr(generation, "eos_token_id", None)
    if named is None:
        named = tokenizer.eos_token_id
    return frozenset({named} if isinstance(named, int) else cast("list[int]", named or []))


@torch.inference_mode()
def greedy_answer(model: Any, prompt: list[int], ends: frozenset[int]) -> GreedyAnswer:
    """The greedy answer to one prompt, with at most `MAX_ANSWER_TOKENS` tokens."""
    ids_1T = torch.tensor([prompt])
    tokens: list[int] = []
    cache: Any = None
    while len(tokens) < MAX_ANSWER_TOKENS:
        output = model(input_ids=ids_1T, past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        token = int(output.logits[0, -1].argmax())
        tokens.append(token)
        if token in ends:
            return GreedyAnswer(prompt, tokens, has_ended=True)
        ids_1T = torch.tensor([[token]] if cache is not None else [[*prompt, *tokens]])
    return GreedyAnswer(prompt, tokens, has_ended=False)


@torch.inference_mode()
def answer_logprobs(model: Any, answers: Sequence[GreedyAnswer]) -> list[torch.Tensor]:
    """For each answer the log probabilities (T, V) of its tokens, given all earlier ones."""
    result: list[torch.Tensor] = []
    for answer in answers:
        logits_TV = model(input_ids=torch.tensor([answer.ids]), use_cache=False).logits[0]
        of_answer_TV = logits_TV[len(answer.prompt) - 1 : -1]
        result.append(log_softmax(of_answer_TV.float(), dim=-1))
    return result


def read_reference(
    model: nn.Module, tokenizer: Any, without_adapter: Callable[[], Any] | None, prompts: Prompts
) -> Reference:
    """The answers of ``model``. ``without_adapter`` disables the adapter of the model and returns it."""
    ends = end_tokens(model, tokenizer)
    answers = [greedy_answer(model, ids, ends) for ids in prompts.ids]
    logprobs = answer_logprobs(model, answers)
    base = None if without_adapter is None else answer_logprobs(without_adapter(), answers)
    return Reference(answers, logprobs, base, ends, tokenizer.chat_template or None, prompts)
