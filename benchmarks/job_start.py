"""Time from the submission of a job to its first step and its end, and from a crash to the next step."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.result import BenchmarkResult, ratio_of_rounds
from benchmarks.whole_service import Service, running_service, wait_until
from benchmarks.workload import Size
from zeta_core.system.settings import process_environment

ROUNDS = 5
IDLE_SECONDS = 20.0
WARM, COLD, SCRIPT = "warm", "cold", "bare script"
STEPS_OF_A_LONG_JOB = 1_000_000
# The same model, data and step, with nothing around them.
BARE_SCRIPT = """
import pydoc_data.topics
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import accelerate
text = "".join(pydoc_data.topics.topics.values()).encode()[: 4 * 64]
model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                     vocab_size=384, max_position_embeddings=128))
accelerator = accelerate.Accelerator(cpu=True)
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.003))
batch = torch.tensor(list(text)).view(4, 64)
accelerator.backward(model(input_ids=batch, labels=batch).loss)
optimizer.step()
print(1, flush=True)
"""


def bare_script_seconds() -> float:
    """From the start of the script to its first step."""
    started = time.time()
    with subprocess.Popen(
        [sys.executable, "-c", BARE_SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=process_environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        return time.time() - started


def one_step(service: Service) -> tuple[float, float]:
    """Seconds from the submission to the first step, and to the end."""
    started = time.time()
    job_id = service.submit()
    service.wait_for_status(job_id, "succeeded")
    ended = time.time()
    first_step = service.first_step_at(job_id)
    assert first_step is not None
    return first_step - started, ended - started


def recovery_seconds(service: Service) -> float:
    """From the death of a run to the first step of its next attempt."""
    job_id = service.submit(max_steps=STEPS_OF_A_LONG_JOB, checkpointing_steps=STEPS_OF_A_LONG_JOB)
    wait_until(lambda: service.first_step_at(job_id))
    killed = time.time()
    service.first_process(job_id).kill()
    again = wait_until(lambda: service.first_step_at(job_id, attempt=2))
    assert again is not None
    service.http.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()
    service.wait_for_status(job_id, "cancelled")
    return again - killed


def measure_first_step(size: Size) -> BenchmarkResult:
    figures: dict[str, list[float]] = {WARM: [], COLD: [], SCRIPT: []}
    ends: dict[str, list[float]] = {WARM: [], COLD: []}
    with (
        tempfile.TemporaryDirectory() as folder,
        running_service(Path(folder, WARM), warm=True) as warm,
        running_service(Path(folder, COLD), warm=False) as cold,
    ):
        idle = warm.idle_figures(IDLE_SECONDS) if size.large else {}
        for turn in range(size.of(ROUNDS, 1)):
            for name in (WARM, COLD, SCRIPT)[:: 1 if turn % 2 == 0 else -1]:
                if name == SCRIPT:
                    figures[name].append(bare_script_seconds())
                    continue
                first_step, end = one_step(warm if name == WARM else cold)
                figures[name].append(first_step)
                ends[name].append(end)
    medians = ", ".join(f"{name} {statistics.median(values):.2f} s" for name, values in ends.items())
    return BenchmarkResult(
        title="From the submission of a job to its first step, relative to a script that does the step alone",
        unit="s",
        figures=figures,
        ratio=ratio_of_rounds(figures[WARM], figures[SCRIPT]),
        target=0.25,
        target_is="maximum",
        notes=f"One step of a tiny model, through a whole service. From the submission to the end: {medians}.",
        details={"seconds to the end": ends, "idle service": idle},
    )


def measure_recovery(size: Size) -> BenchmarkResult:
    figures: dict[str, list[float]] = {WARM: [], COLD: []}
    with (
        tempfile.TemporaryDirectory() as folder,
        running_service(Path(folder, WARM), warm=True) as warm,
        running_service(Path(folder, COLD), warm=False) as cold,
    ):
        for turn in range(size.of(ROUNDS, 1)):
            for name in (WARM, COLD)[:: 1 if turn % 2 == 0 else -1]:
                figures[name].append(recovery_seconds(warm if name == WARM else cold))
    return BenchmarkResult(
        title="From the kill of a run to the first step of its next attempt, warm relative to cold",
        unit="s",
        figures=figures,
        ratio=ratio_of_rounds(figures[WARM], figures[COLD]),
        target=0.4,
        target_is="maximum",
        notes="The first process is killed with SIGKILL before the first checkpoint.",
    )
