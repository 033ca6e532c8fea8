"""``python -m benchmarks [NAME...] [--small]``: run benchmarks, print one table and write JSON."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks import (
    activation_memory,
    best_settings,
    checkpoint_blocking,
    command_line,
    concurrent_answers,
    dashboard,
    data_wait,
    demo_start,
    evaluation,
    event_delay,
    event_storage,
    job_start,
    listing,
    loop_overhead,
    lora,
    mixed_documents,
    one_step_job,
    packed_attention,
    resume_time,
    scale,
    submissions,
    throughput,
    viewers,
)
from benchmarks.result import BenchmarkResult, Skipped, describe_machine, markdown_table, write_json
from benchmarks.workload import FULL, SMALL, Size

BENCHMARKS: dict[str, Callable[[Size], BenchmarkResult]] = {
    "loop-overhead": loop_overhead.measure,
    "throughput": throughput.measure,
    "mixed-documents": mixed_documents.measure,
    "packed-attention": packed_attention.measure,
    "checkpoint-blocking": checkpoint_blocking.measure,
    "resume-time": resume_time.measure,
    "activation-memory": activation_memory.measure,
    "data-wait": data_wait.measure,
    "lora": lora.measure,
    "evaluation": evaluation.measure,
    **{f"best-{work}": partial(best_settings.measure, work) for work in best_settings.TARGETS},
    "command-line": command_line.measure,
    "submissions": submissions.on_sqlite,
    "submissions-postgresql": submissions.on_postgresql,
    "listing": listing.on_sqlite,
    "listing-postgresql": listing.on_postgresql,
    "event-storage": event_storage.measure,
    "event-delay": event_delay.measure,
    "first-step": job_start.measure_first_step,
    "one-step-job": one_step_job.measure,
    "recovery": job_start.measure_recovery,
    "concurrent-answers": concurrent_answers.measure,
    "dashboard": dashboard.measure,
    "viewers": viewers.measure,
}
ONLY_BY_NAME: dict[str, Callable[[Size], BenchmarkResult]] = {  # each takes up to half an hour
    "scale": scale.measure,
    "demo-start": demo_start.measure,
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    known = BENCHMARKS | ONLY_BY_NAME
    text = f"benchmarks to run: {', '.join(known)}; by default all except {', '.join(ONLY_BY_NAME)}"
    parser.add_argument("names", nargs="*", metavar="NAME", help=text)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to test that the benchmarks run")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - known.keys():
        parser.error(f"unknown benchmark: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    environment = describe_machine()
    results: list[BenchmarkResult] = []
    skipped: dict[str, str] = {}
    for name in options.names or BENCHMARKS:
        started = time.perf_counter()
        try:
            results.append(known[name](SMALL if options.small else FULL))
        except Skipped as reason:
            skipped[name] = str(reason)
            continue
        print(f"{name}: ratio {results[-1].ratio:.3g} ({time.perf_counter() - started:.0f} s)", file=sys.stderr)
    environment |= {
        "load_average_at_the_end": describe_machine()["load_average_1_5_15_minutes"],
        "threads": torch.get_num_threads(),
    }
    print("\n" + markdown_table(results))
    for name, reason in skipped.items():
        print(f"\n{name} was skipped: {reason}")
    print("\n" + ", ".join(f"{name} {value}" for name, value in environment.items()))
    print(f"\nAll figures: {write_json(results, environment, skipped)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
