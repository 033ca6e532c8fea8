"""Tokens a second of a LoRA fine-tune on identical work: ours, and peft's model under `transformers.Trainer`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks import loops, work
from benchmarks.answer import OURS, Answer, ratio_of_rounds
from benchmarks.contestants import turn_of
from benchmarks.stopwatch import Stopwatch
from benchmarks.work import WARM_UP_STEPS, Size

PEER = "peft + transformers.Trainer"
RANK, ALPHA = 16, 32


def ours(task: loops.Task, stopwatch: Stopwatch) -> None:
    lora = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0, "target_modules": "all-linear"}
    loops.ours(task, work.llama(task.size), stopwatch, lora=lora)


def peer(task: loops.Task, stopwatch: Stopwatch) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(work.llama(task.size), config)  # pyright: ignore[reportArgumentType]
    loops.trainer(task, adapted, stopwatch)


def one_round(name: str, size: Size, folder: Path) -> float:
    """Tokens a second."""
    task, stopwatch = loops.task(size, folder, size.steps + WARM_UP_STEPS), Stopwatch(skip=WARM_UP_STEPS)
    (ours if name == OURS else peer)(task, stopwatch)
    assert len(stopwatch.steps) == size.steps
    return task.tokens_per_step / stopwatch.seconds_per_step


def measure(size: Size) -> Answer:
    speed: dict[str, list[float]] = {OURS: [], PEER: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(size.rounds):
            for name in (OURS, PEER)[:: 1 if turn % 2 == 0 else -1]:
                process = OURS if name == OURS else loops.TRAINER
                speed[name].append(turn_of(process, size, one_round, name, size, Path(folder) / f"{turn}-{name}"))
    return Answer(
        question="LoRA on identical work, ours by peft + transformers.Trainer's",
        unit="tokens/s",
        figures=speed,
        ratio=ratio_of_rounds(speed[OURS], speed[PEER]),
        bar=1.0,
        better="at least",
        notes=f"Rank {RANK} in all linear layers of 6.8 M parameters, 8 x 256 tokens a step.",
    )
