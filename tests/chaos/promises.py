"""Checks every promise of docs/reliability.md after all jobs have ended; each breach is a sentence.

1. every job that got a 201 ends with the correct status and reason
2. two attempts of a job never train at once, and lines of an old attempt are ignored after the next one has started
3. the final weights are bit-identical to those of an undisturbed run
4. every event is stored once, in order and without a gap, and the log is complete before the status is final
5. no process or file of an ended attempt is left behind
6. every loop of every server keeps running, and no invalid entry is left in Redis
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from server.database.tables import AttemptRow, EventRow, JobRow
from tests.chaos.faults import INVALID_WORKER
from tests.chaos.fleet import Fleet
from tests.chaos.planned_jobs import PlannedJob
from tests.chaos.training import WITNESS_DIRECTORY
from tests.chaos.users import Users
from tests.harness.waiting import wait_until
from zeta_core.contract.job.checkpoint import NAME_PATTERN, Manifest
from zeta_core.contract.job.status import ENDED, JobStatus, StatusReason
from zeta_core.contract.wire.messages import WORKERS_HASH
from zeta_core.contract.wire.run_directory import (
    JOURNAL_FILE,
    LOCK_FILE,
    LOG_FILE,
    MANIFEST_NAME,
    checkpoint_key,
    log_key,
)

RECOVERY_SECONDS = 30.0
Breaches = Iterator[str]


class Evidence:
    """The database, the files and the processes after all faults, read once."""

    def __init__(self, fleet: Fleet, users: Users, *, recovery_seconds: float = RECOVERY_SECONDS) -> None:
        self.recovery_seconds = recovery_seconds
        self.fleet = fleet
        self.users = users
        self.jobs: dict[str, JobRow] = fleet.database.jobs()
        self.attempts: dict[str, list[AttemptRow]] = {job: fleet.database.attempts(job) for job in self.jobs}
        self.events: dict[str, list[EventRow]] = {job: fleet.database.events(job) for job in self.jobs}
        self.checkpoints = {job: fleet.database.checkpoints(job) for job in self.jobs}
        self._run_directories = {
            (path.parents[2].name, path.parent.name, int(path.name.split("-")[1])): path for path in _runs(fleet)
        }

    def accepted(self) -> Iterator[tuple[JobRow, PlannedJob]]:
        """The stored jobs that got a 201, with their plans."""
        return ((self.jobs[job], planned) for job, planned in self.users.accepted.items() if job in self.jobs)

    def run_directory(self, attempt: AttemptRow) -> Path | None:
        """The run directory of an attempt; that of node 0 if there are several."""
        return self._run_directories.get((attempt.worker, attempt.job_id, attempt.attempt))

    def final_weights(self, job_id: str) -> str | None:
        """The SHA-256 of the weights in the job's final checkpoint."""
        directory = self.fleet.store / checkpoint_key(job_id, "final")
        if not directory.is_dir():
            return None
        manifest = Manifest.model_validate_json((directory / MANIFEST_NAME).read_text())
        digests = [_sha256(directory / file.path) for file in manifest.files if file.role == "weights"]
        return hashlib.sha256("".join(digests).encode()).hexdigest() if len(digests) > 1 else digests[0]


def accepted_jobs_end_correctly(evidence: Evidence) -> Breaches:
    """All specs are valid, so every job succeeded, or was cancelled by its user."""
    yield from evidence.users.unexpected_responses
    for job_id in evidence.users.accepted.keys() - evidence.jobs.keys():
        yield f"{job_id} got a 201 but is not in the database"
    keys = [planned.key for _, planned in evidence.accepted()]
    if len(evidence.jobs) != len(set(keys)):
        yield f"{len(set(keys))} submissions created {len(evidence.jobs)} jobs"
    for job, _ in evidence.accepted():
        cancelled = "cancel" in evidence.users.accepted_commands.get(job.id, []) or job.id in evidence.fleet.cancelled
        ends = {(JobStatus.SUCCEEDED, StatusReason.COMPLETED)}
        ends |= {(JobStatus.CANCELLED, StatusReason.CANCELLED_BY_USER)} if cancelled else set()
        if (job.status, job.status_reason) not in ends:
            reasons = [attempt.reason for attempt in evidence.attempts[job.id]]
            yield f"{job.id} is {job.status} ({job.status_reason}), its attempts ended {reasons}: {job.error}"
        elif job.requested_action is not None or job.worker is not None or job.finished_at is None:
            yield f"{job.id} is {job.status} and still has {job.requested_action=} {job.worker=} {job.finished_at=}"


def one_attempt_at_a_time(evidence: Evidence) -> Breaches:
    for job, _ in evidence.accepted():
        file = evidence.fleet.folder / WITNESS_DIRECTORY / f"{job.id}.jsonl"
        starts: list[dict[str, Any]] = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )
        for start in starts:
            if start["others_alive"]:
                yield f"{job.id}: attempt {start['attempt']} started while {start['others_alive']} were alive"
        numbers = [start["attempt"] for start in starts]
        nodes = [(start["attempt"], start["node"]) for start in starts]
        if numbers != sorted(numbers) or len(nodes) != len(set(nodes)):
            yield f"{job.id}: its attempts and their nodes started in the order {nodes}"
        highest = 0
        for event in evidence.events[job.id]:
            if event.attempt < highest:
                yield f"{job.id}: event {event.seq} is of attempt {event.attempt}, but {highest} had started"
            highest = max(highest, event.attempt)


def weights_are_identical(evidence: Evidence) -> Breaches:
    references = {
        planned.kind: evidence.final_weights(job.id)
        for job, planned in evidence.accepted()
        if planned.key.startswith("reference-")
    }
    for job, planned in evidence.accepted():
        if job.status != JobStatus.SUCCEEDED:
            continue
        expected, found = planned.computed_weights or references.get(planned.kind), evidence.final_weights(job.id)
        if expected is None or found != expected:
            steps = [(attempt.attempt, attempt.first_step, attempt.last_step) for attempt in evidence.attempts[job.id]]
            yield f"{job.id} ({planned.kind}) ended with weights {found}, undisturbed {expected}; its attempts: {steps}"


def events_are_complete(evidence: Evidence) -> Breaches:
    for job, _ in evidence.accepted():
        events = evidence.events[job.id]
        if [event.seq for event in events] != list(range(1, len(events) + 1)):
            yield f"{job.id}: its events are numbered {[event.seq for event in events]}"
        final = [event for event in events if event.type == "status" and event.fields.get("status") in ENDED]
        if len(final) != 1 or final[0] is not events[-1]:
            yield f"{job.id}: {len(final)} events end it, and its last event is {events[-1].type if events else None}"
        for attempt in evidence.attempts[job.id]:
            mine = [event for event in events if event.attempt == attempt.attempt and event.line is not None]
            lines = [event.line for event in mine]
            num_lines = attempt.stored_line
            if attempt.num_nodes > 1 and len(lines) == num_lines - 1:
                num_lines -= 1  # the attempt ended with the last line of another node instead of node 0's
            if lines != list(range(1, num_lines + 1)):
                yield f"{job.id}: attempt {attempt.attempt} has lines {lines}"
            directory = evidence.run_directory(attempt)
            if directory is not None:
                yield from _matches_journal(job.id, mine, directory)
                if attempt.reason == StatusReason.COMPLETED:
                    yield from _log_is_complete(evidence, job.id, attempt.attempt, directory)


def nothing_is_left_behind(evidence: Evidence) -> Breaches:
    fleet = evidence.fleet
    for job_id, job_state in fleet.database.job_states().items():
        if job_state.nodes:
            yield f"{job_id} still occupies slots of {sorted(job_state.nodes)}"
    for found in fleet.training_processes():
        yield f"process {found.process.pid} of attempt {found.attempt} of {found.job_id} is alive"
    for directory in _runs(fleet):
        if not _is_unlocked(directory):
            yield f"{directory} is still locked"
    for host in fleet.hosts:
        for directory in host.home.glob("workers/*/runs/*/*"):
            if not directory.name.startswith("attempt-"):
                yield f"{directory} was left behind by an ended job"
    for entry in fleet.store.glob("jobs/*/checkpoints/*"):
        yield from _checkpoint_is_complete(entry)
    for job, _ in evidence.accepted():
        for checkpoint in evidence.checkpoints[job.id]:
            if not (fleet.store / checkpoint_key(job.id, checkpoint.name) / MANIFEST_NAME).exists():
                yield f"{job.id}: the database lists {checkpoint.name}, but the store doesn't contain it"


def every_loop_is_running(evidence: Evidence) -> Breaches:
    """Soon after the last fault: a failing loop pauses for up to 2 s before it retries."""
    with suppress(AssertionError):
        wait_until(lambda: not list(_troubles(evidence.fleet)), evidence.recovery_seconds, "every loop to recover")
    yield from _troubles(evidence.fleet)


def _troubles(fleet: Fleet) -> Breaches:
    for server in fleet.servers:
        try:
            with server.http() as http:
                parts: dict[str, str] = http.get("/readyz").json().get("parts", {})
        except httpx.HTTPError as error:
            yield f"{server.home.name} does not answer: {error}"
            continue
        for name, state in parts.items():
            if name.startswith("loop "):
                yield f"{server.home.name}: the {name} is {state}"
    with fleet.valkey.client() as client:
        if client.hexists(WORKERS_HASH, INVALID_WORKER):
            yield f"{WORKERS_HASH} still has the invalid heartbeat {INVALID_WORKER!r}"


@dataclass(frozen=True)
class Promise:
    sentence: str
    breaches: Callable[[Evidence], Breaches]


PROMISES: tuple[Promise, ...] = (
    Promise("every job that got a 201 ended with the correct status and reason", accepted_jobs_end_correctly),
    Promise("two attempts of a job never trained at once; lines of old attempts were ignored", one_attempt_at_a_time),
    Promise("the final weights are bit-identical to those of the undisturbed run", weights_are_identical),
    Promise("every event is stored once, in order and without a gap, and the log before the end", events_are_complete),
    Promise("no process or file of an ended attempt is left behind", nothing_is_left_behind),
    Promise("every loop of every server is running, and no invalid entry is left in Redis", every_loop_is_running),
)


def _runs(fleet: Fleet) -> list[Path]:
    return fleet.run_directories()


def _matches_journal(job_id: str, events: list[EventRow], directory: Path) -> Breaches:
    """Stored progress and log events equal the lines of the journal. (Other lines may be stored with changes.)"""
    journal = (directory / JOURNAL_FILE).read_bytes().split(b"\n") if (directory / JOURNAL_FILE).exists() else []
    for event in events:
        assert event.line is not None
        try:
            line = json.loads(journal[event.line - 1])
        except (IndexError, ValueError):
            yield f"{job_id}: event {event.seq} has line {event.line}, which is missing in {directory}"
            continue
        if line["type"] in ("progress", "log") and (line["type"], line.get("step"), line.get("message")) != (
            event.type,
            event.fields.get("step"),
            event.fields.get("message"),
        ):
            yield f"{job_id}: event {event.seq} is {event.fields}, but line {event.line} is {line}"


def _log_is_complete(evidence: Evidence, job_id: str, attempt: int, directory: Path) -> Breaches:
    stored = evidence.fleet.store / log_key(job_id, attempt)
    if not stored.exists() or stored.read_bytes() != (directory / LOG_FILE).read_bytes():
        yield f"{job_id}: the stored log of attempt {attempt} is not equal to {directory / LOG_FILE}"


def _checkpoint_is_complete(entry: Path) -> Breaches:
    """A stored checkpoint has every file of its manifest, with the right contents."""
    if not NAME_PATTERN.match(entry.name):
        yield f"{entry} is an incomplete checkpoint"
        return
    if not (entry / MANIFEST_NAME).exists():
        yield f"{entry} has no manifest"
        return
    for file in Manifest.model_validate_json((entry / MANIFEST_NAME).read_text()).files:
        if not (entry / file.path).exists() or _sha256(entry / file.path) != file.sha256:
            yield f"{entry / file.path} differs from its manifest"


def _is_unlocked(directory: Path) -> bool:
    if not (directory / LOCK_FILE).exists():
        return True
    descriptor = os.open(directory / LOCK_FILE, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
