"""Time from the start of a resumed run to its next step, early and late in a large token file.

The late checkpoint is a copy of the early one with a later position, so both have the same size.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path

from benchmarks import workload
from benchmarks.result import BenchmarkResult, ratio_of_rounds
from benchmarks.workload import SMALL, Size
from zeta_core.checkpoint import checkpoint_files
from zeta_core.contract.wire.run_directory import MANIFEST_NAME, TRAINING_STATE_NAME

EARLY, LATE = 10, 10_000
BATCH_SIZE, SEQ_LEN, VOCABULARY = 16, 128, workload.SMALL_VOCABULARY
TOKENS = 40_000_000


def train_steps(steps: int, folder: Path, tokens: Path, resume_from: Path | None = None) -> list[float]:
    """Train this number of steps. Returns the time at which each of them finished."""
    finished_at: list[float] = []

    def stop() -> str | None:
        finished_at.append(time.perf_counter())
        return "hand_back" if len(finished_at) == steps else None

    workload.train_zeta(
        workload.llama(SMALL),
        folder,
        dataset=tokens,
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZE,
        max_steps=2 * LATE,
        stop=stop,
        resume_from=resume_from,
    )
    return finished_at


def advanced_copy(early: Path, folder: Path, step: int) -> Path:
    """Copy the checkpoint ``early`` to another output directory as a checkpoint of ``step``, and return its path."""
    checkpoint = checkpoint_files.read_checkpoint(early)
    assert checkpoint is not None
    part = checkpoint_files.begin_checkpoint(folder, f"step-{step}")
    shutil.copytree(early, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST_NAME))
    state = part / TRAINING_STATE_NAME / "state.json"
    content = json.loads(state.read_text())
    content["progress"] |= {"step": step, "consumed_sequences": step * BATCH_SIZE}
    state.write_text(json.dumps(content))
    changes = {"name": f"step-{step}", "step": step}
    checkpoint_files.publish_checkpoint(
        part, folder, lambda files: checkpoint.manifest.model_copy(update={**changes, "files": files})
    )
    return folder / f"step-{step}"


def measure(size: Size) -> BenchmarkResult:
    figures: dict[str, list[float]] = {f"at step {step:,}": [] for step in (EARLY, LATE)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_tokens = size.of(TOKENS, 4 * LATE * BATCH_SIZE)
        tokens = workload.token_file(folder, num_tokens=num_tokens, vocab_size=VOCABULARY)
        train_steps(EARLY, folder / "first", tokens)
        early = folder / "first" / "output" / f"step-{EARLY}"
        for turn in range(size.rounds):
            for step in (EARLY, LATE)[:: 1 if turn % 2 == 0 else -1]:
                run_folder = folder / f"{turn}-{step}"
                resume_from = advanced_copy(early, run_folder / "saved", step)
                started = time.perf_counter()
                [finished_at] = train_steps(1, run_folder, tokens, resume_from)
                figures[f"at step {step:,}"].append(finished_at - started)
                shutil.rmtree(run_folder)
    late_seconds, early_seconds = figures[f"at step {LATE:,}"], figures[f"at step {EARLY:,}"]
    return BenchmarkResult(
        title="Resuming late in a run, relative to resuming early",
        unit="s to the next step",
        figures=figures,
        ratio=ratio_of_rounds(late_seconds, early_seconds),
        target=1.2,
        target_is="maximum",
        notes=f"{num_tokens / 1e6:g} M tokens. Resuming late should take no longer; the target allows for noise.",
    )
