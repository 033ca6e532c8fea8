"""Run directories: creating one, starting its training process, and reading its journal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.harness.children import start_child
from tests.zeta_core.models import LLAMA_CONFIG
from zeta_core.contract.job.events import JOURNAL_LINE, JournalLine, StatusLine

ROOT = Path(__file__).resolve().parents[2]
SPEC: dict[str, Any] = {
    "model": {"config": LLAMA_CONFIG},
    "dataset": {"builtin": "python-docs"},
    "seq_len": 32,
    "batch_size": 2,
    "gradient_accumulate_every": 2,
    "learning_rate": 1e-3,
    "max_steps": 6,
    "checkpointing_steps": 2,
}


def make_run(directory: Path, attempt: int = 1, *, spec: Mapping[str, Any] | None = None, **fields: Any) -> Path:
    """Create ``<directory>/attempt-N`` with a ``run.json``. All attempts share ``<directory>/output``.

    ``fields`` are further fields of the ``run.json``.
    """
    run_dir = directory / f"attempt-{attempt}"
    run_dir.mkdir(parents=True)
    content = {
        "job_id": "job_test",
        "attempt": attempt,
        "spec": {**SPEC, **(spec or {})},
        "output_dir": str(directory / "output"),
        "artifacts_root": str(directory / "artifacts"),
        "cache_dir": str(directory / "cache"),
        **fields,
    }
    (run_dir / "run.json").write_text(json.dumps(content))
    return run_dir


def start(run_dir: Path, *program: str, **variables: str) -> subprocess.Popen[bytes]:
    """Start the training process as a worker does. ``program`` replaces ``python -m zeta_core``."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    environment = {**os.environ, **own}  # noqa: TID251 - a child's environment
    command = [*(program or (sys.executable, "-m", "zeta_core")), str(run_dir)]
    return start_child(command, log_file=run_dir / "train.log", environment=environment)


def journal(run_dir: Path) -> list[JournalLine]:
    """The lines of the journal, after checking that the last one is complete."""
    file = run_dir / "events.jsonl"
    if not file.exists():
        return []
    text = file.read_text()
    assert text == "" or text.endswith("\n")
    return [JOURNAL_LINE.validate_json(line) for line in text.splitlines()]


def end_of(run_dir: Path) -> StatusLine:
    """The last line of the journal, which contains the status at the end of the attempt."""
    last = journal(run_dir)[-1]
    assert isinstance(last, StatusLine)
    return last
