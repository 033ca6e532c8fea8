"""Peak memory with and without activation checkpointing, for a run whose memory is mostly activations.

``python -m benchmarks.activation_memory yes|no`` trains two steps and prints the peak memory of the process in
bytes, minus the peak after a tiny run that loaded all code.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import workload
from benchmarks.result import BenchmarkResult, ratio_of_rounds
from benchmarks.workload import FULL, SMALL, Size

BATCH_SIZE, SEQ_LEN, VOCABULARY = 16, 512, 384
WITH, WITHOUT = "with", "without"


def peak_bytes(size: Size, *, checkpointing: bool) -> int:
    _train(SMALL, checkpointing=checkpointing)
    before = _max_rss_bytes()
    _train(size, checkpointing=checkpointing)
    return max(1, _max_rss_bytes() - before)


def _train(size: Size, *, checkpointing: bool) -> None:
    batch_size, steps = size.of(BATCH_SIZE, 1), 2
    with tempfile.TemporaryDirectory() as folder:
        tokens = workload.token_file(Path(folder), num_tokens=2 * steps * batch_size * SEQ_LEN, vocab_size=VOCABULARY)
        workload.train_zeta(
            workload.llama(size, num_hidden_layers=8, vocab_size=VOCABULARY),
            Path(folder) / "zeta",
            dataset=tokens,
            seq_len=SEQ_LEN,
            batch_size=batch_size,
            max_steps=steps,
            use_activation_checkpointing=checkpointing,
        )


def _max_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak_in_new_process(checkpointing: bool) -> int:
    command = [sys.executable, "-m", "benchmarks.activation_memory", "yes" if checkpointing else "no"]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(process.stdout.splitlines()[-1])


def measure(size: Size) -> BenchmarkResult:
    figures: dict[str, list[float]] = {WITH: [], WITHOUT: []}
    for _ in range(max(1, size.rounds // 4)):
        for name, checkpointing in ((WITH, True), (WITHOUT, False)):
            peak = (
                _peak_in_new_process(checkpointing) if size.isolated else peak_bytes(size, checkpointing=checkpointing)
            )
            figures[name].append(peak / 2**20)
    return BenchmarkResult(
        title="Peak memory with activation checkpointing, relative to without",
        unit="MiB",
        figures=figures,
        ratio=ratio_of_rounds(figures[WITH], figures[WITHOUT]),
        target=0.6,
        target_is="maximum",
        notes=f"8 layers of 256, {BATCH_SIZE} x {SEQ_LEN} tokens; above the peak of a tiny run before it.",
    )


if __name__ == "__main__":
    print(peak_bytes(FULL, checkpointing=sys.argv[1] == "yes"))
