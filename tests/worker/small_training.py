"""A small real training program for tests of the worker: it follows the protocol of run directories, without torch.

``python small_training.py RUN_DIR``. Its spec's metadata controls it: ``steps``, ``seconds_per_step``,
``seconds_to_load``, ``checkpoint_every``, and ``then`` (``succeed``, ``exit``, ``hang``, ``allocate`` with
``mebibytes``). ``child=stubborn`` starts a child in its own session that ignores SIGTERM. After each step, it
checks for a save file, a stop file and contact with its worker, as the trainer does. Its weights are a chain of hashes,
so they show whether a step was skipped or repeated.
"""

import errno
import faulthandler
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from zeta_core.contract.job.checkpoint import Manifest, ManifestFile
from zeta_core.contract.job.events import CheckpointLine, JournalLine, ProgressLine, StatusLine, utc_now
from zeta_core.contract.job.job import JobResult
from zeta_core.contract.job.status import STOP_ENDS, JobStatus, StatusReason
from zeta_core.contract.spec.resolved_spec import ResolvedSpec
from zeta_core.contract.wire.run_directory import (
    ALIVE_FILE,
    DISK_FULL_EXIT,
    JOURNAL_FILE,
    LOCK_FILE,
    RUN_FILE,
    SAVE_FILE,
    STACKS_SIGNAL,
    STOP_FILE,
    RunFile,
    StopFile,
)
from zeta_core.process.save_requests import SaveRequests
from zeta_core.process.worker_monitor import WorkerMonitor

WEIGHTS_FILE = "model.safetensors"
IGNORE_SIGTERM = "import signal, threading; signal.signal(signal.SIGTERM, signal.SIG_IGN); threading.Event().wait(600)"


def metadata_of(run_file: RunFile) -> dict[str, Any]:
    metadata: Any = run_file.spec.get("metadata")
    return metadata or {}


def next_weights(weights: bytes, step: int) -> bytes:
    """The weights after one more step."""
    return hashlib.sha256(weights + step.to_bytes(8, "big")).digest()


class SmallTraining:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run_file = RunFile.model_validate_json((directory / RUN_FILE).read_text())
        self.output = Path(self.run_file.output_dir)
        self.lock = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT)
        fcntl.flock(self.lock, fcntl.LOCK_SH)
        metadata = metadata_of(self.run_file)
        self.steps = int(metadata.get("steps", "3"))
        self.seconds_per_step = float(metadata.get("seconds_per_step", "0.02"))
        self.seconds_to_load = float(metadata.get("seconds_to_load", "0"))
        self.checkpoint_every = int(metadata.get("checkpoint_every", "0"))
        self.then = str(metadata.get("then", "succeed"))
        self.child = str(metadata.get("child", ""))
        self.weights = b""
        self.save_requests = SaveRequests(directory / SAVE_FILE)
        self.fulfilled_request = 0
        self.worker_monitor = WorkerMonitor(directory / ALIVE_FILE)
        self.worker_monitor.start(self.run_file, on_exit=self.hand_back)
        faulthandler.register(signal.Signals[STACKS_SIGNAL])

    def run(self) -> int:
        print(f"attempt {self.run_file.attempt} begins", flush=True)
        if self.child == "stubborn":
            subprocess.Popen([sys.executable, "-c", IGNORE_SIGTERM], start_new_session=True)
        threading.Event().wait(self.seconds_to_load)
        first = self._resumed_step()
        self.write(
            StatusLine(
                status=JobStatus.RUNNING,
                resolved_spec=ResolvedSpec.model_validate({"micro_batch_size": 1, "first": first}),
            )
        )
        for step in range(first + 1, self.steps + 1):
            threading.Event().wait(self.seconds_per_step)
            self.weights = next_weights(self.weights, step)
            self.write(
                ProgressLine(phase="training", step=step, total_steps=self.steps, loss=4.0 / step, tokens=step * 8)
            )
            if self.checkpoint_every and step % self.checkpoint_every == 0:
                self.save(f"step-{step}", step)
            elif self.save_requests.newest() > self.fulfilled_request:
                self.fulfilled_request = self.save_requests.newest()
                self.save(f"step-{step}", step, request=self.fulfilled_request)
            if (self.directory / STOP_FILE).exists():
                return self.stop(StopFile.model_validate_json((self.directory / STOP_FILE).read_text()), step)
            if self.worker_monitor.is_lost:
                return self.stop(StopFile(action="hand_back"), step)
        if self.then == "exit":
            return 7
        if self.then == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.then == "hang":
            threading.Event().wait(600)
        if self.then == "allocate":
            self.allocated = [
                bytearray(os.urandom(1 << 20)) for _ in range(int(metadata_of(self.run_file)["mebibytes"]))
            ]
            threading.Event().wait(600)
        self.save("final", self.steps)
        result = JobResult(train_loss=4.0 / self.steps, tokens=self.steps * 8)
        self.write(StatusLine(status=JobStatus.SUCCEEDED, reason=StatusReason.COMPLETED, result=result))
        print("the last line of the log", flush=True)
        return 0

    def stop(self, stop: StopFile, step: int) -> int:
        status, reason = STOP_ENDS[stop.action]
        if stop.action != "cancel" and not (self.output / f"step-{step}").exists():
            self.save(f"step-{step}", step)
        self.write(StatusLine(status=status, reason=reason))
        return 0

    def hand_back(self) -> None:
        status, reason = STOP_ENDS["hand_back"]
        self.write(StatusLine(status=status, reason=reason))

    def save(self, name: str, step: int, *, request: int | None = None) -> None:
        """Save a checkpoint, unless this is one of the nodes after node 0."""
        if self.run_file.node_rank:
            return
        directory = self.output / f".{name}.new"
        directory.mkdir(parents=True)
        (directory / WEIGHTS_FILE).write_bytes(self.weights)
        sha256 = hashlib.sha256(self.weights).hexdigest()
        file = ManifestFile(path=WEIGHTS_FILE, size=len(self.weights), sha256=sha256, role="weights")
        manifest = Manifest(
            run_id="run_small",
            name=name,
            format="module",
            step=step,
            tokens=step * 8,
            created_at=utc_now(),
            files=[file],
        )
        (directory / "manifest.json").write_text(manifest.model_dump_json())
        directory.rename(self.output / name)
        self.write(CheckpointLine(name=name, step=step, bytes=len(self.weights), request=request))

    def write(self, line: JournalLine) -> None:
        with (self.directory / JOURNAL_FILE).open("ab") as journal:
            journal.write(line.model_dump_json(exclude_none=True).encode() + b"\n")

    def _resumed_step(self) -> int:
        if self.run_file.resume_from is None:
            return 0
        checkpoint = Path(self.run_file.resume_from)
        self.weights = (checkpoint / WEIGHTS_FILE).read_bytes()
        return int(json.loads((checkpoint / "manifest.json").read_text())["step"])


if __name__ == "__main__":
    try:
        sys.exit(SmallTraining(Path(sys.argv[1])).run())
    except OSError as error:
        sys.exit(DISK_FULL_EXIT if error.errno == errno.ENOSPC else 1)
