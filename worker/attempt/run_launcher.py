"""Starts the run of an attempt, with its sandbox, command, environment and warm start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from worker.attempt.resources import WorkerResources
from worker.run.launch import own_environment, run_environment
from worker.run.process_tree import ProcessTree
from worker.run.sandbox import SandboxInputs
from worker.run.warm_start import WarmStart
from zeta_core.contract.access import HubAccess
from zeta_core.contract.job.kind import KINDS, JobKind
from zeta_core.contract.wire.run_directory import RunFile


class RunLauncher:
    """Starts the run of one attempt on ``num_slots`` slots with the GPUs ``devices``."""

    def __init__(
        self,
        resources: WorkerResources,
        run_file: RunFile,
        directory: Path,
        devices: Sequence[str],
        num_slots: int,
    ) -> None:
        self._resources = resources
        self._run_file = run_file
        self._directory = directory
        self._devices = devices
        self._num_slots = num_slots

    def prepare_sandbox(self, run_file: RunFile, check_cancelled: Callable[[], None]) -> None:
        """Fetch the files that the spec names, and write ``sandbox.json``, which lists what the run may access.

        Raises `OSError`.

        ``run_file`` is complete: it names the checkpoint to resume from.
        """
        resources = self._resources
        inputs = SandboxInputs.of_spec(
            run_file.spec,
            resources.settings,
            partial(resources.store.local, check_cancelled=check_cancelled),
            run_file.kind,
            bases=run_file.bases,
            held_out=run_file.resolved_spec.value("held_out"),
        )
        if resources.sandboxes is not None:
            resources.sandboxes.prepare_run(self._directory, run_file, inputs, self._devices)

    def start(self, tree: ProcessTree) -> bool:
        """Start the run in ``tree``. Returns false if the caller must try again later. Raises `OSError`."""
        return tree.start(self._command(), self._environment(), self._warm_start())

    def _command(self) -> Sequence[str]:
        """The command that runs a job of this kind; the run directory is appended to it."""
        return (*self._resources.command, *KINDS[self._run_file.kind].arguments)

    def _environment(self) -> dict[str, str]:
        return run_environment(
            own_environment(),
            job_id=self._run_file.job_id,
            attempt=self._run_file.attempt,
            threads=self._resources.threads * max(1, self._num_slots),
            devices=self._devices,
            hub=self._run_file.hub_access if self._run_file.hub else HubAccess.OFF,
            job_env=self._resources.settings.job_env,
            directory=self._directory,
        )

    def _warm_start(self) -> WarmStart | None:
        """The worker's warm start, if it makes no difference to this attempt.

        Libraries read the number of threads and DeepSpeed's accelerator when they are imported.
        """
        threads = self._run_file.resolved_spec.threads
        if (
            self._num_slots > 1
            or self._run_file.num_nodes > 1
            or threads not in (None, self._resources.threads)
            or self._run_file.spec.get("use_deepspeed")
            or self._run_file.kind is not JobKind.TRAINING
        ):
            return None
        return self._resources.warm_start
