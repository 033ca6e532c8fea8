"""The kinds of jobs, and the rules that differ between them.

Jobs of every kind share one table, one state machine, one dispatch path and one journal. The kind determines the model
that validates the spec (`contract.spec.kinds`), the command that a worker starts, and the slots on which it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class JobKind(StrEnum):
    TRAINING = "training"
    EXPORT = "export"
    BATCH = "batch"
    EVALUATION = "evaluation"


@dataclass(frozen=True)
class KindRules:
    """How a job of a kind runs.

    A worker starts ``python -m zeta_core`` with ``arguments`` and the run directory. A job with ``is_background`` needs
    no GPU: it runs in a background slot, so it never waits for a training job or delays one. Only jobs with
    ``saves_checkpoints`` accept the commands ``checkpoint`` and ``rerun --from``.
    """

    arguments: tuple[str, ...] = ()
    is_background: bool = False
    saves_checkpoints: bool = False


KINDS: Mapping[JobKind, KindRules] = {
    JobKind.TRAINING: KindRules(saves_checkpoints=True),
    JobKind.EXPORT: KindRules(arguments=("export",), is_background=True),
    JobKind.BATCH: KindRules(arguments=("batch",)),
    JobKind.EVALUATION: KindRules(arguments=("evaluate",)),
}

BACKGROUND_KINDS = frozenset(kind for kind, rules in KINDS.items() if rules.is_background)
