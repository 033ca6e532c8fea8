"""Packed documents in long sequences: tokens per second with attention within documents, and with a dense mask.

The documents are the topics of the Python language reference, packed into sequences of 2,048 bytes. Both
implementations train the same model on the same batches, in turns.
"""

from __future__ import annotations

import time
from pydoc_data.topics import topics

import torch

from benchmarks import workload
from benchmarks.result import BenchmarkResult, ratio_of_rounds
from benchmarks.workload import Size
from zeta_core.data.sequences import MicroBatch
from zeta_core.objective.attention import attention_implementation
from zeta_core.objective.isolation import Isolation
from zeta_core.objective.loss import Convention, LossFunction

SEQ_LEN, VOCABULARY = 2048, 384
NAMES = {"varlen": "within documents", "sdpa": "dense mask"}


def packed_batch(seq_len: int, document: int) -> MicroBatch:
    """One sequence of bytes; each part of up to ``document`` bytes of a paragraph is a document."""
    parts = [part.encode()[:document] for topic in topics.values() for part in topic.split("\n\n") if part]
    ids: list[int] = []
    segments: list[int] = []
    positions: list[int] = []
    for number, part in enumerate(parts):
        ids += [byte + 3 for byte in part]
        segments += [number] * len(part)
        positions += range(len(part))
        if len(ids) >= seq_len:
            break
    ids_BT, segments_BT, positions_BT = (torch.tensor(values[:seq_len])[None] for values in (ids, segments, positions))
    labels_BT = ids_BT.masked_fill(positions_BT == 0, -100)
    return MicroBatch(ids_BT, labels_BT, positions_BT, segments_BT, int((labels_BT >= 0).sum()))


def measure(size: Size) -> BenchmarkResult:
    seq_len = size.of(SEQ_LEN, 128)
    batch = packed_batch(seq_len, document=512)
    model = workload.llama(size, vocab_size=VOCABULARY)
    loss_function = LossFunction(
        Convention.LOGITS, "input_ids", isolation=Isolation(positions=True), fixed=(("use_cache", False),)
    )

    def seconds(name: str) -> float:
        with attention_implementation(model, name):
            began = time.perf_counter()
            loss_function(model, batch)[0].backward()
            model.zero_grad()
            return time.perf_counter() - began

    figures: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(workload.WARM_UP_STEPS + size.rounds * size.steps):
        for name in NAMES:
            speed = seq_len / seconds(name)
            if number >= workload.WARM_UP_STEPS:
                figures[name].append(speed)
    length = seq_len / int((batch.positions_BT == 0).sum())
    return BenchmarkResult(
        title="Attention within packed documents, relative to a dense mask",
        unit="tokens/s",
        figures={NAMES[name]: speeds for name, speeds in figures.items()},
        ratio=ratio_of_rounds(figures["varlen"], figures["sdpa"]),
        target=1.2,
        target_is="minimum",
        notes=f"6 layers of 256, one sequence of {seq_len:,} tokens; documents of {length:.0f} tokens on average.",
    )
