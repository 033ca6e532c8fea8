"""A loaded model: its serving process, its slot, and the requests that it is answering.

If it is an adapter or a base, further adapters of the same base, and the base itself, are added to its process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from worker.machine.devices import Slot
from worker.run.memory_watch import MemoryWatch
from worker.serving.added_adapter import AddedAdapter
from worker.serving.outbox import Outboxes
from worker.serving.process import ServingProcess
from zeta_core.contract.job.responses import ServedModelReport
from zeta_core.contract.wire.answers import (
    AdapterFailed,
    Alive,
    AnswerRequest,
    Cancel,
    Failure,
    FromServing,
    Generate,
    Generated,
    LoadFailed,
    ModelReady,
    ServedWeights,
)

LOAD_SECONDS = 1800.0  # a large model from a slow disk, or from the Hub
MEMORY_SETTING = "ZETA_SERVE_MEMORY_BYTES"
MAX_ADDED = 15  # adapters of one base, besides the first; each needs memory
STALL_SECONDS = 900.0  # without a sign of life, above the time of a long prompt on a CPU

logger = logging.getLogger(__name__)


class ServedModel:
    """``start`` starts the process; its messages are passed to the argument, from another thread."""

    def __init__(
        self,
        weights: ServedWeights,
        slot: Slot,
        outboxes: Outboxes,
        start: Callable[[Callable[[FromServing], None]], ServingProcess],
        *,
        memory_limit_bytes: int | None,
        memory_share_bytes: int,
    ) -> None:
        """Raises `OSError` if the process can't be started. The limits are those of `MemoryWatch`."""
        self.weights = weights
        self.slot = slot
        self.used_at = time.monotonic()  # when it last had a request
        self.is_ready = False
        self.is_ending = False  # it takes no more requests
        self._outboxes = outboxes
        self._requests: dict[str, str] = {}  # ids -> keys of the weights
        self._added: dict[str, AddedAdapter] = {}  # by the key of its weights
        self._rejected: set[str] = set()  # adapters that need a process of their own
        self._failed: SimpleQueue[AdapterFailed] = SimpleQueue()  # adapters; for the supervisor's thread
        self._ending: Failure | None = None  # why its requests end
        self._process = start(self._receive)
        self._memory = MemoryWatch(
            self._process.processes, limit_bytes=memory_limit_bytes, share_bytes=memory_share_bytes
        )
        self._started_at = time.monotonic()

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def has_loaded(self, weights: ServedWeights) -> bool:
        return weights.key == self.weights.key or weights.key in self._added

    def can_add(self, weights: ServedWeights) -> bool:
        """Whether the weights can share the base of this model."""
        return weights.shares_base(self.weights) and len(self._added) < MAX_ADDED and weights.key not in self._rejected

    def answer(self, request: AnswerRequest) -> None:
        """Answer with the weights of the request: those of this model, or an adapter, which is added if necessary."""
        self.used_at = time.monotonic()
        weights, key = request.weights, request.weights.key
        self._requests[request.request_id] = key
        generate = Generate(request_id=request.request_id, prompt=request.prompt, options=request.options)
        if key == self.weights.key:
            self._process.send(generate)
            return
        if key not in self._added:
            number = len(self._added) + len(self._rejected)
            logger.info("Adding %s to the base of %s.", weights.name, self.weights.name, extra={"action": "serve"})
            self._added[key] = AddedAdapter(weights, number, self._process, self._failed.put)
        self._added[key].send(generate)

    def cancel(self, request_id: str) -> None:
        """End a request without an answer, if this model has it."""
        key = self._requests.pop(request_id, None)
        if key in self._added:
            self._added[key].cancel(request_id)
        if key is not None:
            self._process.send(Cancel(request_id=request_id))

    def reports(self) -> list[ServedModelReport]:
        """The weights that this process serves."""
        keys = list(self._requests.values())
        return [
            ServedModelReport(
                model=weights.name,
                project=weights.project,
                base=weights.shared_base,
                ready=self.is_ready,
                requests=keys.count(weights.key),
            )
            for weights in (self.weights, *(added.weights for added in self._added.values()))
        ]

    def end(self, failure: Failure) -> None:
        """Kill the process; its requests end with ``failure``."""
        if self.is_ending:
            return
        self.is_ending, self._ending = True, failure
        self._outboxes.fail(tuple(self._requests), failure)
        self._process.kill()

    def is_gone(self) -> bool:
        """Whether the process has ended; its remaining requests have then failed. Never blocks."""
        self._reject_failed_adapters()
        self._end_if_stalled()
        self._end_if_too_large()
        if not self._process.is_gone():
            return False
        failure = self._ending or Failure(
            code="process_ended",
            message=f"The process that served {self.weights.name} has ended; send the request again.",
        )
        self.is_ending = True
        self._outboxes.fail(tuple(self._requests), failure)
        return True

    def _reject_failed_adapters(self) -> None:
        """Fail the requests to adapters that can't share the base. Repeated ones start a process of their own."""
        while True:
            try:
                failed = self._failed.get_nowait()
            except Empty:
                return
            adapter = self._added.pop(failed.key, None)
            if adapter is None:  # the process runs code on users' files, so it may report anything
                continue
            self._rejected.add(failed.key)
            logger.warning(
                "%s can't share the base of %s: %s",
                adapter.weights.name,
                self.weights.name,
                failed.message,
                extra={"action": "serve"},
            )
            message = f"{adapter.weights.name} needs a process of its own; send the request again."
            ids = [request_id for request_id, key in list(self._requests.items()) if key == failed.key]
            self._outboxes.fail(ids, Failure(code="process_ended", message=message))
            for request_id in ids:
                self._requests.pop(request_id, None)

    def _end_if_stalled(self) -> None:
        now = time.monotonic()
        if self.is_ending:
            return
        if not self.is_ready and now - self._started_at > LOAD_SECONDS:
            message = f"{self.weights.name} was not loaded within {LOAD_SECONDS:g} s."
        elif self.is_ready and now - self._process.last_contact > STALL_SECONDS:
            message = f"The process that served {self.weights.name} hung for {STALL_SECONDS:g} s."
        else:
            return
        logger.warning("%s Ending it.", message, extra={"action": "serve"})
        self.end(Failure(code="process_ended", message=f"{message} Send the request again."))

    def _end_if_too_large(self) -> None:
        """End the process if it exceeds its memory limit. A model that does not fit must not be requested again."""
        excess = None if self.is_ending else self._memory.excess()
        if excess is None:
            return
        message = excess.describe(f"The process that served {self.weights.name}", MEMORY_SETTING)
        logger.warning("%s", message, extra={"action": "serve"})
        if self.is_ready:
            self.end(Failure(code="process_ended", message=f"{message} Send shorter or fewer requests at a time."))
        else:
            self.end(Failure(code="model_failed", message=f"{message} The model does not fit into the memory."))

    def _receive(self, message: FromServing) -> None:
        match message:
            case ModelReady():
                self.is_ready = True
            case LoadFailed(message=reason, can_retry=can_retry):
                logger.warning("%s can't be served: %s", self.weights.name, reason, extra={"action": "serve"})
                self._ending = Failure(code="process_ended" if can_retry else "model_failed", message=reason)
            case AdapterFailed():
                self._failed.put(message)
            case Generated():
                self._outboxes.add(message)
                if message.is_last:
                    self.used_at = time.monotonic()
                    self._requests.pop(message.request_id, None)
            case Alive():
                return
