"""How long training stands still for a checkpoint of 110 million parameters (1.3 GB with AdamW's moments).

Ours: the time in which the loop is in a save, or waits before an update for what is still being copied. The peer's:
the call of `accelerator.save_state`. Ours is flushed to the disk, hashed and published while training goes on, which
takes the machine's time, too: ``more`` has how much later the steps were done because of a save, both ways.
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

from benchmarks import loops, work
from benchmarks.answer import OURS, Answer, ratio_of_rounds
from benchmarks.contestants import turn_of
from benchmarks.work import Size
from zeta_core.checkpoint.staging import Staging
from zeta_core.train.checkpointing import Checkpointer

SEQ_LEN, BATCH_SIZE, VOCABULARY = 128, 1, 32000
EVERY, FEW, SAVES = (
    8,
    2,
    2,
)  # steps from one save to the next; saves in a round: the first is the one whose memory is new
SAVE_STATE = "accelerator.save_state"


def model_of(size: Size) -> nn.Module:
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    return work.llama(size, **shape, vocab_size=VOCABULARY, tie_word_embeddings=True)


@dataclass
class Waits:
    """Seconds that the training's own thread spent in each save, and when its steps were done."""

    saves: list[float] = field(default_factory=list[float])
    steps_at: list[float] = field(default_factory=list[float])

    def step_done(self) -> None:
        self.steps_at.append(time.perf_counter())

    @contextmanager
    def counted(self) -> Generator[None]:
        """Within it every save in the course of a training is counted, with the copying that its update waits for."""
        save, finish = Checkpointer.save, Staging.finish
        waits, trains = self, threading.current_thread()

        @wraps(save)
        def timed_save(self: Checkpointer, *names: str) -> None:
            started = time.perf_counter()
            save(self, *names)
            if names[0].startswith("step-"):
                waits.saves.append(time.perf_counter() - started)

        @wraps(finish)
        def timed_finish(self: Staging) -> None:
            started = time.perf_counter()
            finish(self)
            if waits.saves and threading.current_thread() is trains:
                waits.saves[-1] += time.perf_counter() - started

        Checkpointer.save, Staging.finish = timed_save, timed_finish
        try:
            yield
        finally:
            Checkpointer.save, Staging.finish = save, finish

    def seconds_later(self) -> float:
        """How much later all steps were done than without the saves, for each of them."""
        measured = self.steps_at[work.WARM_UP_STEPS :]
        periods = [after - before for before, after in pairwise(measured)]
        return (sum(periods) - len(periods) * statistics.median(periods)) / max(1, len(self.saves))


def ours(size: Size, folder: Path, tokens: Path) -> Waits:
    waits = Waits()
    with waits.counted():
        work.train_ours(
            model_of(size),
            folder,
            dataset=tokens,
            seq_len=SEQ_LEN,
            batch_size=BATCH_SIZE,
            max_steps=_steps(size),
            checkpointing_steps=size.of(EVERY, FEW),
            stop=waits.step_done,
        )
    return waits


def save_state(size: Size, folder: Path, tokens: Path) -> Waits:
    from accelerate import Accelerator

    batches = work.batches(tokens, seq_len=SEQ_LEN, batch_size=BATCH_SIZE, steps=_steps(size))
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = model_of(size)
    model, optimizer = accelerator.prepare(model, work.adamw(model))
    waits = Waits()
    model.train()
    for step, batch in enumerate(batches, 1):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), work.MAX_GRAD_NORM)
        waits.step_done()
        optimizer.step()
        optimizer.zero_grad()
        if step % size.of(EVERY, FEW) == 0:
            started = time.perf_counter()
            accelerator.save_state(str(folder / f"state-{step}"))
            waits.saves.append(time.perf_counter() - started)
    accelerator.free_memory()
    return waits


def _steps(size: Size) -> int:
    return (SAVES + 1) * size.of(EVERY, FEW) - 1


def measure(size: Size) -> Answer:
    blocked: dict[str, list[float]] = {OURS: [], SAVE_STATE: []}
    later: dict[str, list[float]] = {OURS: [], SAVE_STATE: []}
    steps, vocabulary = _steps(size), size.of(VOCABULARY, work.SMALL_VOCABULARY)
    for turn in range(max(1, size.rounds // 2)):
        with tempfile.TemporaryDirectory() as folder:
            tokens = work.token_file(Path(folder), num_tokens=2 * SEQ_LEN * steps, vocabulary=vocabulary)
            runs = [(OURS, OURS, ours), (SAVE_STATE, loops.ACCELERATE, save_state)]
            for name, process, train in runs[:: 1 if turn % 2 == 0 else -1]:
                waits = turn_of(process, size, train, size, Path(folder) / process, tokens)
                assert len(waits.saves) == SAVES, (name, waits.saves)
                blocked[name] += waits.saves
                later[name].append(waits.seconds_later())
    more: dict[str, Any] = {"first_save": blocked[OURS][::SAVES], "later_saves": blocked[OURS][1::SAVES]}
    return Answer(
        question="Training stands still for a checkpoint, ours by accelerator.save_state's",
        unit="s",
        figures=blocked,
        ratio=ratio_of_rounds(blocked[OURS], blocked[SAVE_STATE]),
        bar=0.35,
        better="at most",
        notes="110 M parameters, 1.32 GB; first and later saves.",
        more={**more, "steps_done_later_by": later},
    )
