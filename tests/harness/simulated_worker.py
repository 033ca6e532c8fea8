"""A simulated worker: the test sends the worker's side of the protocol over real Redis, message by message."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import redis

from tests.harness.fleet import SmallFleet
from tests.harness.waiting import wait_until
from zeta_core.contract.job.events import utc_now
from zeta_core.contract.job.machine_usage import MachineUsage
from zeta_core.contract.job.responses import DeviceReport
from zeta_core.contract.wire.messages import (
    CONTRACT_VERSION,
    SERVER_STREAM,
    TO_WORKER,
    WORKERS_HASH,
    Claim,
    ClaimAnswer,
    FromWorker,
    Heartbeat,
    JournalAck,
    JournalBatch,
    ToWorker,
    worker_queue,
    worker_stream,
)
from zeta_core.contract.wire.signatures import WorkerKey, derive_key, read_envelope, sign, sign_heartbeat


class SimulatedWorker:
    def __init__(
        self,
        client: "redis.Redis",
        secret: str | WorkerKey,
        name: str = "simulated",
        *,
        slots: int = 1,
        device_kind: str | None = "cpu:simulated",
        contract_version: int = CONTRACT_VERSION,
    ) -> None:
        self.name = name
        self.device_kind = device_kind
        self.contract_version = contract_version
        self.incarnation = f"{name}-1"
        self.stopping = False
        self.disk_low = False
        self.clock_ahead_seconds = 0.0
        self.key = derive_key(secret, name) if isinstance(secret, str) else secret
        self._client = client
        self._slots = slots
        self._beat = 0
        self._started: dict[str, int] = {}

    def send_heartbeat(self, *running: tuple[str, int]) -> None:
        """Send a heartbeat that lists these (job, attempt) in the first slots."""
        self._beat += 1
        signed = signed_heartbeat(
            self.key,
            self.name,
            self._beat,
            slots=self._slots,
            running=list(running),
            stopping=self.stopping,
            disk_low=self.disk_low,
            incarnation=self.incarnation,
            device_kind=self.device_kind,
            contract_version=self.contract_version,
            sent_at=time.time() + self.clock_ahead_seconds,
        )
        self._client.hset(WORKERS_HASH, self.name, signed)

    def start(self, fleet: SmallFleet, job_id: str, attempt: int = 1) -> None:
        """Send heartbeats until the job is dispatched, claim it, and report it as running with the earlier ones."""
        others = [(job, number) for job, number in self._started.items() if job != job_id]

        def dispatched() -> bool:
            self.send_heartbeat(*others)
            return fleet.job(job_id).worker == self.name

        wait_until(dispatched, 15, f"{job_id} to be dispatched")
        assert self.claim(job_id, attempt).granted
        self._started[job_id] = attempt
        self.send_heartbeat(*others, (job_id, attempt))

    def claim(self, job_id: str, attempt: int = 1) -> ClaimAnswer:
        """Claim a job, and wait for the answer."""
        self.send(Claim(job_id=job_id, attempt=attempt, worker=self.name, incarnation=self.incarnation))
        answer = self.receive(ClaimAnswer, job_id)
        assert isinstance(answer, ClaimAnswer)
        return answer

    def publish(self, job_id: str, first_line: int, *lines: dict[str, Any], attempt: int = 1) -> JournalAck:
        """Send one batch, and wait for the acknowledgement."""
        self.send(self.batch(job_id, first_line, *lines, attempt=attempt))
        ack = self.receive(JournalAck, job_id)
        assert isinstance(ack, JournalAck)
        return ack

    def batch(self, job_id: str, first_line: int, *lines: dict[str, Any], attempt: int = 1) -> JournalBatch:
        return JournalBatch(job_id=job_id, attempt=attempt, worker=self.name, first_line=first_line, lines=list(lines))

    def send(self, message: FromWorker) -> None:
        sent_at = time.time() + self.clock_ahead_seconds
        self.send_raw({**sign(message, self.key, channel=SERVER_STREAM, sent_at=sent_at)})

    def send_raw(self, fields: dict[Any, Any]) -> None:
        self._client.xadd(SERVER_STREAM, fields)

    def receive(self, kind: type[ToWorker], job_id: str) -> ToWorker:
        """The next message of this kind about this job. Earlier messages are removed from the stream."""

        def next_one() -> ToWorker | None:
            for message in self.receive_all():
                if isinstance(message, kind) and getattr(message, "job_id", None) == job_id:
                    return message
            return None

        found = wait_until(next_one, 60, f"a {kind.__name__} about {job_id}")
        assert found is not None
        return found

    def receive_all(self) -> list[ToWorker]:
        """Remove and return the messages in the worker's stream."""
        stream = worker_stream(self.name)
        entries: Any = self._client.xrange(stream)
        for message_id, _ in entries:
            self._client.xdel(stream, message_id)
        return [read_envelope(fields).open(TO_WORKER, self.key, channel=stream) for _, fields in entries]

    def num_dispatched(self) -> int:
        """The number of messages in this worker's Celery queue."""
        waiting: Any = self._client.llen(worker_queue(self.name))
        return int(waiting)


def progress(step: int, **fields: Any) -> dict[str, Any]:
    return {"type": "progress", "phase": "training", "step": step, "created_at": utc_now().isoformat(), **fields}


def status(to: str, **fields: Any) -> dict[str, Any]:
    return {"type": "status", "status": to, "created_at": utc_now().isoformat(), **fields}


def checkpoint(step: int, name: str | None = None) -> dict[str, Any]:
    return {"type": "checkpoint", "name": name or f"step-{step}", "step": step, "created_at": utc_now().isoformat()}


def signed_heartbeat(
    secret: str | WorkerKey,
    worker: str,
    beat: int,
    *,
    slots: int = 1,
    cores: int = 1,
    kind: Literal["cuda", "cpu"] = "cpu",
    running: Sequence[tuple[str, int]] = (),
    stopping: bool = False,
    disk_low: bool = False,
    incarnation: str = "first",
    contract_version: int = CONTRACT_VERSION,
    device_kind: str | None = "cpu:simulated",
    name: str | None = None,
    memory_bytes: int = 1,
    machine_bytes: int = 1,
    labels: Mapping[str, str] | None = None,
    devices: Sequence[str | None] = (),
    problems: Mapping[int, str] | None = None,
    background_slots: int = 0,
    usage: MachineUsage | None = None,
    cached_inputs: Sequence[str] = (),
    sent_at: float | None = None,
) -> str:
    """The signed heartbeat that a worker writes into its field of the hash.

    ``secret`` is the shared secret, or the key of a worker. ``devices`` are those of the slots, ``None`` for the
    remaining ones; ``problems`` are by slot.
    """
    listed = [*running, *[(None, None)] * (slots - len(running))]
    heartbeat = Heartbeat(
        worker=worker,
        incarnation=incarnation,
        beat=beat,
        version="0",
        host="here",
        started_at=utc_now(),
        cores=cores,
        memory_bytes=machine_bytes,
        stopping=stopping,
        disk_low=disk_low,
        contract_version=contract_version,
        cpu_kind=device_kind,
        labels=dict(labels or {}),
        usage=usage,
        cached_inputs=list(cached_inputs),
        slots=[
            DeviceReport(
                slot=slot,
                kind=kind,
                name=name or kind,
                memory_bytes=memory_bytes,
                device_kind=device_kind,
                device=devices[slot] if slot < len(devices) else None,
                problem=(problems or {}).get(slot),
                job_id=job_id,
                attempt=attempt,
            )
            for slot, (job_id, attempt) in enumerate(listed)
        ],
        background_slots=[
            DeviceReport(slot=slots + number, kind="cpu", name="background", memory_bytes=memory_bytes)
            for number in range(background_slots)
        ],
    )
    key = derive_key(secret, worker) if isinstance(secret, str) else secret
    return sign_heartbeat(heartbeat, key, channel=WORKERS_HASH, sent_at=sent_at)
