"""An adapter that is added to a serving process that has loaded its base.

The sandbox of the process contains only the checkpoint that it was started with, so the files of the adapter are copied
into its run directory. They are not linked, because the process may write there. A thread copies them, because the
artifact store may be slow; requests wait until then. The base itself needs no copy: its files are in the sandbox.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from worker.serving.process import ServingProcess
from zeta_core.contract.spec.sources import JobModel
from zeta_core.contract.wire.answers import AdapterFailed, AddAdapter, Generate, ServedWeights
from zeta_core.contract.wire.run_directory import checkpoint_key

ADAPTERS_DIRECTORY = "adapters"  # in the run directory of a serving process


class AddedAdapter:
    """``on_failure`` is called from another thread if the files can't be copied."""

    def __init__(
        self,
        weights: ServedWeights,
        number: int,
        process: ServingProcess,
        on_failure: Callable[[AdapterFailed], None],
    ) -> None:
        """Begin to copy. ``number`` is different for each adapter of the process."""
        self.weights = weights
        self._process = process
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._waiting: list[Generate] | None = []  # until the process knows the adapter
        target = process.directory / ADAPTERS_DIRECTORY / str(number)
        threading.Thread(target=self._add, args=(target,), name=f"adapter-{weights.name}", daemon=True).start()

    def send(self, request: Generate) -> None:
        """Send a request to this adapter, or keep it until the process knows the adapter."""
        request = request.model_copy(update={"adapter": self.weights.key})
        with self._lock:
            if self._waiting is None:
                self._process.send(request)
            else:
                self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Forget a request that waits."""
        with self._lock:
            if self._waiting is not None:
                self._waiting = [request for request in self._waiting if request.request_id != request_id]

    def _add(self, target: Path) -> None:
        key, file = self.weights.key, self._process.file
        file = file.model_copy(update={"weights": self.weights})
        if not self.weights.is_base:
            try:
                _copy_checkpoint(self.weights, Path(file.artifacts_root), target)
            except OSError as error:
                self._on_failure(AdapterFailed(key=key, message=f"its files can't be copied ({error.strerror})."))
                return
            file = file.model_copy(update={"artifacts_root": str(target)})
        with self._lock:
            self._process.send(AddAdapter(key=key, file=file))
            for request in self._waiting or []:
                self._process.send(request)
            self._waiting = None


def _copy_checkpoint(weights: ServedWeights, artifacts: Path, target: Path) -> None:
    """Copy the files of a checkpoint, without its training state, to an artifact store ``target``. Raises `OSError`."""
    source = JobModel.model_validate(weights.model)
    key = checkpoint_key(source.job, source.checkpoint)
    target.parent.mkdir(exist_ok=True)  # fails if the process has ended, and its directory was removed
    (target / key).mkdir(parents=True)
    for path in sorted((artifacts / key).iterdir()):
        if path.is_file():
            shutil.copyfile(path, target / key / path.name)
