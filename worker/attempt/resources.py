"""The resources that all attempts of a worker share."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from worker.artifacts.store import ArtifactStore
from worker.settings import WorkerSettings


@dataclass(frozen=True)
class WorkerResources:
    """``executor`` runs file transfers; ``command`` starts a training."""

    settings: WorkerSettings
    incarnation: str
    store: ArtifactStore
    executor: Executor
    command: Sequence[str]
    num_slots: int
