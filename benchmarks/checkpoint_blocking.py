"""How long a checkpoint of 110 million parameters (1.3 GB with AdamW's moments) blocks training.

For this project, this is the time that the loop spends in a save, or waits before an update until copying is complete.
For Accelerate, it is the duration of `accelerator.save_state`. This project flushes, hashes and publishes the files
while training continues, which slows the steps down. ``details`` therefore contains the delay per save for both.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import loops, workload
from benchmarks.contestants import run_isolated
from benchmarks.result import ZETA, BenchmarkResult, ratio_of_rounds
from benchmarks.workload import Size
from zeta_core.checkpoint.staging import Staging
from zeta_core.train.checkpointing import Checkpointer

SEQ_LEN, BATCH_SIZE, VOCABULARY = 128, 1, 32000
SAVE_EVERY, SAVE_EVERY_SMALL = 8, 2  # steps
SAVES = 2  # in each round; only the first one allocates buffers
SAVE_STATE = "accelerator.save_state"


def build_model(size: Size) -> nn.Module:
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    return workload.llama(size, **shape, vocab_size=VOCABULARY, tie_word_embeddings=True)


@dataclass
class SaveTimings:
    """The seconds for which each save blocked the training thread, and the time at which each step finished."""

    blocked_seconds: list[float] = field(default_factory=list[float])
    finished_at: list[float] = field(default_factory=list[float])

    def record_step(self) -> None:
        self.finished_at.append(time.perf_counter())

    @contextmanager
    def timing(self) -> Generator[None]:
        """Within the context, time every save before the last one, including the copying that an update waits for."""
        save, finish = Checkpointer.save, Staging.finish
        timings, training_thread = self, threading.current_thread()

        @wraps(save)
        def timed_save(self: Checkpointer, *names: str) -> None:
            started = time.perf_counter()
            save(self, *names)
            if names[0].startswith("step-"):
                timings.blocked_seconds.append(time.perf_counter() - started)

        @wraps(finish)
        def timed_finish(self: Staging) -> None:
            started = time.perf_counter()
            finish(self)
            if timings.blocked_seconds and threading.current_thread() is training_thread:
                timings.blocked_seconds[-1] += time.perf_counter() - started

        Checkpointer.save, Staging.finish = timed_save, timed_finish
        try:
            yield
        finally:
            Checkpointer.save, Staging.finish = save, finish

    def delay_per_save(self) -> float:
        """The seconds by which each save delayed the end of all steps."""
        measured = self.finished_at[workload.WARM_UP_STEPS :]
        periods = [after - before for before, after in pairwise(measured)]
        return (sum(periods) - len(periods) * statistics.median(periods)) / max(1, len(self.blocked_seconds))


def run_zeta(size: Size, folder: Path, tokens: Path) -> SaveTimings:
    timings = SaveTimings()
    with timings.timing():
        workload.train_zeta(
            build_model(size),
            folder,
            dataset=tokens,
            seq_len=SEQ_LEN,
            batch_size=BATCH_SIZE,
            max_steps=_steps(size),
            checkpointing_steps=size.of(SAVE_EVERY, SAVE_EVERY_SMALL),
            stop=timings.record_step,
        )
    return timings


def save_state(size: Size, folder: Path, tokens: Path) -> SaveTimings:
    from accelerate import Accelerator

    batches = workload.batches(tokens, seq_len=SEQ_LEN, batch_size=BATCH_SIZE, steps=_steps(size))
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = build_model(size)
    model, optimizer = accelerator.prepare(model, workload.adamw(model))
    timings = SaveTimings()
    model.train()
    for step, batch in enumerate(batches, 1):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), workload.MAX_GRAD_NORM)
        timings.record_step()
        optimizer.step()
        optimizer.zero_grad()
        if step % size.of(SAVE_EVERY, SAVE_EVERY_SMALL) == 0:
            started = time.perf_counter()
            accelerator.save_state(str(folder / f"state-{step}"))
            timings.blocked_seconds.append(time.perf_counter() - started)
    accelerator.free_memory()
    return timings


def _steps(size: Size) -> int:
    return (SAVES + 1) * size.of(SAVE_EVERY, SAVE_EVERY_SMALL) - 1


def measure(size: Size) -> BenchmarkResult:
    blocked: dict[str, list[float]] = {ZETA: [], SAVE_STATE: []}
    delays: dict[str, list[float]] = {ZETA: [], SAVE_STATE: []}
    steps, vocab_size = _steps(size), size.of(VOCABULARY, workload.SMALL_VOCABULARY)
    for turn in range(max(1, size.rounds // 2)):
        with tempfile.TemporaryDirectory() as folder:
            tokens = workload.token_file(Path(folder), num_tokens=2 * SEQ_LEN * steps, vocab_size=vocab_size)
            runs = [(ZETA, ZETA, run_zeta), (SAVE_STATE, loops.ACCELERATE, save_state)]
            for name, process, train in runs[:: 1 if turn % 2 == 0 else -1]:
                timings = run_isolated(process, size, train, size, Path(folder) / process, tokens)
                assert len(timings.blocked_seconds) == SAVES, (name, timings.blocked_seconds)
                blocked[name] += timings.blocked_seconds
                delays[name].append(timings.delay_per_save())
    details: dict[str, Any] = {"first_save": blocked[ZETA][::SAVES], "later_saves": blocked[ZETA][1::SAVES]}
    return BenchmarkResult(
        title="Time for which a checkpoint blocks the run, relative to accelerator.save_state",
        unit="s",
        figures=blocked,
        ratio=ratio_of_rounds(blocked[ZETA], blocked[SAVE_STATE]),
        target=0.35,
        target_is="maximum",
        notes="110 M parameters, 1.32 GB; first and later saves.",
        details={**details, "steps_done_later_by": delays},
    )
