"""Generating a few samples at each evaluation: the model continues held-out prompts.

The prompt of a conversation is everything before the first answer that is trained on; the prompt of a text is its first
tokens. Sampling is cheap: at most `NUM_TOKENS` calls for each length of `NUM_PROMPTS` short sequences, cut off after
`MAX_SECONDS`. It is deterministic: the prompts and the random numbers, from a separate generator, are always the same,
so differences come from the model alone.

Shapes: B sequences, T tokens, V entries of the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from itertools import groupby, takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from zeta_core.contract.job.events import SampleLine
from zeta_core.data.sequences import MicroBatch
from zeta_core.data.tokens import TokenFile
from zeta_core.objective.loss import Convention, LossFunction
from zeta_core.parallel.processes import Processes
from zeta_core.report.reporter import Reporter

NUM_PROMPTS = 3
NUM_PROMPT_TOKENS = 32  # of a text
MAX_PROMPT_TOKENS = 256  # of a conversation; the last ones are used
MAX_DOCUMENTS = 1000  # that are searched for prompts of equal length
NUM_TOKENS = 32
TEMPERATURE = 0.8
MAX_SECONDS = 10.0


class SampleWriter:
    """Generates continuations of a few held-out prompts."""

    def __init__(
        self,
        held_out: TokenFile,
        seq_len: int,
        loss_function: LossFunction,
        tokenizer: Any,
        processes: Processes,
        device: torch.device,
        report: Reporter,
        *,
        ends: Collection[int],
        seed: int,
    ) -> None:
        """Without a ``tokenizer``, no samples are generated. A sample stops at the first of the tokens ``ends``."""
        self._ends = ends
        self._loss_function, self._tokenizer, self._seed = loss_function, tokenizer, seed
        self._processes, self._device, self._report = processes, device, report
        prompts = _conversation_prompts(held_out, max(seq_len // 2, min(MAX_PROMPT_TOKENS, seq_len - NUM_TOKENS)))
        if not prompts:
            prompts = _text_prompts(held_out, min(NUM_PROMPT_TOKENS, seq_len // 2))
        # Prompts of the same length form one batch.
        self._prompts = [np.stack(list(alike)) for _, alike in groupby(sorted(prompts, key=len), key=len)]
        self._seq_len = seq_len
        self._has_cache = "use_cache" in dict(loss_function.fixed)  # a Hugging Face model with a KV cache
        # A model that only returns a loss can't generate samples.
        can_generate = tokenizer is not None and loss_function.convention is not Convention.LABELS
        self._can_generate = can_generate and bool(self._prompts)

    def write(self, model: nn.Module, step: int) -> list[SampleLine]:
        """Generate one line for each prompt. All ranks must call this, because a sharded model needs them all."""
        if not self._can_generate:
            return []
        generator = torch.Generator().manual_seed(self._seed)
        lines: list[SampleLine] = []
        for prompts_BT in self._prompts:
            with torch.compiler.set_stance("force_eager"):  # lengths that occur once are not worth compiling for
                rows = self._continued(model, prompts_BT, generator)
            if not rows:
                self._report.log("This model returns no logits for the next token, so no samples are written.")
                self._can_generate = False
                return []
            length = prompts_BT.shape[1]
            lines += [
                SampleLine(step=step, prompt=self._text(row[:length]), text=self._text(self._until_end(row[length:])))
                for row in rows
            ]
        return lines

    def _continued(
        self, model: nn.Module, prompts_BT: NDArray[np.int64], generator: torch.Generator
    ) -> list[list[int]]:
        """The prompts with the model's continuations; empty if the model can't generate."""
        began, max_seconds = time.monotonic(), MAX_SECONDS / len(self._prompts)
        ids_BT = torch.from_numpy(prompts_BT).to(self._device)
        past: Any = None
        for _ in range(min(NUM_TOKENS, self._seq_len - prompts_BT.shape[1])):
            if self._has_cache:
                unread_BT = ids_BT if past is None else ids_BT[:, -1:]
                output = model(input_ids=unread_BT, past_key_values=past, use_cache=True)
                past = getattr(output, "past_key_values", None)
                logits_BV = output.logits[:, -1, : len(self._tokenizer)]
            else:
                logits_BV = self._next_logits(model, ids_BT)
            if logits_BV is None:
                return []
            weights_BV = torch.softmax(logits_BV.float().cpu() / TEMPERATURE, dim=-1)
            drawn_B = torch.multinomial(weights_BV, 1, generator=generator)[:, 0]
            is_main = self._processes.is_main
            too_long = float(time.monotonic() - began > max_seconds)
            # The first rank decides for all ranks: the drawn tokens, and whether time is up.
            decision = torch.cat((drawn_B.double(), torch.tensor([too_long]).double())) * is_main
            *drawn, stop = self._processes.sum(decision.to(self._device))
            ids_BT = torch.cat((ids_BT, torch.tensor(drawn, device=self._device).long()[:, None]), dim=1)
            if stop:
                break
        return ids_BT.tolist()

    def _next_logits(self, model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor | None:
        logits_BTV = self._logits(model, ids_BT)
        length = ids_BT.shape[1]
        if logits_BTV is not None and length > 1 and logits_BTV.shape[1] == length - 1:
            # A wrapper that reserves the last token for its loss gets one extra token.
            logits_BTV = self._logits(model, torch.cat((ids_BT, ids_BT[:, -1:]), dim=1))
            length += 1
        if logits_BTV is None or logits_BTV.shape[1] not in (1, ids_BT.shape[1]):
            return None
        return logits_BTV[:, -1, : len(self._tokenizer)]

    def _logits(self, model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor | None:
        positions_BT = torch.arange(ids_BT.shape[1], device=self._device).expand_as(ids_BT)
        batch = MicroBatch(ids_BT=ids_BT, labels_BT=ids_BT, positions_BT=positions_BT, segments_BT=None, num_targets=0)
        try:
            return self._loss_function.logits_in(self._loss_function.call(model, batch))
        except TypeError:  # its forward cannot be called without targets
            return None

    def _until_end(self, ids: list[int]) -> list[int]:
        return list(takewhile(lambda token: token not in self._ends, ids))

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _conversation_prompts(tokens: TokenFile, max_tokens: int) -> list[NDArray[np.int64]]:
    """The last ``max_tokens`` tokens before the first answers of a few conversations, if there are any.

    Prompts of the same length form one batch, so the conversations are chosen whose lengths differ least.
    """
    if tokens.supervised is None or not tokens.has_whole_documents:
        return []
    step = 2 if tokens.has_pairs else 1  # both answers of a pair have the same prompt
    conversations = np.arange(0, tokens.num_documents, step)[:MAX_DOCUMENTS]
    starts, lengths = tokens.offsets[conversations], np.zeros(len(conversations), dtype=np.int64)
    for index, (start, end) in enumerate(zip(starts, tokens.offsets[conversations + 1], strict=True)):
        indices = tokens.where(np.arange(int(start), int(end)))
        lengths[index] = int(np.argmax(tokens.supervised[indices]))  # 0: nothing is trained on
    eligible = np.flatnonzero(lengths > 1)  # at 1, everything is trained on: a text
    if not len(eligible):
        return []
    by_length = eligible[np.argsort(lengths[eligible], kind="stable")]
    count = min(NUM_PROMPTS, len(eligible))
    shown = np.minimum(lengths[by_length], max_tokens)
    spreads = shown[count - 1 :] - shown[: len(shown) - count + 1]
    alike = np.flatnonzero(spreads == spreads.min())
    first = alike[len(alike) // 2]
    chosen = np.sort(by_length[first : first + count])
    ends = starts[chosen] + lengths[chosen]
    spans = [np.arange(end - min(length, max_tokens), end) for end, length in zip(ends, lengths[chosen], strict=True)]
    return [tokens.ids[tokens.where(span)].astype(np.int64) for span in spans]


def _text_prompts(tokens: TokenFile, length: int) -> list[NDArray[np.int64]]:
    """The first ``length`` tokens of the first few documents that are long enough, or else of the longest one."""
    starts, lengths = np.asarray(tokens.offsets[:-1]), np.diff(tokens.offsets)
    length = max(1, min(length, int(lengths.max()) - 1))
    chosen = starts[lengths > length][:NUM_PROMPTS]
    return list(tokens.ids[tokens.where(chosen[:, None] + np.arange(length))].astype(np.int64))
