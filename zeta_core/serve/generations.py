"""Answering requests to all models of a process: adapters of one base, or one whole model.

Each adapter has a batch of its own, and the base computes one step for each batch in turn. So an answer has the same
numbers whether other adapters answer at the same time or not.
"""

from __future__ import annotations

from collections.abc import Callable

from zeta_core.contract.wire.answers import AddAdapter, Generate, Generated
from zeta_core.serve.adapters import SharedBase
from zeta_core.serve.generation import Generation, cache_limit_bytes
from zeta_core.serve.loading import LoadedModel


class Generations:
    """``send`` is called with everything that is generated."""

    def __init__(self, loaded: LoadedModel, send: Callable[[Generated], None]) -> None:
        self._send = send
        self._base = SharedBase(loaded)
        self._cache_bytes = cache_limit_bytes(loaded.device)
        self._by_adapter: dict[str | None, Generation] = {}
        self._insert(None, loaded)

    @property
    def is_idle(self) -> bool:
        return all(generation.is_idle for generation in self._by_adapter.values())

    def add_adapter(self, added: AddAdapter) -> None:
        """Load another adapter of the base. Raises what `SharedBase.add` raises."""
        self._insert(added.key, self._base.add(added.key, added.file))

    def add(self, request: Generate) -> None:
        """Begin to answer a request. A request to an adapter that could not be added has failed already."""
        generation = self._by_adapter.get(request.adapter)
        if generation is not None:
            generation.add(request)

    def cancel(self, request_id: str) -> None:
        """End a request without an answer; harmless if it has ended."""
        for generation in self._by_adapter.values():
            generation.cancel(request_id)

    def step(self) -> None:
        """Compute the next token of every request."""
        for key, generation in self._by_adapter.items():
            if not generation.is_idle:
                self._base.activate(key)
                generation.step()

    def _insert(self, key: str | None, loaded: LoadedModel) -> None:
        def free_cache_bytes() -> int:
            others = (other for other_key, other in self._by_adapter.items() if other_key != key)
            return self._cache_bytes - sum(other.cache_bytes for other in others)

        self._by_adapter[key] = Generation(loaded, self._send, free_cache_bytes)
