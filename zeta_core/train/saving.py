"""Saving checkpoints during training: state is copied between two steps, and a thread writes it.

A save that does not fit on the disk is not started; the run ends there, and nothing is left half-written. Only one
save is in progress at a time. The next save and the end of the run wait for it, and raise its errors. A checkpoint is
reported only after it is durable and published.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file

from zeta_core.checkpoint import checkpoint_files
from zeta_core.checkpoint.checkpoint_files import Checkpoint
from zeta_core.checkpoint.shared_weights import SharedWeights
from zeta_core.checkpoint.staging import Staging, Tensors
from zeta_core.checkpoint.training_state import CONSTANT_TENSORS_FILE, Snapshot, write_training_state
from zeta_core.checkpoint.weights import SavedWeights, is_exported_exactly
from zeta_core.contract.job.checkpoint import BEST_CHECKPOINT, Manifest, ManifestFile
from zeta_core.contract.job.events import CheckpointLine, utc_now
from zeta_core.contract.wire.run_directory import TRAINING_STATE_NAME
from zeta_core.failures import DiskFull
from zeta_core.model.export import Exporter
from zeta_core.parallel.node_files import collect_files
from zeta_core.parallel.processes import Engine
from zeta_core.report.reporter import Reporter

SMALL_FILES_BYTES = 2**20  # configuration, tokenizer, plan, manifest


class CheckpointSaver:
    """Saves the checkpoints of one run. The first rank writes all files except the shards of the other ranks.

    The shards of other nodes are written there, and then sent to the first node, which publishes the checkpoint.
    """

    def __init__(
        self,
        output_dir: Path,
        run_id: str,
        export: Exporter,
        saved: SavedWeights,
        engine: Engine,
        report: Reporter,
        *,
        keep: int,
    ) -> None:
        self._engine = engine
        self._processes = engine.processes
        # The threads of all ranks synchronize after writing their shards, in a process group of their own.
        shared = self._processes.num_nodes > 1 or (engine.writes_shards and self._processes.world_size > 1)
        self._group: Any = dist.new_group(backend="gloo") if shared else None
        self._output_dir = output_dir
        self._run_id = run_id
        self._export = export
        self._saved = saved
        self.constant_tensors: Tensors = {}  # computed once, and stored with every checkpoint
        self._report = report
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Checkpoint | None] | None = None
        self._reserving: tuple[Staging, Future[None]] | None = None
        self.newest: Checkpoint | None = None
        self.best_elsewhere: Checkpoint | None = None  # in another output_dir, until it is copied to this one

    @property
    def busy(self) -> bool:
        return self._pending is not None and not self._pending.done()

    def wait(self) -> Checkpoint | None:
        """Wait for the pending save, and raise its error. Returns the newest checkpoint, on the first rank."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.newest = pending.result()
        return self.newest

    def prepare(self, staging: Staging) -> None:
        """Allocate the buffers of the first save, during training."""
        if self._pending is None and self.newest is None:
            self._reserving = staging, self._thread.submit(self._engine.reserve, staging, self._saved.names)

    def save(
        self,
        names: Sequence[str],
        snapshot: Snapshot,
        metrics: dict[str, float],
        plan: dict[str, Any],
        *,
        request: int | None = None,
    ) -> None:
        """Start completing and writing ``snapshot``, which must not change before `wait`, under each of ``names``.

        The first name is written; the others are hard links to its files. ``plan`` is stored in the training state.
        ``request`` is the number of the request that this save fulfils, if any.
        """
        assert self._pending is None, "wait for the previous save"
        part = self._output_dir / self._processes.from_main(lambda: self._begin(names[0], snapshot)).name
        self._processes.on_other_nodes(lambda: self._begin(names[0], snapshot))
        shared = self._shared_weights(part, snapshot)
        self._engine.write_now(part / TRAINING_STATE_NAME)
        self._pending = self._thread.submit(self._write, part, names, snapshot, shared, metrics, plan, request)

    def save_copy(self, name: str) -> None:
        """Save the newest checkpoint under another name, as an independent copy if there is enough space."""
        newest = self.wait()
        if self._processes.is_main:
            assert newest is not None
            self.newest = self._finish(
                checkpoint_files.copy_checkpoint(newest, self._output_dir, name, independent=True)
            )
            self._copy_best()

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def wait_for_buffers(self) -> None:
        """Wait until the buffers are available for the next save."""
        self.wait()
        if self._reserving is not None:
            (staging, reserving), self._reserving = self._reserving, None
            staging.stop_reserving()
            reserving.result()

    def _begin(self, name: str, snapshot: Snapshot) -> Path:
        """The directory to write into. Raises `DiskFull`."""
        part = checkpoint_files.begin_checkpoint(self._output_dir, name)
        needed, free = self._bytes_needed(snapshot), shutil.disk_usage(part).free
        if needed > free:
            part.rmdir()
            raise DiskFull(
                f"{name} needs {needed / 1e6:.1f} MB, but only {free / 1e6:.1f} MB are free on the disk of output_dir.",
                hint="Free up disk space; the run then continues from its newest checkpoint.",
            )
        (part / TRAINING_STATE_NAME).mkdir()
        if (shared := self._shared_weights(part, snapshot)) is not None:
            shared.create()
        return part

    def _shared_weights(self, part: Path, snapshot: Snapshot) -> SharedWeights | None:
        """The files of the weights of a sharded model, in ``part``; None if the first rank has the whole weights."""
        if snapshot.rows is None:
            return None
        dtype = self._export.dtype if self._export.format == "huggingface" else None
        return SharedWeights(part / TRAINING_STATE_NAME, snapshot.rows, dtype)

    def _bytes_needed(self, snapshot: Snapshot) -> int:
        """The size of the previous checkpoint, or that of the tensors to write if that is larger.

        The weights of a sharded model are written twice: by all ranks, and exported.
        """
        shards = self._engine.num_shards if self._engine.writes_shards else 1
        copies = 1 if snapshot.rows is None else 2 * shards
        tensors = copies * sum(tensor.nbytes for tensor in snapshot.weights.values())
        tensors += shards * sum(tensor.nbytes for tensor in snapshot.optimizer.values())
        return max(tensors, 0 if self.newest is None else self.newest.size_bytes) + SMALL_FILES_BYTES

    def _write(
        self,
        part: Path,
        names: Sequence[str],
        snapshot: Snapshot,
        shared: SharedWeights | None,
        metrics: dict[str, float],
        plan: dict[str, Any],
        request: int | None,
    ) -> Checkpoint | None:
        snapshot.complete()
        if self._processes.is_main or self._group is not None:
            self._write_shard(part / TRAINING_STATE_NAME, snapshot, shared)
        if self._processes.num_nodes > 1 and self._processes.is_first_of_node:
            collect_files(part / TRAINING_STATE_NAME, self._processes, self._group)
            if not self._processes.is_main:
                shutil.rmtree(part)
        if not self._processes.is_main:
            return None
        weights = snapshot.weights if shared is None else shared.trained()
        self._export.write(part, weights if shared is None else shared.exported(), snapshot.aliases)
        trained = {name: t for name, t in weights.items() if name in self._saved.names}
        if is_exported_exactly(part, trained):
            trained = {}
        if shared is not None and shared.keep(trained):
            trained = {}
        write_training_state(part / TRAINING_STATE_NAME, snapshot, plan, trained)
        if self.constant_tensors:
            save_file(self.constant_tensors, part / TRAINING_STATE_NAME / CONSTANT_TENSORS_FILE)

        def manifest(files: list[ManifestFile]) -> Manifest:
            return Manifest(
                run_id=self._run_id,
                name=names[0],
                format=self._export.format,
                base_model=self._export.base_model,
                step=snapshot.progress.step,
                tokens=snapshot.progress.tokens,
                metrics=metrics,
                device_kind=plan["device_kind"],
                created_at=utc_now(),
                files=files,
            )

        written = self._finish(checkpoint_files.publish_checkpoint(part, self._output_dir, manifest), request)
        for name in names[1:]:
            self._finish(checkpoint_files.copy_checkpoint(written, self._output_dir, name))
        if BEST_CHECKPOINT in names:
            self.best_elsewhere = None
        self._copy_best()
        return written

    def _write_shard(self, folder: Path, snapshot: Snapshot, shared: SharedWeights | None) -> None:
        """Write this rank's shard of the state, and wait for all ranks. Raises the error of any rank."""
        own_error: Exception | None = None
        try:
            if shared is not None:
                shared.write()
            self._engine.write_shard(folder, snapshot.optimizer)
        except Exception as error:  # noqa: BLE001 - sent to every rank, then raised
            own_error = error
        errors: list[str | None] = [None if own_error is None else f"{type(own_error).__name__}: {own_error}"]
        if self._group is not None:
            errors *= self._processes.world_size
            dist.all_gather_object(errors, errors[0], group=self._group)
        if own_error is not None:
            raise own_error
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None]
        if failed:
            raise OSError(f"A checkpoint was not written: {'; '.join(failed)}")

    def _finish(self, published: Checkpoint, request: int | None = None) -> Checkpoint:
        """Update the pointer, remove the checkpoints that it replaces, and report it, in this order."""
        checkpoint_files.write_pointer(published, self._output_dir)
        checkpoint_files.prune_steps(self._output_dir, self._run_id, self._keep)
        self._report_checkpoint(published, request)
        return published

    def _copy_best(self) -> None:
        """Copy the best checkpoint from another output_dir, after saving one here so the run never resumes from it."""
        best, self.best_elsewhere = self.best_elsewhere, None
        if best is not None:
            self._report_checkpoint(checkpoint_files.copy_checkpoint(best, self._output_dir, BEST_CHECKPOINT))

    def _report_checkpoint(self, published: Checkpoint, request: int | None = None) -> None:
        manifest = published.manifest
        self._report.write(
            CheckpointLine(
                name=manifest.name,
                step=manifest.step,
                metrics=manifest.metrics,
                bytes=published.size_bytes,
                request=request,
            )
        )
