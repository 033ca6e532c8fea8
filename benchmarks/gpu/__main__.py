"""``python -m benchmarks.gpu [--rehearse] [--page FILE]``: run the GPU tests and benchmarks, and write docs/gpu.md.

It takes at most about 8 minutes on one GPU. Each part has a time limit, and what exceeds it is reported as such. The
page is written after each workload, so a run that is interrupted leaves what it has measured. With ``--rehearse``, the
same steps train tiny models on this machine's CPU, the GPU tests are collected but skipped, and the page is
build/gpu-rehearsal.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.workloads import MEASURED_STEPS, REHEARSAL, WORKLOADS, GpuWorkload, Measurement, build_model
from benchmarks.result import describe_machine
from zeta_core.train.flops import flops_per_token, peak_flops_by_name

ROOT = Path(__file__).resolve().parents[2]
PAGE, REHEARSED_PAGE = ROOT / "docs" / "gpu.md", ROOT / "build" / "gpu-rehearsal.md"
CONTESTANTS = ("zeta", "bare loop", "TRL")
TOTAL_SECONDS, TEST_SECONDS, CONTESTANT_SECONDS = 460, 130, 75
MIN_SECONDS = 15  # with less time left, a contestant is not started

Results = Sequence[tuple[GpuWorkload, Mapping[str, Measurement]]]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="train tiny models on the CPU")
    parser.add_argument("--page", type=Path, help="the file to write instead of docs/gpu.md")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="the time for everything")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print("No NVIDIA GPU is available; see `nvidia-smi`, or use --rehearse.", file=sys.stderr)
        return 2
    page: Path = options.page or (REHEARSED_PAGE if options.rehearse else PAGE)
    page.parent.mkdir(parents=True, exist_ok=True)
    ends_at = time.monotonic() + options.seconds
    machine = describe_machine()
    tests = _run_tests(min(TEST_SECONDS, ends_at - time.monotonic()))
    print(f"Tests: {tests}", file=sys.stderr)
    results: list[tuple[GpuWorkload, dict[str, Measurement]]] = []
    for workload in REHEARSAL if options.rehearse else WORKLOADS:
        by_name: dict[str, Measurement] = {}
        results.append((workload, by_name))
        for name in CONTESTANTS:
            by_name[name] = found = _measure(name, workload, min(CONTESTANT_SECONDS, ends_at - time.monotonic()))
            speed = found.failure or f"{_speed(workload, found):,.0f} tokens/s"
            print(f"{workload.title}, {name}: {speed}", file=sys.stderr)
        page.write_text(render(results, tests, machine))
    print(f"Written: {page}")
    return 0


# --- Running each part in a process -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Done:
    """The end of a process. ``exit_code`` is None if it exceeded its time limit."""

    exit_code: int | None
    output: str
    errors: str


def _run(command: Sequence[str], seconds: float) -> _Done:
    """Run a command, and kill it with all its child processes after ``seconds``, because they could hold the GPU."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=max(1, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        return _Done(None, output, errors)
    return _Done(process.returncode, output, errors)


def _run_tests(seconds: float) -> str:
    """Run every test that needs a GPU, and return pytest's closing line."""
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in file.read_text()]
    done = _run([sys.executable, "-m", "pytest", "-m", "gpu", "-q", *files], seconds)
    print(done.output, done.errors, file=sys.stderr)
    lines = done.output.strip().splitlines()
    closing = lines[-1].strip("= ") if lines else done.errors.strip()[-500:]
    return f"not finished after {seconds:.0f} s" if done.exit_code is None else closing


def _measure(name: str, workload: GpuWorkload, seconds: float) -> Measurement:
    """Train in a process of its own, which is killed after its time limit."""
    if seconds < MIN_SECONDS:
        return Measurement(failure="not run, because the time was used up")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measurement.json"
        done = _run([sys.executable, "-m", "benchmarks.gpu.contestants", name, workload.title, str(out)], seconds)
        if done.exit_code is None:
            return Measurement(failure=f"not finished after {seconds:.0f} s")
        if done.exit_code or not out.exists():
            print(done.errors[-3000:], file=sys.stderr)
            lines = done.errors.strip().splitlines()
            return Measurement(failure=lines[-1] if lines else f"exit status {done.exit_code}")
        return Measurement(**json.loads(out.read_text()))


# --- The page ---------------------------------------------------------------------------------------------------------


def _speed(workload: GpuWorkload, measurement: Measurement) -> float:
    assert measurement.seconds_per_step is not None
    return workload.tokens_per_step / measurement.seconds_per_step


def render(results: Results, tests: str, machine: Mapping[str, object]) -> str:
    """The page, with a row for each workload and library."""
    gpu = str(machine["gpu"] or "")
    lines = [
        "---",
        "orphan: true",
        "---",
        "",
        "# On a GPU",
        "",
        "`make gpu` writes this page. Every library trains the same model with the same number of tokens per step: "
        "random weights in the shape of Llama 3, bfloat16 autocast, recomputed activations, fused AdamW, and LoRA of "
        f"rank 16 in all linear layers for 8B. Figures are medians of up to {MEASURED_STEPS} steps, one process after "
        "the other.",
        "",
        "| workload | library | tokens/s | MFU | peak memory | attention |",
        "|---|---|---:|---:|---:|---|",
    ]
    for workload, by_name in results:
        per_token = flops_of(workload)
        peak = peak_flops_by_name(gpu)
        for name, found in by_name.items():
            if found.failure is not None:
                lines.append(f"| {workload.title} | {name} | {found.failure.replace('|', '/')} | | | |")
                continue
            speed = _speed(workload, found)
            mfu = "" if peak is None else f"{speed * per_token / peak:.1%}"
            memory = "" if found.peak_bytes is None else f"{found.peak_bytes / 1e9:.1f} GB"
            lines.append(f"| {workload.title} | {name} | {speed:,.0f} | {mfu} | {memory} | {found.attention} |")
    described = ", ".join(f"{name} {value}" for name, value in machine.items())
    return "\n".join([*lines, "", f"Tests with a GPU: {tests}.", "", f"Machine: {described}.", ""])


def flops_of(workload: GpuWorkload) -> float:
    """FLOPs per token of the forward and backward passes; the base of LoRA has no gradient of its own."""
    model = build_model(workload, torch.device("meta"), attention="eager")
    model.requires_grad_(not workload.lora)
    return flops_per_token(model, workload.seq_len)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
