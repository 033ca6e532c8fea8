"""From the start of a resumed run to its next step, early and late in a large file of tokens.

The late checkpoint is the early one with its position moved on: what is read is the same.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path

from benchmarks import work
from benchmarks.answer import Answer, ratio_of_rounds
from benchmarks.work import SMALL, Size
from zeta_core.checkpoint import checkpoint_files
from zeta_core.contract.wire.run_directory import MANIFEST_NAME, TRAINING_STATE_NAME

EARLY, LATE = 10, 10_000
BATCH_SIZE, SEQ_LEN, VOCABULARY = 16, 128, work.SMALL_VOCABULARY
TOKENS = 40_000_000


def trained_for(steps: int, folder: Path, tokens: Path, resume_from: Path | None = None) -> list[float]:
    """Train until so many steps are done in this call; returns when each of them was."""
    done: list[float] = []

    def stop() -> str | None:
        done.append(time.perf_counter())
        return "hand_back" if len(done) == steps else None

    work.train_ours(
        work.llama(SMALL),
        folder,
        dataset=tokens,
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZE,
        max_steps=2 * LATE,
        stop=stop,
        resume_from=resume_from,
    )
    return done


def moved_on(early: Path, folder: Path, step: int) -> Path:
    """A copy of the checkpoint ``early`` as it would be after ``step`` steps, in a run's directory of its own."""
    checkpoint = checkpoint_files.read(early)
    assert checkpoint is not None
    part = checkpoint_files.begin(folder, f"step-{step}")
    shutil.copytree(early, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST_NAME))
    state = part / TRAINING_STATE_NAME / "state.json"
    content = json.loads(state.read_text())
    content["progress"] |= {"step": step, "consumed_sequences": step * BATCH_SIZE}
    state.write_text(json.dumps(content))
    about = {"name": f"step-{step}", "step": step}
    checkpoint_files.publish(
        part, folder, lambda files: checkpoint.manifest.model_copy(update={**about, "files": files})
    )
    return folder / f"step-{step}"


def measure(size: Size) -> Answer:
    figures: dict[str, list[float]] = {f"at step {step:,}": [] for step in (EARLY, LATE)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_tokens = size.of(TOKENS, 4 * LATE * BATCH_SIZE)
        tokens = work.token_file(folder, num_tokens=num_tokens, vocabulary=VOCABULARY)
        trained_for(EARLY, folder / "first", tokens)
        early = folder / "first" / "output" / f"step-{EARLY}"
        for turn in range(size.rounds):
            for step in (EARLY, LATE)[:: 1 if turn % 2 == 0 else -1]:
                place = folder / f"{turn}-{step}"
                resume_from = moved_on(early, place / "saved", step)
                started = time.perf_counter()
                [done] = trained_for(1, place, tokens, resume_from)
                figures[f"at step {step:,}"].append(done - started)
                shutil.rmtree(place)
    late, soon = figures[f"at step {LATE:,}"], figures[f"at step {EARLY:,}"]
    return Answer(
        question="Resuming late by resuming early",
        unit="s to the next step",
        figures=figures,
        ratio=ratio_of_rounds(late, soon),
        bar=1.2,
        better="at most",
        notes=f"{num_tokens / 1e6:g} M tokens; the bar is that it does not grow, with room for noise.",
    )
