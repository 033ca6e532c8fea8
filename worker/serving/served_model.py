"""A loaded model: its serving process, its slot, and the requests that it is answering."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from worker.machine.devices import Slot
from worker.run.memory_watch import MemoryWatch
from worker.serving.outbox import Outboxes
from worker.serving.process import Message, ServingProcess
from zeta_core.contract.wire.answers import (
    Alive,
    AnswerRequest,
    Cancel,
    Failure,
    Generate,
    Generated,
    LoadFailed,
    Ready,
    ServedWeights,
)

LOAD_SECONDS = 1800.0  # a large model from a slow disk, or from the Hub
MEMORY_SETTING = "ZETA_SERVE_MEMORY_BYTES"
STALL_SECONDS = 900.0  # without a sign of life, above the time of a long prompt on a CPU

logger = logging.getLogger(__name__)


class ServedModel:
    """``start`` starts the process; its messages are passed to the argument, from another thread."""

    def __init__(
        self,
        weights: ServedWeights,
        slot: Slot,
        outboxes: Outboxes,
        start: Callable[[Callable[[Message], None]], ServingProcess],
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
        self._requests: set[str] = set()
        self._ending: Failure | None = None  # why its requests end
        self._process = start(self._receive)
        self._memory = MemoryWatch(
            self._process.processes, limit_bytes=memory_limit_bytes, share_bytes=memory_share_bytes
        )
        self._started_at = time.monotonic()

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def answer(self, request: AnswerRequest) -> None:
        self.used_at = time.monotonic()
        self._requests.add(request.request_id)
        self._process.send(Generate(request_id=request.request_id, prompt=request.prompt, options=request.options))

    def cancel(self, request_id: str) -> None:
        """End a request without an answer, if this model has it."""
        if request_id in self._requests:
            self._requests.discard(request_id)
            self._process.send(Cancel(request_id=request_id))

    def end(self, failure: Failure) -> None:
        """Kill the process; its requests end with ``failure``."""
        if self.is_ending:
            return
        self.is_ending, self._ending = True, failure
        self._outboxes.fail(tuple(self._requests), failure)
        self._process.kill()

    def is_gone(self) -> bool:
        """Whether the process has ended; its remaining requests have then failed. Never blocks."""
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

    def _receive(self, message: Message) -> None:
        match message:
            case Ready():
                self.is_ready = True
            case LoadFailed(message=reason, can_retry=can_retry):
                logger.warning("%s can't be served: %s", self.weights.name, reason, extra={"action": "serve"})
                self._ending = Failure(code="process_ended" if can_retry else "model_failed", message=reason)
            case Generated():
                self._outboxes.add(message)
                if message.is_last:
                    self.used_at = time.monotonic()
                    self._requests.discard(message.request_id)
            case Alive():
                return
