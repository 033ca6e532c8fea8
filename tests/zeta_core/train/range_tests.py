"""Short runs with a found or given learning rate, and their reports.

As a script, this is one of several processes: ``range_tests.py FOLDER STRATEGY...`` trains each strategy with a found
rate and then with that rate as a number, and keeps the checkpoints of both.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.zeta_core.models import llama
from tests.zeta_core.runs import RecordedLines
from zeta_core.contract.job.events import JOURNAL_LINE, LogLine, ProgressLine
from zeta_core.contract.job.status import StopAction
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.range_test import RangeTest
from zeta_core.contract.spec.validation import parse
from zeta_core.data.sources import SourceLocations
from zeta_core.environment import ProcessRank
from zeta_core.report.reporter import Reporter
from zeta_core.run import Outcome, RunRequest, execute

STRATEGIES: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": {"use_fsdp": True}, "zero-2": {"use_deepspeed": 2}}


def begin(
    model: object,
    output_dir: Path,
    *,
    rank: ProcessRank | None = None,
    stop: Callable[[RecordedLines], StopAction | None] = lambda lines: "hand_back" if _trains(lines) else None,
    resume: bool = False,
    **options: Any,
) -> tuple[Outcome, RecordedLines]:
    """Train the first steps of a run of 200, up to a checkpoint. Its range test has 20 updates."""
    values: dict[str, Any] = {
        "learning_rate": "find",
        "max_steps": 200,
        "batch_size": 4,
        "gradient_accumulate_every": 1,
        "seq_len": 32,
        **options,
    }
    lines = RecordedLines()
    run = RunRequest(
        options=parse(TrainerOptions, values),
        model=model,
        output_dir=output_dir,
        cache=output_dir.parent / "cache",
        locations=SourceLocations(any_path=True),
        resume_from=output_dir if resume else None,
        stop=lambda: stop(lines),
    )
    rank = rank or ProcessRank()
    return execute(run, rank, Reporter(lines) if rank.is_main else Reporter()), lines


def _trains(lines: RecordedLines) -> bool:
    return any(isinstance(line, ProgressLine) and line.phase == "training" and line.step for line in lines.all)


def range_test_in(lines: RecordedLines) -> tuple[str, RangeTest]:
    """The message and the data of the range test, read from the journal lines."""
    read = [JOURNAL_LINE.validate_json(line.model_dump_json(exclude_none=True)) for line in lines.all]
    return next(
        (line.message, line.data) for line in read if isinstance(line, LogLine) and isinstance(line.data, RangeTest)
    )


def weights(output_dir: Path, file: str = "model.safetensors") -> bytes:
    """The contents of a file of the newest checkpoint."""
    newest = max(output_dir.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    return (newest / file).read_bytes()


def main(folder: Path, *strategies: str) -> None:
    rank = ProcessRank.from_environment()
    for name in strategies:
        found = folder / f"{name}-found"
        begin(llama(attention_dropout=0.1), found, rank=rank, **STRATEGIES[name])
        dist.barrier()
        rate = json.loads((found / "plan.json").read_text())["learning_rate"]
        begin(llama(attention_dropout=0.1), folder / f"{name}-given", rank=rank, learning_rate=rate, **STRATEGIES[name])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
