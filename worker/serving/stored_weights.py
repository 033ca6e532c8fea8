"""Fetches the stored files of served models in a thread, because a store may be slow."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from worker.run.sandbox import SandboxInputs
from zeta_core.contract.wire.answers import ServedWeights
from zeta_core.system.artifact_store import ArtifactStore


class StoredWeights:
    """Not thread-safe. No method blocks."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        self._fetching: dict[str, Future[SandboxInputs]] = {}  # by the key of the weights

    def is_fetched(self, weights: ServedWeights) -> bool:
        """Whether `inputs` has an answer now."""
        return weights.key not in self._fetching or self._fetching[weights.key].done()

    def inputs(self, weights: ServedWeights) -> SandboxInputs | None:
        """The files of these weights on this machine; ``None`` while they are being fetched, which this call starts.

        Raises `OSError` and `BrokenCheckpoint` if they could not be fetched.
        """
        work = self._fetching.get(weights.key)
        if work is None:
            work = self._executor.submit(SandboxInputs.of_weights, weights, self._store.local)
            self._fetching[weights.key] = work
        if not work.done():
            return None
        return self._fetching.pop(weights.key).result()

    def stop(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
