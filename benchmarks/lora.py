"""Tokens per second of LoRA fine-tuning on identical work, compared with peft under `transformers.Trainer`."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import loops, workload
from benchmarks.contestants import run_in_turns
from benchmarks.result import ZETA, BenchmarkResult, ratio_of_rounds
from benchmarks.stopwatch import Stopwatch
from benchmarks.workload import WARM_UP_STEPS, Size

PEFT = "peft + transformers.Trainer"
RANK, ALPHA = 16, 32


def run_zeta(task: loops.Task, stopwatch: Stopwatch) -> None:
    lora = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0, "target_modules": "all-linear"}
    loops.run_zeta(task, workload.llama(task.size), stopwatch, lora=lora)


def run_trainer(task: loops.Task, stopwatch: Stopwatch) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(workload.llama(task.size), config)  # pyright: ignore[reportArgumentType]
    loops.trainer(task, adapted, stopwatch)


def one_round(name: str, size: Size, folder: Path) -> Stopwatch:
    task, stopwatch = loops.task(size, folder, size.steps + WARM_UP_STEPS), Stopwatch(skip=WARM_UP_STEPS)
    (run_zeta if name == ZETA else run_trainer)(task, stopwatch)
    assert len(stopwatch.steps) == size.steps
    return stopwatch


def measure(size: Size) -> BenchmarkResult:
    stopwatches: dict[str, list[Stopwatch]] = {ZETA: [], PEFT: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(size.rounds):
            rounds = {
                process: partial(one_round, name, size, Path(folder) / f"{turn}-{process}")
                for name, process in ((ZETA, ZETA), (PEFT, loops.TRAINER))
            }
            found = run_in_turns(size, rounds)
            stopwatches[ZETA].append(found[ZETA])
            stopwatches[PEFT].append(found[loops.TRAINER])
    tokens = loops.tokens_per_step(size)
    return BenchmarkResult(
        title="LoRA on identical work, relative to peft + transformers.Trainer",
        unit="tokens/s",
        figures={
            name: [tokens / stopwatch.seconds_per_step for stopwatch in rounds] for name, rounds in stopwatches.items()
        },
        ratio=ratio_of_rounds(loops.seconds_of_steps(stopwatches[PEFT]), loops.seconds_of_steps(stopwatches[ZETA])),
        target=1.05,
        target_is="minimum",
        notes=f"Rank {RANK} in all linear layers of 6.8 M parameters, 8 x 256 tokens per step.",
    )
