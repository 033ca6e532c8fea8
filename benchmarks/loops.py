"""The same work in four training loops: this project's, bare PyTorch, Accelerate, and `transformers.Trainer`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import workload
from benchmarks.contestants import run_in_turns
from benchmarks.result import ZETA
from benchmarks.stopwatch import Stopwatch
from benchmarks.workload import WARM_UP_STEPS, Size

BATCH_SIZE, SEQ_LEN, VOCABULARY = 8, 256, 4096
BARE, ACCELERATE, TRAINER = "bare loop", "accelerate", "transformers.Trainer"


@dataclass(frozen=True)
class Task:
    """The work of one round, the same for every loop."""

    size: Size
    folder: Path
    tokens: Path
    steps: int
    seq_len: int
    batches: Sequence[torch.Tensor]


def task(size: Size, folder: Path, steps: int) -> Task:
    folder.mkdir(parents=True, exist_ok=True)
    seq_len, vocab_size = size.of(SEQ_LEN, 16), size.of(VOCABULARY, workload.SMALL_VOCABULARY)
    tokens = workload.token_file(folder, num_tokens=2 * BATCH_SIZE * seq_len * steps, vocab_size=vocab_size)
    ordered = workload.batches(tokens, seq_len=seq_len, batch_size=BATCH_SIZE, steps=steps)
    return Task(size, folder, tokens, steps, seq_len, ordered)


def run_zeta(task: Task, model: nn.Module, stopwatch: Stopwatch, **options: Any) -> None:
    settings: dict[str, Any] = {"seq_len": task.seq_len, "batch_size": BATCH_SIZE, "max_steps": task.steps, **options}
    with stopwatch.running(model):
        workload.train_zeta(model, task.folder / "zeta", dataset=task.tokens, **settings)


def bare(task: Task, model: nn.Module, stopwatch: Stopwatch) -> None:
    """Only the necessary calls. Like the other loops, it reads the loss in each step."""
    with stopwatch.running(model):
        optimizer = workload.adamw(model)
        schedule = workload.cosine(optimizer, task.steps)
        model.train()
        for batch in task.batches:
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), workload.MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            loss.item()


def accelerated(task: Task, model: nn.Module, stopwatch: Stopwatch) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    loader = torch.utils.data.DataLoader(workload.Rows(task.batches), batch_size=BATCH_SIZE)
    with stopwatch.running(model):
        optimizer = workload.adamw(model)
        schedule = workload.cosine(optimizer, task.steps)
        prepared, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        prepared.train()
        for batch in loader:
            with accelerator.accumulate(prepared):
                loss = prepared(**batch, use_cache=False).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(prepared.parameters(), workload.MAX_GRAD_NORM)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            loss.item()
    accelerator.free_memory()


def trainer(task: Task, model: nn.Module, stopwatch: Stopwatch) -> None:
    from transformers import Trainer

    class InOrder(Trainer):
        """Trains in the given order, so that the work is the same; the default sampler shuffles."""

        def _get_train_sampler(self, train_dataset: object = None) -> None:
            return None

    arguments = workload.trainer_arguments(task.folder / "trainer", batch_size=BATCH_SIZE, steps=task.steps)
    with stopwatch.running(model):
        InOrder(model=model, args=arguments, train_dataset=workload.Rows(task.batches)).train()


LOOPS: dict[str, Callable[[Task, nn.Module, Stopwatch], None]] = {
    ZETA: run_zeta,
    BARE: bare,
    ACCELERATE: accelerated,
    TRAINER: trainer,
}


@cache
def measure_loops(size: Size) -> dict[str, list[Stopwatch]]:
    """A stopwatch for each loop and round. The loops take turns step by step.

    The result is cached, because several benchmarks use it.
    """
    stopwatches: dict[str, list[Stopwatch]] = {name: [] for name in LOOPS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(size.rounds):
            rounds = {name: partial(one_round, name, size, Path(folder) / f"{turn}-{name}") for name in LOOPS}
            for name, stopwatch in run_in_turns(size, rounds).items():
                stopwatches[name].append(stopwatch)
    return stopwatches


def one_round(name: str, size: Size, folder: Path) -> Stopwatch:
    stopwatch = Stopwatch(skip=WARM_UP_STEPS)
    LOOPS[name](task(size, folder, size.steps + WARM_UP_STEPS), workload.llama(size), stopwatch)
    assert len(stopwatch.steps) == size.steps, name
    return stopwatch


def tokens_per_step(size: Size) -> int:
    return BATCH_SIZE * size.of(SEQ_LEN, 16)


def seconds_of_steps(rounds: Sequence[Stopwatch]) -> list[float]:
    """The duration of each step of every round."""
    return [step.wall for stopwatch in rounds for step in stopwatch.steps]
