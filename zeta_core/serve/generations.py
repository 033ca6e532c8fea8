"""Answering requests to all models of a process: a base and its adapters, or one whole model.

Each adapter has a batch of its own, and the base computes `TURN_STEPS` steps for each batch in turn. So an answer has
the same numbers whether other adapters answer at the same time or not.
"""

from __future__ import annotations

from collections.abc import Callable

from zeta_core.contract.wire.answers import AddAdapter, Generate, Generated
from zeta_core.serve.adapters import SharedBase
from zeta_core.serve.generation import Generation, cache_limit_bytes
from zeta_core.serve.loading import LoadedModel

TURN_STEPS = 4  # because activating another adapter may take half as long as a step of a small model


class Generations:
    """``send`` is called with everything that is generated."""

    def __init__(self, loaded: LoadedModel, send: Callable[[Generated], None], *, is_base: bool = False) -> None:
        """``is_base``: the loaded model is the base of adapters, which may be added."""
        self._send = send
        self._base = SharedBase(loaded, is_base=is_base)
        self._cache_bytes = cache_limit_bytes(loaded.device)
        self._by_adapter: dict[str | None, Generation] = {}
        self._turn: str | None = None  # the adapter whose steps are computed
        self._steps_left = TURN_STEPS
        self._insert(None, loaded)

    @property
    def is_idle(self) -> bool:
        return all(generation.is_idle for generation in self._by_adapter.values())

    def add_adapter(self, added: AddAdapter) -> None:
        """Load another adapter of the base, or let the base answer. Raises what `SharedBase.add` raises."""
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
        """Compute the next token of every request to one adapter."""
        if self._steps_left <= 0 or self._by_adapter[self._turn].is_idle:
            self._turn = self._next_turn()
            self._steps_left = TURN_STEPS
        self._steps_left -= 1
        self._base.activate(self._turn)
        self._by_adapter[self._turn].step()

    def _next_turn(self) -> str | None:
        """The next adapter with requests; the same one if no other has any."""
        keys = list(self._by_adapter)
        after = keys.index(self._turn) + 1
        return next((key for key in (*keys[after:], *keys[:after]) if not self._by_adapter[key].is_idle), self._turn)

    def _insert(self, key: str | None, loaded: LoadedModel) -> None:
        def free_cache_bytes() -> int:
            others = (other for other_key, other in self._by_adapter.items() if other_key != key)
            return self._cache_bytes - sum(other.cache_bytes for other in others)

        self._by_adapter[key] = Generation(loaded, self._send, free_cache_bytes)
