"""Training in this process, with the journal lines of the run recorded in memory."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from itertools import count
from pathlib import Path
from typing import Any

from zeta_core.contract.job.events import JournalLine, ProgressLine, SampleLine, StatusLine
from zeta_core.contract.job.status import StopAction
from zeta_core.contract.spec.job_spec import TrainerOptions
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.spec.validation import parse
from zeta_core.data.sources import SourceLocations
from zeta_core.environment import ProcessRank
from zeta_core.report.reporter import Reporter
from zeta_core.run import Outcome, RunRequest, execute


class RecordedLines:
    """The journal lines of a run, in order; replaces the journal file."""

    def __init__(self) -> None:
        self.all: list[JournalLine] = []

    def write(self, line: JournalLine) -> None:
        self.all.append(line)

    def close(self) -> None:
        pass

    @property
    def evaluations(self) -> dict[int, float]:
        """The loss of each evaluated step."""
        found = [line for line in self.all if isinstance(line, ProgressLine) and line.eval_loss is not None]
        return {line.step or 0: line.eval_loss or 0.0 for line in found}

    @property
    def resolved_spec(self) -> ResolvedSpec:
        """The resolved spec, as reported when the run begins."""
        return next(line.resolved_spec for line in self.all if isinstance(line, StatusLine) and line.resolved_spec)

    @property
    def samples(self) -> list[SampleLine]:
        return [line for line in self.all if isinstance(line, SampleLine)]


def train(
    model: object,
    output_dir: Path,
    *,
    cache: Path,
    resume: bool | Path = False,
    stop: Callable[[], StopAction | None] = lambda: None,
    locations: SourceLocations | None = None,
    started_on: date | None = None,
    **options: Any,
) -> tuple[Outcome, RecordedLines]:
    """Train a small model on short sequences in this process; return the outcome and the journal lines."""
    values = {"batch_size": 4, "gradient_accumulate_every": 1, "seq_len": 32, "learning_rate": 1e-2, **options}
    lines = RecordedLines()
    run = RunRequest(
        options=parse(TrainerOptions, values),
        model=model,
        output_dir=output_dir,
        cache=cache,
        locations=locations or SourceLocations(any_path=True),
        resume_from=resume if isinstance(resume, Path) else output_dir if resume else None,
        started_on=started_on,
        stop=stop,
    )
    return execute(run, ProcessRank(), Reporter(lines)), lines


def stopping_after(num_checks: int) -> Callable[[], StopAction | None]:
    """A stop request that appears after this many checks. Runs check after each step, and within evaluations."""
    checks = count(1)
    return lambda: "hand_back" if next(checks) > num_checks else None
