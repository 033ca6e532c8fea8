"""What a training says: lines of the contract, to the journal of a run directory or to the console of a script.

The journal is append-only: each line is one write of one whole line, so a reader never sees half of one, and a line
that was written is not lost when the process is killed (it is not lost with the machine only after the checkpoint's
fsync; the worker publishes lines as they come). Ranks other than the first say nothing.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from pydantic import JsonValue

from zeta_core.contract.job.advice import Advice, Patch, in_words
from zeta_core.contract.job.events import (
    CheckpointLine,
    ErrorLine,
    JournalLine,
    LogLine,
    Phase,
    ProgressLine,
    SampleLine,
    StatusLine,
    WarningLine,
)
from zeta_core.contract.wire.run_directory import LONGEST_LINE_BYTES

SECONDS_BEYOND_LIMIT = 30.0
MOST_LINE_BYTES = LONGEST_LINE_BYTES // 4
MOST_CHARACTERS = 16_384  # of each text of a line that is longer
_LIMIT_REACHED = (
    "The journal has {} lines, which is its limit: from here on it tells checkpoints, the end, and a step now and "
    "then; the log has the rest."
)


class Sink(Protocol):
    """Where lines go."""

    def write(self, line: JournalLine) -> None: ...

    def close(self) -> None: ...


class JournalWriter:
    """``events.jsonl`` of a run directory; beyond ``max_lines`` it tells checkpoints, the end, a step now and then."""

    def __init__(self, path: Path, max_lines: int | None = None) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.max_lines = max_lines
        self._num_lines = 0
        self._progress_at = 0.0

    def write(self, line: JournalLine) -> None:
        """Raises `OSError`; of a line that did not fit on the disk nothing is left."""
        if self._is_left_out(line):
            return
        self._num_lines += 1
        self._append(line)
        if self._num_lines == self.max_lines:
            self._append(WarningLine(code="journal_limit", message=_LIMIT_REACHED.format(self.max_lines)))

    def _is_left_out(self, line: JournalLine) -> bool:
        if self.max_lines is None or self._num_lines < self.max_lines:
            return False
        if isinstance(line, ProgressLine) and time.monotonic() - self._progress_at >= SECONDS_BEYOND_LIMIT:
            self._progress_at = time.monotonic()
            return False
        return not isinstance(line, StatusLine | CheckpointLine | ErrorLine)

    def _append(self, line: JournalLine) -> None:
        data = line.model_dump_json(exclude_none=True).encode() + b"\n"
        if len(data) > MOST_LINE_BYTES:
            data = json.dumps(_shortened(line.model_dump(mode="json", exclude_none=True))).encode() + b"\n"
        written = os.write(self._file, data)
        if written != len(data):
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        os.close(self._file)


def _shortened(value: JsonValue) -> JsonValue:
    """``value`` with the beginning of each long text: a library's error message may hold a whole row of data."""
    match value:
        case str() if len(value) > MOST_CHARACTERS:
            return f"{value[:MOST_CHARACTERS]} ... ({len(value) - MOST_CHARACTERS:,} more characters)"
        case list():
            return [_shortened(item) for item in value]
        case dict():
            return {name: _shortened(item) for name, item in value.items()}
        case _:
            return value


class Console:
    """The same lines as sentences for people, on standard output; advice names the job's rerun where it is one."""

    def __init__(self, job_id: str | None = None) -> None:
        self._job_id = job_id
        self._phase: Phase | None = None

    def write(self, line: JournalLine) -> None:
        text = self._sentence(line)
        if text is not None:
            print(text, file=sys.stderr if isinstance(line, ErrorLine) else sys.stdout, flush=True)

    def close(self) -> None:
        sys.stdout.flush()

    def _sentence(self, line: JournalLine) -> str | None:
        match line:
            case ProgressLine():
                return self._progress(line)
            case LogLine():
                return line.message
            case WarningLine():
                return f"Warning: {in_words(line.message, line.hint, line.patch, self._job_id)}"
            case ErrorLine():
                return f"Error: {in_words(line.message, line.hint, line.patch, self._job_id)}"
            case CheckpointLine():
                return f"Saved {line.name} (step {line.step}, {line.bytes / 1e6:.1f} MB)."
            case SampleLine():
                return f"Sample after step {line.step}: {line.prompt!r} -> {line.text!r}"
            case StatusLine():
                return None

    def _progress(self, line: ProgressLine) -> str | None:
        if line.eval_loss is not None:
            self._phase = line.phase
            more = "" if line.perplexity is None else f", perplexity {line.perplexity:.4g}"
            return f"Evaluated after step {line.step}: loss {line.eval_loss:.4f}{more}"
        if line.step is None or line.loss is None:
            entered = line.phase if line.phase != self._phase else None
            self._phase = line.phase
            return None if entered is None else f"{entered.replace('_', ' ').capitalize()} ..."
        self._phase = line.phase
        parts = [f"step {line.step}/{line.total_steps}", f"loss {line.loss:.4f}"]
        if line.learning_rate is not None:
            parts.append(f"lr {line.learning_rate:.3g}")
        if line.tokens_per_second is not None:
            parts.append(f"{line.tokens_per_second:,.0f} tokens/s")
        if line.eta_seconds:
            minutes, seconds = divmod(math.ceil(line.eta_seconds), 60)
            parts.append(f"{minutes}:{seconds:02d} to go")
        return "  ".join(parts)


class Reporter:
    """The one voice of a training. Every rank has one; only the first rank's has sinks."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def write(self, line: JournalLine) -> None:
        for sink in self._sinks:
            sink.write(line)

    @contextmanager
    def also_to(self, sink: Sink) -> Generator[None]:
        """Within it lines go to ``sink`` as well; it is closed at the end."""
        before = self._sinks
        self._sinks = (*before, sink)
        try:
            yield
        finally:
            self._sinks = before
            sink.close()

    def phase(self, phase: Phase) -> None:
        self.write(ProgressLine(phase=phase))

    def log(self, message: str) -> None:
        self.write(LogLine(message=message))

    def warn(
        self,
        code: str,
        message: str,
        *,
        hint: str | None = None,
        patch: Patch | None = None,
        evidence: dict[str, JsonValue] | None = None,
    ) -> None:
        self.write(WarningLine(code=code, message=message, hint=hint, patch=patch, evidence=evidence))

    def advise(self, advice: Advice) -> None:
        self.warn(advice.code, advice.message, hint=advice.hint, patch=advice.patch, evidence=advice.evidence or None)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
