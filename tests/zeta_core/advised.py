"""What a run advises, and the one way in which its advice is applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from server.submitting.reruns import apply_merge_patch
from tests.zeta_core.runs import Lines
from tests.zeta_core.runs import train as train_into
from zeta_core.contract.job.events import WarningLine
from zeta_core.run import Outcome


def train(directory: Path, model: object, spec: dict[str, Any]) -> tuple[Outcome, Lines]:
    """Train as the spec says, in a fresh folder under ``directory``."""
    number = len(list(directory.glob("out-*")))
    (directory / f"out-{number}").mkdir(parents=True)
    return train_into(model, directory / f"out-{number}", cache=directory / "cache", **spec)


def applied(spec: dict[str, Any], patch: dict[str, Any] | None) -> dict[str, Any]:
    """The spec under the patch, as the server's rerun does it."""
    assert patch
    return apply_merge_patch(spec, patch)


def warnings(lines: Lines) -> dict[str, WarningLine]:
    """The warnings by their codes."""
    return {line.code: line for line in lines.all if isinstance(line, WarningLine)}
