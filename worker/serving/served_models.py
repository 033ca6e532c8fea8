"""The models that this worker serves: starting, sharing and ending them.

Adapters of one base share a process, which holds the base once ([decision 0062](docs/decisions/0062-shared-bases.md)).

Training comes first. A model uses a slot that no job uses; up to `serve_models` models share a slot. As soon as a job
is dispatched for the slot, they are ended, and their requests fail with ``evicted``. A model that had no request for
`serve_idle_seconds` ends as well, or earlier if another model needs its place.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from worker.machine.devices import Slot, memory_bytes
from worker.run import processes
from worker.run.launch import own_environment, run_environment
from worker.run.processes import RunProcesses
from worker.run.sandbox import Sandboxes, SandboxInputs
from worker.serving.outbox import Outboxes, Post
from worker.serving.process import ATTEMPT, ServingProcess
from worker.serving.served_model import ServedModel
from worker.serving.stored_weights import StoredWeights
from worker.settings import WorkerSettings
from zeta_core.contract.access import HubAccess
from zeta_core.contract.job.responses import ServedModelReport
from zeta_core.contract.wire.answers import (
    SERVING_DIRECTORY,
    AnswerControl,
    AnswerRequest,
    Failure,
    FromServing,
    ServedWeights,
    ServeFile,
    serving_directory,
)
from zeta_core.contract.wire.run_directory import project_cache
from zeta_core.system.artifact_store import ArtifactStore, BrokenCheckpoint

NO_SLOT = "The worker's devices are in use by jobs or other models; send the request again later."
STOP_SECONDS = 2.0  # for the acknowledgement of the last parts, when the worker stops

logger = logging.getLogger(__name__)


class ServedModels:
    """Not thread-safe: the supervisor's thread calls every method. No method blocks."""

    def __init__(
        self,
        settings: WorkerSettings,
        command: Sequence[str],
        slots: Sequence[Slot],
        threads: int,
        post: Post,
        store: ArtifactStore,
        sandboxes: Sandboxes | None = None,
    ) -> None:
        """``command`` starts a run; ``threads`` is the number of threads of each slot."""
        self._sandboxes = sandboxes
        self._settings = settings
        self._command = command
        self._slots = slots
        self._threads = threads
        self._outboxes = Outboxes(post)
        self._weights = StoredWeights(store)
        self._models: list[ServedModel] = []
        self._waiting: dict[str, AnswerRequest] = {}  # until their weights are fetched
        self._stopped_at: float | None = None  # monotonic

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do after `stop`."""
        timed_out = self._stopped_at is not None and time.monotonic() - self._stopped_at > STOP_SECONDS
        return timed_out or (not self._models and not len(self._outboxes))

    def end_earlier(self) -> None:
        """Kill the processes that an earlier process of this worker left; they exit by themselves unless they hang."""
        for directory in self._settings.root.glob(f"{SERVING_DIRECTORY}/*"):
            processes.send(RunProcesses(directory, directory.name, ATTEMPT).alive(), signal.SIGKILL)
            shutil.rmtree(directory, ignore_errors=True)

    @property
    def used_devices(self) -> set[str]:
        """The GPUs of the models, as in ``CUDA_VISIBLE_DEVICES``."""
        return {model.slot.device for model in self._models if model.slot.device is not None}

    def take(self, request: AnswerRequest, unavailable: Collection[int]) -> None:
        """Answer a request; ``unavailable`` are the slots that jobs use. A repeated request has no effect."""
        if self._outboxes.open(request):
            self._answer(request, unavailable)

    def _answer(self, request: AnswerRequest, unavailable: Collection[int]) -> None:
        model = self._find(request.weights)
        if isinstance(model, Failure):
            self._outboxes.fail([request.request_id], model)
        elif model is not None and model.has_loaded(request.weights):
            model.answer(request)
        elif model is None and all(slot.slot in unavailable for slot in self._slots):
            self._outboxes.fail([request.request_id], Failure(code="no_capacity", message=NO_SLOT))
        elif (inputs := self._fetched_inputs(request)) is not None:
            if model is None:
                self._start(request, inputs, unavailable)
            else:
                model.answer(request)

    def _fetched_inputs(self, request: AnswerRequest) -> SandboxInputs | None:
        """The stored files of the weights; ``None`` if the request waits for them or has failed."""
        weights = request.weights
        try:
            inputs = self._weights.inputs(weights)
        except (OSError, BrokenCheckpoint) as error:
            reason = error.strerror if isinstance(error, OSError) else error.message.rstrip(".")
            failure = Failure(code="model_failed", message=f"{weights.name} can't be served: {reason}.")
            self._outboxes.fail([request.request_id], failure)
            return None
        if inputs is None:
            self._waiting[request.request_id] = request
        return inputs

    def control(self, control: AnswerControl) -> None:
        """Handle an acknowledgement or a cancellation."""
        self._outboxes.acknowledge(control)
        if control.cancel:
            self._cancel(control.request_id)

    def evict(self, slots: Collection[int]) -> bool:
        """End the models in these slots, because a job needs them; returns whether they are gone."""
        found = [model for model in self._models if model.slot.slot in slots]
        for model in found:
            model.end(
                Failure(code="evicted", message=f"{model.weights.name} was ended, because a job needs its device.")
            )
        self._remove_gone()
        return not any(model in self._models for model in found)

    def step(self, unavailable: Collection[int] = ()) -> None:
        """Start models whose weights were fetched, end idle ones, and repeat what the server has not acknowledged."""
        for request_id, request in list(self._waiting.items()):
            if self._weights.is_fetched(request.weights):
                del self._waiting[request_id]
                self._answer(request, unavailable)
        now = time.monotonic()
        for model in self._models:
            if not model.num_requests and now - model.used_at >= self._settings.serve_idle_seconds:
                self._end_idle(model)
        self._remove_gone()
        for request_id in self._outboxes.step():
            self._cancel(request_id)

    def stop(self) -> None:
        """End every model, because the worker stops."""
        self._stopped_at = time.monotonic()
        self._weights.stop()
        self._outboxes.fail(tuple(self._waiting), Failure(code="evicted", message="The worker is stopping."))
        self._waiting.clear()
        for model in self._models:
            model.end(Failure(code="evicted", message=f"The worker that served {model.weights.name} is stopping."))

    def reports(self, slot: int) -> list[ServedModelReport]:
        """The models in a slot."""
        models = [model for model in self._models if model.slot.slot == slot and not model.is_ending]
        return [report for model in models for report in model.reports()]

    def _find(self, weights: ServedWeights) -> ServedModel | Failure | None:
        """The model that has loaded these weights or can add them, or the reason why there can be none."""
        if self._stopped_at is not None:
            return Failure(code="no_capacity", message="The worker is stopping; send the request again.")
        models = [model for model in self._models if not model.is_ending]
        loaded = next((model for model in models if model.has_loaded(weights)), None)
        return loaded or next((model for model in models if model.can_add(weights)), None)

    def _start(self, request: AnswerRequest, inputs: SandboxInputs, unavailable: Collection[int]) -> None:
        slot = self._free_slot(unavailable)
        if slot is None:
            failure = Failure(code="no_capacity", message=NO_SLOT)
            self._outboxes.fail([request.request_id], failure)
            return
        weights = request.weights
        try:
            model = ServedModel(
                weights,
                slot,
                self._outboxes,
                partial(self._start_process, weights, inputs, slot),
                memory_limit_bytes=self._settings.serve_memory_bytes,
                memory_share_bytes=memory_bytes() // len(self._slots),
            )
        except OSError as error:
            failure = Failure(code="model_failed", message=f"{weights.name} can't be served: {error.strerror}.")
            self._outboxes.fail([request.request_id], failure)
            return
        logger.info("Serving %s in slot %d.", weights.name, slot.slot, extra={"action": "serve"})
        self._models.append(model)
        model.answer(request)

    def _free_slot(self, unavailable: Collection[int]) -> Slot | None:
        """The slot without a job that has the fewest models; the model that was idle longest is ended if needed."""
        free = [slot for slot in self._slots if slot.slot not in unavailable]
        if not free:
            return None
        counts = {slot.slot: sum(model.slot == slot for model in self._models) for slot in free}
        slot = min(free, key=lambda slot: counts[slot.slot])
        if counts[slot.slot] < self._settings.serve_models:
            return slot
        idle = [
            model for model in self._models if model.slot in free and not model.num_requests and not model.is_ending
        ]
        if not idle:
            return None
        longest = min(idle, key=lambda model: model.used_at)
        self._end_idle(longest)
        return longest.slot

    def _start_process(
        self, weights: ServedWeights, inputs: SandboxInputs, slot: Slot, on_message: Callable[[FromServing], None]
    ) -> ServingProcess:
        settings, served_id = self._settings, f"serve_{secrets.token_hex(8)}"
        hub = settings.hub_access(weights.hub)
        devices = () if slot.device is None else (slot.device,)
        environment = run_environment(
            own_environment(),
            job_id=served_id,
            attempt=ATTEMPT,
            threads=self._threads,
            devices=devices,
            hub=hub,
            job_env=settings.job_env,
        )
        file = ServeFile(
            weights=weights,
            artifacts_root=str(settings.artifacts),
            cache_dir=str(settings.root / project_cache(weights.project)),
            data_root=str(settings.data_root) if settings.data_root else None,
            hub=hub != HubAccess.OFF,
        )
        directory = Path(settings.root, serving_directory(served_id))
        directory.mkdir(parents=True)
        if self._sandboxes is not None:
            self._sandboxes.prepare(directory, inputs=inputs, project=weights.project, hub=hub, devices=devices)
        return ServingProcess(directory, file, self._command, environment, devices, on_message)

    def _cancel(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)
        for model in self._models:
            model.cancel(request_id)

    def _end_idle(self, model: ServedModel) -> None:
        logger.info("%s is no longer served, because it was idle.", model.weights.name, extra={"action": "serve"})
        model.end(Failure(code="evicted", message=f"{model.weights.name} was ended; send the request again."))

    def _remove_gone(self) -> None:
        self._models = [model for model in self._models if not model.is_gone()]
