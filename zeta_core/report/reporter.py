"""Sending the lines of a run to its sinks: a journal, the console, or trackers."""

from __future__ import annotations

import math
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

from pydantic import JsonValue

from zeta_core.contract.job.advice import Advice, Patch, advice_text
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
    describe_perplexity,
)


class Sink(Protocol):
    """A destination of lines."""

    def write(self, line: JournalLine) -> None: ...

    def close(self) -> None: ...


class Console:
    """Prints lines as sentences on standard output. For a job, advice contains the command that reruns it."""

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
                return f"Warning: {advice_text(line.message, line.hint, line.patch, self._job_id)}"
            case ErrorLine():
                return f"Error: {advice_text(line.message, line.hint, line.patch, self._job_id)}"
            case CheckpointLine():
                return f"Saved {line.name} (step {line.step}, {line.bytes / 1e6:.1f} MB)."
            case SampleLine():
                return f"Sample after step {line.step}: {line.prompt!r} -> {line.text!r}"
            case StatusLine():
                return None

    def _progress(self, line: ProgressLine) -> str | None:
        if line.eval_loss is not None:
            self._phase = line.phase
            more = "" if line.perplexity is None else f", perplexity {describe_perplexity(line.perplexity)}"
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


class WithoutWarnings:
    """Sends all lines except warnings to a sink: every node finds the same ones, and node 0 reports them."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, line: JournalLine) -> None:
        if not isinstance(line, WarningLine):
            self._sink.write(line)

    def close(self) -> None:
        self._sink.close()


class Reporter:
    """Sends lines to all sinks. Every rank has a reporter, but only the first rank of each node has sinks."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def write(self, line: JournalLine) -> None:
        for sink in self._sinks:
            sink.write(line)

    @contextmanager
    def also_to(self, sink: Sink) -> Generator[None]:
        """Within the context, lines also go to ``sink``, which is closed at the end."""
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
