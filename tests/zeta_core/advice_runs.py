"""Training short runs whose advice the tests read and apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from server.submitting.reruns import apply_merge_patch
from tests.zeta_core.runs import RecordedLines
from tests.zeta_core.runs import train as train_into
from zeta_core.contract.job.events import WarningLine
from zeta_core.run import Outcome


def train(directory: Path, model: object, spec: dict[str, Any]) -> tuple[Outcome, RecordedLines]:
    """Train with this spec in a new folder under ``directory``."""
    number = len(list(directory.glob("out-*")))
    (directory / f"out-{number}").mkdir(parents=True)
    return train_into(model, directory / f"out-{number}", cache=directory / "cache", **spec)


def apply_patch(spec: dict[str, Any], patch: dict[str, Any] | None) -> dict[str, Any]:
    """Apply a patch to a spec, as the server does for a rerun."""
    assert patch
    return apply_merge_patch(spec, patch)


def warnings_by_code(lines: RecordedLines) -> dict[str, WarningLine]:
    """The warnings of a run by code."""
    return {line.code: line for line in lines.all if isinstance(line, WarningLine)}
