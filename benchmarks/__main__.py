"""``python -m benchmarks [NAME...] [--small]``: ask the questions, print one table, write JSON."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks import (
    activation_memory,
    checkpoint_blocking,
    data_wait,
    evaluation,
    loop_overhead,
    lora,
    mixed_documents,
    resume_time,
    throughput,
)
from benchmarks.answer import Answer, machine, table, write
from benchmarks.work import FULL, SMALL, Size

QUESTIONS: dict[str, Callable[[Size], Answer]] = {
    "loop-overhead": loop_overhead.measure,
    "throughput": throughput.measure,
    "mixed-documents": mixed_documents.measure,
    "checkpoint-blocking": checkpoint_blocking.measure,
    "resume-time": resume_time.measure,
    "activation-memory": activation_memory.measure,
    "data-wait": data_wait.measure,
    "lora": lora.measure,
    "evaluation": evaluation.measure,
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(QUESTIONS)}; all if none")
    parser.add_argument("--small", action="store_true", help="tiny sizes: whether it runs, not how fast")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.names) - QUESTIONS.keys():
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(QUESTIONS)}")
    about = machine()
    answers: list[Answer] = []
    for name in asked.names or QUESTIONS:
        started = time.perf_counter()
        answers.append(QUESTIONS[name](SMALL if asked.small else FULL))
        print(f"{name}: ratio {answers[-1].ratio:.3g} ({time.perf_counter() - started:.0f} s)", file=sys.stderr)
    about |= {"load_average_at_the_end": machine()["load_average_1_5_15_minutes"], "threads": torch.get_num_threads()}
    print("\n" + table(answers))
    print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"\nAll figures: {write(answers, about)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
