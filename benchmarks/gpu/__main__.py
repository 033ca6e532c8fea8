"""``python -m benchmarks.gpu [--rehearse]``: run the GPU tests and benchmarks on one GPU, and write docs/gpu.md.

It takes at most about 8 minutes: each part has a time limit, and what exceeds it is reported as such. With
``--rehearse``, tiny models are trained on this machine's CPU, and the page is printed instead of written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.gpu.workloads import REHEARSAL, WORKLOADS, GpuWorkload, Measurement, build_model
from benchmarks.result import describe_machine
from zeta_core.train.flops import flops_per_token, peak_flops_by_name

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gpu.md"
CONTESTANTS = ("zeta", "bare loop", "TRL")
TEST_SECONDS, CONTESTANT_SECONDS = 150, 45

Results = Sequence[tuple[GpuWorkload, Mapping[str, Measurement]]]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="train tiny models on the CPU, and write no file")
    rehearses = parser.parse_args(arguments).rehearse
    if not rehearses and not torch.cuda.is_available():
        print("No NVIDIA GPU is available; see `nvidia-smi`, or use --rehearse.", file=sys.stderr)
        return 2
    tests = "not run in a rehearsal" if rehearses else _run_tests()
    print(f"Tests: {tests}", file=sys.stderr)
    results: list[tuple[GpuWorkload, dict[str, Measurement]]] = []
    for workload in REHEARSAL if rehearses else WORKLOADS:
        by_name: dict[str, Measurement] = {}
        results.append((workload, by_name))
        for name in CONTESTANTS:
            by_name[name] = found = _measure(name, workload)
            speed = found.failure or f"{_speed(workload, found):,.0f} tokens/s"
            print(f"{workload.title}, {name}: {speed}", file=sys.stderr)
    page = render(results, tests, describe_machine())
    if rehearses:
        print(page)
    else:
        PAGE.write_text(page)
        print(f"Written: {PAGE}")
    return 0


def _run_tests() -> str:
    """Run every test that needs a GPU, and return pytest's closing line."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--timeout", str(TEST_SECONDS)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TEST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"not finished after {TEST_SECONDS} s"
    print(done.stdout, file=sys.stderr)
    return done.stdout.strip().splitlines()[-1].strip("= ") if done.stdout.strip() else done.stderr[-500:]


def _measure(name: str, workload: GpuWorkload) -> Measurement:
    """Train in a process of its own, which is killed after its time limit."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measurement.json"
        command = [sys.executable, "-m", "benchmarks.gpu.contestants", name, workload.title, str(out)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=CONTESTANT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return Measurement(failure=f"not finished after {CONTESTANT_SECONDS} s")
        if done.returncode or not out.exists():
            print(done.stderr[-3000:], file=sys.stderr)
            lines = done.stderr.strip().splitlines()
            return Measurement(failure=lines[-1] if lines else f"exit status {done.returncode}")
        return Measurement(**json.loads(out.read_text()))


def _speed(workload: GpuWorkload, measurement: Measurement) -> float:
    assert measurement.seconds_per_step is not None
    return workload.tokens_per_step / measurement.seconds_per_step


def render(results: Results, tests: str, machine: Mapping[str, object]) -> str:
    """The page, with a row for each workload and library."""
    gpu = str(machine["gpu"] or "")
    lines = [
        "# On a GPU",
        "",
        "`make gpu` writes this page. Every library trains the same model with the same number of tokens per step: "
        "random weights in the shape of Llama 3, bfloat16 autocast, recomputed activations, fused AdamW, and LoRA of "
        "rank 16 in all linear layers for 8B. Figures are medians of 8 steps, one process after the other.",
        "",
        "| workload | library | tokens/s | MFU | peak memory | attention |",
        "|---|---|---:|---:|---:|---|",
    ]
    for workload, by_name in results:
        per_token = flops_of(workload)
        peak = peak_flops_by_name(gpu)
        for name, found in by_name.items():
            if found.failure is not None:
                lines.append(f"| {workload.title} | {name} | {found.failure} | | | |")
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
