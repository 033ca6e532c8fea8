"""The same training by four loops: ours, a bare PyTorch loop, Accelerate's, and `transformers.Trainer`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import work
from benchmarks.answer import OURS
from benchmarks.contestants import side_by_side
from benchmarks.stopwatch import Stopwatch
from benchmarks.work import WARM_UP_STEPS, Size

BATCH_SIZE, SEQ_LEN, VOCABULARY = 8, 256, 4096
BARE, ACCELERATE, TRAINER = "bare loop", "accelerate", "transformers.Trainer"


@dataclass(frozen=True)
class Task:
    """What one loop is given in one round; every loop the same."""

    size: Size
    folder: Path
    tokens: Path
    steps: int
    seq_len: int
    batches: Sequence[torch.Tensor]


def task(size: Size, folder: Path, steps: int) -> Task:
    folder.mkdir(parents=True, exist_ok=True)
    seq_len, vocabulary = size.of(SEQ_LEN, 16), size.of(VOCABULARY, work.SMALL_VOCABULARY)
    tokens = work.token_file(folder, num_tokens=2 * BATCH_SIZE * seq_len * steps, vocabulary=vocabulary)
    ordered = work.batches(tokens, seq_len=seq_len, batch_size=BATCH_SIZE, steps=steps)
    return Task(size, folder, tokens, steps, seq_len, ordered)


def ours(task: Task, model: nn.Module, stopwatch: Stopwatch, **options: Any) -> None:
    given: dict[str, Any] = {"seq_len": task.seq_len, "batch_size": BATCH_SIZE, "max_steps": task.steps, **options}
    with stopwatch.running(model):
        work.train_ours(model, task.folder / "ours", dataset=task.tokens, **given)


def bare(task: Task, model: nn.Module, stopwatch: Stopwatch) -> None:
    """Nothing but what must be done; it looks at its loss in each step, as the others do."""
    with stopwatch.running(model):
        optimizer = work.adamw(model)
        schedule = work.cosine(optimizer, task.steps)
        model.train()
        for batch in task.batches:
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), work.MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            loss.item()


def accelerated(task: Task, model: nn.Module, stopwatch: Stopwatch) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    loader = torch.utils.data.DataLoader(work.Rows(task.batches), batch_size=BATCH_SIZE)
    with stopwatch.running(model):
        optimizer = work.adamw(model)
        schedule = work.cosine(optimizer, task.steps)
        prepared, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        prepared.train()
        for batch in loader:
            with accelerator.accumulate(prepared):
                loss = prepared(**batch, use_cache=False).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(prepared.parameters(), work.MAX_GRAD_NORM)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            loss.item()
    accelerator.free_memory()


def trainer(task: Task, model: nn.Module, stopwatch: Stopwatch) -> None:
    from transformers import Trainer

    class InOrder(Trainer):
        """Its own sampler shuffles; the work is that of the others only in their order."""

        def _get_train_sampler(self, train_dataset: object = None) -> None:
            return None

    arguments = work.trainer_arguments(task.folder / "trainer", batch_size=BATCH_SIZE, steps=task.steps)
    with stopwatch.running(model):
        InOrder(model=model, args=arguments, train_dataset=work.Rows(task.batches)).train()


LOOPS: dict[str, Callable[[Task, nn.Module, Stopwatch], None]] = {
    OURS: ours,
    BARE: bare,
    ACCELERATE: accelerated,
    TRAINER: trainer,
}


@cache
def measured(size: Size) -> dict[str, list[Stopwatch]]:
    """A stopwatch for each loop and round; the loops take turns step by step.

    Asked for by several questions, run once.
    """
    stopwatches: dict[str, list[Stopwatch]] = {name: [] for name in LOOPS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(size.rounds):
            rounds = {name: partial(one_round, name, size, Path(folder) / f"{turn}-{name}") for name in LOOPS}
            for name, stopwatch in side_by_side(size, rounds).items():
                stopwatches[name].append(stopwatch)
    return stopwatches


def one_round(name: str, size: Size, folder: Path) -> Stopwatch:
    stopwatch = Stopwatch(skip=WARM_UP_STEPS)
    LOOPS[name](task(size, folder, size.steps + WARM_UP_STEPS), work.llama(size), stopwatch)
    assert len(stopwatch.steps) == size.steps, name
    return stopwatch


def tokens_per_step(size: Size) -> int:
    return BATCH_SIZE * size.of(SEQ_LEN, 16)


def seconds_of_turns(rounds: Sequence[Stopwatch]) -> list[float]:
    """Of each step of every round."""
    return [step.wall for watch in rounds for step in watch.steps]
