"""The prompts for comparing an export with its checkpoint: beginnings of the job's own held-out documents.

A conversation is continued with the first answer that the job trains on, and a text after its first tokens. Without
held-out data, or if it can't be read any more, the export is compared on fixed prompts. They are not in the training
data, except by chance, so they don't only measure what the model memorized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import JsonValue, ValidationError

from zeta_core.contract.spec.held_out import HeldOutData
from zeta_core.contract.spec.sources import dataset_sources
from zeta_core.data.sequences import Sequences
from zeta_core.data.sources import SourceLocations, open_sources
from zeta_core.data.tokens import TokenFile, prepare_tokens
from zeta_core.data.tokens.held_out import hold_out
from zeta_core.failures import InvalidData, TrainingFailed
from zeta_core.report.reporter import Reporter

FIXED_PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How many days does a week have?",
    "Name three colours.",
    "Explain in one sentence why the sky is blue.",
    "Translate 'good morning' into German.",
    "What is 12 plus 30?",
    "Give a short piece of advice to a new colleague.",
)
NUM_PROMPTS = 8
MAX_PROMPT_TOKENS = 256
TEXT_PROMPT_TOKENS = 64  # of a text that is continued
MAX_DATA_BYTES = 256 << 20  # more would take long to read for eight prompts
_NUM_CANDIDATES = 64  # documents; the first suitable ones are used

PromptSource = Literal["eval_dataset", "eval_split", "fixed"]


@dataclass(frozen=True)
class Prompts:
    """Prompts as token ids.

    ``names`` are the locations of documents, such as ``chats.jsonl, line 3``, or the fixed prompts. ``texts`` are the
    rendered prompts, and ``text_ids`` their ids as the checkpoint's tokenizer encodes them. ``reason`` says why fixed
    prompts were used.
    """

    source: PromptSource
    names: tuple[str, ...]
    ids: list[list[int]]
    texts: list[str]
    text_ids: list[list[int]]
    reason: str | None = None


def choose_prompts(
    held_out: JsonValue,
    tokenizer: Any,
    locations: SourceLocations,
    cache: Path,
    report: Reporter,
    *,
    context_tokens: int | None,
) -> Prompts:
    """The prompts from a job's `HeldOutData`, or fixed ones with the reason.

    ``context_tokens`` is the longest sequence that the model supports.
    """
    if held_out is None:
        return fixed_prompts(tokenizer, reason="the job has no held-out data, or its file was deleted")
    try:
        return held_out_prompts(
            HeldOutData.model_validate(held_out), tokenizer, locations, cache, report, context_tokens=context_tokens
        )
    except (TrainingFailed, OSError, ValidationError) as error:
        problem = error.message if isinstance(error, TrainingFailed) else str(error).splitlines()[0]
        reason = f"the job's held-out data can't be used: {problem}"
        report.log(f"The export is compared on fixed prompts, because {reason}")
        return fixed_prompts(tokenizer, reason=reason)


def fixed_prompts(tokenizer: Any, prompts: Sequence[str] = FIXED_PROMPTS, *, reason: str) -> Prompts:
    """Questions in the chat template, or texts to continue."""
    texts = [_rendered(tokenizer, text) if tokenizer.chat_template else text for text in prompts]
    ids = encoded(tokenizer, texts)
    return Prompts("fixed", tuple(prompts), ids, texts, ids, reason)


def held_out_prompts(
    data: HeldOutData,
    tokenizer: Any,
    locations: SourceLocations,
    cache: Path,
    report: Reporter,
    *,
    context_tokens: int | None,
) -> Prompts:
    """Up to `NUM_PROMPTS` prompts from documents that are spread over the held-out data. Raises `InvalidData`."""
    tokens = _read(data, tokenizer, locations, cache, report)
    if tokens.largest_id >= len(tokenizer):
        raise InvalidData(
            f"it contains token {tokens.largest_id}, but the checkpoint's tokenizer has {len(tokenizer)} tokens."
        )
    limit = min(MAX_PROMPT_TOKENS, *([] if context_tokens is None else [max(1, context_tokens // 2)]))
    names: list[str] = []
    ids: list[list[int]] = []
    for name, prompt in _candidates(tokens, limit):
        if prompt not in ids and len(ids) < NUM_PROMPTS:
            names.append(name)
            ids.append(prompt)
    if not ids:
        raise InvalidData(f"it has no document with an answer after at most {limit} tokens.")
    texts = [_decoded(tokenizer, prompt) for prompt in ids]
    source = "eval_dataset" if data.eval_split is None else "eval_split"
    return Prompts(source, tuple(names), ids, texts, encoded(tokenizer, texts))


def encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of rendered texts."""
    return [cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def _read(data: HeldOutData, tokenizer: Any, locations: SourceLocations, cache: Path, report: Reporter) -> TokenFile:
    """The held-out documents, as the training read them."""
    sources = open_sources(
        dataset_sources(data.dataset),
        locations,
        pretokenized=data.use_pretokenized,
        method=data.method,
        split="held_out" if data.eval_split is None else "train",
    )
    num_bytes = sum(source.num_bytes for source in sources)
    if num_bytes > MAX_DATA_BYTES:
        raise InvalidData(f"it is {num_bytes >> 20} MiB, more than the {MAX_DATA_BYTES >> 20} MiB that are read again.")
    if data.eval_split is not None and data.group_by is not None:
        sources = [replace(source, group_by=data.group_by) for source in sources]
    tokens = prepare_tokens(
        sources,
        tokenizer,
        cache,
        report,
        train_on=data.train_on,
        method=data.method,
        today=data.template_date,
        processes=torch.get_num_threads(),
    )
    return tokens if data.eval_split is None else hold_out(tokens, data.eval_split, data.seed).held_out


def _candidates(tokens: TokenFile, limit: int) -> list[tuple[str, list[int]]]:
    """Prompts of at most ``limit`` tokens with the locations of their documents, spread evenly over the documents."""
    parts = Sequences(tokens, limit + 1, pack=False)
    number = len(parts)
    chosen = np.linspace(0, number - 1, min(number, _NUM_CANDIDATES)).round().astype(np.int64)
    found: list[tuple[str, list[int]]] = []
    for start, end in zip(*(bounds.tolist() for bounds in parts.spans(chosen)), strict=True):
        at = tokens.where(np.arange(start, end))
        length = min(TEXT_PROMPT_TOKENS, (end - start) // 2)
        if tokens.supervised is not None:
            length = int(np.argmax(tokens.supervised[at]))
        if not length:  # the later part of a long text
            continue
        document = int(np.searchsorted(tokens.offsets, start, "right")) - 1
        found.append((tokens.location(document), tokens.ids[at[:length]].astype(np.int64).tolist()))
    every = max(1, len(found) // NUM_PROMPTS)
    return [found[number] for first in range(every) for number in range(first, len(found), every)]


def _rendered(tokenizer: Any, question: str) -> str:
    turns = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
