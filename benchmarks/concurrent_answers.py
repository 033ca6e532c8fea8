"""Tokens per second of 8 chats that are answered at the same time, relative to the same chats one after the other."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import ByT5Tokenizer

from benchmarks import workload
from benchmarks.result import BenchmarkResult, ratio_of_rounds
from benchmarks.workload import Size
from zeta_core.contract.wire.answers import AnswerOptions, Generate, Generated, Prompt
from zeta_core.serve.generation import Generation
from zeta_core.serve.loading import LoadedModel

CHATS, PROMPT_TOKENS, TOKENS = 8, 64, 96
SEQUENTIAL, CONCURRENT = "one after the other", "at the same time"


def seconds(generation: Generation, chats: int, num_tokens: int, *, at_once: bool) -> float:
    """The time to answer all chats with exactly this many tokens each."""
    options = AnswerOptions(max_tokens=num_tokens, temperature=1.0, seed=1)
    started = time.perf_counter()
    for number in range(chats):
        prompt = Prompt(text=[4 + (number * 31 + position) % 255 for position in range(PROMPT_TOKENS)])
        generation.add(Generate(request_id=str(number), prompt=prompt, options=options))
        while not at_once and not generation.is_idle:
            generation.step()
    while not generation.is_idle:
        generation.step()
    return time.perf_counter() - started


def measure(size: Size) -> BenchmarkResult:
    num_tokens = size.of(TOKENS, 4)
    sent: list[Generated] = []
    tokenizer: Any = ByT5Tokenizer()
    model = workload.llama(size).eval()
    generation = Generation(LoadedModel(model, tokenizer, torch.device("cpu"), frozenset(), 2048), sent.append)
    seconds(generation, CHATS, 4, at_once=True)  # warms up
    rates: dict[str, list[float]] = {SEQUENTIAL: [], CONCURRENT: []}
    for _ in range(size.rounds):
        for name in rates:
            sent.clear()
            took = seconds(generation, CHATS, num_tokens, at_once=name == CONCURRENT)
            counted = sum(piece.num_tokens for part in sent for piece in part.pieces if piece.finish_reason is not None)
            assert counted == CHATS * num_tokens
            rates[name].append(counted / took)
    return BenchmarkResult(
        title=f"{CHATS} chats at the same time, relative to one after the other",
        unit="tokens/s",
        figures=rates,
        ratio=ratio_of_rounds(rates[CONCURRENT], rates[SEQUENTIAL]),
        target=2.0,
        target_is="minimum",
        notes=f"{PROMPT_TOKENS} prompt tokens and {num_tokens} answer tokens each, 6.8 M parameters.",
    )
