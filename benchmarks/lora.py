"""Tokens a second of a LoRA fine-tune on identical work: ours, and peft's model under `transformers.Trainer`."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import loops, work
from benchmarks.answer import OURS, Answer, ratio_of_rounds
from benchmarks.contestants import side_by_side
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


def one_round(name: str, size: Size, folder: Path) -> Stopwatch:
    task, stopwatch = loops.task(size, folder, size.steps + WARM_UP_STEPS), Stopwatch(skip=WARM_UP_STEPS)
    (ours if name == OURS else peer)(task, stopwatch)
    assert len(stopwatch.steps) == size.steps
    return stopwatch


def measure(size: Size) -> Answer:
    watches: dict[str, list[Stopwatch]] = {OURS: [], PEER: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(size.rounds):
            rounds = {
                process: partial(one_round, name, size, Path(folder) / f"{turn}-{process}")
                for name, process in ((OURS, OURS), (PEER, loops.TRAINER))
            }
            found = side_by_side(size, rounds)
            watches[OURS].append(found[OURS])
            watches[PEER].append(found[loops.TRAINER])
    tokens = loops.tokens_per_step(size)
    return Answer(
        question="LoRA on identical work, ours by peft + transformers.Trainer's",
        unit="tokens/s",
        figures={name: [tokens / watch.seconds_per_step for watch in rounds] for name, rounds in watches.items()},
        ratio=ratio_of_rounds(loops.seconds_of_turns(watches[PEER]), loops.seconds_of_turns(watches[OURS])),
        bar=1.0,
        better="at least",
        notes=f"Rank {RANK} in all linear layers of 6.8 M parameters, 8 x 256 tokens a step.",
    )
