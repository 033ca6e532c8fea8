"""The resources that all attempts of a worker share."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from worker.artifacts.cached_inputs import CachedInputs
from worker.machine.devices import count_cores
from worker.machine.usage import UsageMeter
from worker.run.sandbox import Sandboxes
from worker.run.warm_start import WarmStart
from worker.settings import WorkerSettings
from zeta_core.system.artifact_store import ArtifactStore


@dataclass(frozen=True)
class WorkerResources:
    """``executor`` runs file transfers; ``command`` starts a run, unless ``warm_start`` can.

    ``usage`` measures the machine for the curves of jobs, and ``cached_inputs`` records what its caches hold.
    """

    settings: WorkerSettings
    incarnation: str
    store: ArtifactStore
    executor: Executor
    command: Sequence[str]
    num_slots: int
    warm_start: WarmStart | None = None
    sandboxes: Sandboxes | None = None
    usage: UsageMeter | None = None
    cached_inputs: CachedInputs | None = None

    @property
    def threads(self) -> int:
        """The number of threads for each slot of a run."""
        return max(1, count_cores() // self.num_slots)
