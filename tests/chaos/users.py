"""The users: they submit, cancel, pause and resume jobs over HTTP, and retry like a careful script.

A job counts as accepted once its 201 was read, and a command once its 202 was. A request without a response is sent
again, to the next server, with the same Idempotency-Key.
"""

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import httpx

from tests.chaos.planned_jobs import PlannedJob
from tests.server.server_process import ServerProcess
from zeta_core.contract.job.status import ENDED, StatusReason

POLL_SECONDS = 1.0
ANSWER_SECONDS = 4.0


class Users:
    """The users of one run of the suite. `serve` may be called again once all jobs have ended."""

    def __init__(self, servers: Sequence[ServerProcess]) -> None:
        self.accepted: dict[str, PlannedJob] = {}  # by job id
        self.accepted_commands: dict[str, list[str]] = {}  # the commands that got a 202, by job id
        self.unexpected_responses: list[str] = []  # descriptions of responses that no user should get
        self.all_ended = threading.Event()
        self._servers = servers
        self._planned: list[PlannedJob] = []
        self._unfinished: set[str] = set()
        self._stopped = threading.Event()
        self._turns = itertools.count()

    @property
    def num_waiting(self) -> int:
        """The number of jobs that are not submitted or not ended yet."""
        return len(self._planned) + len(self._unfinished)

    def serve(self, planned: Sequence[PlannedJob], *, at_once: int) -> None:
        """Submit these jobs in a thread, ``at_once`` at a time, and follow each until it has ended."""
        self._planned = list(planned)
        self.all_ended.clear()
        threading.Thread(target=self._serve, args=(at_once,), name="users", daemon=True).start()

    def stop(self) -> None:
        """Send no more requests."""
        self._stopped.set()

    def _serve(self, at_once: int) -> None:
        while not self._stopped.is_set() and self.num_waiting:
            while self._planned and len(self._unfinished) < at_once and self.submit(self._planned[0]):
                self._planned.pop(0)
            for job_id in sorted(self._unfinished):
                self._check(job_id)
            self._stopped.wait(POLL_SECONDS)
        if not self.num_waiting:
            self.all_ended.set()

    def submit(self, planned: PlannedJob) -> str | None:
        """The id of the accepted job; ``None`` without a response."""
        response = self.request("POST", "/v1/jobs", json=planned.spec, headers={"Idempotency-Key": planned.key})
        if response is None:
            return None
        if response.status_code != 201:
            self.unexpected_responses.append(
                f"POST /v1/jobs of {planned.key} was answered {response.status_code}: {response.text}"
            )
            return planned.key
        job_id = str(response.json()["id"])
        self.accepted[job_id] = planned
        self._unfinished.add(job_id)
        return job_id

    def request(self, method: str, path: str, **request: Any) -> httpx.Response | None:
        """The response of the next server; ``None`` if there is none or it is a 5xx."""
        server = self._servers[next(self._turns) % len(self._servers)]
        try:
            with server.http() as http:
                response = http.request(method, path, timeout=ANSWER_SECONDS, **request)
        except httpx.TransportError:
            return None
        return response if response.status_code < 500 else None

    def _check(self, job_id: str) -> None:
        response = self.request("GET", f"/v1/jobs/{job_id}")
        if response is None:
            return
        if response.status_code != 200:
            self.unexpected_responses.append(
                f"GET of the accepted job {job_id} was answered {response.status_code}: {response.text}"
            )
            self._unfinished.discard(job_id)
            return
        job: dict[str, Any] = response.json()
        if job["status"] in ENDED:
            self._unfinished.discard(job_id)
            return
        command = self._next_command(job)
        if command is not None:
            self._command(job_id, command)

    def _next_command(self, job: dict[str, Any]) -> str | None:
        planned, done = self.accepted[job["id"]], self.accepted_commands.get(job["id"], [])
        if job["status"] == "paused":  # a job paused by a full disk resumes by itself
            return "resume" if job["status_reason"] == StatusReason.PAUSED_BY_USER else None
        if planned.command is None or planned.command in done:
            return None
        step = (job["progress"] or {}).get("step") or 0
        return planned.command if step >= planned.after_step else None

    def _command(self, job_id: str, command: str) -> None:
        response = self.request("POST", f"/v1/jobs/{job_id}/{command}")
        if response is None:
            return
        if response.status_code == 202:
            self.accepted_commands.setdefault(job_id, []).append(command)
        elif response.status_code != 409:  # 409: its status has changed since it was read
            self.unexpected_responses.append(
                f"{command} of {job_id} was answered {response.status_code}: {response.text}"
            )
            self.accepted_commands.setdefault(job_id, []).append(command)


def upload(server: ServerProcess, content: bytes) -> str:
    """Upload a text; returns its id."""
    with server.http() as http:
        response = http.post("/v1/files", files={"file": ("text.txt", content)}, data={"purpose": "dataset"})
    assert response.status_code == 201, response.text
    return str(response.json()["id"])
